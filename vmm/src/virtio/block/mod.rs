//! virtio-blk, the block device (virtio 1.2 §5.2), on a raw file or a host block device.
//!
//! [`disk`] is the file: opened for no more than the guest may do, locked, and never interpreted:
//! the format is always explicit (CH GHSA-jmr4-g2hv-mjj6). [`request`] is what a driver may ask. [`worker`]
//! serves the queue, through [`ring`] what would make it wait.
//!
//! The host's page cache is used. A read that hits it is one `preadv2` straight into
//! guest memory, on the thread that was kicked: nothing is cheaper, as a hand-over to another engine
//! costs more than the copy. Only what would block goes to io_uring.

mod device;
pub mod disk;
mod request;
mod ring;
mod worker;

pub use device::{Block, BlockCounters};
pub use disk::{DiskError, DiskProblem};

#[cfg(test)]
mod tests;
