//! Room over time: what is free of a node from one time to another, if what runs ends when it should
//! and what is reserved starts when it should.
//!
//! Nothing is copied to try something: the cluster itself is changed node by node and put back
//! ([`Overlay`]), so that whoever caches by node looks only at the nodes that differ.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::known::Item;
use crate::model::{Cluster, Free, Gang, Node, TaskPlace};

/// For ever.
pub(super) const FOREVER: u64 = u64::MAX;

/// Nodes whose free room was changed to try something, with what is really free of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Overlay {
    saved: BTreeMap<u32, Free>,
}

impl Overlay {
    /// What is really free of a node.
    pub fn real<'a>(&'a self, cluster: &'a Cluster, node: u32) -> &'a Free {
        self.saved.get(&node).unwrap_or(&cluster.free()[node as usize])
    }

    pub fn set(&mut self, cluster: &mut Cluster, node: u32, free: Free) {
        self.save(cluster, node);
        cluster.set_free(node, free);
    }

    /// As if the task were gone.
    pub fn give(&mut self, cluster: &mut Cluster, gang: &Gang, place: &TaskPlace) {
        self.save(cluster, place.node);
        cluster.give(gang, place);
    }

    fn save(&mut self, cluster: &Cluster, node: u32) {
        self.saved.entry(node).or_insert_with(|| cluster.free()[node as usize].clone());
    }

    /// Room was taken on the changed cluster for good.
    pub fn took(&mut self, cluster: &Cluster, gang: &Gang, places: &[TaskPlace]) {
        for place in places {
            if let Some(free) = self.saved.get_mut(&place.node) {
                let taken = free.take(&cluster.nodes()[place.node as usize], gang, place);
                debug_assert_eq!(taken, Ok(()), "a view shows no more than there is");
            }
        }
    }

    /// Gives back what a trial took where [`Overlay::restore`] does not put it back anyway.
    pub fn undo(&mut self, cluster: &mut Cluster, gang: &Gang, tasks: &[TaskPlace]) {
        for place in tasks.iter().filter(|place| !self.saved.contains_key(&place.node)) {
            cluster.give(gang, place);
        }
    }

    /// All nodes as they are.
    pub fn restore(&mut self, cluster: &mut Cluster) {
        for (node, free) in std::mem::take(&mut self.saved) {
            cluster.set_free(node, free);
        }
    }
}

/// Room that a waiting gang will have.
#[derive(Clone, Debug)]
pub(super) struct Reservation {
    pub gang: Arc<Gang>,
    pub tasks: Vec<TaskPlace>,
    /// Names of the nodes, for indices do not outlive a cluster.
    pub names: Vec<String>,
    pub from_ms: u64,
    pub until_ms: u64,
    /// Nobody else gets the room meanwhile, however short he says he will run.
    pub firm: bool,
    /// The gang whose end makes the room, if one's.
    pub after: Option<String>,
    /// Whether `from_ms` is more than a guess.
    pub known: bool,
    /// Gangs that were told to make it.
    pub makers: Vec<String>,
}

/// A gang that runs, and when it will have ended.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub item: Arc<Item>,
    /// Nodes that it is on; the same one may be there twice.
    pub nodes: Arc<[u32]>,
    pub end_ms: u64,
    /// Whether the end is more than a guess.
    pub known: bool,
}

/// Runs by node: those of the beginning of the cycle one node after the other in one list, and those
/// that started since.
#[derive(Clone, Debug, Default)]
struct ByNode {
    /// Where a node's begin; the next one's end.
    begins: Vec<u32>,
    runs: Vec<u32>,
    started: BTreeMap<u32, Vec<u32>>,
}

impl ByNode {
    fn of(runs: &[Run]) -> Self {
        let nodes = runs.iter().flat_map(|run| run.nodes.iter()).max().map_or(0, |most| *most as usize + 1);
        let mut begins = vec![0; nodes + 1];
        for node in runs.iter().flat_map(|run| run.nodes.iter()) {
            begins[*node as usize + 1] += 1;
        }
        for node in 0..nodes {
            begins[node + 1] += begins[node];
        }
        let mut next = begins.clone();
        let mut list = vec![0; begins[nodes] as usize];
        for (run, at) in runs.iter().zip(0..) {
            for node in run.nodes.iter() {
                let next = &mut next[*node as usize];
                list[*next as usize] = at;
                *next += 1;
            }
        }
        Self { begins, runs: list, started: BTreeMap::new() }
    }

    fn started(&mut self, run: u32, nodes: &[u32]) {
        for node in nodes {
            self.started.entry(*node).or_default().push(run);
        }
    }

    fn on(&self, node: u32) -> impl Iterator<Item = u32> {
        let at = node as usize;
        let bounds = self.begins.get(at).zip(self.begins.get(at + 1));
        let runs = bounds.map_or(&[][..], |(from, to)| &self.runs[*from as usize..*to as usize]);
        let started = self.started.get(&node).map_or(&[][..], Vec::as_slice);
        let mut last = None;
        // One that has several tasks on the node may be there several times, one after the other.
        runs.iter().chain(started).copied().filter(move |run| last.replace(*run) != Some(*run))
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Rooms {
    pub now_ms: u64,
    pub runs: Vec<Run>,
    /// By end, and by node: made when first needed.
    order: Vec<(u64, u32)>,
    by_node: Option<ByNode>,
    pub reservations: Vec<Reservation>,
    reserved: BTreeMap<u32, Vec<usize>>,
    view: Overlay,
    shown: Option<(u64, Option<String>)>,
}

impl Rooms {
    pub fn new(now_ms: u64, runs: Vec<Run>) -> Self {
        Self {
            now_ms,
            runs,
            order: Vec::new(),
            by_node: None,
            reservations: Vec::new(),
            reserved: BTreeMap::new(),
            view: Overlay::default(),
            shown: None,
        }
    }

    /// Runs by the time of their end.
    pub fn by_end(&mut self) -> &[(u64, u32)] {
        self.index();
        if self.order.len() < self.runs.len() {
            let new = self.order.len()..self.runs.len();
            self.order.extend(new.map(|at| (self.runs[at].end_ms, at as u32)));
            // Nearly all are in their order already, which this sort makes use of.
            self.order.sort();
        }
        &self.order
    }

    fn index(&mut self) {
        self.by_node.get_or_insert_with(|| ByNode::of(&self.runs));
    }

    /// Runs on a node, in the order in which they are known.
    fn on_node(&self, node: u32) -> impl Iterator<Item = &Run> {
        let runs = self.by_node.iter().flat_map(move |by_node| by_node.on(node));
        runs.map(|at| &self.runs[at as usize])
    }

    /// A gang started, on the cluster as it was shown.
    pub fn started(&mut self, cluster: &Cluster, run: Run, places: &[TaskPlace]) {
        self.view.took(cluster, &run.item.gang, places);
        if let Some(by_node) = &mut self.by_node {
            by_node.started(self.runs.len() as u32, &run.nodes);
        }
        self.runs.push(run);
    }

    /// What is really free of a node, whatever is shown.
    pub fn real<'a>(&'a self, cluster: &'a Cluster, node: u32) -> &'a Free {
        self.view.real(cluster, node)
    }

    pub fn is_reserved(&self, node: u32) -> bool {
        self.reserved.contains_key(&node)
    }

    pub fn reservation(&self, gang: &str) -> Option<&Reservation> {
        self.reservations.iter().find(|reservation| reservation.gang.id == gang)
    }

    /// Says who makes the room of a reservation.
    pub fn made_by(&mut self, gang: &str, makers: Vec<String>) {
        if let Some(reservation) = self.reservations.iter_mut().find(|one| one.gang.id == gang) {
            reservation.makers = makers;
        }
    }

    pub fn reserve(&mut self, cluster: &mut Cluster, reservation: Reservation) {
        self.hide(cluster);
        let at = self.reservations.len();
        for place in &reservation.tasks {
            let on_node = self.reserved.entry(place.node).or_default();
            if on_node.last() != Some(&at) {
                on_node.push(at);
            }
        }
        self.reservations.push(reservation);
    }

    /// Gives up what is reserved for a gang.
    pub fn release(&mut self, cluster: &mut Cluster, gang: &str) -> Option<Reservation> {
        let at = self.reservations.iter().position(|reservation| reservation.gang.id == gang)?;
        self.hide(cluster);
        let released = self.reservations.remove(at);
        self.reserved.clear();
        for (at, reservation) in self.reservations.iter().enumerate() {
            for place in &reservation.tasks {
                let on_node = self.reserved.entry(place.node).or_default();
                if on_node.last() != Some(&at) {
                    on_node.push(at);
                }
            }
        }
        Some(released)
    }

    /// Times that tell gangs apart by when they end: those that end between the same two of these are
    /// alike.
    pub fn class(&self, until_ms: u64) -> u64 {
        let starts = self.reservations.iter().filter(|one| !one.firm).map(|one| one.from_ms);
        starts.filter(|from| *from < until_ms).max().unwrap_or(0)
    }

    /// The same, with a time that is asked for only if it matters.
    pub fn class_of(&self, until_ms: impl FnOnce() -> u64) -> u64 {
        if self.reservations.iter().all(|one| one.firm) { 0 } else { self.class(until_ms()) }
    }

    /// Shows on the cluster what a gang may take that runs until then; `own` is the gang whose own
    /// reservation does not count.
    pub fn show(&mut self, cluster: &mut Cluster, until_ms: u64, own: Option<&str>) {
        let own = own.filter(|own| self.reservation(own).is_some());
        let class = self.class(until_ms);
        if self.shown.as_ref().is_some_and(|(shown, but)| *shown == class && but.as_deref() == own) {
            return;
        }
        self.hide(cluster);
        if !self.reserved.is_empty() {
            self.index();
        }
        let nodes: Vec<u32> = self.reserved.keys().copied().collect();
        for node in nodes {
            let free = self.free(cluster, &cluster.free()[node as usize], node, self.now_ms, until_ms, own);
            if free != cluster.free()[node as usize] {
                self.view.set(cluster, node, free);
            }
        }
        self.shown = Some((class, own.map(str::to_owned)));
    }

    /// The cluster is what it is again.
    pub fn hide(&mut self, cluster: &mut Cluster) {
        self.view.restore(cluster);
        self.shown = None;
    }

    /// What is free of a node from one time to another without a break; `real` is free now.
    ///
    /// [`Rooms::by_end`] must have been called in this cycle.
    pub fn free(
        &self,
        cluster: &Cluster,
        real: &Free,
        node: u32,
        from_ms: u64,
        until_ms: u64,
        own: Option<&str>,
    ) -> Free {
        let mut free = real.clone();
        let counts = |reservation: &&Reservation| {
            own != Some(reservation.gang.id.as_str())
                && reservation.until_ms > from_ms
                && (reservation.from_ms < until_ms || reservation.firm)
        };
        let reserved = self.reserved.get(&node).into_iter().flatten();
        let reserved: Vec<&Reservation> = reserved.map(|&at| &self.reservations[at]).filter(counts).collect();
        // Where estimates are not trusted, everything is thought to run for ever.
        let firm = reserved.iter().any(|reservation| reservation.firm);
        let until_ms = if firm { FOREVER } else { until_ms };
        let mut changes: Vec<(u64, bool, &Gang, &TaskPlace)> = Vec::new();
        for run in self.on_node(node) {
            let tasks = cluster.running().get(&run.item.gang.id).map(|running| running.tasks.as_slice());
            let here = tasks.unwrap_or_default().iter().filter(|place| place.node == node);
            if run.end_ms <= from_ms {
                for place in here {
                    free.give(&cluster.nodes()[node as usize], &run.item.gang, place);
                }
            } else if run.end_ms < until_ms {
                changes.extend(here.map(|place| (run.end_ms, false, &*run.item.gang, place)));
            }
        }
        for reservation in &reserved {
            for place in reservation.tasks.iter().filter(|place| place.node == node) {
                changes.push((reservation.from_ms.max(from_ms), true, &reservation.gang, place));
                if reservation.until_ms < until_ms {
                    changes.push((reservation.until_ms, false, &reservation.gang, place));
                }
            }
        }
        if !changes.iter().any(|(_, takes, ..)| *takes) {
            return free;
        }
        // What ends at a time is gone before what starts then.
        changes.sort_by_key(|&(at, takes, ..)| (at, takes));
        let mut least = free.clone();
        for (_, takes, gang, place) in changes {
            if takes {
                free.withhold(&cluster.nodes()[node as usize], gang, place);
                least.limit(&free);
            } else {
                free.give(&cluster.nodes()[node as usize], gang, place);
            }
        }
        least
    }

    /// Times at which room may come free on a node.
    pub fn ends_on(&self, node: u32) -> impl Iterator<Item = u64> {
        let reserved = self.reserved.get(&node).into_iter().flatten();
        self.on_node(node).map(|run| run.end_ms).chain(reserved.map(|&at| self.reservations[at].until_ms))
    }

    /// The run on a node that ends at that time.
    pub fn ending_on(&self, node: u32, end_ms: u64) -> Option<&Run> {
        self.on_node(node).find(|run| run.end_ms == end_ms)
    }

    /// The gang for which room is held that would have been enough for another.
    pub fn holder(&self) -> Option<&str> {
        self.reservations.first().map(|reservation| reservation.gang.id.as_str())
    }
}

/// How many tasks of a gang a node holds at most, if this much of it is free.
pub(super) fn holds(node: &Node, free: &Free, gang: &Gang) -> u32 {
    let by_amount = free.amount.holds(&gang.taken());
    let Some(request) = &gang.task.gpus else { return by_amount };
    if by_amount == 0 {
        return 0;
    }
    let devices = node.gpus.iter().zip(&free.gpus).filter(|(gpu, _)| request.accepts(gpu));
    let parts: u32 = devices
        .filter_map(|(gpu, free)| gpu.part(*free, &request.share).map(|part| (free, part)))
        .map(|(free, part)| u32::from(free.milli / part.milli.max(1)).max(1))
        .sum();
    by_amount.min(parts / request.count.max(1))
}

/// Node names of places, without repetition, in their order.
pub(super) fn names(cluster: &Cluster, tasks: &[TaskPlace]) -> Vec<String> {
    let mut nodes: Vec<u32> = tasks.iter().map(|place| place.node).collect();
    nodes.dedup();
    nodes.into_iter().map(|node| cluster.nodes()[node as usize].name.clone()).collect()
}

/// Places grouped by node.
pub(super) fn by_node(tasks: &[TaskPlace]) -> BTreeMap<u32, Vec<&TaskPlace>> {
    let mut nodes: BTreeMap<u32, Vec<&TaskPlace>> = BTreeMap::new();
    for place in tasks {
        nodes.entry(place.node).or_default().push(place);
    }
    nodes
}
