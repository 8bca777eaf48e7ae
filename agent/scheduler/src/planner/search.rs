//! The earliest time at which a gang fits, and where.
//!
//! What runs is taken away in the order of its ends. How many tasks fit by simple counting is kept up
//! to date meanwhile; only when that is enough is the gang really placed, on the cluster as it will be
//! then. Reservations made before stay what they are: on their nodes, a later one comes after or
//! beside them, so that what fits at a time fits at all later times too.

use std::collections::HashMap;
use std::sync::Arc;

use super::room::{self, FOREVER, Overlay, Reservation, Rooms};
use crate::model::{Cluster, Free, Gang, Node, Scope, TaskPlace};
use crate::placement::{Placer, eligible};

/// Placements that are tried one by one; from then on twice as much must have ended before each next,
/// for where counting is far from enough (scopes, isolation), each try would fail.
const EXACT_TRIES: u32 = 16;

/// Where and when a gang fits.
pub(super) struct Found {
    pub from_ms: u64,
    pub tasks: Vec<TaskPlace>,
    pub after: Option<String>,
    pub known: bool,
}

/// Domains that a whole gang must be in: all nodes, racks, leaves, or single nodes.
pub(super) struct Domains {
    /// By node.
    domain: Vec<u32>,
}

impl Domains {
    pub fn of(cluster: &Cluster, gang: &Gang) -> Self {
        let nodes = cluster.nodes();
        let mut named: HashMap<Option<&str>, u32> = HashMap::new();
        let domain = match gang.scope {
            Scope::Any => vec![0; nodes.len()],
            Scope::Switch | Scope::Node => (0..nodes.len() as u32).collect(),
            Scope::Leaf | Scope::Rack => nodes
                .iter()
                .map(|node| {
                    let name = if gang.scope == Scope::Leaf { &node.leaf } else { &node.rack };
                    let next = named.len() as u32;
                    *named.entry(name.as_deref()).or_insert(next)
                })
                .collect(),
        };
        Self { domain }
    }

    pub fn of_node(&self, node: u32) -> u32 {
        self.domain[node as usize]
    }
}

/// How many tasks of a gang each domain holds.
struct Counts {
    domain: Vec<u32>,
    on_node: Vec<u32>,
    in_domain: Vec<u64>,
    enough: u64,
    domains_enough: usize,
}

impl Counts {
    /// Nothing fits anywhere.
    fn of(cluster: &Cluster, gang: &Gang, tasks: u32) -> Self {
        let domain = Domains::of(cluster, gang).domain;
        let count = domain.iter().max().map_or(0, |max| *max as usize + 1);
        Self {
            on_node: vec![0; domain.len()],
            in_domain: vec![0; count],
            domain,
            enough: tasks.into(),
            domains_enough: 0,
        }
    }

    /// What fits now.
    fn now(cluster: &Cluster, gang: &Gang, tasks: u32, admits: &dyn Fn(&Node) -> bool) -> Self {
        let mut counts = Self::of(cluster, gang, tasks);
        for (node, index) in cluster.nodes().iter().zip(0..) {
            if eligible(node, gang) && admits(node) {
                counts.update(cluster, index, gang);
            } else {
                // What no task can go to never counts.
                counts.domain[index as usize] = u32::MAX;
            }
        }
        counts
    }

    fn update(&mut self, cluster: &Cluster, node: u32, gang: &Gang) {
        let index = node as usize;
        self.set(node, room::holds(&cluster.nodes()[index], &cluster.free()[index], gang));
    }

    fn set(&mut self, node: u32, tasks: u32) {
        let domain = self.domain[node as usize] as usize;
        let Some(sum) = self.in_domain.get_mut(domain) else { return };
        let on_node = &mut self.on_node[node as usize];
        let was_enough = *sum >= self.enough;
        *sum = *sum - u64::from(*on_node) + u64::from(tasks);
        *on_node = tasks;
        match (was_enough, *sum >= self.enough) {
            (false, true) => self.domains_enough += 1,
            (true, false) => self.domains_enough -= 1,
            _ => {}
        }
    }
}

/// Whether a gang could fit if nothing ran, by counting.
pub(super) fn ever(cluster: &Cluster, gang: &Gang, admits: &dyn Fn(&Node) -> bool) -> bool {
    let mut counts = Counts::of(cluster, gang, gang.tasks.min);
    for (node, index) in cluster.nodes().iter().zip(0..) {
        if eligible(node, gang) && admits(node) {
            counts.set(index, room::holds(node, &Free::all(node), gang));
            if counts.domains_enough > 0 {
                return true;
            }
        }
    }
    false
}

/// The earliest time from now on at which the gang fits, if what runs ends when it should. The
/// cluster is as it was afterwards.
pub(super) fn earliest(
    rooms: &mut Rooms,
    cluster: &mut Cluster,
    placer: &mut Placer,
    gang: &Gang,
    admits: &dyn Fn(&Node) -> bool,
) -> Option<Found> {
    rooms.hide(cluster);
    rooms.by_end();
    let mut overlay = Overlay::default();
    let found = search(rooms, cluster, placer, gang, admits, &mut overlay);
    overlay.restore(cluster);
    found
}

fn search(
    rooms: &mut Rooms,
    cluster: &mut Cluster,
    placer: &mut Placer,
    gang: &Gang,
    admits: &dyn Fn(&Node) -> bool,
    overlay: &mut Overlay,
) -> Option<Found> {
    let own = Some(gang.id.as_str());
    let now = rooms.now_ms;
    let mut reserved: Vec<(u64, u32)> = Vec::new();
    for reservation in rooms.reservations.iter().filter(|one| one.gang.id != gang.id) {
        reserved.extend(reservation.tasks.iter().map(|place| (reservation.until_ms, place.node)));
    }
    reserved.sort_unstable();
    reserved.dedup();
    let on_reserved = |rooms: &Rooms, cluster: &mut Cluster, overlay: &mut Overlay, node: u32, at: u64| {
        let free = rooms.free(cluster, overlay.real(cluster, node), node, at, FOREVER, own);
        overlay.set(cluster, node, free);
    };
    for &(_, node) in &reserved {
        on_reserved(rooms, cluster, overlay, node, now);
    }
    let mut counts = Counts::now(cluster, gang, gang.tasks.min, admits);
    let ends = rooms.by_end().to_vec();
    let mut next = (ends.iter().peekable(), reserved.iter().peekable());
    let (mut at, mut tries, mut skip, mut last) = (now, 0, 0, None::<u32>);
    loop {
        if counts.domains_enough > 0 && skip == 0 {
            if let Some(tasks) = placer.seek(cluster, gang, gang.tasks.min, admits) {
                overlay.undo(cluster, gang, &tasks);
                let run = last.map(|last| &rooms.runs[last as usize]);
                return Some(Found {
                    from_ms: at,
                    tasks,
                    after: run.map(|run| run.item.gang.id.clone()),
                    known: run.is_none_or(|run| run.known),
                });
            }
            tries += 1;
            skip = if tries < EXACT_TRIES { 0 } else { 1 << (tries - EXACT_TRIES).min(20) };
        }
        // The next time at which anything ends, and all that ends then.
        let times = (next.0.peek().map(|(end, _)| *end), next.1.peek().map(|(end, _)| *end));
        let Some(time) = [times.0, times.1].into_iter().flatten().min().filter(|time| *time < FOREVER) else {
            // What was skipped is still to be tried with all gone.
            if skip > 0 && counts.domains_enough > 0 {
                skip = 0;
                continue;
            }
            return None;
        };
        at = at.max(time);
        while let Some(&(_, run)) = next.0.next_if(|(end, _)| *end == time) {
            last = Some(run);
            skip = u32::saturating_sub(skip, 1);
            let ending = Arc::clone(&rooms.runs[run as usize].item.gang);
            let places = cluster.running().get(&ending.id).map(|running| running.tasks.clone());
            for place in places.iter().flatten() {
                if rooms.is_reserved(place.node) {
                    on_reserved(rooms, cluster, overlay, place.node, at);
                } else {
                    overlay.give(cluster, &ending, place);
                }
                counts.update(cluster, place.node, gang);
            }
        }
        while let Some(&(_, node)) = next.1.next_if(|(end, _)| *end == time) {
            last = None;
            on_reserved(rooms, cluster, overlay, node, at);
            counts.update(cluster, node, gang);
        }
    }
}

/// When reserved places will be free, if that is known now; none if never, or if they cannot be used
/// any more.
pub(super) fn recheck(
    rooms: &mut Rooms,
    cluster: &mut Cluster,
    reservation: &Reservation,
    admits: &dyn Fn(&Node) -> bool,
) -> Option<Found> {
    rooms.hide(cluster);
    rooms.by_end();
    let gang = &*reservation.gang;
    let last = reservation.tasks.iter().map(|place| place.node as usize).max()?;
    if last >= cluster.nodes().len() || room::names(cluster, &reservation.tasks) != reservation.names {
        return None;
    }
    let (mut from, mut after) = (rooms.now_ms, None);
    for (node, places) in room::by_node(&reservation.tasks) {
        let machine = &cluster.nodes()[node as usize];
        if !eligible(machine, gang) || !admits(machine) {
            return None;
        }
        let mut times: Vec<u64> = rooms.ends_on(node).filter(|&end| end > rooms.now_ms).collect();
        times.push(rooms.now_ms);
        times.sort_unstable();
        times.dedup();
        let own = Some(gang.id.as_str());
        let real = &cluster.free()[node as usize];
        let fits = |at: &u64| {
            let mut free = rooms.free(cluster, real, node, *at, FOREVER, own);
            places.iter().all(|place| free.take(machine, gang, place).is_ok())
        };
        let at = times.into_iter().find(|at| fits(at))?;
        if at > from {
            (from, after) = (at, Some((node, at)));
        }
    }
    let run = after.and_then(|(node, end)| rooms.ending_on(node, end));
    Some(Found {
        from_ms: from,
        tasks: reservation.tasks.clone(),
        after: run.map(|run| run.item.gang.id.clone()),
        known: run.is_none_or(|run| run.known),
    })
}
