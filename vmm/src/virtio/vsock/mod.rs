//! virtio-vsock (virtio 1.2 §5.10), with Unix sockets on the host's side.
//!
//! A guest's connection to context ID 2, port P, becomes one to the Unix socket `<socket>_P`. A host
//! program connects to `<socket>`, sends `CONNECT P\n` and reads `OK <port>\n` when the guest has
//! accepted; anything else than that answer is a refusal, and the socket is closed.
//!
//! ```text
//! device      the queues, the worker, the timer
//! muxer       all connections: turns, limits, deadlines
//! connection  one connection: its states and both directions' credit
//! packet      the header's format
//! unix        listening, connecting and readiness of Unix sockets
//! ```

pub mod connection;
mod device;
mod metrics;
pub mod muxer;
pub mod packet;
#[cfg(test)]
mod tests;
mod unix;

pub use device::Vsock;
pub use metrics::VsockMetrics;
pub use unix::{VsockListener, VsockSocketError};
