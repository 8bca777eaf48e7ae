//! What the planner decides, and why it leaves the rest waiting.

use std::fmt;

use lathe_api::MemorySize;
use lathe_api::job::IsolationClass;

use super::snapshot::Capacity;

/// Every gang of the input is in exactly one of the two, in the input's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Gangs to start.
    pub placements: Vec<Placement>,
    /// Gangs that wait.
    pub waiting: Vec<Waiting>,
}

/// A gang and the node of each rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The gang.
    pub gang: String,
    /// The node's name for each rank, from rank 0. Ranks of one node are consecutive.
    pub nodes: Vec<String>,
}

/// A gang that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The gang.
    pub gang: String,
    /// The dominant reason.
    pub reason: Reason,
}

/// Why a gang waits; displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no node at all.
    NoNodes,
    /// No node supports the class.
    NoNodeForClass {
        /// The class.
        class: IsolationClass,
        /// What nodes say about it, as `node: problem`.
        problems: Vec<String>,
    },
    /// No node has as many usable GPUs as one task needs, whatever runs.
    NoNodeForGpus {
        /// By each task.
        needed: u32,
        /// On the node of the class that has most.
        most: u32,
        /// What nodes say about GPUs that cannot be used, as `node: problem`.
        problems: Vec<String>,
    },
    /// It does not fit even on empty nodes.
    LargerThanCluster {
        /// The gang's size.
        tasks: u32,
        /// Each task's size.
        task: Capacity,
        /// How many such tasks the nodes hold when empty.
        holds: u32,
    },
    /// No node has as many free GPUs as one task needs.
    GpusOnOneNode {
        /// By each task.
        needed: u32,
        /// On the node of the class that has most.
        most: u32,
    },
    /// Too few GPUs are free.
    Gpus {
        /// In all.
        needed: u64,
        /// On nodes of the class.
        free: u64,
    },
    /// Too few CPUs are free.
    Cpus {
        /// In all.
        needed: u64,
        /// On nodes of the class.
        free: u64,
    },
    /// Too little memory is free.
    Memory {
        /// In all, bytes.
        needed: u64,
        /// On nodes of the class, bytes.
        free: u64,
    },
    /// Enough is free in sum, but not in pieces of a task's size.
    Fragmented {
        /// The gang's size.
        tasks: u32,
        /// Each task's size.
        task: Capacity,
        /// How many such tasks fit now.
        fit: u32,
    },
    /// An earlier gang waits.
    Behind {
        /// That gang.
        gang: String,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNodes => f.write_str("no node is ready"),
            Self::NoNodeForClass { class, problems } => {
                write!(f, "no ready node runs class {}", class_name(*class))?;
                if problems.is_empty() { Ok(()) } else { write!(f, ": {}", problems.join("; ")) }
            }
            Self::NoNodeForGpus { needed, most, problems } => {
                write!(f, "needs {}, the most that a ready node can give is {most}", Gpus(*needed))?;
                if problems.is_empty() { Ok(()) } else { write!(f, ": {}", problems.join("; ")) }
            }
            Self::GpusOnOneNode { needed, most } => {
                write!(f, "needs {}, the largest number free on one node is {most}", Gpus(*needed))
            }
            Self::Gpus { needed, free } => {
                write!(f, "needs {needed} GPUs in total across nodes; {free} are free")
            }
            Self::LargerThanCluster { tasks, task, holds } => write!(
                f,
                "larger than the whole cluster: needs {}, the ready nodes hold {holds} of them when empty; \
                 waits until nodes are added",
                Tasks(*tasks, *task),
            ),
            Self::Cpus { needed, free } => {
                write!(f, "needs {needed} CPUs in total across nodes; {free} are free")
            }
            Self::Memory { needed, free } => write!(
                f,
                "needs {} of memory in total across nodes; {} are free",
                MemorySize::from_bytes(*needed),
                // Whole MiB: the exact byte count of a node's free memory is noise here.
                MemorySize::from_mib(*free >> 20),
            ),
            Self::Fragmented { tasks, task, fit } => {
                write!(
                    f,
                    "needs room for {}; only {fit} of them fit beside what runs now",
                    Tasks(*tasks, *task)
                )
            }
            Self::Behind { gang } => write!(f, "behind job {gang}, which came first"),
        }
    }
}

struct Tasks(u32, Capacity);

impl fmt::Display for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: u32| if count == 1 { "" } else { "s" };
        let Self(tasks, task) = self;
        let memory = MemorySize::from_bytes(task.memory_bytes);
        let (cpus, gpus) = (task.cpus, task.gpus);
        write!(f, "{tasks} task{} of {cpus} CPU{}", plural(*tasks), plural(cpus))?;
        match gpus {
            0 => write!(f, " and {memory}"),
            _ => write!(f, ", {memory} and {}", Gpus(gpus)),
        }
    }
}

struct Gpus(u32);

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} GPU{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}

/// The class as users write it.
fn class_name(class: IsolationClass) -> &'static str {
    match class {
        IsolationClass::Microvm => "microvm",
        IsolationClass::Unikernel => "unikernel",
        IsolationClass::Container => "container",
    }
}
