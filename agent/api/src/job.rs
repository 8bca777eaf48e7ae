//! Jobs and their tasks, as users submit and see them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::artefact::Digest;
use crate::pool::DEFAULT_POOL;
use crate::scheduling::{Communication, Constraint, Isolation, Preference, Toleration, Topology};
use crate::service::ServiceSpec;
use crate::{MemorySize, TimeSpan};

/// How strongly a sandbox is isolated, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum IsolationClass {
    /// Full virtualization: an unmodified Linux guest under KVM.
    Microvm,
    /// Paravirtualization: our own guest kernel. Not available yet: refused with a clear error.
    Unikernel,
    /// OS-level virtualization: namespaces, cgroups, seccomp.
    Container,
}

/// What a user submits, as TOML or JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// For people; `[a-z0-9-]`, 1 to 63 characters. Not unique.
    pub name: String,
    /// Isolation of every task.
    pub class: IsolationClass,
    /// Image name, optionally `name@sha256:...` to insist on a digest.
    pub image: String,
    /// Arguments after the image's entrypoint; replaces the image's `Cmd`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Added to the image's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The gang's size: all tasks run at once or none does. 1 to 1024.
    #[serde(default = "one")]
    pub tasks: u32,
    /// Makes the gang elastic: it starts and goes on with as few tasks as this, and has up to `tasks`
    /// when there is room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks_min: Option<u32>,
    /// What each task gets.
    #[serde(default)]
    pub resources: Resources,
    /// Datasets each task sees.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<DatasetMount>,
    /// What happens when a task fails.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Seconds between SIGTERM and SIGKILL. A job that is stopped for another gets SIGTERM too: it is
    /// the signal to write a checkpoint.
    #[serde(default = "grace")]
    pub grace_seconds: u32,
    /// The pool that it runs in.
    #[serde(default = "default_pool")]
    pub pool: String,
    /// Higher goes first where the pool's policy looks at it; -1000 to 1000.
    #[serde(default)]
    pub priority: i32,
    /// It may be stopped for others (SIGTERM, its grace period, SIGKILL), and starts again later.
    #[serde(default)]
    pub preemptible: bool,
    /// How long it will run, if its owner knows. Policies plan with it; nothing ends at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<TimeSpan>,
    /// Within what the whole gang must be.
    #[serde(default)]
    pub topology: Topology,
    /// What it does not share with other tenants.
    #[serde(default)]
    pub isolation: Isolation,
    /// How its tasks talk to each other: those that talk much are put near each other.
    #[serde(default)]
    pub communication: Communication,
    /// What every node that it runs on must fulfil.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub constraints: Vec<Constraint>,
    /// What nodes should fulfil if they can.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preferences: Vec<Preference>,
    /// Taints of nodes that do not keep it away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Makes it a service: work that stays up. Each replica is a job of one task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceSpec>,
}

fn default_pool() -> String {
    DEFAULT_POOL.to_owned()
}

fn one() -> u32 {
    1
}

fn grace() -> u32 {
    10
}

/// The carve of one task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// CPUs, 1 to 64.
    pub cpus: u32,
    /// Memory: the guest's whole memory in a microVM, the cgroup's limit in a container.
    pub memory: MemorySize,
    /// Writable disk above the image; absent keeps the overlay in the task's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<MemorySize>,
    /// Whole GPUs, passed through: 0 to 64, in class microvm alone.
    pub gpus: u32,
    /// Models of GPU that do, as `lathe gpu list` shows them; all if empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpu_models: Vec<String>,
    /// Memory that each GPU must have at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<MemorySize>,
    /// A MIG instance of this profile (`1g.10gb`) instead of a whole GPU. Not available yet: refused with
    /// a clear error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_profile: Option<String>,
}

impl Default for Resources {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: MemorySize::from_mib(256),
            disk: None,
            gpus: 0,
            gpu_models: Vec::new(),
            gpu_memory: None,
            gpu_profile: None,
        }
    }
}

/// A dataset at a path in the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetMount {
    /// The dataset's name, optionally `name@sha256:...`.
    pub name: String,
    /// Absolute path of its folder in the task; read-only, enforced on the host.
    pub mount: String,
}

/// What happens when a task of the gang fails or its node is lost: the whole gang starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RestartPolicy {
    /// How often the gang is started again after a task failed.
    pub on_failure: u32,
    /// How often the gang is started again after a node or a VMM was lost. Not the task's fault,
    /// so counted apart.
    pub on_loss: u32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self { on_failure: 0, on_loss: 3 }
    }
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for room; `reason` says for what.
    Pending,
    /// Placed; sandboxes are being prepared and started, or run.
    Running,
    /// Every task exited with 0.
    Succeeded,
    /// A task failed and no restart is left.
    Failed,
    /// It makes room for another job: sandboxes are being stopped (SIGTERM, grace, SIGKILL), then it
    /// waits again.
    Preempting,
    /// A cancel was asked for; sandboxes are being stopped.
    Cancelling,
    /// Stopped on request.
    Cancelled,
}

impl JobState {
    /// Whether nothing will change any more.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// A job as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Unique and short: `<name>-<6 characters>`.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// The service that it is a replica of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// As submitted, defaults filled in.
    pub spec: JobSpec,
    /// The image's digest, resolved at submission.
    pub image_digest: Digest,
    /// Now.
    pub state: JobState,
    /// Why it is pending, or why it failed. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it is expected to start, milliseconds since the Unix epoch; absent if it does not wait, or
    /// nobody can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_start_ms: Option<u64>,
    /// The job whose end or start it waits for; absent if that is another tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Why it was placed where it is. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How many tasks it has now, if it is elastic and placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
    /// How often it was stopped for another job.
    #[serde(default)]
    pub preemptions: u32,
    /// Which start of the gang this is, from 1; 0 before the first.
    pub attempt: u32,
    /// Its tasks, by rank; of the current attempt.
    pub tasks: Vec<Task>,
    /// Milliseconds since the Unix epoch.
    pub submitted_ms: u64,
    /// When it reached its terminal state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_ms: Option<u64>,
}

/// One member of the gang.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// From 0.
    pub rank: u32,
    /// Its sandbox: `<job>-<rank>-<attempt>`; absent before placement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The node it was placed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its address on the job network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Now.
    pub state: TaskState,
    /// It is a service's replica, and its port accepts connections.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ready: bool,
    /// Why it failed or was lost. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
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

/// Where a task is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Not placed yet.
    Pending,
    /// The node fetches its image and datasets and makes its sandbox.
    Preparing,
    /// The sandbox starts.
    Starting,
    /// Its process runs.
    Running,
    /// It was told to stop.
    Stopping,
    /// Its process ended by itself; see `exit`.
    Exited,
    /// It could not be started, or its sandbox died; see `reason`.
    Failed,
    /// Its node is gone.
    Lost,
}

impl TaskState {
    /// Whether nothing will change any more.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Exited | Self::Failed | Self::Lost)
    }
}

/// How a task's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskExit {
    /// It returned this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It used more memory than it had.
    OutOfMemory,
}

impl TaskExit {
    /// Whether this is success.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Code(0))
    }
}

/// What a task used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Usage {
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// Peak memory in bytes.
    pub memory_peak_bytes: u64,
    /// Output dropped because of a limit, bytes.
    pub output_dropped_bytes: u64,
}

/// Milliseconds spent in each stage, as the node measured them; zero where a stage did not happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Stages {
    /// Fetching and converting the image.
    pub image_ms: u64,
    /// Fetching datasets.
    pub datasets_ms: u64,
    /// Making the sandbox: disks, network, cgroup.
    pub prepare_ms: u64,
    /// From starting the VMM or container to the task's process.
    pub start_ms: u64,
    /// The task's process.
    pub run_ms: u64,
    /// Taking the sandbox down.
    pub cleanup_ms: u64,
}
