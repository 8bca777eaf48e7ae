//! Which way a function is reset, and doing it.
//!
//! A reset of the bus also clears what a function-level reset leaves behind: on some GPUs the latter left
//! a state in which the next driver failed. But it takes all that is on the bus along, so it needs all of
//! it to be ours and none of it to be running.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::VfioError;
use super::function::HostFunction;
use super::host::HostDevice;
use super::ioctls::{self, Affected};
use super::iommu::Iommu;
use super::kernel::KernelFunction;
use crate::config::HostPciAddress;

/// `VFIO_PCI_HOT_RESET_FLAG_DEV_ID`: the kernel speaks of devices, not groups (iommufd).
const BY_DEVICE: u32 = 1 << 0;
/// `VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED`: all of them are ours.
const OWNED: u32 = 1 << 1;

/// Base classes of GPUs: display controllers and processing accelerators.
const GPU_CLASSES: [u32; 2] = [0x03, 0x12];

const NO_RESET: &str = "cannot be reset: it has no reset of its own, and its bus has functions that are not part of \
                        this machine; pass these along, or move the card to a slot of its own";

/// What helps where it answers: the kernel refuses a reset of a bus with a function that no VFIO driver has.
const ADVICE: &str = "what its last user left in it is unknown; bind every function on its bus to vfio-pci, or restart \
                      the host";

const ADVICE_IF_SILENT: &str = "it does not answer; turn its slot off and on, or restart the host";

/// A way to reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetMethod {
    /// This function alone: function-level reset, or what else the kernel has for it.
    Function,
    /// All that is on its bus (secondary bus reset).
    Bus,
}

impl ResetMethod {
    /// For people and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Function => "function reset",
            Self::Bus => "bus reset",
        }
    }
}

/// What was done and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetReport {
    /// How.
    pub method: ResetMethod,
    /// From the call to its return.
    pub duration: Duration,
}

/// The ways to try, best first; empty if there is none.
fn choose(class: u32, function: bool, bus: bool) -> Vec<ResetMethod> {
    let available = |method: &ResetMethod| match method {
        ResetMethod::Function => function,
        ResetMethod::Bus => bus,
    };
    let order = if GPU_CLASSES.contains(&(class >> 16)) {
        [ResetMethod::Bus, ResetMethod::Function]
    } else {
        [ResetMethod::Function, ResetMethod::Bus]
    };
    order.into_iter().filter(available).collect()
}

/// What a reset asks of a function. [`KernelFunction`] asks the kernel; tests answer themselves.
pub trait Resettable: HostFunction {
    /// Whether the kernel can reset this function alone.
    fn can_reset(&self) -> bool;

    /// Resets this function alone.
    ///
    /// # Errors
    /// What the kernel said.
    fn reset_function(&self) -> io::Result<()>;

    /// What a reset of its bus would reset: flags of VFIO's, and the functions.
    ///
    /// # Errors
    /// When the bus cannot be reset.
    fn on_its_bus(&self) -> io::Result<(u32, Vec<Affected>)>;

    /// Resets all that is on its bus; `groups` are files of the groups that are ours, none with iommufd.
    ///
    /// # Errors
    /// What the kernel said.
    fn reset_bus(&self, groups: &[RawFd]) -> io::Result<()>;
}

impl Resettable for KernelFunction {
    fn can_reset(&self) -> bool {
        ioctls::can_reset(&self.file_descriptor()).unwrap_or(false)
    }

    fn reset_function(&self) -> io::Result<()> {
        ioctls::reset(&self.file_descriptor())
    }

    fn on_its_bus(&self) -> io::Result<(u32, Vec<Affected>)> {
        ioctls::hot_reset_info(&self.file_descriptor())
    }

    fn reset_bus(&self, groups: &[RawFd]) -> io::Result<()> {
        ioctls::hot_reset(&self.file_descriptor(), groups)
    }
}

/// Resets a function and sees that it answers. `field` is where it stands in the description; `groups` are the
/// IOMMU groups that are ours; functions in `running` are in use by the guest and must not be reset along.
///
/// A function without any reset is refused like one whose reset fails: what its last user left in it, DMA that
/// still runs included, would be the next one's.
///
/// # Errors
/// When there is no way to reset it, or all ways failed.
pub fn reset(
    (device, field): (&HostDevice, &str),
    function: &impl Resettable,
    iommu: &dyn Iommu,
    groups: &[u32],
    running: &[HostPciAddress],
) -> Result<ResetReport, VfioError> {
    let refused =
        |problem: String| VfioError::Device { field: field.to_owned(), address: device.address, problem };
    let bus = bus_is_ours(function, groups, running);
    let mut failures = Vec::new();
    for method in choose(device.class, function.can_reset(), bus) {
        let start = Instant::now();
        let result = match method {
            ResetMethod::Function => function.reset_function(),
            ResetMethod::Bus => function.reset_bus(&iommu.group_files(groups)),
        };
        match result {
            Ok(()) if function.answers() => return Ok(ResetReport { method, duration: start.elapsed() }),
            Ok(()) => failures.push(format!("{} left it without an answer", method.name())),
            Err(error) => failures.push(format!("{} failed: {error}", method.name())),
        }
    }
    if failures.is_empty() {
        return Err(refused(NO_RESET.to_owned()));
    }
    let advice = if function.answers() { ADVICE } else { ADVICE_IF_SILENT };
    Err(refused(format!("cannot be reset: {}; {advice}", failures.join(", "))))
}

fn bus_is_ours(function: &impl Resettable, groups: &[u32], running: &[HostPciAddress]) -> bool {
    let Ok((flags, affected)) = function.on_its_bus() else { return false };
    let runs = |other: &Affected| {
        running.iter().any(|address| {
            let devfn = address.device() << 3 | address.function();
            (address.domain(), address.bus(), devfn) == (other.domain.into(), other.bus, other.devfn)
        })
    };
    let owned = if flags & BY_DEVICE != 0 {
        flags & OWNED != 0
    } else {
        affected.iter().all(|other| u32::try_from(other.group).is_ok_and(|group| groups.contains(&group)))
    };
    owned && !affected.iter().any(runs)
}

#[cfg(test)]
#[path = "reset_tests.rs"]
mod tests;
