//! What can go wrong with passed-through devices.

use std::io;

use crate::config::{HostPciAddress, MemorySize};
use crate::pci::config::ConfigError;

/// A device that cannot be passed through, or a host that cannot pass any.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The device is not there, not ours, or not fit.
    #[error("{field}: {address}: {problem}")]
    Device {
        /// Where it stands in `vm.json` or the request.
        field: String,
        /// Which.
        address: HostPciAddress,
        /// What is in the way and what to do.
        problem: String,
    },
    /// The kernel lacks the backend asked for.
    #[error("vfio.backend: {0}")]
    Backend(String),
    /// Locked memory.
    #[error(
        "memory.size: devices need all {needed} of guest memory locked, this process may lock {limit}; raise \
         the limit: ulimit -l, LimitMEMLOCK= of the service, or give it CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// Bytes to lock.
        needed: MemorySize,
        /// The limit.
        limit: MemorySize,
    },
    /// The IOMMU's table of mappings.
    #[error(
        "the machine needs {needed} DMA mappings, the IOMMU driver takes {limit}; raise \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
    )]
    Mappings {
        /// How many.
        needed: usize,
        /// How many it takes.
        limit: u32,
    },
    /// Guest memory at addresses that the IOMMU does not translate.
    #[error(
        "memory.size: guest memory at {start:#x}..{end:#x} is beyond what this host's IOMMU translates \
         ({aperture}); use less memory"
    )]
    Aperture {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
        /// What it does translate.
        aperture: String,
    },
    /// There is no such device in the machine.
    #[error("{0:?} is not the ID of a passed-through device of this machine")]
    NoSuchDevice(String),
    /// There is such a device in the machine.
    #[error("id: {0:?} is the ID of a device that is there already")]
    Exists(String),
    /// No slot to plug into.
    #[error("no free hotplug slot; the machine was started with hotplug_slots: {0}")]
    NoSlot(u8),
    /// VFIO refused.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// What it said.
        source: io::Error,
    },
    /// A layout that the virtual configuration space cannot hold.
    #[error("{address}: {source}")]
    Config {
        /// Which device.
        address: HostPciAddress,
        /// What is wrong.
        source: ConfigError,
    },
}

impl VfioError {
    /// For `map_err`: names what was tried.
    pub(super) fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }
}
