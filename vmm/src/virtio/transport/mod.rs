//! The virtio PCI transport (virtio 1.2 §4.1), modern interface only.
//!
//! [`VirtioPci`] is a PCI function with one 64-bit BAR that holds all structures of §4.1.4 and the
//! MSI-X tables, a page each ([`layout`]). [`common`] keeps the device status state
//! machine and the queues' set-up; [`interrupt`] is the device's way back to the driver.

pub mod common;
pub mod interrupt;
pub mod layout;
mod pci;

pub use pci::{TransportError, VirtioPci};

#[cfg(test)]
mod tests;
