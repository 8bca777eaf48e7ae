//! What the planner sees: nodes as they are now, and the gangs that wait.

use lathe_api::job::IsolationClass;

/// An amount of what a task is carved from, and of what a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// GPUs that can be given to sandboxes.
    pub gpus: u32,
    /// Sandboxes: bounded by the addresses in a node's subnet. A task takes one.
    pub sandboxes: u32,
}

impl Capacity {
    /// How many tasks of this size fit.
    pub fn holds(self, task: Self) -> u32 {
        let by = |have: u64, need: u64| have.checked_div(need).unwrap_or(u64::MAX);
        let count = by(self.cpus.into(), task.cpus.into())
            .min(by(self.memory_bytes, task.memory_bytes))
            .min(by(self.gpus.into(), task.gpus.into()))
            .min(by(self.sandboxes.into(), task.sandboxes.into()));
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Less one task, which must fit.
    pub(crate) fn take(&mut self, task: Self) {
        self.cpus -= task.cpus;
        self.memory_bytes -= task.memory_bytes;
        self.gpus -= task.gpus;
        self.sandboxes -= task.sandboxes;
    }
}

/// A node that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Unique; ties are broken by it.
    pub name: String,
    /// What tasks can have of it when it runs none.
    pub total: Capacity,
    /// What tasks can have of it now.
    pub free: Capacity,
    /// Classes that run on it.
    pub classes: Vec<IsolationClass>,
    /// Why the other classes do not, one line each.
    pub class_problems: Vec<String>,
    /// What keeps GPUs of it from being given to sandboxes, one line each.
    pub gpu_problems: Vec<String>,
}

/// A gang: equal tasks that start together or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gang {
    /// Its job.
    pub id: String,
    /// What every node it runs on must support.
    pub class: IsolationClass,
    /// How many tasks; at least 1.
    pub tasks: u32,
    /// What each gets.
    pub task: Capacity,
}

/// In which order, and how strictly, gangs are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// By arrival; see the crate's documentation.
    #[default]
    FirstComeFirstServed,
}
