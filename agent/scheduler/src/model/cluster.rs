//! A cluster at one moment: nodes, what is free of each, and what runs.
//!
//! Nodes are behind an [`Arc`] and what is free is small, so that a copy to try something on is
//! cheap. Every change is written to a log of node indices, and every node has a fingerprint of its
//! state: whoever caches something by node asks what changed, or compares fingerprints, which also
//! tell copies apart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::{Fold, Free, Gang, GpuPlace, Node};

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    nodes: Arc<Vec<Node>>,
    by_name: Arc<HashMap<String, u32>>,
    free: Vec<Free>,
    running: BTreeMap<String, Running>,
    changes: Vec<u32>,
    /// Changes that were dropped from the front of the log.
    dropped: usize,
    node_prints: Arc<Vec<u64>>,
    prints: Vec<u64>,
    /// Of all nodes' states, and of what all nodes are.
    print: u64,
    nodes_print: u64,
    /// Nodes on which a task does not share the node or a switch with all.
    isolated: BTreeSet<u32>,
}

/// Where one task is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TaskPlace {
    /// Index of the node.
    pub node: u32,
    /// Its GPUs.
    pub gpus: Vec<GpuPlace>,
    /// The NUMA node that its CPUs and memory come from, if from one.
    pub numa: Option<u8>,
}

/// A gang that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    /// What it asked for.
    pub gang: Arc<Gang>,
    /// Where each task is, by rank.
    pub tasks: Vec<TaskPlace>,
    /// Since when.
    pub started_ms: u64,
    /// When it will have ended, if anybody can tell.
    pub expected_end_ms: Option<u64>,
    /// It was told to stop, and will be gone then.
    pub stopping: bool,
}

/// A place that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// No such node.
    #[error("there is no node of index {0}")]
    NoNode(u32),
    /// CPUs, memory, hugepages or addresses.
    #[error("node {node} has no room for the task beside what runs")]
    Amount {
        /// The node.
        node: String,
    },
    /// A GPU.
    #[error("GPU {index} of node {node} is not free")]
    Gpu {
        /// The node.
        node: String,
        /// Among its GPUs.
        index: u8,
    },
    /// A tenant that demands a node or switch of its own is, or would be, beside another.
    #[error("tenant {tenant} cannot be beside others on node {node}, or others beside it")]
    Isolation {
        /// The node.
        node: String,
        /// Of the gang.
        tenant: String,
    },
    /// The gang runs already.
    #[error("gang {0} runs already")]
    Twice(String),
}

impl Cluster {
    /// Empty nodes.
    pub fn new(nodes: Vec<Node>) -> Self {
        let free: Vec<Free> = nodes.iter().map(Free::all).collect();
        let node_prints: Vec<u64> = nodes.iter().map(Fold::of).collect();
        let prints = node_prints.iter().zip(&free).map(|(node, free)| Fold::mix(*node, Fold::of(free)));
        let prints: Vec<u64> = prints.collect();
        let (print, nodes_print) = (sum(&prints), sum(&node_prints));
        let by_name = nodes.iter().zip(0..).map(|(node, index)| (node.name.clone(), index)).collect();
        Self {
            nodes: Arc::new(nodes),
            by_name: Arc::new(by_name),
            free,
            running: BTreeMap::new(),
            changes: Vec::new(),
            dropped: 0,
            node_prints: Arc::new(node_prints),
            prints,
            print,
            nodes_print,
            isolated: BTreeSet::new(),
        }
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node's index.
    pub fn index(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// What is free of each node.
    pub fn free(&self) -> &[Free] {
        &self.free
    }

    /// Gangs that run, by ID.
    pub fn running(&self) -> &BTreeMap<String, Running> {
        &self.running
    }

    /// A gang that runs, to correct what is known of it.
    pub fn running_mut(&mut self, gang: &str) -> Option<&mut Running> {
        self.running.get_mut(gang)
    }

    /// How many changes there were, and the nodes of those from `since` on. A node may be there twice.
    /// Old changes are forgotten: who asks for them gets all nodes.
    pub fn changes(&self, since: usize) -> (usize, &[u32]) {
        let since = since.saturating_sub(self.dropped);
        (self.dropped + self.changes.len(), self.changes.get(since..).unwrap_or_default())
    }

    /// A fingerprint of each node's state: what it is, and what is free of it. Copies of a cluster have
    /// the same ones where they are equal.
    pub fn fingerprints(&self) -> &[u64] {
        &self.prints
    }

    /// A fingerprint of what each node is, whatever is free of it.
    pub fn node_fingerprints(&self) -> &[u64] {
        &self.node_prints
    }

    /// A fingerprint of the states of all nodes.
    pub fn fingerprint(&self) -> u64 {
        self.print
    }

    /// A fingerprint of what all nodes are, whatever is free of them.
    pub fn nodes_fingerprint(&self) -> u64 {
        self.nodes_print
    }

    /// Whether a task that runs does not share its node or its switch with all: it matters then whose
    /// a gang is.
    pub fn is_isolated(&self) -> bool {
        !self.isolated.is_empty()
    }

    fn changed(&mut self, index: u32) {
        let at = index as usize;
        let print = Fold::mix(self.node_prints[at], Fold::of(&self.free[at]));
        let old = std::mem::replace(&mut self.prints[at], print);
        self.print = self.print.wrapping_sub(numbered(at, old)).wrapping_add(numbered(at, print));
        if self.free[at].is_isolated() {
            self.isolated.insert(index);
        } else if !self.isolated.is_empty() {
            self.isolated.remove(&index);
        }
        // A log that began with all nodes tells nobody less than the truth.
        let nodes = self.nodes.len();
        if self.changes.len() >= (16 * nodes).max(1 << 16) {
            let keep = self.changes.len() - nodes;
            self.changes.clear();
            self.changes.extend((0..nodes).filter_map(|node| u32::try_from(node).ok()));
            self.dropped += keep;
        }
        self.changes.push(index);
    }

    /// Replaces what is known of a node, which keeps its index, name and number of GPUs; what runs
    /// there goes on.
    pub fn update(&mut self, index: u32, node: Node) {
        let old = &self.nodes[index as usize];
        debug_assert_eq!((&old.name, old.gpus.len()), (&node.name, node.gpus.len()));
        let free = &mut self.free[index as usize];
        free.amount = node.total.less(&old.total.less(&free.amount));
        let print = Fold::of(&node);
        let old = std::mem::replace(&mut Arc::make_mut(&mut self.node_prints)[index as usize], print);
        let at = index as usize;
        self.nodes_print = self.nodes_print.wrapping_sub(numbered(at, old)).wrapping_add(numbered(at, print));
        Arc::make_mut(&mut self.nodes)[index as usize] = node;
        self.changed(index);
    }

    /// Marks what is free of a node as something else than its total less what runs: GPUs that are
    /// being scrubbed, sandboxes that should be gone.
    pub fn set_free(&mut self, index: u32, free: Free) {
        self.free[index as usize] = free;
        self.changed(index);
    }

    /// Takes room for one task.
    ///
    /// # Errors
    /// When it is not free; nothing changes then.
    pub fn take(&mut self, gang: &Gang, place: &TaskPlace) -> Result<(), TakeError> {
        let index = place.node as usize;
        let Some(free) = self.free.get_mut(index) else { return Err(TakeError::NoNode(place.node)) };
        free.take(&self.nodes[index], gang, place)?;
        self.changed(place.node);
        Ok(())
    }

    /// Gives back what one task took.
    pub fn give(&mut self, gang: &Gang, place: &TaskPlace) {
        self.free[place.node as usize].give(&self.nodes[place.node as usize], gang, place);
        self.changed(place.node);
    }

    /// Starts a gang whose room was taken already, task by task.
    ///
    /// # Errors
    /// When it runs.
    pub fn started(&mut self, running: Running) -> Result<(), TakeError> {
        if self.running.contains_key(&running.gang.id) {
            return Err(TakeError::Twice(running.gang.id.clone()));
        }
        self.running.insert(running.gang.id.clone(), running);
        Ok(())
    }

    /// Takes room for all tasks, and starts the gang.
    ///
    /// # Errors
    /// When a place is not free or the gang runs; nothing changes then.
    pub fn start(&mut self, running: Running) -> Result<(), TakeError> {
        if self.running.contains_key(&running.gang.id) {
            return Err(TakeError::Twice(running.gang.id.clone()));
        }
        for (done, place) in running.tasks.iter().enumerate() {
            if let Err(error) = self.take(&running.gang, place) {
                for place in &running.tasks[..done] {
                    self.give(&running.gang, place);
                }
                return Err(error);
            }
        }
        self.started(running)
    }

    /// Ends a gang, and gives back what it took.
    pub fn end(&mut self, gang: &str) -> Option<Running> {
        let running = self.running.remove(gang)?;
        for place in &running.tasks {
            self.give(&running.gang, place);
        }
        Some(running)
    }
}

/// A fingerprint that depends on where it is.
fn numbered(at: usize, print: u64) -> u64 {
    Fold::mix(print, at as u64)
}

fn sum(prints: &[u64]) -> u64 {
    prints.iter().enumerate().fold(0, |sum, (at, print)| sum.wrapping_add(numbered(at, *print)))
}
