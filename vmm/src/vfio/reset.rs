//! Which way a function is reset, and doing it.
//!
//! A reset of the bus also clears what a function-level reset leaves behind: on some GPUs the latter left
//! a state in which the next driver failed. But it takes all that is on the bus along, so it needs all of
//! it to be ours and none of it to be running.

use std::time::{Duration, Instant};

use super::VfioError;
use super::function::HostFunction;
use super::host::HostDevice;
use super::ioctls;
use super::iommu::Iommu;
use super::kernel::KernelFunction;
use crate::config::HostPciAddress;

/// `VFIO_PCI_HOT_RESET_FLAG_DEV_ID`: the kernel speaks of devices, not groups (iommufd).
const BY_DEVICE: u32 = 1 << 0;
/// `VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED`: all of them are ours.
const OWNED: u32 = 1 << 1;

/// Base classes of GPUs: display controllers and processing accelerators.
const GPU_CLASSES: [u32; 2] = [0x03, 0x12];

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

/// Resets a function. `groups` are the IOMMU groups that are ours; functions in `running` are in use by the
/// guest and must not be reset along.
///
/// # Errors
/// When there is no way to reset it, or all ways failed.
pub fn reset(
    device: &HostDevice,
    function: &KernelFunction,
    iommu: &dyn Iommu,
    groups: &[u32],
    running: &[HostPciAddress],
) -> Result<ResetReport, VfioError> {
    let bus = bus_is_ours(function, groups, running);
    let methods = choose(device.class, function.can_reset(), bus);
    let mut failure = None;
    for method in methods {
        let start = Instant::now();
        let result = match method {
            ResetMethod::Function => function.reset(),
            ResetMethod::Bus => ioctls::hot_reset(&function.file_descriptor(), &iommu.group_files(groups)),
        };
        match result {
            Ok(()) => return Ok(ResetReport { method, duration: start.elapsed() }),
            Err(source) => {
                failure = Some(VfioError::Reset { address: device.address, method: method.name(), source });
            }
        }
    }
    Err(failure.unwrap_or_else(|| VfioError::Device {
        field: "passthrough".to_owned(),
        address: device.address,
        problem:
            "cannot be reset: it has no reset of its own, and its bus has functions that are not part of \
                  this machine; pass these along, or move the card to a slot of its own"
                .to_owned(),
    }))
}

fn bus_is_ours(function: &KernelFunction, groups: &[u32], running: &[HostPciAddress]) -> bool {
    let Ok((flags, affected)) = ioctls::hot_reset_info(&function.file_descriptor()) else { return false };
    let runs = |other: &ioctls::Affected| {
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
mod tests {
    use super::*;

    #[test]
    fn gpus_are_reset_by_their_bus_where_that_is_ours_and_others_alone() {
        use ResetMethod::{Bus, Function};
        assert_eq!(choose(0x03_02_00, true, true), [Bus, Function]);
        assert_eq!(choose(0x12_00_00, true, false), [Function]);
        assert_eq!(choose(0x01_08_02, true, true), [Function, Bus]);
        assert_eq!(choose(0x00_ff_00, false, true), [Bus]);
        assert_eq!(choose(0x03_00_00, false, false), []);
    }
}
