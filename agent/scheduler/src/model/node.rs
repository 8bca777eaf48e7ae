//! Nodes: what they have, where they stand, and whether they take work.

use std::collections::BTreeMap;

use lathe_api::job::IsolationClass;

use super::{Amount, Gpu};

/// A node, as it is when nothing runs on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Node {
    /// Unique.
    pub name: String,
    /// What tasks can have of it when it runs none.
    pub total: Amount,
    /// Its GPUs that can be given away, in the node's order; at most 64.
    pub gpus: Vec<Gpu>,
    /// Its NUMA nodes; empty where they do not matter.
    pub numa: Vec<NumaNode>,
    /// Classes that run on it.
    pub classes: Vec<IsolationClass>,
    /// Why the other classes do not, one line each.
    pub class_problems: Vec<String>,
    /// What keeps GPUs of it from being given to sandboxes, one line each.
    pub gpu_problems: Vec<String>,
    /// For constraints and pools.
    pub labels: BTreeMap<String, String>,
    /// What gangs must tolerate to run here.
    pub taints: Vec<Taint>,
    /// The network switch that it hangs on.
    pub leaf: Option<String>,
    /// The rack that it stands in.
    pub rack: Option<String>,
    /// How fast it fetches artefacts, megabits a second, measured or the link's; 0 if not known.
    pub fetch_mbps: u32,
    /// Images, datasets and models (or chunks of them) that are there, by digest, with bytes.
    pub artefacts: BTreeMap<String, u64>,
    /// Whether it takes work.
    pub offer: Offer,
    /// When it will not be there.
    pub maintenance: Vec<Window>,
}

/// A NUMA node of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NumaNode {
    /// What tasks can have of it; sandboxes do not count here.
    pub total: Amount,
}

/// Whether a node takes work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Offer {
    /// It does.
    #[default]
    Open,
    /// An operator said that it takes no more; what runs stays.
    Cordoned {
        /// What the operator said.
        reason: String,
    },
    /// An operator wants it empty: what may move, moves.
    Draining {
        /// What the operator said.
        reason: String,
    },
    /// It refused plans or lost tasks again and again.
    Suspected {
        /// What it said.
        reason: String,
    },
}

/// Keeps away what does not tolerate it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Taint {
    /// Key.
    pub key: String,
    /// Value; may be empty.
    pub value: String,
}

/// A time during which a node will not be there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// From, milliseconds.
    pub from_ms: u64,
    /// Until, milliseconds; not included.
    pub until_ms: u64,
    /// What for.
    pub reason: String,
}
