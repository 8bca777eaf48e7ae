//! Why there is no room for a gang.

use std::fmt;

use lathe_api::MemorySize;
use lathe_api::job::IsolationClass;

use crate::model::TaskRequest;

/// Why there is no room for a gang; displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortage {
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
        task: TaskRequest,
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
        task: TaskRequest,
        /// How many such tasks fit now.
        fit: u32,
    },
}

impl fmt::Display for Shortage {
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
                Tasks(*tasks, task),
            ),
            Self::Cpus { needed, free } => {
                write!(f, "needs {} CPUs in total across nodes; {} are free", Cpus(*needed), Cpus(*free))
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
                    Tasks(*tasks, task)
                )
            }
        }
    }
}

struct Tasks<'a>(u32, &'a TaskRequest);

impl fmt::Display for Tasks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(tasks, task) = self;
        let plural = |one: bool| if one { "" } else { "s" };
        let memory = MemorySize::from_bytes(task.amount.memory_bytes);
        let cpus = task.amount.cpu_milli;
        write!(f, "{tasks} task{} of {} CPU{}", plural(*tasks == 1), Cpus(cpus), plural(cpus == 1000))?;
        match task.gpu_count() {
            0 => write!(f, " and {memory}"),
            gpus => write!(f, ", {memory} and {}", Gpus(gpus)),
        }
    }
}

/// Thousandths of CPUs, as people write them.
struct Cpus(u64);

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0 as f64 / 1000.0)
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
