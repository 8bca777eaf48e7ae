//! The machine description: `vm.json`, which is also the body of the control API.
//!
//! Parsing is strict: unknown fields, bare numbers for sizes, and implied disk formats are refused.
//! What can only be checked against the host (does the file exist, is it in use) is checked when
//! the machine is built, not here.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

pub use crate::host_address::HostPciAddress;

/// A size in bytes, written with a binary unit: `"512 MiB"`, `"4 GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = String, example = "512 MiB")]
pub struct MemorySize(u64);

impl MemorySize {
    /// A size of `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size of `mib` mebibytes.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size in whole mebibytes, rounded down.
    pub const fn mib(self) -> u64 {
        self.0 >> 20
    }
}

/// A size that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size: write a whole number and a unit, KiB, MiB, GiB or TiB, as in \"512 MiB\"")]
pub struct ParseSizeError(String);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl FromStr for MemorySize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseSizeError(text.to_owned());
        let (unit, shift) = UNITS.into_iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(error)?;
        let digits = text[..text.len() - unit.len()].trim_end();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(error());
        }
        let count: u64 = digits.parse().map_err(|_| error())?;
        count.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} KiB", self.0.div_ceil(1024))
    }
}

impl Serialize for MemorySize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What runs first.
    pub boot: BootConfig,
    /// Virtual CPUs.
    pub cpus: CpuConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Disks, in PCI order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in PCI order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkConfig>,
    /// PCI devices of the host that the guest gets for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passthrough: Vec<PassthroughConfig>,
    /// How passed-through devices reach guest memory.
    #[serde(default, skip_serializing_if = "VfioConfig::is_default")]
    pub vfio: VfioConfig,
    /// Empty root ports into which devices can be plugged while the guest runs, at most 16.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hotplug_slots: u8,
    /// NUMA nodes of the guest, in order; absent means a machine without NUMA.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa: Vec<NumaNodeConfig>,
    /// Host-guest sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Whether the guest has an entropy device.
    #[serde(default = "enabled")]
    pub rng: bool,
    /// The first serial port (16550 at 0x3f8).
    #[serde(default)]
    pub serial: ConsoleConfig,
    /// The virtio console (hvc0); absent unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
}

fn enabled() -> bool {
    true
}

fn is_zero(count: &u8) -> bool {
    *count == 0
}

/// Kernel, initramfs, command line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// An ELF kernel (PVH note preferred, else the 64-bit Linux protocol) or a bzImage.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// An initramfs, if any.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, at most 2047 bytes of printable ASCII.
    #[serde(default)]
    pub cmdline: String,
}

/// Virtual CPUs and the topology the guest sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// How many, 1 to 64.
    pub count: u8,
    /// `sockets * cores * threads` must equal `count`; absent means one socket of `count` cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
}

/// Sockets, cores a socket, threads a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    /// Sockets.
    pub sockets: u8,
    /// Cores in each socket.
    pub cores: u8,
    /// Threads in each core.
    pub threads: u8,
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// At least 16 MiB, a multiple of 2 MiB (of the page size with hugepages).
    pub size: MemorySize,
    /// Back the guest with pages of this size from the host's pool; absent means plain pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugepageSize>,
}

/// A hugepage size of x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugepageSize {
    /// 2 MiB.
    #[serde(rename = "2 MiB")]
    TwoMiB,
    /// 1 GiB.
    #[serde(rename = "1 GiB")]
    OneGiB,
}

impl HugepageSize {
    /// The page size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::TwoMiB => 2 << 20,
            Self::OneGiB => 1 << 30,
        }
    }
}

/// A virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique in the machine; also the disk's serial, at most 20 bytes of ASCII.
    pub id: String,
    /// A file or a block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Always explicit: a guest that writes a header must not choose what the host reads next.
    pub format: DiskFormat,
    /// Enforced on the host: the file is opened read-only.
    #[serde(default)]
    pub read_only: bool,
    /// How the host does the I/O.
    #[serde(default)]
    pub io: DiskIo,
}

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The file is the disk.
    Raw,
}

/// The host's I/O engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskIo {
    /// io_uring where the host allows it, else `sync`.
    #[default]
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// preadv/pwritev on the device's own thread.
    Sync,
}

/// A virtio-net interface on a tap device that exists already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Unique in the machine.
    pub id: String,
    /// Name of the tap device, at most 15 bytes.
    pub tap: String,
    /// The guest's address, as `"02:00:00:00:00:01"`.
    pub mac: String,
    /// Announced to the guest; absent means 1500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to 8; the tap must have been made with `multi_queue` for more than one.
    #[serde(default = "one_queue_pair")]
    pub queue_pairs: u8,
    /// Whether the host kernel moves the frames.
    #[serde(default)]
    pub vhost: VhostMode,
}

fn one_queue_pair() -> u8 {
    1
}

/// Use of vhost-net.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VhostMode {
    /// vhost-net where `/dev/vhost-net` opens, else the VMM.
    #[default]
    Auto,
    /// vhost-net, or fail.
    On,
    /// Always the VMM.
    Off,
}

/// A PCI function of the host, bound to `vfio-pci`, that the guest gets for itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PassthroughConfig {
    /// Unique in the machine; names the device in the control API and in metrics.
    pub id: String,
    /// The function on the host, as `"0000:65:00.0"`.
    #[schema(value_type = String, example = "0000:65:00.0")]
    pub address: HostPciAddress,
    /// The GPUDirect clique announced to NVIDIA's driver: 0 to 15, or `"off"`. Absent means computed from
    /// the topology on GPUs of an architecture that has cliques, and none on all others.
    #[serde(default, skip_serializing_if = "GpuDirectClique::is_default")]
    pub gpudirect_clique: GpuDirectClique,
}

/// Which GPUs can reach each other's memory directly, as NVIDIA's driver is told in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuDirectClique {
    /// Computed from the topology.
    #[default]
    Auto,
    /// The capability is not shown.
    Off,
    /// This number, 0 to 15.
    #[serde(untagged)]
    Number(u8),
}

impl GpuDirectClique {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How passed-through devices reach guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VfioConfig {
    /// The kernel's interface for it.
    #[serde(default)]
    pub backend: VfioBackend,
    /// Whether devices can reach each other's BARs. Where the kernel cannot do it the machine starts
    /// without, and says so.
    #[serde(default = "enabled")]
    pub peer_to_peer: bool,
}

impl Default for VfioConfig {
    fn default() -> Self {
        Self { backend: VfioBackend::Auto, peer_to_peer: true }
    }
}

impl VfioConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The kernel's interface to the IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VfioBackend {
    /// iommufd where the kernel has it, else `container`.
    #[default]
    Auto,
    /// `/dev/iommu` and a character device a function, or fail.
    Iommufd,
    /// `/dev/vfio/vfio` and a file an IOMMU group.
    Container,
}

/// One NUMA node of the guest: the next `cpus` CPUs and the next `memory` of RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaNodeConfig {
    /// How many CPUs; together all of the machine's.
    pub cpus: u8,
    /// How much memory, a multiple of 2 MiB (of the page size with hugepages); together all of the machine's.
    pub memory: MemorySize,
    /// The host's node that the memory is taken from, and whose devices are near this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_node: Option<u32>,
}

/// virtio-vsock with Unix sockets on the host side.
///
/// A guest's connection to CID 2, port P, is connected to the Unix socket `<socket>_P`.
/// A host program connects to `<socket>` and sends `CONNECT P\n`; the answer is `OK <port>\n`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, 3 or more.
    pub cid: u32,
    /// Path of the Unix socket, made by the VMM and removed when it ends.
    #[schema(value_type = String)]
    pub socket: PathBuf,
}

/// Where a console's bytes go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "mode", deny_unknown_fields)]
pub enum ConsoleConfig {
    /// The device is there, output is dropped, nothing is ever typed.
    #[default]
    Null,
    /// The VMM's own standard input and output.
    Stdio,
    /// Output is appended to a file, at most `limit` bytes; later output is dropped and counted.
    File {
        /// Created if absent.
        #[schema(value_type = String)]
        path: PathBuf,
        /// What a guest may fill of the host's disk.
        #[serde(default = "console_limit")]
        limit: MemorySize,
    },
}

fn console_limit() -> MemorySize {
    MemorySize::from_mib(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_units_and_do_not_overflow() {
        assert_eq!("512 MiB".parse(), Ok(MemorySize::from_mib(512)));
        assert_eq!("512MiB".parse(), Ok(MemorySize::from_mib(512)));
        for bad in ["512", "MiB", "1.5 GiB", "-1 MiB", "99999999999 TiB", "1 GB", ""] {
            assert!(bad.parse::<MemorySize>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(MemorySize::from_mib(1536).to_string(), "1536 MiB");
        assert_eq!(MemorySize::from_mib(2048).to_string(), "2 GiB");
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = r#"{"boot":{"kernel":"k","krenel":1},"cpus":{"count":1},"memory":{"size":"16 MiB"}}"#;
        let error = serde_json::from_str::<VmConfig>(text).unwrap_err().to_string();
        assert!(error.contains("krenel"), "{error}");
    }

    #[test]
    fn the_smallest_machine_round_trips() {
        let text = r#"{"boot":{"kernel":"k"},"cpus":{"count":1},"memory":{"size":"16 MiB"}}"#;
        let vm: VmConfig = serde_json::from_str(text).unwrap();
        assert!(vm.rng && vm.disks.is_empty() && vm.serial == ConsoleConfig::Null);
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&vm).unwrap()).unwrap();
        assert_eq!(vm, again);
    }
}
