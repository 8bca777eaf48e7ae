//! GPUs: what a host has of them, and what state each is in.
//!
//! A GPU here is a PCI function of the display class (base class 0x03) or a processing accelerator
//! (class 0x1200), whether or not it can be given to a sandbox: what stands in the way is listed with
//! it, never left out.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::HostPciAddress;

/// One GPU of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Gpu {
    /// Its PCI function.
    #[schema(value_type = String, example = "0000:65:00.0")]
    pub address: HostPciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// 24-bit class code.
    pub class: u32,
    /// As NVML names it, such as `NVIDIA H100 80GB HBM3`; `10de:2330` where no driver tells.
    pub model: String,
    /// Its own memory: what NVML says, else the size of the largest prefetchable memory BAR.
    pub memory_bytes: u64,
    /// Base address registers that are in use.
    #[serde(default)]
    pub bars: Vec<Bar>,
    /// NUMA node, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// IOMMU group, if the host has an IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// The other endpoints of the group, bridges left out: the group is given away as a whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub group_members: Vec<GroupMember>,
    /// Bound driver, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The driver it goes back to when Lathe lets go of it; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_driver: Option<String>,
    /// PCI Express link; absent on conventional PCI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<PcieLink>,
    /// The kernel's reset methods in the order it tries them: `flr`, `pm`, `bus`, ...
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset_methods: Vec<String>,
    /// Bridges above it: root port first, the one it sits under last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub path: Vec<HostPciAddress>,
    /// Where it is in its life.
    pub state: GpuState,
    /// Why it is quarantined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The sandbox that has it, or had it last while it is being scrubbed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Whether it works, as far as its driver and the kernel log tell.
    pub health: GpuHealth,
    /// What NVIDIA's driver says of it, or, while a guest has it, what stays true of what it last said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvml: Option<NvmlInfo>,
    /// What stands in the way of giving it to a sandbox, and what to do about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<GpuProblem>,
}

impl Gpu {
    /// Whether it can ever be given to a sandbox as things are: nothing blocks, it is not broken and
    /// not quarantined.
    pub fn is_usable(&self) -> bool {
        let blocked = self.problems.iter().any(|problem| problem.severity == Severity::Blocks);
        !blocked && self.state != GpuState::Quarantined && !matches!(self.health, GpuHealth::Failed(_))
    }

    /// Clears what changes from one moment to the next. Reports carry none of it: each difference is a
    /// write to the store, and figures belong into metrics.
    pub fn clear_readings(&mut self) {
        if let Some(link) = &mut self.link {
            link.speed_mts = None;
        }
        if let Some(nvml) = &mut self.nvml {
            nvml.temperature_celsius = None;
            nvml.power_milliwatts = None;
        }
    }
}

/// Where a GPU is in its life. It is offered in `free` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuState {
    /// Nobody has it, and it is clean.
    Free,
    /// A sandbox has it.
    InUse,
    /// It is reset and its memory proven clean.
    Scrubbing,
    /// It could not be proven clean, or did not reset; `reason` says what to do.
    Quarantined,
}

/// Whether a GPU works.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "is", content = "reason", rename_all = "snake_case")]
pub enum GpuHealth {
    /// Nothing is known against it.
    #[default]
    Healthy,
    /// It works with less than it had, or wants attention soon.
    Degraded(String),
    /// It must not be given to anybody before the reason is gone.
    Failed(String),
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bar {
    /// 0 to 5. A 64-bit one takes two and has the lower number.
    pub index: u8,
    /// Bytes.
    pub size_bytes: u64,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether reads have no side effects: memory rather than registers.
    pub prefetchable: bool,
}

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere.
    Memory64,
    /// I/O ports.
    Io,
}

/// An endpoint in the same IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupMember {
    /// Its PCI function.
    #[schema(value_type = String)]
    pub address: HostPciAddress,
    /// 24-bit class code.
    pub class: u32,
    /// Bound driver, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// A PCI Express link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PcieLink {
    /// Megatransfers a second a lane now; drops when the GPU idles. A reading, absent in reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed_mts: Option<u32>,
    /// Lanes now.
    pub width: u32,
    /// Megatransfers a second a lane at most.
    pub max_speed_mts: u32,
    /// Lanes at most.
    pub max_width: u32,
}

/// What NVML says of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NvmlInfo {
    /// `GPU-` and a UUID.
    pub uuid: String,
    /// The board's serial number, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Version of NVIDIA's driver.
    pub driver_version: String,
    /// Whether it is partitioned into instances (MIG); absent where it cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig_mode: Option<bool>,
    /// Error correction; absent where its memory has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ecc: Option<Ecc>,
    /// PCI functions at the other ends of its NVLinks: GPUs, or switches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub nvlink_peers: Vec<HostPciAddress>,
    /// What the driver wants done; absent with drivers that do not say (before 570).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_action: Option<RecoveryAction>,
    /// The gravest Xid in the kernel log since the GPU was last reset, the last one of those that ask for the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_xid: Option<u32>,
    /// A reading, absent in reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_celsius: Option<u32>,
    /// A reading, absent in reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_milliwatts: Option<u32>,
}

/// Error correction of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ecc {
    /// Whether it is on.
    pub enabled: bool,
    /// Errors corrected since the driver was loaded.
    pub corrected: u64,
    /// Errors that could not be corrected since the driver was loaded.
    pub uncorrected: u64,
}

/// What NVIDIA's driver wants done with a GPU (`NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// Nothing.
    None,
    /// Reset it.
    Reset,
    /// Restart the host.
    Reboot,
    /// End what runs on other GPUs connected to it (a peer's fault reached it).
    DrainPeers,
    /// Let what runs on it end, then reset it.
    DrainAndReset,
    /// One that this version does not know.
    #[serde(other)]
    Unknown,
}

/// Something in the way of giving a GPU to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuProblem {
    /// How much it matters.
    pub severity: Severity,
    /// What was found. One line.
    pub what: String,
    /// What to do. One line.
    pub fix: String,
}

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It works all the same.
    Warns,
    /// It cannot be given to a sandbox.
    Blocks,
}

/// Whether a PCI function can be given to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceCheck {
    /// The function.
    #[schema(value_type = String)]
    pub address: HostPciAddress,
    /// What it is: its class and IDs; empty if it does not exist.
    pub what: String,
    /// What is in the way; what blocks comes first.
    pub problems: Vec<GpuProblem>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu() -> Gpu {
        let text = r#"{"address": "0000:65:00.0", "vendor": 4318, "device": 9008, "class": 197120,
            "model": "10de:2330", "memory_bytes": 1, "state": "free", "health": {"is": "healthy"},
            "link": {"speed_mts": 2500, "width": 16, "max_speed_mts": 32000, "max_width": 16}}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn only_gpus_that_nothing_blocks_and_that_work_are_usable() {
        let problem = |severity| GpuProblem { severity, what: String::new(), fix: String::new() };
        let problems = |severity| Gpu { problems: vec![problem(severity)], ..gpu() };
        assert!(gpu().is_usable() && problems(Severity::Warns).is_usable());
        assert!(!problems(Severity::Blocks).is_usable());
        assert!(!Gpu { state: GpuState::Quarantined, ..gpu() }.is_usable());
        assert!(!Gpu { health: GpuHealth::Failed(String::new()), ..gpu() }.is_usable());
        assert!(Gpu { health: GpuHealth::Degraded(String::new()), ..gpu() }.is_usable());
    }

    #[test]
    fn reports_of_one_gpu_that_idles_and_works_are_the_same() {
        let reading = |speed, celsius| {
            let nvml = NvmlInfo { temperature_celsius: Some(celsius), ..NvmlInfo::default() };
            let mut gpu = Gpu { nvml: Some(nvml), ..gpu() };
            gpu.link.as_mut().unwrap().speed_mts = Some(speed);
            gpu.clear_readings();
            gpu
        };
        assert_eq!(reading(2500, 30), reading(32000, 70));
    }

    #[test]
    fn an_action_of_a_later_version_is_unknown_and_no_error() {
        assert_eq!(serde_json::from_str::<RecoveryAction>("\"replace\"").unwrap(), RecoveryAction::Unknown);
    }
}
