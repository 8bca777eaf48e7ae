//! The records as the planner sees them, kept up to date by what changed.
//!
//! - [`node`], [`gang`], [`settings`]: records to nodes, gangs, pools and tenants.
//!
//! The amounts that are free of a node always follow from its record of allocations, by which
//! placements are committed, and never from sums kept here: a node that changed is counted anew.

pub mod gang;
pub mod node;
pub mod settings;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use lathe_api::job::JobState;
use lathe_api::node::NodeState;
use lathe_scheduler::model::{Free, GpuFree, GpuPlace, Node, Offer, Running, TaskPlace};
use lathe_scheduler::policy::Settings;
use lathe_scheduler::{Cluster, Gang};

use crate::coordinator::Live;
use crate::records::{Allocation, Allocations, JobRecord, Operations};
use crate::state::{Contents, Unseen};
use crate::submit::parse_sandbox_id;

/// See the module.
#[derive(Debug, Default)]
pub struct Model {
    /// Nodes that take part: those whose reports arrive.
    pub cluster: Cluster,
    /// Pools and tenants.
    pub settings: Settings,
    /// Of jobs that have not ended.
    gangs: HashMap<String, Arc<Gang>>,
    /// Of those that wait, in the order of their submission.
    pending: BTreeMap<u64, Arc<Gang>>,
    /// Where they are in it.
    numbers: HashMap<String, u64>,
}

impl Model {
    /// Takes in what changed.
    pub fn sync(&mut self, contents: &Contents, live: &HashMap<String, Live>, unseen: &Unseen, now_ms: u64) {
        if unseen.all || unseen.settings {
            self.settings = settings::settings(contents);
        }
        if unseen.all {
            self.gangs.retain(|id, _| contents.jobs.contains_key(id));
            self.pending.clear();
            self.numbers.clear();
            contents.jobs.keys().for_each(|id| self.know(contents, id));
        } else {
            unseen.jobs.iter().for_each(|id| self.know(contents, id));
        }
        let (mut nodes, mut jobs) = (unseen.nodes.clone(), unseen.jobs.clone());
        if unseen.all {
            nodes.extend(contents.nodes.keys().cloned());
            nodes.extend(self.cluster.nodes().iter().map(|node| node.name.clone()));
            jobs.extend(contents.jobs.keys().cloned());
            jobs.extend(self.cluster.running().keys().cloned());
        }
        let others = nodes.iter().filter(|name| self.renew(contents, live, name, now_ms)).count();
        if others > 0 {
            let parts = contents.nodes.keys().filter_map(|name| describe(contents, live, name, now_ms));
            self.cluster = Cluster::new(parts.collect());
            (nodes, jobs) =
                (contents.nodes.keys().cloned().collect(), contents.jobs.keys().cloned().collect());
        }
        for id in &jobs {
            self.rerun(contents, id, &mut nodes);
        }
        for name in nodes {
            self.refill(contents, live, &name);
        }
    }

    /// Gangs that wait, in the order of their submission.
    pub fn pending(&self) -> Vec<Arc<Gang>> {
        self.pending.values().cloned().collect()
    }

    /// A job's gang, if it has not ended.
    pub fn gang(&self, job: &str) -> Option<&Arc<Gang>> {
        self.gangs.get(job)
    }

    /// Makes the gang of a job, or forgets it.
    fn know(&mut self, contents: &Contents, id: &str) {
        if let Some(number) = self.numbers.remove(id) {
            self.pending.remove(&number);
        }
        let Some(record) = contents.jobs.get(id).map(|record| &record.value) else {
            self.gangs.remove(id);
            return;
        };
        // What a job asks for never changes.
        let gang = self.gangs.entry(id.to_owned()).or_insert_with(|| Arc::new(gang::gang(record)));
        if waits(record) {
            self.pending.insert(record.sequence, Arc::clone(gang));
            self.numbers.insert(id.to_owned(), record.sequence);
        }
    }

    /// Takes over what a node is now. One that is lost stays, with nothing to give, so that the others keep
    /// their places; one that has other GPUs makes a new cluster necessary, which is what it says.
    fn renew(&mut self, contents: &Contents, live: &HashMap<String, Live>, name: &str, now_ms: u64) -> bool {
        let node = describe(contents, live, name, now_ms);
        let Some(index) = self.cluster.index(name) else {
            if let Some(node) = node {
                self.cluster.push(node);
            }
            return false;
        };
        let known = &self.cluster.nodes()[index as usize];
        if node.is_none() && !contents.nodes.contains_key(name) {
            // It was given back, and does not keep a place for ever.
            return true;
        }
        let node = node.unwrap_or_else(|| lost(known));
        if node != *known {
            if !node.gpus.iter().map(|gpu| &gpu.id).eq(known.gpus.iter().map(|gpu| &gpu.id)) {
                return true;
            }
            self.cluster.update(index, node);
        }
        false
    }

    /// What runs of a job; the nodes where that is different now are added.
    fn rerun(&mut self, contents: &Contents, id: &str, nodes: &mut BTreeSet<String>) {
        let mut touch = |cluster: &Cluster, tasks: &[TaskPlace]| {
            nodes.extend(tasks.iter().map(|task| cluster.nodes()[task.node as usize].name.clone()));
        };
        if let Some(ended) = self.cluster.end(id) {
            touch(&self.cluster, &ended.tasks);
        }
        let (Some(record), Some(gang)) = (contents.jobs.get(id), self.gangs.get(id)) else { return };
        let record = &record.value;
        let tasks: Vec<TaskPlace> = record
            .job
            .tasks
            .iter()
            .filter_map(|task| {
                let (node, sandbox) = (task.node.as_ref()?, task.sandbox.as_ref()?);
                let allocation = contents.allocations.get(node)?.value.sandboxes.get(sandbox)?;
                self.place(node, allocation)
            })
            .collect();
        if tasks.is_empty() {
            return;
        }
        touch(&self.cluster, &tasks);
        let started_ms = record.placed_ms.unwrap_or(record.job.submitted_ms);
        let running = Running {
            // One of which tasks have ended already cannot have others added or removed.
            gang: if tasks.len() == record.job.tasks.len() {
                Arc::clone(gang)
            } else {
                rigid(gang, tasks.len())
            },
            tasks,
            started_ms,
            expected_end_ms: gang.estimate_ms.map(|estimate| started_ms.saturating_add(estimate)),
            stopping: record.stopping.is_some(),
        };
        // It ended just now, if it ran.
        let _ = self.cluster.started(running);
    }

    /// Counts anew what is free of a node.
    fn refill(&mut self, contents: &Contents, live: &HashMap<String, Live>, name: &str) {
        let Some(index) = self.cluster.index(name) else { return };
        let taking_part = contents.nodes.get(name).zip(live.get(name));
        let Some((record, live)) = taking_part.filter(|_| takes_part(contents, live, name)) else {
            let mut nothing = Free::all(&self.cluster.nodes()[index as usize]);
            nothing.gpus.fill(GpuFree::NONE);
            self.cluster.set_free(index, nothing);
            return;
        };
        let none = Allocations::default();
        let allocations = contents.allocations.get(name).map_or(&none, |of| &of.value);
        let node = &self.cluster.nodes()[index as usize];
        self.cluster.set_free(index, node::free(node, &record.value, allocations, live));
        if live.strays > 0 {
            return;
        }
        for (sandbox, allocation) in &allocations.sandboxes {
            let gang = parse_sandbox_id(sandbox).and_then(|(job, _, _)| self.gangs.get(job)).cloned();
            let place = self.place(name, allocation);
            let taken = gang.zip(place).is_some_and(|(gang, place)| self.cluster.take(&gang, &place).is_ok());
            if !taken {
                self.subtract(index, allocation);
            }
        }
    }

    /// Takes off what an allocation takes although there is less: a node that shrank.
    fn subtract(&mut self, index: u32, allocation: &Allocation) {
        let mut free = self.cluster.free()[index as usize].clone();
        free.amount = free.amount.less(&allocation.amount());
        for (gpu, left) in self.cluster.nodes()[index as usize].gpus.iter().zip(&mut free.gpus) {
            if allocation.gpus.iter().any(|address| address.to_string() == gpu.id) {
                *left = GpuFree::NONE;
            }
        }
        self.cluster.set_free(index, free);
    }

    fn place(&self, node: &str, allocation: &Allocation) -> Option<TaskPlace> {
        let index = self.cluster.index(node)?;
        let gpus = &self.cluster.nodes()[index as usize].gpus;
        let gpus = allocation.gpus.iter().filter_map(|address| {
            let id = address.to_string();
            let at = gpus.iter().position(|gpu| gpu.id == id)?;
            Some(GpuPlace { index: u8::try_from(at).ok()?, part: GpuFree::ALL })
        });
        Some(TaskPlace { node: index, gpus: gpus.collect(), numa: allocation.numa })
    }
}

fn rigid(gang: &Gang, tasks: usize) -> Arc<Gang> {
    let tasks = lathe_scheduler::model::Size::exactly(u32::try_from(tasks).unwrap_or(u32::MAX));
    Arc::new(Gang { tasks, ..gang.clone() })
}

/// Whether a job is to be placed.
pub fn waits(record: &JobRecord) -> bool {
    let held = record.replica.as_ref().is_some_and(|replica| replica.held_until_ms.is_some());
    record.job.state == JobState::Pending && !record.cancelled && !held
}

/// Whether a node's reports arrive, and arrived since this process started: what it runs beside its
/// allocations is known from them alone.
pub fn takes_part(contents: &Contents, live: &HashMap<String, Live>, name: &str) -> bool {
    live.get(name).is_some_and(|live| live.last_heartbeat_ms > 0)
        && contents.alive.contains_key(name)
        && contents.nodes.get(name).is_some_and(|record| record.value.state == NodeState::Ready)
}

/// A node that does not take part, which keeps its place.
fn lost(known: &Node) -> Node {
    const WHY: &str = "it stopped reporting";
    Node {
        name: known.name.clone(),
        gpus: known.gpus.clone(),
        numa: known.numa.clone(),
        labels: known.labels.clone(),
        class_problems: vec![WHY.to_owned()],
        offer: Offer::Suspected { reason: WHY.to_owned() },
        ..Node::default()
    }
}

fn describe(contents: &Contents, live: &HashMap<String, Live>, name: &str, now_ms: u64) -> Option<Node> {
    if !takes_part(contents, live, name) {
        return None;
    }
    let none = Operations::default();
    let operations = contents.operations.get(name).map_or(&none, |record| &record.value);
    Some(node::node(&contents.nodes.get(name)?.value, operations, live.get(name)?, now_ms))
}
