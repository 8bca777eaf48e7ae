//! The document that `lathe-nvml` prints: what NVIDIA's management library (NVML) says of every GPU
//! that NVIDIA's driver runs.
//!
//! A program of its own for two reasons. NVML is a shared library and Lathe's programs are static, so
//! they cannot load it. And calls into a driver with a sick GPU hang for minutes: a process can be
//! given up on, a thread cannot.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Everything, on standard output as one line of JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Version of the driver.
    pub driver_version: String,
    /// GPUs that answered.
    pub gpus: Vec<Device>,
    /// One line for each GPU that did not even tell its address.
    #[serde(default)]
    pub lost: Vec<String>,
}

/// One GPU. What it does not support is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// PCI address as NVML writes it: `00000000:65:00.0`.
    pub address: String,
    /// `GPU-` and a UUID.
    pub uuid: String,
    /// Marketing name.
    pub name: String,
    /// Serial number of the board.
    #[serde(default)]
    pub serial: Option<String>,
    /// Its memory in bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Whether it is partitioned into instances.
    #[serde(default)]
    pub mig_mode: Option<bool>,
    /// Whether error correction is on.
    #[serde(default)]
    pub ecc_enabled: Option<bool>,
    /// Corrected errors since the driver was loaded.
    #[serde(default)]
    pub ecc_corrected: Option<u64>,
    /// Uncorrected errors since the driver was loaded.
    #[serde(default)]
    pub ecc_uncorrected: Option<u64>,
    /// PCI addresses at the other ends of its active NVLinks.
    #[serde(default)]
    pub nvlink_peers: Vec<String>,
    /// `nvmlDeviceGpuRecoveryAction_t`.
    #[serde(default)]
    pub recovery_action: Option<u64>,
    /// Degrees Celsius.
    #[serde(default)]
    pub temperature_celsius: Option<u32>,
    /// Milliwatts.
    #[serde(default)]
    pub power_milliwatts: Option<u32>,
    /// What was asked and failed, other than for lack of support.
    #[serde(default)]
    pub failures: Vec<String>,
}
