//! virtio devices (virtio 1.2) and their PCI transport.
//!
//! A device implements [`device::VirtioDevice`]; the transport owns its life: negotiation,
//! activation, reset. The guest is hostile: nothing it writes is believed before it is checked.

pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
pub(crate) mod test_machine;
pub mod transport;
pub mod vsock;
pub mod worker;
