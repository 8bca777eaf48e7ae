//! Gangs: what jobs ask for.

use std::collections::BTreeMap;

use lathe_api::job::IsolationClass;

use super::{Amount, GpuRequest, Taint};

/// Equal tasks that start together or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gang {
    /// Its job; unique.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// The pool it was submitted to.
    pub pool: String,
    /// What every node it runs on must support.
    pub class: IsolationClass,
    /// How many tasks.
    pub tasks: Size,
    /// What each gets.
    pub task: TaskRequest,
    /// What every node it runs on must fulfil.
    pub constraints: Vec<Constraint>,
    /// Taints that do not keep it away: a key, and a value or any (none).
    pub tolerations: Vec<(String, Option<String>)>,
    /// What nodes should fulfil if they can.
    pub preferences: Vec<Preference>,
    /// What the whole gang must be within.
    pub scope: Scope,
    /// What it does not share with other tenants.
    pub isolation: Isolation,
    /// What it reads.
    pub inputs: Vec<Input>,
    /// How its tasks talk.
    pub communication: Communication,
    /// Higher goes first where the policy looks at it.
    pub priority: i32,
    /// Whether it may be stopped for others and started again later.
    pub preemptible: bool,
    /// How long it needs to write a checkpoint before it is stopped, milliseconds.
    pub grace_ms: u64,
    /// When it came.
    pub submitted_ms: u64,
    /// How long it will run, if the user says, milliseconds.
    pub estimate_ms: Option<u64>,
    /// Gangs with the same word run similarly long: a job's name without what makes it unique.
    pub kind: String,
}

/// How many tasks a gang has: elastic ones have bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Least that it starts and goes on with, at least 1.
    pub min: u32,
    /// Most that it can use.
    pub max: u32,
}

impl Size {
    /// Not elastic.
    pub const fn exactly(tasks: u32) -> Self {
        Self { min: tasks, max: tasks }
    }
}

/// What each task gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TaskRequest {
    /// What adds up.
    pub amount: Amount,
    /// GPUs, if any.
    pub gpus: Option<GpuRequest>,
}

impl TaskRequest {
    /// Whole GPUs or shares of one; 0 without.
    pub fn gpu_count(&self) -> u32 {
        self.gpus.as_ref().map_or(0, |gpus| gpus.count)
    }
}

/// A condition on a node's labels. The node's own name is the label `name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Constraint {
    /// The label.
    pub label: String,
    /// What must hold of it.
    pub operator: Operator,
}

/// What must hold of a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// It has one of these values.
    In(Vec<String>),
    /// It has none of these values, or is not there.
    NotIn(Vec<String>),
    /// It is there.
    Exists,
    /// It is not there.
    Absent,
}

impl Constraint {
    /// Whether a node of this name with these labels fulfils it.
    pub fn holds(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        let value =
            if self.label == "name" { Some(name) } else { labels.get(&self.label).map(String::as_str) };
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.iter().any(|one| one == value)),
            Operator::NotIn(values) => value.is_none_or(|value| values.iter().all(|one| one != value)),
            Operator::Exists => value.is_some(),
            Operator::Absent => value.is_none(),
        }
    }
}

/// What nodes should fulfil if they can.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Preference {
    /// The condition.
    pub constraint: Constraint,
    /// How much it matters beside others, 1 to 100; negative to keep away.
    pub weight: i32,
}

/// What a whole gang must be within.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// One PCIe switch of one node: its GPUs all are below it.
    Switch,
    /// One node.
    Node,
    /// One network switch.
    Leaf,
    /// One rack.
    Rack,
    /// Nothing.
    #[default]
    Any,
}

/// What a gang does not share with other tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Isolation {
    /// It shares all.
    #[default]
    Shared,
    /// Its CPUs are whole ones of its own: a task takes its CPUs rounded up.
    Cores,
    /// No GPU of another tenant is below the PCIe switches of its GPUs.
    Switch,
    /// No task of another tenant is on its nodes.
    Node,
}

/// Something a gang reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Input {
    /// Digest of the artefact or chunk.
    pub digest: String,
    /// Its size.
    pub bytes: u64,
}

/// How a gang's tasks talk to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Communication {
    /// Hardly.
    #[default]
    None,
    /// Each with the next rank, as all-reduce does.
    Ring,
    /// Each with each, as experts do.
    AllToAll,
}

impl Gang {
    /// What one task takes of a node: with cores of its own, CPUs are rounded up.
    pub fn taken(&self) -> Amount {
        let mut amount = self.task.amount;
        if self.isolation == Isolation::Cores {
            amount.cpu_milli = amount.cpu_milli.div_ceil(1000).saturating_mul(1000);
        }
        amount
    }

    /// Whether it may run beside these taints.
    pub fn tolerates(&self, taints: &[Taint]) -> bool {
        taints.iter().all(|taint| {
            self.tolerations.iter().any(|(key, value)| {
                *key == taint.key && value.as_ref().is_none_or(|value| *value == taint.value)
            })
        })
    }
}

impl Default for Gang {
    /// One container of nothing, which a caller fills in.
    fn default() -> Self {
        Self {
            id: String::new(),
            tenant: String::new(),
            pool: String::new(),
            class: IsolationClass::Container,
            tasks: Size::exactly(1),
            task: TaskRequest::default(),
            constraints: Vec::new(),
            tolerations: Vec::new(),
            preferences: Vec::new(),
            scope: Scope::Any,
            isolation: Isolation::Shared,
            inputs: Vec::new(),
            communication: Communication::None,
            priority: 0,
            preemptible: false,
            grace_ms: 0,
            submitted_ms: 0,
            estimate_ms: None,
            kind: String::new(),
        }
    }
}
