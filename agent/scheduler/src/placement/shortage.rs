//! Why there is no room for a gang.

use std::fmt;

use lathe_api::MemorySize;
use lathe_api::job::IsolationClass;

use crate::model::{Constraint, Isolation, Operator, Scope, Taint, TaskRequest};

/// Why there is no room for a gang; displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// There is no node at all.
    NoNodes,
    /// The pool has no node.
    NotInPool {
        /// Its name.
        pool: String,
    },
    /// A constraint holds on no node that is left.
    NoNodeForConstraint {
        /// It.
        constraint: Constraint,
    },
    /// Nodes that match have taints that it does not tolerate.
    Tainted {
        /// How many match but for that.
        nodes: usize,
        /// One of the taints.
        taint: Taint,
    },
    /// Nodes that match take no work.
    Closed {
        /// How many match.
        nodes: usize,
        /// Why not the first of them.
        what: Filtered,
        /// Its name.
        first: String,
        /// What was said about it.
        reason: String,
    },
    /// No node has a GPU of these models.
    NoGpuModel {
        /// Asked for.
        models: Vec<String>,
        /// That there are.
        there: Vec<String>,
    },
    /// No node has GPUs with so much memory.
    NoGpuMemory {
        /// By each, bytes.
        needed: u64,
        /// Of the largest, bytes.
        most: u64,
    },
    /// No node's GPUs can be partitioned so.
    NoGpuProfile {
        /// The MIG profile.
        profile: String,
    },
    /// No instance of the profile is free.
    NoInstance {
        /// The MIG profile.
        profile: String,
    },
    /// It would run into the maintenance of all nodes that match.
    Maintenance {
        /// How many match.
        nodes: usize,
        /// Of the window that ends last.
        reason: String,
    },
    /// There would be room beside other tenants, which it, or one that runs, does not want.
    Isolated {
        /// What the gang demands.
        isolation: Isolation,
        /// The gang's size.
        tasks: u32,
        /// How many of its tasks fit.
        fit: u32,
    },
    /// Too few GPUs are free below one PCIe switch.
    GpusOnOneSwitch {
        /// Of the whole gang.
        needed: u32,
        /// Below the switch that has most.
        most: u32,
        /// The node of that.
        node: String,
    },
    /// No group of its scope holds it even when empty.
    LargerThanGroup {
        /// The gang's size.
        tasks: u32,
        /// Each task's size.
        task: TaskRequest,
        /// What it must be within.
        scope: Scope,
        /// How many such tasks the largest group holds when empty.
        holds: u64,
    },
    /// Enough is free in sum, but in no group of its scope.
    Group {
        /// The gang's size.
        tasks: u32,
        /// Each task's size.
        task: Box<TaskRequest>,
        /// What it must be within.
        scope: Scope,
        /// How many such tasks fit into the group that has most room.
        holds: u64,
        /// A node of that.
        node: String,
    },
    /// Too few hugepages are free.
    Hugepages {
        /// In all, bytes.
        needed: u64,
        /// On nodes that match, bytes.
        free: u64,
    },
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

/// Why a node takes no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtered {
    /// An operator said that it takes no more.
    Cordoned,
    /// An operator wants it empty.
    Draining,
    /// It refused plans or lost tasks again and again.
    Suspected,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNodes => f.write_str("no node is ready"),
            Self::NotInPool { .. }
            | Self::NoNodeForConstraint { .. }
            | Self::Tainted { .. }
            | Self::Closed { .. } => self.filtered(f),
            Self::NoGpuModel { .. }
            | Self::NoGpuMemory { .. }
            | Self::NoGpuProfile { .. }
            | Self::NoInstance { .. }
            | Self::GpusOnOneSwitch { .. } => self.devices(f),
            Self::Maintenance { .. }
            | Self::Isolated { .. }
            | Self::LargerThanGroup { .. }
            | Self::Group { .. } => self.groups(f),
            Self::Hugepages { needed, free } => write!(
                f,
                "needs {} of hugepages in total across nodes; {} are free",
                MemorySize::from_bytes(*needed),
                MemorySize::from_mib(*free >> 20),
            ),
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

impl Shortage {
    /// Shortages of nodes that pass the filters.
    fn filtered(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInPool { pool } => write!(f, "pool {pool:?} has no ready node"),
            Self::NoNodeForConstraint { constraint } => {
                write!(
                    f,
                    "constraint `{}` holds on no ready node that the others leave",
                    Condition(constraint)
                )
            }
            Self::Tainted { nodes, taint: Taint { key, value } } => {
                let value = if value.is_empty() { String::new() } else { format!("={value}") };
                write!(f, "{} taints that it does not tolerate: {key}{value}", All(*nodes, "has", "have"))
            }
            Self::Closed { nodes, what, first, reason } => {
                let what = match what {
                    Filtered::Cordoned => "cordoned",
                    Filtered::Draining => "being drained",
                    Filtered::Suspected => "suspected of failing",
                };
                let all = All(*nodes, "is", "are");
                write!(f, "{all} {what} ({first}{})", Said(reason))
            }
            _ => Ok(()),
        }
    }

    /// Shortages of devices.
    fn devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGpuModel { models, there } => {
                write!(f, "no ready node has a GPU of model {}", models.join(" or "))?;
                if there.is_empty() { Ok(()) } else { write!(f, "; there are {}", there.join(", ")) }
            }
            Self::NoGpuMemory { needed, most } => write!(
                f,
                "needs GPUs with {} of memory, the largest of a ready node has {}",
                MemorySize::from_bytes(*needed),
                MemorySize::from_mib(*most >> 20),
            ),
            Self::NoGpuProfile { profile } => {
                write!(f, "no GPU of a ready node can be partitioned into {profile}")
            }
            Self::NoInstance { profile } => write!(f, "needs a MIG instance {profile}; none is free"),
            Self::GpusOnOneSwitch { needed, most, node } => {
                write!(
                    f,
                    "needs {} on one switch; the largest free group is {most} on node {node}",
                    Gpus(*needed)
                )
            }
            _ => Ok(()),
        }
    }

    /// Shortages of groups of nodes.
    fn groups(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Maintenance { nodes, reason } => {
                let all = All(*nodes, "has", "have");
                write!(f, "{all} maintenance before it would have ended{}", Said(reason))
            }
            Self::Isolated { isolation, tasks, fit } => {
                let needs = match isolation {
                    Isolation::Node => "needs nodes without other tenants",
                    Isolation::Switch => "needs PCIe switches without other tenants",
                    Isolation::Shared | Isolation::Cores => {
                        "other tenants keep nodes or switches to themselves"
                    }
                };
                write!(f, "{needs}; {fit} of {tasks} tasks fit")
            }
            Self::LargerThanGroup { tasks, task, scope, holds } => write!(
                f,
                "larger than one {}: needs {}, the largest holds {holds} of them when empty",
                scope_name(*scope),
                Tasks(*tasks, task),
            ),
            Self::Group { tasks, task, scope, holds, node } => {
                let scope = scope_name(*scope);
                write!(f, "needs room for {} on one {scope}; ", Tasks(*tasks, task))?;
                match *holds {
                    0 => write!(f, "none of them fits now"),
                    _ => write!(f, "the largest free group has room for {holds}, with node {node}"),
                }
            }
            _ => Ok(()),
        }
    }
}

/// "all 3 nodes that match are", or "the only node that matches is".
struct All(usize, &'static str, &'static str);

impl fmt::Display for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(nodes, one, many) = self;
        match nodes {
            1 => write!(f, "the only node that matches {one}"),
            nodes => write!(f, "all {nodes} nodes that match {many}"),
        }
    }
}

/// What somebody said, if he said anything.
struct Said<'a>(&'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

/// A constraint as users write it.
struct Condition<'a>(&'a Constraint);

impl fmt::Display for Condition<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Constraint { label, operator } = self.0;
        match operator {
            Operator::In(values) => write!(f, "{label} in [{}]", values.join(", ")),
            Operator::NotIn(values) => write!(f, "{label} not in [{}]", values.join(", ")),
            Operator::Exists => write!(f, "{label} exists"),
            Operator::Absent => write!(f, "{label} absent"),
        }
    }
}

fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Switch => "PCIe switch",
        Scope::Node => "node",
        Scope::Leaf => "leaf switch",
        Scope::Rack => "rack",
        Scope::Any => "cluster",
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
