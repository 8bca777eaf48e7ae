//! A gang's try: whether it may start, whether it fits, and its start.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cycle, Outcome, admits};
use crate::model::{Gang, Node, Running, TaskPlace};
use crate::plan::Start;
use crate::planner::accounts::used_by;
use crate::planner::known::Item;
use crate::planner::room::{self, Run};
use crate::policy::Strategy;

impl Cycle<'_> {
    /// Tries to start a gang now.
    pub(in crate::planner) fn attempt(&mut self, index: usize, why: &dyn Fn() -> String) -> Outcome {
        let waiter = &self.waiters[index];
        let Some(pool) = waiter.pool.map(|pool| pool as usize) else { return Outcome::NoPool };
        if self.running.contains(&waiter.print) && self.cluster.running().contains_key(&waiter.item.gang.id) {
            return Outcome::RunsStill;
        }
        if let Some(outcome) = self.refuse_by_limit(index) {
            return outcome;
        }
        if !self.has_reservation(index)
            && let Some(outcome) = self.refuse_at_sight(index)
        {
            return outcome;
        }
        let item = self.item(index);
        let gang = &item.gang;
        let estimate = self.estimator.estimate(&item.similar, gang.estimate_ms);
        let until = self.now.saturating_add(estimate.mean_ms);
        self.rooms.show(self.cluster, until, Some(&gang.id));
        match self.place(pool, &item, until) {
            Some(tasks) => {
                self.start(&item, pool, tasks, until, estimate.known, why);
                Outcome::Started
            }
            None => match self.start_where_reserved(&item, pool, until, estimate.known, why) {
                true => Outcome::Started,
                false => self.fail(&item, pool, until),
            },
        }
    }

    /// Whether room is held for the gang, or was in the cycle before.
    fn has_reservation(&self, index: usize) -> bool {
        let waiter = &self.waiters[index];
        self.reserving.contains(&waiter.print) && {
            let id = &waiter.item.gang.id;
            self.kept.contains_key(id) || self.rooms.reservation(id).is_some()
        }
    }

    /// What comes of a gang that a limit keeps from starting.
    fn refuse_by_limit(&mut self, index: usize) -> Option<Outcome> {
        if !self.limited {
            return None;
        }
        let item = self.item(index);
        if let Some((_, reached)) = self.limit(&item, item.gang.tasks.min) {
            // A reservation is for what could start as soon as there is room.
            self.kept.remove(&item.gang.id);
            self.rooms.release(self.cluster, &item.gang.id);
            return Some(Outcome::Limit(Arc::new(reached)));
        }
        self.limit_holder(index, &item).map(Outcome::Behind)
    }

    /// A starved gang's own limit is used up: nobody else gets what comes free of it.
    pub(super) fn hold_limit(&mut self, index: usize) {
        let item = self.item(index);
        if let Some((key, reached)) = self.limit(&item, item.gang.tasks.min)
            && reached.needed <= reached.limit
        {
            self.held_limits.push((key, index));
        }
    }

    /// The starved gang that waits for the same limit.
    fn limit_holder(&self, index: usize, item: &Item) -> Option<Arc<str>> {
        let line = &self.pools.lines[item.pool?];
        let tenants = &self.tenants[item.tenant as usize].line;
        let holder = self.held_limits.iter().find(|((pool, tenant), holder)| {
            *holder != index && line.contains(pool) && tenant.is_none_or(|tenant| tenants.contains(&tenant))
        })?;
        Some(self.waiters[holder.1].item.gang.id.as_str().into())
    }

    /// As many tasks as fit, at least the least.
    fn place(&mut self, pool: usize, item: &Item, until: u64) -> Option<Vec<TaskPlace>> {
        let (gang, pools, now) = (&*item.gang, self.pools, self.now);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        let most = self.allowed(item, gang.tasks.min, gang.tasks.max);
        self.place_between(pool, item, gang.tasks.min, most, &admits)
    }

    /// As many more tasks as limits allow, between two bounds of which the lower one is allowed.
    pub(in crate::planner) fn allowed(&self, item: &Item, least: u32, most: u32) -> u32 {
        if most <= least || self.limit(item, most).is_none() {
            return most.max(least);
        }
        let (mut may, mut not) = (least, most);
        while not - may > 1 {
            let middle = may + (not - may) / 2;
            if self.limit(item, middle).is_none() { may = middle } else { not = middle }
        }
        may
    }

    /// As many tasks as fit, between two bounds.
    pub(in crate::planner) fn place_between(
        &mut self,
        pool: usize,
        item: &Item,
        least: u32,
        most: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Option<Vec<TaskPlace>> {
        let (gang, placer) = (&*item.gang, &mut self.placers[pool]);
        let mut found = placer.seek(self.cluster, gang, most, admits);
        if found.is_some() || most <= least {
            return found;
        }
        // The most that fits is between the two: half the distance each time.
        let (mut fits, mut fails) = (least, most);
        found = placer.seek(self.cluster, gang, fits, admits);
        while let Some(places) = &found
            && fails - fits > 1
        {
            let middle = fits + (fails - fits) / 2;
            places.iter().for_each(|place| self.cluster.give(gang, place));
            match placer.seek(self.cluster, gang, middle, admits) {
                Some(more) => (found, fits) = (Some(more), middle),
                None => {
                    fails = middle;
                    found = placer.seek(self.cluster, gang, fits, admits);
                }
            }
        }
        found
    }

    /// Starts a gang on the places that are reserved for it, if they are free.
    fn start_where_reserved(
        &mut self,
        item: &Item,
        pool: usize,
        until: u64,
        known: bool,
        why: &dyn Fn() -> String,
    ) -> bool {
        let gang = &item.gang;
        let kept = self.kept.get(&gang.id).or_else(|| self.rooms.reservation(&gang.id));
        let Some(tasks) = kept.map(|reservation| reservation.tasks.clone()) else { return false };
        let (pools, now) = (self.pools, self.now);
        let usable = self.usable(gang, &tasks, &|node| admits(pools, pool, node, now, until));
        if !usable {
            return false;
        }
        for (done, place) in tasks.iter().enumerate() {
            if self.cluster.take(gang, place).is_err() {
                tasks[..done].iter().for_each(|place| self.cluster.give(gang, place));
                return false;
            }
        }
        let item = Arc::new(item.clone());
        self.start(&item, pool, tasks, until, known, why);
        true
    }

    fn usable(&self, gang: &Gang, tasks: &[TaskPlace], admits: &dyn Fn(&Node) -> bool) -> bool {
        let names =
            self.kept.get(&gang.id).or_else(|| self.rooms.reservation(&gang.id)).map(|kept| &kept.names);
        let nodes = self.cluster.nodes();
        let within = tasks.iter().all(|place| {
            nodes
                .get(place.node as usize)
                .is_some_and(|node| crate::placement::eligible(node, gang) && admits(node))
        });
        within && names.is_some_and(|names| *names == room::names(self.cluster, tasks))
    }

    fn start(
        &mut self,
        item: &Arc<Item>,
        pool: usize,
        tasks: Vec<TaskPlace>,
        until: u64,
        known: bool,
        why: &dyn Fn() -> String,
    ) {
        let gang = &item.gang;
        let share = used_by(item, &tasks);
        self.accounts.add(&self.pools.lines[pool], &self.tenants[item.tenant as usize].line, &share);
        let running = Running {
            gang: Arc::clone(gang),
            tasks: tasks.clone(),
            started_ms: self.now,
            expected_end_ms: known.then_some(until),
            stopping: false,
        };
        // It was looked for among what runs before it was placed.
        let started = self.cluster.started(running);
        debug_assert_eq!(started, Ok(()));
        self.running.insert(item.print);
        let nodes = tasks.iter().map(|place| place.node).collect();
        let run = Run { item: Arc::clone(item), nodes, end_ms: until.max(self.now + 1), known };
        self.rooms.started(self.cluster, run, &tasks);
        let mut taken: BTreeMap<u32, usize> = BTreeMap::new();
        for place in &tasks {
            *taken.entry(place.node).or_default() +=
                place.gpus.iter().filter(|gpu| gpu.part.is_whole()).count();
        }
        for (node, taken) in taken {
            let left = self.rooms.real(self.cluster, node).whole_gpus() as usize;
            if let Some(before) = self.whole.get_mut(left + taken) {
                *before = before.saturating_sub(1);
            }
            self.whole[left] += 1;
        }
        self.kept.remove(&gang.id);
        self.rooms.release(self.cluster, &gang.id);
        let strategy = self.settings.pools[pool].placement;
        let why = format!("{}; {}", why(), where_and_how(&room::names(self.cluster, &tasks), strategy));
        self.plan.starts.push(Start { gang: Arc::clone(gang), tasks, why });
    }
}

fn where_and_how(names: &[String], strategy: Strategy) -> String {
    let how = match strategy {
        Strategy::Balanced => "leaves most room for what typically comes",
        Strategy::Random => "anywhere",
        Strategy::DotProduct => "best aligned with what is free",
        Strategy::GpuClustering => "beside what shares GPUs in the same way",
        Strategy::GpuPacking => "where GPUs are used already",
        Strategy::BestFit => "where least is left",
        Strategy::FragmentationGradientDescent => "where fragmentation grows least",
        Strategy::Spread => "away from what runs",
    };
    match names {
        [one] => format!("on node {one}: {how}"),
        _ => format!("on {} nodes: {how}", names.len()),
    }
}
