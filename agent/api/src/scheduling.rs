//! What jobs ask of where they run, and what was decided about them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::JobState;

/// Within what a whole gang must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// One PCIe switch of one node: the gang's GPUs all hang below it.
    Switch,
    /// One node.
    Node,
    /// The nodes of one network switch: those with the same label `lathe.leaf`.
    Leaf,
    /// The nodes of one rack: those with the same label `lathe.rack`.
    Rack,
    /// Nothing.
    #[default]
    Any,
}

/// What a gang does not share with other tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// It shares nodes.
    #[default]
    Shared,
    /// Its CPUs are whole cores of its own.
    Cores,
    /// No GPU of another tenant hangs below the PCIe switches of its GPUs.
    Switch,
    /// No task of another tenant runs on its nodes.
    Node,
}

/// How the tasks of a gang talk to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Communication {
    /// Hardly.
    #[default]
    None,
    /// Each with the next rank, as all-reduce does.
    Ring,
    /// Each with each, as mixtures of experts do.
    AllToAll,
}

/// What must hold of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// It has one of the values.
    In,
    /// It has none of the values, or is not there.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    Absent,
}

/// A condition on the labels of nodes. The node's own name is the label `name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Constraint {
    /// The label.
    pub label: String,
    /// What must hold of it.
    pub operator: Operator,
    /// For `in` and `not_in`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// A condition that nodes should fulfil if they can.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Preference {
    /// The label.
    pub label: String,
    /// What should hold of it.
    pub operator: Operator,
    /// For `in` and `not_in`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// How much it matters beside others: 1 to 100, or -100 to -1 to keep away.
    pub weight: i32,
}

/// A taint that does not keep the job away.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// The taint's value; any if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

/// Keeps jobs that do not tolerate it away from a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Taint {
    /// Its key.
    pub key: String,
    /// Its value; may be empty.
    #[serde(default)]
    pub value: String,
}

/// What was decided about a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecisionKind {
    /// Its tasks were given their places.
    Placed,
    /// It was told to stop, and waits again.
    Preempted,
    /// An elastic gang was given another size.
    Resized,
    /// A node did not take what had been planned for it.
    Refused,
    /// It ended badly and waits to start again.
    Restarted,
    /// It was cancelled.
    Cancelled,
    /// A service was given another number of replicas.
    Scaled,
}

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// The pool's policy.
    Policy,
    /// An operator, who cordoned, drained or set something.
    Operator,
    /// Its owner.
    Owner,
    /// Nobody: a node, a VMM or the job itself failed.
    Failure,
    /// Its service, which needs another number of replicas or ends.
    Service,
}

/// A decision about a job, for its history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The start of the gang that it is about, from 1; 0 before the first.
    pub attempt: u32,
    /// What.
    pub kind: DecisionKind,
    /// By whom.
    pub by: DecidedBy,
    /// Why, one line.
    pub why: String,
}

/// The answer to `GET /v1/jobs/{id}/why`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Why {
    /// The job.
    pub job: String,
    /// Now.
    pub state: JobState,
    /// What it waits for, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What would let it start; absent if it does not wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// What its pool's provider of nodes was asked for, or why it is not; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// When it is expected to start, milliseconds since the Unix epoch; absent if nobody can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_start_ms: Option<u64>,
    /// The job whose end or start it waits for; absent if that is another tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Its place among those that wait in its pool, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<u32>,
    /// How many wait in its pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u32>,
    /// Why it was placed where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed: Option<String>,
    /// What was decided about it, oldest first; the first and the latest if there were many.
    pub decisions: Vec<Decision>,
}

/// The answer to `POST /v1/jobs/plan`: what would become of a job if it were submitted now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Planned {
    /// It would start at once.
    pub starts: bool,
    /// Where each task would go, by rank; empty if it would wait.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<PlannedTask>,
    /// Why there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What it would wait for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it would start, milliseconds since the Unix epoch; absent if nobody can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_start_ms: Option<u64>,
    /// The job it would wait for; absent if that is another tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// How many running jobs would be stopped for it, to wait again.
    #[serde(default)]
    pub preemptions: u32,
}

/// Where a task would go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedTask {
    /// From 0.
    pub rank: u32,
    /// The node.
    pub node: String,
    /// PCI addresses of the GPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
}

/// Something that an operator, or a pool's provider of nodes, did to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// From 1, without gaps.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Who: the ID of the admin token, as `lathe token list` shows it, or `provider:` and the name of one.
    pub who: String,
    /// What: `node cordon`, `pool set`, ...
    pub action: String,
    /// To which node, pool, tenant.
    pub subject: String,
    /// What exactly, and the reason given, one line.
    pub detail: String,
}
