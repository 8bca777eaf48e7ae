//! A cluster at one moment: nodes, what is free of each, and what runs.
//!
//! Nodes are behind an [`Arc`] and what is free is small, so that a copy to try something on is
//! cheap. Every change is written to a log of node indices: whoever caches something by node asks for
//! what changed since it last looked.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Amount, Gang, GpuFree, GpuPlace, Node};

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    nodes: Arc<Vec<Node>>,
    by_name: Arc<HashMap<String, u32>>,
    free: Vec<Free>,
    running: BTreeMap<String, Running>,
    changes: Vec<u32>,
}

/// What is free of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Free {
    /// What adds up.
    pub amount: Amount,
    /// By GPU, in the node's order.
    pub gpus: Vec<GpuFree>,
    /// By NUMA node; empty where they do not matter. A task that takes from none of them in
    /// particular takes from the freest first.
    pub numa: Vec<Amount>,
    /// Tasks by tenant: name and number, in the order of the names.
    pub tenants: Vec<(Arc<str>, u32)>,
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
    /// The gang runs already.
    #[error("gang {0} runs already")]
    Twice(String),
}

impl Cluster {
    /// Empty nodes.
    pub fn new(nodes: Vec<Node>) -> Self {
        let free = nodes.iter().map(Free::all).collect();
        let by_name = nodes.iter().zip(0..).map(|(node, index)| (node.name.clone(), index)).collect();
        Self {
            nodes: Arc::new(nodes),
            by_name: Arc::new(by_name),
            free,
            running: BTreeMap::new(),
            changes: Vec::new(),
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
    pub fn changes(&self, since: usize) -> (usize, &[u32]) {
        (self.changes.len(), self.changes.get(since..).unwrap_or_default())
    }

    /// Replaces what is known of a node, which keeps its index, name and number of GPUs; what runs
    /// there goes on.
    pub fn update(&mut self, index: u32, node: Node) {
        let old = &self.nodes[index as usize];
        debug_assert_eq!((&old.name, old.gpus.len()), (&node.name, node.gpus.len()));
        let free = &mut self.free[index as usize];
        free.amount = node.total.less(&old.total.less(&free.amount));
        Arc::make_mut(&mut self.nodes)[index as usize] = node;
        self.changes.push(index);
    }

    /// Marks what is free of a node as something else than its total less what runs: GPUs that are
    /// being scrubbed, sandboxes that should be gone.
    pub fn set_free(&mut self, index: u32, free: Free) {
        self.free[index as usize] = free;
        self.changes.push(index);
    }

    /// Takes room for one task.
    ///
    /// # Errors
    /// When it is not free; nothing changes then.
    pub fn take(&mut self, gang: &Gang, place: &TaskPlace) -> Result<(), TakeError> {
        let index = place.node as usize;
        let Some(free) = self.free.get_mut(index) else { return Err(TakeError::NoNode(place.node)) };
        free.take(&self.nodes[index].name, gang, place)?;
        self.changes.push(place.node);
        Ok(())
    }

    /// Gives back what one task took.
    pub fn give(&mut self, gang: &Gang, place: &TaskPlace) {
        self.free[place.node as usize].give(&self.nodes[place.node as usize], gang, place);
        self.changes.push(place.node);
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

impl Free {
    /// All of a node.
    pub fn all(node: &Node) -> Self {
        Self {
            amount: node.total,
            gpus: vec![GpuFree::ALL; node.gpus.len()],
            numa: node.numa.iter().map(|numa| numa.total).collect(),
            tenants: Vec::new(),
        }
    }

    /// Thousandths of GPUs that are free.
    pub fn gpu_milli(&self) -> u64 {
        self.gpus.iter().map(|gpu| u64::from(gpu.milli)).sum()
    }

    /// GPUs that nobody uses.
    pub fn whole_gpus(&self) -> u32 {
        u32::try_from(self.gpus.iter().filter(|gpu| gpu.is_whole()).count()).unwrap_or(u32::MAX)
    }

    pub(crate) fn take(&mut self, node: &str, gang: &Gang, place: &TaskPlace) -> Result<(), TakeError> {
        let amount = gang.task.amount;
        if !self.amount.fits(&amount) {
            return Err(TakeError::Amount { node: node.to_owned() });
        }
        for (at, &GpuPlace { index, part }) in place.gpus.iter().enumerate() {
            let twice = place.gpus[..at].iter().any(|other| other.index == index);
            let free = self.gpus.get(usize::from(index)).filter(|_| !twice);
            let enough = free.is_some_and(|free| {
                free.milli >= part.milli
                    && free.slots & part.slots == part.slots
                    && free.compute >= part.compute
            });
            if !enough {
                return Err(TakeError::Gpu { node: node.to_owned(), index });
            }
        }
        for &GpuPlace { index, part } in &place.gpus {
            let free = &mut self.gpus[usize::from(index)];
            free.milli -= part.milli;
            free.slots &= !part.slots;
            free.compute -= part.compute;
        }
        self.amount = self.amount.less(&amount);
        self.take_numa(place.numa, amount);
        self.count(&gang.tenant);
        Ok(())
    }

    /// Less what a task will have, as far as that is there: for times other than now.
    pub(crate) fn withhold(&mut self, gang: &Gang, place: &TaskPlace) {
        for &GpuPlace { index, part } in &place.gpus {
            if let Some(free) = self.gpus.get_mut(usize::from(index)) {
                free.milli = free.milli.saturating_sub(part.milli);
                free.slots &= !part.slots;
                free.compute = free.compute.saturating_sub(part.compute);
            }
        }
        self.amount = self.amount.less(&gang.task.amount);
        self.take_numa(place.numa, gang.task.amount);
        self.count(&gang.tenant);
    }

    /// What is free both here and there.
    pub(crate) fn limit(&mut self, other: &Self) {
        self.amount = self.amount.least(&other.amount);
        for (one, other) in self.gpus.iter_mut().zip(&other.gpus) {
            one.milli = one.milli.min(other.milli);
            one.slots &= other.slots;
            one.compute = one.compute.min(other.compute);
        }
        for (one, other) in self.numa.iter_mut().zip(&other.numa) {
            *one = one.least(other);
        }
        for (tenant, tasks) in &other.tenants {
            match self.tenants.binary_search_by(|(name, _)| name.cmp(tenant)) {
                Ok(at) => self.tenants[at].1 = self.tenants[at].1.max(*tasks),
                Err(at) => self.tenants.insert(at, (Arc::clone(tenant), *tasks)),
            }
        }
    }

    fn count(&mut self, tenant: &str) {
        match self.tenants.binary_search_by(|(name, _)| (**name).cmp(tenant)) {
            Ok(at) => self.tenants[at].1 += 1,
            Err(at) => self.tenants.insert(at, (tenant.into(), 1)),
        }
    }

    pub(crate) fn give(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) {
        for &GpuPlace { index, part } in &place.gpus {
            if let Some(free) = self.gpus.get_mut(usize::from(index)) {
                // No more than all: GPUs may have been marked as free meanwhile.
                free.milli = free.milli.saturating_add(part.milli).min(GpuFree::ALL.milli);
                free.slots |= part.slots;
                free.compute = free.compute.saturating_add(part.compute).min(GpuFree::ALL.compute);
            }
        }
        self.amount = self.amount.plus(&gang.task.amount);
        self.give_numa(&node.numa, place.numa, gang.task.amount);
        if let Ok(at) = self.tenants.binary_search_by(|(name, _)| (**name).cmp(gang.tenant.as_str())) {
            self.tenants[at].1 -= 1;
            if self.tenants[at].1 == 0 {
                self.tenants.remove(at);
            }
        }
    }

    /// NUMA accounts are a preference, not a promise: what one lacks comes from the freest others.
    fn take_numa(&mut self, preferred: Option<u8>, mut amount: Amount) {
        amount.sandboxes = 0;
        if let Some(one) = preferred.and_then(|numa| self.numa.get_mut(usize::from(numa))) {
            let rest = amount.less(one);
            *one = one.less(&amount);
            amount = rest;
        }
        while amount != Amount::default() {
            let Some(one) = self.numa.iter_mut().max_by_key(|one| (one.cpu_milli, one.memory_bytes)) else {
                return;
            };
            let rest = amount.less(one);
            if rest == amount {
                return;
            }
            *one = one.less(&amount);
            amount = rest;
        }
    }

    fn give_numa(&mut self, nodes: &[super::NumaNode], preferred: Option<u8>, mut amount: Amount) {
        amount.sandboxes = 0;
        let preferred = preferred.map(usize::from);
        let order = preferred.into_iter().chain((0..self.numa.len()).filter(|&one| Some(one) != preferred));
        for at in order {
            let (Some(one), Some(node)) = (self.numa.get_mut(at), nodes.get(at)) else { continue };
            let room = node.total.less(one);
            let rest = amount.less(&room);
            *one = one.plus(&amount.less(&rest));
            amount = rest;
        }
    }
}
