//! virtio-net (virtio 1.2 §5.1) on a tap device that exists already.
//!
//! The frames are moved by the host's kernel (vhost-net) or by the monitor, a thread for each pair of
//! queues. Checksums and segmentation are left to whoever is last: the tap takes and gives frames
//! with virtio's own header, so nothing is computed here.
//!
//! ```text
//! device    what is offered and who moves the frames
//! features  feature bits and what they mean for the tap
//! tap, vhost  opening and ordering about the host's two devices
//! pair      a worker: what it waits for
//! receive, transmit  the frames' way in each direction
//! control   the control queue
//! ```

mod control;
mod device;
mod features;
mod mac;
mod metrics;
mod pair;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

pub use device::{MAX_QUEUE_PAIRS, Net, NetError, NetParts};
pub use mac::{MacAddress, ParseMacError};
pub use metrics::NetMetrics;
pub use tap::{TapError, open_tap};
pub use vhost::{VhostError, open_vhost};

/// `struct virtio_net_hdr_v1` (§5.1.6): all devices here are modern, so it always has `num_buffers`.
const HEADER_SIZE: usize = 12;
