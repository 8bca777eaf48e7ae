//! One cycle: who is tried, in which order, and what comes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::MOST_FIRM;
use super::accounts::{Accounts, LimitKey, Pools};
use super::known::{Hardness, Item, TenantInfo};
use super::room::{self, Reservation, Rooms, Run};
use super::search;
use crate::model::{Cluster, Node, Running, Share as GpuShare, TaskPlace};
use crate::placement::{Placer, Shortage};
use crate::plan::{LimitReached, Plan, Reason, Start, Waiting};
use crate::policy::{Backfill, Queue, Settings};
use crate::queue::estimate::Estimator;
use crate::queue::fair::{FairQueue, Fractions, Ledger, Standing};
use crate::queue::{Entry, Order, Sorted};

/// Shapes that may fail in a cycle before the rest of the queues is left for the next: each costs a
/// look at all nodes.
const MOST_FAILURES: usize = 64;
/// Searches for the earliest time of a gang in a cycle: each may look at all that runs.
const MOST_SEARCHES: usize = 8;
/// Gangs of a pool that have reservations with conservative backfill. Those behind them may be
/// delayed by what starts before them, as with EASY.
const MOST_RESERVATIONS: usize = 32;
/// For so long a shortage is said in the same words, milliseconds, unless its kind changes: how much
/// is free changes all the time, and is what nobody waits for.
const SAME_WORDS_MS: u64 = 60_000;

/// Gangs that a reason names: those that make room may be many.
const NAMED: usize = 3;

/// What came of a gang.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// It was not its turn.
    Unseen,
    Started,
    NoPool,
    RunsStill,
    Limit(Arc<LimitReached>),
    Shortage(Arc<Shortage>),
    /// The gang that the room is held for.
    Behind(Arc<str>),
    /// Gangs that were told to make room for it.
    MakingRoom(Arc<[String]>),
}

/// A shape that found no room.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    size: Hardness,
    /// Gangs that end later find none either.
    class: u64,
    outcome: Outcome,
}

pub(super) struct Cycle<'a> {
    pub now: u64,
    pub settings: &'a Settings,
    pub pools: &'a Pools,
    pub tenants: &'a [TenantInfo],
    pub estimator: &'a Estimator,
    pub ledger: &'a Ledger,
    pub placers: &'a mut [Placer],
    pub cluster: &'a mut Cluster,
    pub items: Vec<Arc<Item>>,
    pub accounts: Accounts,
    pub rooms: Rooms,
    /// Reservations of the cycle before.
    pub kept: HashMap<String, Reservation>,
    pub shortages: &'a mut HashMap<(u32, Hardness), (Arc<Shortage>, u64)>,
    /// Shapes that would not fit if nothing ran, and since when that is known.
    pub impossible: &'a mut HashMap<(u32, Hardness), u64>,
    pub outcomes: Vec<Outcome>,
    /// Nodes by the number of their GPUs that nobody uses.
    pub whole: Vec<u64>,
    /// By family.
    pub failed: BTreeMap<u32, Vec<Failed>>,
    pub failures: usize,
    pub searches: usize,
    /// Limits that leave no room for a starved gang: what comes free of them is its.
    pub held_limits: Vec<(LimitKey, usize)>,
    /// Whether any gang that runs is elastic.
    pub elastic: bool,
    /// Gangs that were told something in this cycle.
    pub asked: BTreeSet<String>,
    /// Gangs that room was sought for, and shapes for which there is none to be made.
    pub sought: usize,
    pub sought_in_vain: Vec<(u32, Hardness, i32, u32)>,
    pub plan: Plan,
}

/// Where a pool's queue is.
struct Turn {
    pool: usize,
    queue: Box<dyn Order>,
    rank: usize,
    head: Option<Arc<str>>,
    reservations: usize,
}

impl Cycle<'_> {
    pub fn run(&mut self) {
        self.keep_claims();
        self.serve_queues();
        self.drain();
        self.grow();
    }

    fn serve_queues(&mut self) {
        let mut entries: Vec<Vec<Entry>> = vec![Vec::new(); self.settings.pools.len()];
        let mut urgent: Vec<(u64, usize)> = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            let Some(pool) = item.pool else {
                self.outcomes[index] = Outcome::NoPool;
                continue;
            };
            if matches!(self.outcomes[index], Outcome::Started | Outcome::MakingRoom(_)) {
                continue;
            }
            let gang = &item.gang;
            let waited_ms = self.now.saturating_sub(gang.submitted_ms);
            let starvation_ms = self.settings.pools[pool].starvation_ms;
            if starvation_ms > 0 && waited_ms >= starvation_ms {
                urgent.push((gang.submitted_ms, index));
                continue;
            }
            entries[pool].push(Entry {
                gang: index,
                submitted_ms: gang.submitted_ms,
                waited_ms,
                estimate_ms: self.estimator.estimate(&item.similar, gang.estimate_ms).mean_ms,
                priority: gang.priority,
                tenant: item.tenant,
            });
        }
        urgent.sort_unstable();
        let urgent: Vec<usize> = urgent.into_iter().map(|(_, index)| index).collect();
        let mut turns: Vec<Turn> = Vec::new();
        for (pool, entries) in entries.into_iter().enumerate() {
            let queue = self.queue(pool, entries);
            turns.push(Turn { pool, queue, rank: 0, head: None, reservations: 0 });
        }
        self.serve_starved(&urgent, &mut turns);
        self.keep_promises(&mut turns);
        self.serve_pools(turns);
    }

    /// With conservative backfill, who has a reservation keeps it, whoever comes after: gangs that are
    /// tried before it in this cycle get nothing of it.
    fn keep_promises(&mut self, turns: &mut [Turn]) {
        let conservative = |pool: Option<usize>| {
            pool.is_some_and(|pool| self.settings.pools[pool].backfill == Backfill::Conservative)
        };
        let mut promised: Vec<(u64, usize, usize)> = self
            .items
            .iter()
            .enumerate()
            .filter(|(_, item)| conservative(item.pool))
            .filter_map(|(index, item)| {
                let kept = self.kept.get(&item.gang.id)?;
                Some((kept.from_ms, index, item.pool?))
            })
            .collect();
        promised.sort_unstable();
        for (_, index, pool) in promised {
            if self.limit(&self.items[index], self.items[index].gang.tasks.min).is_none()
                && self.reserve(index, false)
            {
                turns[pool].reservations += 1;
            }
        }
    }

    fn serve_starved(&mut self, starved: &[usize], turns: &mut [Turn]) {
        let mut firm = 0;
        for (rank, &index) in starved.iter().enumerate() {
            let why = || format!("number {} of those that waited too long", rank + 1);
            self.outcomes[index] = self.attempt(index, &why);
            if matches!(self.outcomes[index], Outcome::Limit(_)) {
                self.hold_limit(index);
            } else if self.waits_for_room(index) && !self.make_room(index) {
                let item = Arc::clone(&self.items[index]);
                let Some(pool) = item.pool.filter(|_| firm < MOST_FIRM) else { continue };
                if self.reserve(index, true) {
                    firm += 1;
                    turns[pool].head.get_or_insert_with(|| item.gang.id.as_str().into());
                }
            }
        }
    }

    pub(super) fn waits_for_room(&self, index: usize) -> bool {
        matches!(self.outcomes[index], Outcome::Shortage(_) | Outcome::Behind(_))
    }

    /// Pools take turns, the one that used least of its guarantee, then of its weighted share, first.
    fn serve_pools(&mut self, mut turns: Vec<Turn>) {
        while !turns.is_empty() {
            let keys = turns.iter().map(|turn| self.claim(turn.pool));
            let next = keys
                .enumerate()
                .min_by(|(_, one), (_, other)| one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)));
            let Some((at, _)) = next else { return };
            // Whatever starts nothing leaves the pool's claim as it is: it goes on.
            loop {
                let Some(index) = turns[at].queue.next() else {
                    turns.remove(at);
                    break;
                };
                turns[at].rank += 1;
                if self.serve(&mut turns[at], index) {
                    break;
                }
            }
        }
    }

    /// What a pool has a claim to: less is more.
    fn claim(&self, pool: usize) -> (bool, f64) {
        let settings = &self.settings.pools[pool];
        let used = self.accounts.pool(pool);
        let root = self.pools.lines[pool].last().copied().unwrap_or(pool);
        let share = Fractions::of(&used, self.accounts.capacity(root)).dominant();
        let borrows = super::accounts::borrows(&settings.quota, &used);
        (borrows, share / settings.weight.0.max(1e-9))
    }

    fn queue(&self, pool: usize, entries: Vec<Entry>) -> Box<dyn Order> {
        match Sorted::by(self.settings.pools[pool].queue, entries.iter().copied()) {
            Some(queue) => Box::new(queue),
            None => Box::new(FairQueue::new(
                entries,
                |tenant| self.tenants[tenant as usize].line.clone(),
                |tenant| {
                    let used = self.accounts.tenant(pool, tenant);
                    let has = Fractions::of(&used, self.accounts.capacity(pool));
                    let used = has.plus(&self.ledger.had((pool as u32, tenant)));
                    Standing { used, weight: self.tenants[tenant as usize].weight }
                },
            )),
        }
    }

    /// One gang's turn; true if it starts.
    fn serve(&mut self, turn: &mut Turn, index: usize) -> bool {
        let pool = &self.settings.pools[turn.pool];
        if let (Backfill::None, Some(head)) = (pool.backfill, &turn.head) {
            self.outcomes[index] = Outcome::Behind(Arc::clone(head));
            return false;
        }
        let (rank, queue, name, backfilled) = (turn.rank, pool.queue, &pool.name, &turn.head);
        let why = || {
            let place = format!("number {rank} in the queue of pool {name} ({})", queue_name(queue));
            match backfilled {
                Some(head) => format!("{place}; goes before job {head} without delaying it"),
                None => place,
            }
        };
        self.outcomes[index] = self.attempt(index, &why);
        if matches!(self.outcomes[index], Outcome::Started) {
            let item = &self.items[index];
            let tasks = self.plan.starts.last().map_or(0, |start| start.tasks.len());
            let share = item.share(u32::try_from(tasks).unwrap_or(u32::MAX));
            turn.queue.started(&Fractions::of(&share, self.accounts.capacity(turn.pool)));
            return true;
        }
        if !self.waits_for_room(index) {
            return false;
        }
        let most = match pool.backfill {
            Backfill::None | Backfill::Easy => 1,
            Backfill::Conservative => MOST_RESERVATIONS,
        };
        let made = self.make_room(index);
        let has = made || self.rooms.reservation(&self.items[index].gang.id).is_some();
        let gets = !has && turn.reservations < most && self.reserve(index, false);
        turn.reservations += usize::from(gets);
        if has || gets {
            turn.head.get_or_insert_with(|| self.items[index].gang.id.as_str().into());
        }
        false
    }

    /// Tries to start a gang now.
    pub(super) fn attempt(&mut self, index: usize, why: &dyn Fn() -> String) -> Outcome {
        let item = Arc::clone(&self.items[index]);
        let gang = &item.gang;
        let Some(pool) = item.pool else { return Outcome::NoPool };
        if self.cluster.running().contains_key(&gang.id) {
            return Outcome::RunsStill;
        }
        if let Some((_, reached)) = self.limit(&item, gang.tasks.min) {
            // A reservation is for what could start as soon as there is room.
            self.kept.remove(&gang.id);
            self.rooms.release(self.cluster, &gang.id);
            return Outcome::Limit(Arc::new(reached));
        }
        if let Some(holder) = self.limit_holder(index, &item) {
            return Outcome::Behind(holder);
        }
        let estimate = self.estimator.estimate(&item.similar, gang.estimate_ms);
        let until = self.now.saturating_add(estimate.mean_ms);
        let own = self.kept.contains_key(&gang.id) || self.rooms.reservation(&gang.id).is_some();
        if !own {
            if let Some(outcome) = self.failed_before(&item, until) {
                return outcome;
            }
            if self.too_few(&item)
                && let Some((words, _)) = self.shortages.get(&(item.family, item.size()))
            {
                return Outcome::Shortage(Arc::clone(words));
            }
            if self.failures >= MOST_FAILURES {
                return Outcome::Unseen;
            }
        }
        self.rooms.show(self.cluster, until, Some(&gang.id));
        match self.place(pool, &item, until) {
            Ok(tasks) => {
                self.start(&item, pool, tasks, until, estimate.known, why);
                Outcome::Started
            }
            Err(shortage) => match self.start_where_reserved(&item, pool, until, estimate.known, why) {
                true => Outcome::Started,
                false => self.fail(&item, pool, until, shortage),
            },
        }
    }

    /// As many tasks as fit, at least the least.
    fn place(&mut self, pool: usize, item: &Item, until: u64) -> Result<Vec<TaskPlace>, Shortage> {
        let (gang, pools, now) = (&*item.gang, self.pools, self.now);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        let most = self.allowed(item, gang.tasks.min, gang.tasks.max);
        self.place_between(pool, item, gang.tasks.min, most, &admits)
    }

    /// As many more tasks as limits allow, between two bounds of which the lower one is allowed.
    pub(super) fn allowed(&self, item: &Item, least: u32, most: u32) -> u32 {
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
    pub(super) fn place_between(
        &mut self,
        pool: usize,
        item: &Item,
        least: u32,
        most: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Result<Vec<TaskPlace>, Shortage> {
        let (gang, placer) = (&*item.gang, &mut self.placers[pool]);
        let mut found = placer.place(self.cluster, gang, most, admits);
        if found.is_ok() || most <= least {
            return found;
        }
        // The most that fits is between the two: half the distance each time.
        let (mut fits, mut fails) = (least, most);
        found = placer.place(self.cluster, gang, fits, admits);
        while let Ok(places) = &found
            && fails - fits > 1
        {
            let middle = fits + (fails - fits) / 2;
            places.iter().for_each(|place| self.cluster.give(gang, place));
            match placer.place(self.cluster, gang, middle, admits) {
                Ok(more) => (found, fits) = (Ok(more), middle),
                Err(_) => {
                    fails = middle;
                    found = placer.place(self.cluster, gang, fits, admits);
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

    fn usable(&self, gang: &crate::model::Gang, tasks: &[TaskPlace], admits: &dyn Fn(&Node) -> bool) -> bool {
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
        let share = super::accounts::used_by(item, &tasks);
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
        let run = Run { item: Arc::clone(item), end_ms: until.max(self.now + 1), known };
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

    pub(super) fn limit(&self, item: &Item, tasks: u32) -> Option<(LimitKey, LimitReached)> {
        let line = &self.pools.lines[item.pool?];
        self.accounts.limit(self.settings, self.tenants, line, item, &item.share(tasks))
    }

    /// A starved gang's own limit is used up: nobody else gets what comes free of it.
    fn hold_limit(&mut self, index: usize) {
        let item = Arc::clone(&self.items[index]);
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
        Some(self.items[holder.1].gang.id.as_str().into())
    }

    /// Whether too few nodes have as many GPUs that nobody uses as the gang's tasks need, whatever else
    /// they need: a look at a few numbers, where a trial looks at all nodes.
    fn too_few(&self, item: &Item) -> bool {
        let Some(request) = item.gang.task.gpus.as_ref().filter(|gpus| gpus.share == GpuShare::Whole) else {
            return false;
        };
        let each = (request.count as usize).max(1);
        let fit: u64 = self.whole.iter().zip(0..).map(|(nodes, gpus)| nodes * (gpus / each) as u64).sum();
        fit < u64::from(item.gang.tasks.min)
    }

    fn failed_before(&self, item: &Item, until: u64) -> Option<Outcome> {
        let size = item.size();
        let class = self.rooms.class(until);
        let failed = self.failed.get(&item.family)?;
        if let Some(same) = failed.iter().find(|failed| failed.size == size && class >= failed.class) {
            return Some(same.outcome.clone());
        }
        // A harder one fails too; for its own words it is tried, unless they are known.
        failed.iter().find(|failed| size.at_least(&failed.size) && class >= failed.class)?;
        self.shortages.get(&(item.family, size)).map(|(shortage, _)| Outcome::Shortage(Arc::clone(shortage)))
    }

    /// There is no room; is it there but for reservations?
    fn fail(&mut self, item: &Arc<Item>, pool: usize, until: u64, shortage: Shortage) -> Outcome {
        self.failures += 1;
        let class = self.rooms.class(until);
        let mut outcome = None;
        if let Some(holder) = self.rooms.holder().filter(|holder| *holder != item.gang.id).map(Arc::from) {
            self.rooms.hide(self.cluster);
            let (pools, now, gang) = (self.pools, self.now, &*item.gang);
            let admits = |node: &Node| admits(pools, pool, node, now, until);
            if let Ok(places) = self.placers[pool].place(self.cluster, gang, gang.tasks.min, &admits) {
                places.iter().for_each(|place| self.cluster.give(gang, place));
                outcome = Some(Outcome::Behind(holder));
            }
        }
        let outcome = outcome.unwrap_or_else(|| Outcome::Shortage(self.words(item, shortage)));
        let failed = Failed { size: item.size(), class, outcome: outcome.clone() };
        self.failed.entry(item.family).or_default().push(failed);
        outcome
    }

    /// A shortage in the words that were used for the shape before, if they still do.
    fn words(&mut self, item: &Item, shortage: Shortage) -> Arc<Shortage> {
        let key = (item.family, item.size());
        let kind = std::mem::discriminant(&shortage);
        match self.shortages.get(&key) {
            Some((old, since))
                if std::mem::discriminant(&**old) == kind
                    && self.now < since.saturating_add(SAME_WORDS_MS) =>
            {
                Arc::clone(old)
            }
            _ => {
                let words = Arc::new(shortage);
                self.shortages.insert(key, (Arc::clone(&words), self.now));
                words
            }
        }
    }

    /// Reserves room for a gang that found none now; false if it never finds any.
    pub(super) fn reserve(&mut self, index: usize, firm: bool) -> bool {
        let item = Arc::clone(&self.items[index]);
        let (Some(pool), gang) = (item.pool, &item.gang) else { return false };
        let (pools, now) = (self.pools, self.now);
        let length = self.estimator.estimate(&item.similar, gang.estimate_ms).mean_ms;
        let admits = |node: &Node| admits(pools, pool, node, now, now.saturating_add(length));
        let kept = self.kept.remove(&gang.id);
        let mut found =
            kept.as_ref().and_then(|kept| search::recheck(&mut self.rooms, self.cluster, kept, &admits));
        // Places that come free later than was promised may not be the best any more. Those of starved
        // gangs stay: nobody else got them, which is not so of others.
        let late = match (&found, &kept) {
            (Some(found), Some(kept)) => found.from_ms > kept.from_ms && !(firm && kept.firm),
            _ => true,
        };
        let shape = (item.family, item.size());
        let never =
            self.impossible.get(&shape).is_some_and(|since| now < since.saturating_add(SAME_WORDS_MS))
                || (late && !search::ever(self.cluster, gang, &admits));
        if late && !never && self.searches < MOST_SEARCHES {
            self.searches += 1;
            let placer = &mut self.placers[pool];
            let new = search::earliest(&mut self.rooms, self.cluster, placer, gang, &admits);
            if new.is_none() {
                self.impossible.insert(shape, now);
            }
            let old = found.as_ref().map_or(u64::MAX, |found| found.from_ms);
            if new.as_ref().is_some_and(|new| new.from_ms < old) {
                found = new;
            }
        }
        let Some(found) = found else { return false };
        let reservation = Reservation {
            gang: Arc::clone(gang),
            names: room::names(self.cluster, &found.tasks),
            tasks: found.tasks,
            from_ms: found.from_ms,
            until_ms: found.from_ms.saturating_add(length),
            firm,
            after: found.after,
            known: found.known,
            makers: Vec::new(),
        };
        self.rooms.reserve(self.cluster, reservation);
        true
    }

    /// The plan, with a reason for each gang that waits, and what is reserved for the next cycle.
    pub fn finish(mut self) -> (Plan, HashMap<String, Reservation>, Accounts) {
        self.rooms.hide(self.cluster);
        let reserved: HashMap<String, Reservation> = std::mem::take(&mut self.rooms.reservations)
            .into_iter()
            .map(|reservation| (reservation.gang.id.clone(), reservation))
            .collect();
        for (item, outcome) in self.items.iter().zip(self.outcomes) {
            let gang = &item.gang;
            let reason = match outcome {
                Outcome::Started => continue,
                Outcome::NoPool => Reason::NoPool { pool: gang.pool.clone() },
                Outcome::RunsStill => Reason::RunsStill,
                Outcome::Limit(reached) => Reason::Limit(reached),
                Outcome::Shortage(shortage) => Reason::Shortage(shortage),
                Outcome::MakingRoom(makers) => {
                    Reason::MakingRoom { gangs: makers.iter().take(NAMED).cloned().collect() }
                }
                Outcome::Behind(holder) => Reason::Behind { gang: holder.to_string() },
                Outcome::Unseen => match self.shortages.get(&(item.family, item.size())) {
                    Some((shortage, _)) => Reason::Shortage(Arc::clone(shortage)),
                    None => Reason::Unseen,
                },
            };
            let held = reserved.get(&gang.id);
            self.plan.waiting.push(Waiting {
                gang: gang.id.clone(),
                reason,
                expected_ms: held.filter(|held| held.known).map(|held| held.from_ms),
                after: held.and_then(|held| held.after.clone()),
            });
        }
        if self.shortages.len() > 4 * self.items.len() + 1024 {
            let now = self.now;
            self.shortages.retain(|_, (_, since)| now < since.saturating_add(SAME_WORDS_MS));
            self.impossible.retain(|_, since| now < since.saturating_add(SAME_WORDS_MS));
        }
        (self.plan, reserved, self.accounts)
    }
}

/// Whether a gang that runs until then may be on a node: the node is its pool's, and stays there.
pub(super) fn admits(pools: &Pools, pool: usize, node: &Node, from_ms: u64, until_ms: u64) -> bool {
    pools.admits(pool, node)
        && node.maintenance.iter().all(|window| window.until_ms <= from_ms || window.from_ms >= until_ms)
}

fn queue_name(queue: Queue) -> &'static str {
    match queue {
        Queue::FirstComeFirstServed => "first come first served",
        Queue::ShortestJobFirst => "shortest job first",
        Queue::HighestResponseRatioNext => "highest response ratio next",
        Queue::FairShare => "fair share",
        Queue::Priority => "priority",
    }
}

fn where_and_how(names: &[String], strategy: crate::policy::Strategy) -> String {
    use crate::policy::Strategy;
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
