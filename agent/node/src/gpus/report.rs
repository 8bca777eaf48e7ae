//! Between this module and the inventory: it learns from here who has a device, and this module learns from
//! it what a driver said while it still ran the device.

use std::sync::PoisonError;

use lathe_api::HostPciAddress;
use lathe_api::gpu::{Gpu, GpuHealth, GpuProblem, GpuState, Severity};

use super::{Gpus, Owner, Policy, Times};

/// What a driver said of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Why it must not be given to anybody.
    pub failed: Option<String>,
    /// The size of its memory.
    pub memory_bytes: Option<u64>,
}

/// A device for metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Its function.
    pub address: HostPciAddress,
    /// Where it is in its life.
    pub state: GpuState,
    /// How long its last hand-over took.
    pub times: Times,
}

impl Gpus {
    /// Every device that may be lent or was.
    pub fn figures(&self) -> Vec<Figures> {
        let all = self.lent_or_on_record().unwrap_or_default().into_iter();
        all.map(|address| {
            let view = self.view(address);
            Figures { address, state: view.state, times: view.times }
        })
        .collect()
    }

    /// Takes note of what drivers say of their devices. What is not among `gpus` keeps what was said last.
    pub fn learn(&self, gpus: &[Gpu]) {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for gpu in gpus {
            let known = all.entry(gpu.address).or_default();
            known.failed = match &gpu.health {
                GpuHealth::Failed(reason) => Some(reason.clone()),
                GpuHealth::Healthy | GpuHealth::Degraded(_) => None,
            };
            if gpu.nvml.is_some() {
                known.memory_bytes = Some(gpu.memory_bytes);
            }
        }
    }

    pub(super) fn known(&self, address: HostPciAddress) -> Option<Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }

    /// Says of each device who has it, and of those that this host does not lend that it does not.
    pub fn describe(&self, gpus: &mut [Gpu]) {
        let lent = self.devices();
        for gpu in gpus {
            let view = self.view(gpu.address);
            gpu.driver = self.driver(gpu.address);
            if view.state != GpuState::Free {
                gpu.host_driver = view.host_driver;
            }
            gpu.reason = view.reason;
            gpu.task = view.owner.map(|owner| match owner {
                Owner::Sandbox(id) => id,
                Owner::Operator(_) => owner.to_string(),
            });
            // What an operator has is no sandbox's: it counts as taken whatever the coordinator knows.
            gpu.state = view.state;
            if !lent.contains(&gpu.address) {
                gpu.problems.extend(self.not_lent(gpu.address));
            }
        }
    }

    fn not_lent(&self, address: HostPciAddress) -> Option<GpuProblem> {
        let (what, fix) = match &self.policy {
            // The console's, which the preflight knows.
            Policy::All => return None,
            Policy::Named(_) => ("it is not among --gpu-devices".to_owned(), format!("add {address} there")),
            Policy::Off => {
                ("this host lends none".to_owned(), "start its agent without --no-gpus".to_owned())
            }
        };
        Some(GpuProblem { severity: Severity::Blocks, what, fix })
    }
}
