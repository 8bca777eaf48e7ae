//! What is done when the queues are served: nodes that are drained are emptied, and elastic gangs grow
//! into room that nobody waits for.

use std::sync::Arc;

use super::cycle::{Cycle, admits};
use super::known::Item;
use super::room::{self, Reservation};
use crate::model::{Node, Offer, Scope, TaskPlace};
use crate::plan::{Preemption, Resize};

/// Gangs that leave nodes at a time: each has its new place reserved while it stops.
const MOST_LEAVING: usize = 8;
/// Gangs that grow in a cycle.
const MOST_GROWING: usize = 64;

impl Cycle<'_> {
    /// Gangs that may move leave nodes that are drained or in maintenance, a few at a time, and only
    /// for places that are free: the others stay until they end.
    pub(super) fn drain(&mut self) {
        let now = self.now;
        let leaving = |node: &Node| {
            matches!(node.offer, Offer::Draining { .. })
                || node.maintenance.iter().any(|window| (window.from_ms..window.until_ms).contains(&now))
        };
        let nodes: Vec<bool> = self.cluster.nodes().iter().map(leaving).collect();
        if !nodes.contains(&true) {
            return;
        }
        let running = self.cluster.running();
        let on_it = |tasks: &[TaskPlace]| {
            tasks.iter().find(|place| nodes[place.node as usize]).map(|place| place.node)
        };
        let going = running.values().filter(|one| one.stopping && on_it(&one.tasks).is_some()).count();
        let mut moves: Vec<(Arc<Item>, u32, u32)> = Vec::new();
        for run in &self.rooms.runs {
            let Some(one) = running.get(&run.item.gang.id) else { continue };
            if one.gang.preemptible
                && !one.stopping
                && !self.asked.contains(&one.gang.id)
                && let Some(node) = on_it(&one.tasks)
            {
                moves.push((Arc::clone(&run.item), node, one.tasks.len() as u32));
            }
        }
        let (mut left, mut tries) = (MOST_LEAVING.saturating_sub(going), 4 * MOST_LEAVING);
        for (item, node, tasks) in moves {
            if left == 0 || tries == 0 {
                return;
            }
            tries -= 1;
            left -= usize::from(self.move_away(&item, node, tasks));
        }
    }

    fn move_away(&mut self, item: &Item, from: u32, tasks: u32) -> bool {
        let (Some(pool), gang) = (item.pool, &item.gang) else { return false };
        let (pools, now) = (self.pools, self.now);
        let length = self.estimator.estimate(&item.similar, gang.estimate_ms).mean_ms;
        let until = now.saturating_add(length);
        self.rooms.show(self.cluster, until, None);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        let Some(places) = self.place_between(pool, item, gang.tasks.min, tasks, &admits) else {
            return false;
        };
        places.iter().for_each(|place| self.cluster.give(gang, place));
        let from_ms = now.saturating_add(gang.grace_ms.max(1));
        let reservation = Reservation {
            gang: Arc::clone(gang),
            names: room::names(self.cluster, &places),
            tasks: places,
            from_ms,
            until_ms: from_ms.saturating_add(length),
            firm: true,
            after: None,
            known: true,
            makers: vec![gang.id.clone()],
        };
        let name = &self.cluster.nodes()[from as usize].name;
        let to = match reservation.names.as_slice() {
            [one] => format!("on node {one}"),
            names => format!("on {} nodes", names.len()),
        };
        let why = format!("node {name} is being emptied; there is room {to}");
        self.plan.preemptions.push(Preemption { gang: gang.id.clone(), for_gang: None, why });
        self.asked.insert(gang.id.clone());
        self.hold(item.print, reservation);
        true
    }

    /// Elastic gangs grow where nobody waits for room.
    pub(super) fn grow(&mut self) {
        if !self.elastic || !self.rooms.reservations.is_empty() {
            return;
        }
        let mut grown = 0;
        for at in 0..self.rooms.runs.len() {
            let item = Arc::clone(&self.rooms.runs[at].item);
            let until = self.rooms.runs[at].end_ms;
            if item.gang.tasks.min < item.gang.tasks.max && grown < MOST_GROWING {
                grown += usize::from(self.grow_one(&item, until));
            }
        }
    }

    fn grow_one(&mut self, item: &Item, until: u64) -> bool {
        let gang = &*item.gang;
        let (Some(pool), Some(running)) = (item.pool, self.cluster.running().get(&gang.id)) else {
            return false;
        };
        let has = running.tasks.len() as u32;
        let Some(first) = running.tasks.first().map(|place| place.node as usize) else { return false };
        if running.stopping
            || running.started_ms >= self.now
            || self.asked.contains(&gang.id)
            || has >= gang.tasks.max
        {
            return false;
        }
        if self.limit(item, 1).is_some() {
            return false;
        }
        let more = self.allowed(item, 1, gang.tasks.max - has);
        let home = self.cluster.nodes()[first].clone();
        let (pools, now) = (self.pools, self.now);
        let admits = move |node: &Node| {
            admits(pools, pool, node, now, until)
                && match gang.scope {
                    Scope::Any => true,
                    Scope::Node => node.name == home.name,
                    Scope::Leaf => node.leaf == home.leaf,
                    Scope::Rack => node.rack == home.rack,
                    // Tasks are not told which switch the first ones are below.
                    Scope::Switch => false,
                }
        };
        self.rooms.show(self.cluster, until, None);
        let Some(add) = self.place_between(pool, item, 1, more, &admits) else { return false };
        let line = &self.tenants[item.tenant as usize].line;
        self.accounts.add(&self.pools.lines[pool], line, &super::accounts::used_by(item, &add));
        if let Some(running) = self.cluster.running_mut(&gang.id) {
            running.tasks.extend(add.iter().cloned());
        }
        let why = format!(
            "nobody waits for the room: {} of at most {} tasks",
            has + add.len() as u32,
            gang.tasks.max
        );
        self.plan.resizes.push(Resize { gang: gang.id.clone(), remove: Vec::new(), add, why });
        true
    }
}
