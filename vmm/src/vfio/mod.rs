//! Passed-through PCI functions of the host, by VFIO.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`host`] | finds a function in sysfs and says why it cannot be passed through |
//! | [`iommu`] | the kernel's two interfaces behind one trait: iommufd, and containers of groups |
//! | [`dma`] | guest memory and peers' BARs in the IOMMU, and the limits on that |
//! | [`reset`] | which way a function is reset |
//! | [`passthrough`] | all devices of a machine: opened, reset, mapped, plugged and unplugged |
//! | [`device`] | one function as the guest's bus sees it: BARs, memory slots, the rest below |
//! | [`config`] | whose each bit of configuration space is |
//! | [`interrupts`] | pin, MSI and MSI-X through irqfds |
//! | [`mapping`] | BARs in the VMM's address space, aligned for the largest pages |
//! | [`function`] | a function as a trait; [`kernel`] implements it, tests do so on bytes |
//! | [`ioctls`] | what the libraries lack |

pub mod config;
pub mod device;
pub mod dma;
pub mod error;
#[cfg(test)]
mod fake;
pub mod function;
pub mod host;
pub mod interrupts;
mod ioctls;
pub mod iommu;
pub mod kernel;
pub mod mapping;
pub mod passthrough;
pub mod reset;

pub use error::VfioError;
