//! virtio-console, one port (virtio 1.2 §5.3): hvc0 in Linux.
//!
//! Output goes to a sink that bounds itself; what it refuses is dropped and counted, as
//! a guest must neither fill the host nor wait for it. Input is taken from a file only when the
//! driver has room, so nothing piles up here (FC#2177).

mod device;
mod port;

pub use device::Console;
pub use port::ConsoleCounters;

#[cfg(test)]
mod tests;
