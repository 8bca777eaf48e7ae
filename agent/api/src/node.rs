//! Nodes: what agents register and report, and what operators do to them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::MemorySize;
use crate::artefact::Digest;
use crate::gpu::Gpu;
use crate::job::{IsolationClass, Stages, TaskExit, TaskState, Usage};
use crate::scheduling::Taint;
use crate::service::ServiceLoad;

/// What a host has. Read from the kernel at registration and again when it may have changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Inventory {
    /// Host name.
    pub hostname: String,
    /// Kernel release.
    pub kernel: String,
    /// `/proc/sys/kernel/random/boot_id`: a change means that the host was restarted.
    pub boot_id: String,
    /// Version of the agent.
    pub agent_version: String,
    /// CPUs.
    pub cpus: Cpus,
    /// Usable memory.
    pub memory: Option<MemorySize>,
    /// Memory and CPUs of each NUMA node.
    pub numa: Vec<NumaNode>,
    /// Hugepage pools.
    pub hugepages: Vec<HugepagePool>,
    /// Block devices.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// PCI devices.
    pub pci: Vec<PciDevice>,
    /// GPUs, those among them that cannot be given to sandboxes included.
    pub gpus: Vec<Gpu>,
    /// Classes that can run here, and for those that cannot: why, in `class_problems`.
    pub classes: Vec<IsolationClass>,
    /// One line for each class that cannot run here.
    pub class_problems: Vec<String>,
    /// What the agent was told to say of the host (`lathe-agent --label KEY=VALUE`). An operator's labels
    /// go before them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Images and datasets that are here, so that work that needs them can come to them; the largest
    /// [`MAX_ARTEFACTS`], by digest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub artefacts: Vec<CachedArtefact>,
}

/// Most artefacts that a report lists: what is beyond costs a transfer, not correctness.
pub const MAX_ARTEFACTS: usize = 1024;

/// An image or dataset in a node's cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct CachedArtefact {
    /// Of its manifest.
    pub digest: Digest,
    /// What it takes here.
    pub bytes: u64,
}

/// Label of the network switch that a node hangs on; nodes with the same value are near each other.
pub const LEAF_LABEL: &str = "lathe.leaf";
/// Label of the rack that a node stands in.
pub const RACK_LABEL: &str = "lathe.rack";

/// CPUs and their topology.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Cpus {
    /// As the kernel names it.
    pub model: String,
    /// Logical CPUs online.
    pub online: u32,
    /// Sockets.
    pub sockets: u32,
    /// Physical cores.
    pub cores: u32,
}

/// One NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NumaNode {
    /// The kernel's number.
    pub id: u32,
    /// Logical CPUs.
    pub cpus: Vec<u32>,
    /// Memory in bytes.
    pub memory_bytes: u64,
}

/// Hugepages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HugepagePool {
    /// Page size in bytes.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages nobody uses.
    pub free: u64,
}

/// A block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Kernel name, such as `nvme0n1`.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Model, if it says.
    pub model: String,
    /// Whether it spins.
    pub rotational: bool,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Nic {
    /// Kernel name.
    pub name: String,
    /// Hardware address.
    pub mac: String,
    /// Megabits a second, if it says.
    pub speed_mbps: Option<u32>,
    /// Kernel driver.
    pub driver: String,
}

/// A PCI function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PciDevice {
    /// `dddd:bb:dd.f`.
    pub address: String,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// 24-bit class code.
    pub class: u32,
    /// Bound driver, if any.
    pub driver: Option<String>,
    /// IOMMU group, if the host has an IOMMU.
    pub iommu_group: Option<u32>,
    /// NUMA node, if known.
    pub numa_node: Option<u32>,
}

/// Whether a node takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Heartbeats arrive.
    Ready,
    /// No heartbeat within the expiry; its tasks are lost.
    Lost,
}

/// Whether a node takes new work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "is", content = "reason", rename_all = "snake_case")]
pub enum NodeOffer {
    /// It does.
    #[default]
    Open,
    /// An operator said that it takes no more; what runs stays.
    Cordoned(String),
    /// An operator wants it empty: what may move is moved.
    Draining(String),
    /// It refused placements, or lost tasks, again and again.
    Suspected(String),
}

/// A time during which a node will not be there: nothing is placed that would not be done before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceWindow {
    /// Milliseconds since the Unix epoch.
    pub from_ms: u64,
    /// Milliseconds since the Unix epoch; not included.
    pub until_ms: u64,
    /// What for, one line.
    pub reason: String,
}

/// What an operator does to a node: body of `POST /v1/nodes/{name}/operations` (admin).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "operation", rename_all = "snake_case", deny_unknown_fields)]
pub enum NodeOperation {
    /// It takes no more work; what runs stays.
    Cordon {
        /// Why, one line.
        reason: String,
    },
    /// It takes work again: ends a cordon, a drain and suspicion.
    Uncordon,
    /// It takes no more work, and what may move is moved.
    Drain {
        /// Why, one line.
        reason: String,
    },
    /// It will not be there.
    Maintain(MaintenanceWindow),
    /// It will be there: forgets all its maintenance windows.
    EndMaintenance,
    /// Sets and removes labels; those of the agent stay beneath.
    Label {
        /// To set.
        #[serde(default)]
        set: BTreeMap<String, String>,
        /// To remove.
        #[serde(default)]
        remove: Vec<String>,
    },
    /// Sets and removes taints.
    Taint {
        /// To set; one with the same key is replaced.
        #[serde(default)]
        set: Vec<Taint>,
        /// Keys to remove.
        #[serde(default)]
        remove: Vec<String>,
    },
}

/// A node as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name, from its certificate; unique in the cluster.
    pub name: String,
    /// Address that other nodes reach it at.
    pub address: String,
    /// IPv4 subnet of its sandboxes, as `10.42.3.0/24`; given by the coordinator.
    pub subnet: String,
    /// Now.
    pub state: NodeState,
    /// What it has.
    pub inventory: Inventory,
    /// CPUs promised to tasks.
    pub allocated_cpus: u32,
    /// Memory promised to tasks.
    pub allocated_memory: MemorySize,
    /// GPUs promised to tasks.
    #[serde(default)]
    pub allocated_gpus: u32,
    /// Whether it takes new work.
    #[serde(default)]
    pub offer: NodeOffer,
    /// The agent's labels with the operator's above them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Keep away what does not tolerate them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Taint>,
    /// When it will not be there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub maintenance: Vec<MaintenanceWindow>,
    /// Pools that it belongs to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<String>,
    /// Milliseconds since the Unix epoch.
    pub last_heartbeat_ms: u64,
}

/// Body of `POST /v1/agent/join`: TLS with the cluster's CA but without a client certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// A join token of `lathe cluster init` or `lathe cluster token`.
    pub token: String,
    /// The name the node wants.
    pub name: String,
    /// A PEM certificate signing request made with the node's own key, which never leaves it.
    pub csr_pem: String,
}

/// The answer: from now on the agent uses mTLS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinResponse {
    /// The node's certificate, PEM.
    pub certificate_pem: String,
}

/// Body of `POST /v1/agent/report` (mTLS; the node is the certificate's name): the whole observed
/// state, sent on every change and at least every [`REPORT_INTERVAL_MS`]; it is the heartbeat too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeReport {
    /// Address that other nodes reach this one at.
    pub address: String,
    /// What the host has.
    pub inventory: Inventory,
    /// Every sandbox the node knows of, also ended ones that are still desired.
    pub sandboxes: Vec<SandboxStatus>,
    /// Services that it takes requests for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServiceLoad>,
}

/// How often an agent reports when nothing changes.
pub const REPORT_INTERVAL_MS: u64 = 2_000;

/// After how long without a report a node is lost.
pub const NODE_EXPIRY_MS: u64 = 8_000;

/// One sandbox as the agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxStatus {
    /// `<job>-<rank>-<attempt>`.
    pub id: String,
    /// Now.
    pub state: TaskState,
    /// Its port accepts connections, if it has one ([`crate::sandbox::SandboxSpec::port`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ready: bool,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the failure is the host's or the VMM's (a loss) rather than the task's.
    #[serde(default)]
    pub lost: bool,
    /// How its process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<TaskExit>,
    /// What it used.
    #[serde(default)]
    pub usage: Usage,
    /// How long each stage took.
    #[serde(default)]
    pub stages: Stages,
}

/// Body of `POST /v1/agent/logs` (mTLS): output of sandboxes, in order for each of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogBatch {
    /// At most 256 lines a batch.
    pub lines: Vec<LogLine>,
}

/// One line of output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    /// Whose: `<job>-<rank>-<attempt>`.
    pub sandbox: String,
    /// From 0, without gaps, for each sandbox: a batch sent twice is stored once.
    pub seq: u64,
    /// Milliseconds since the Unix epoch, by the node's clock.
    pub time_ms: u64,
    /// `stdout`, `stderr`, or `lathe` for what the agent says of the sandbox.
    pub stream: LogStream,
    /// Without its newline; lossy UTF-8; at most 16 KiB, longer lines are split.
    pub text: String,
}

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    /// The task's standard output.
    Stdout,
    /// The task's standard error.
    Stderr,
    /// The agent, about the sandbox.
    Lathe,
}
