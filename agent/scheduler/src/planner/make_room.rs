//! Room that is made for a gang: elastic gangs give up what they have beyond their least, and running
//! gangs are stopped, for a gang of higher priority or for one that has a right to what they borrowed.
//!
//! What is chosen is tried on the cluster first: only gangs whose room the waiting gang gets are
//! touched. Among the choices that were tried, the one wins that touches the lowest priority, then
//! loses the least work (GPUs times the time since the start; for gangs that write a checkpoint, no
//! more than that takes), then touches the fewest gangs. Never touched: gangs that are not
//! preemptible, gangs of the same or higher priority (unless they use what others are guaranteed,
//! whatever their priority: or priorities would be worth more than guarantees), and room on nodes
//! where it is reserved for others.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::accounts::{borrows, covers, used_by};
use super::cycle::{Cycle, Outcome, admits};
use super::known::Item;
use super::room::{self, Overlay, Reservation};
use super::search::Domains;
use crate::model::{Fold, Node, Running, TaskPlace};
use crate::placement::eligible;
use crate::plan::{Preemption, Resize};
use crate::policy::Share;

/// Gangs for which room is sought in a cycle: each may look at all that runs.
const MOST_SOUGHT: usize = 4;
/// Domains (nodes, leaves, racks) that are tried in earnest for one gang, the cheapest by counting.
const MOST_TRIED: usize = 4;

/// Something that a running gang can give up.
struct Unit {
    run: usize,
    /// By rank; all of them, or those beyond the least.
    tasks: Vec<TaskPlace>,
    first_rank: u32,
    cost: Cost,
    borrowed: bool,
}

/// What it costs; smaller is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// 0 for tasks beyond the least of an elastic gang.
    stops: u8,
    priority: i32,
    lost: u128,
    gangs: u32,
}

impl Cost {
    fn plus(self, other: Self) -> Self {
        let (stops, priority) = (self.stops, self.priority).max((other.stops, other.priority));
        Self { stops, priority, lost: self.lost + other.lost, gangs: self.gangs + other.gangs }
    }

    /// By how much it gives.
    fn per(self, tasks: u32) -> Self {
        Self { lost: self.lost / u128::from(tasks.max(1)), ..self }
    }

    const NOTHING: Self = Self { stops: 0, priority: i32::MIN, lost: 0, gangs: 0 };
}

/// Units that are enough, and where the gang goes then.
struct Choice {
    units: Vec<usize>,
    places: Vec<TaskPlace>,
    cost: Cost,
}

impl Cycle<'_> {
    /// Tells others to make room for a gang, and holds it; false if that is not possible.
    pub(super) fn make_room(&mut self, index: usize) -> bool {
        let waiter = &self.waiters[index];
        let Some(pool) = waiter.pool.map(|pool| pool as usize) else { return false };
        if self.sought >= MOST_SOUGHT || !(self.elastic || self.settings.pools[pool].preemption) {
            return false;
        }
        let key = (waiter.shape, waiter.priority, waiter.tenant);
        if self.sought_in_vain.contains(&key) {
            return false;
        }
        let item = self.item(index);
        let units = self.units(&item, pool);
        if !units.is_empty() {
            self.sought += 1;
            if let Some(choice) = self.choose(&item, pool, &units) {
                self.ask(index, &item, &units, choice);
                return true;
            }
        }
        self.sought_in_vain.push(key);
        false
    }

    /// What could be given up for this gang, cheapest first.
    fn units(&self, item: &Item, pool: usize) -> Vec<Unit> {
        let mut units = Vec::new();
        let preemption = self.settings.pools[pool].preemption;
        let rights = if preemption { self.rights(item) } else { Vec::new() };
        for (at, run) in self.rooms.runs.iter().enumerate() {
            let gang = &run.item.gang;
            let size = gang.tasks;
            let by_priority =
                preemption && gang.priority < item.gang.priority && self.within(run.item.pool, pool);
            let borrowed = gang.preemptible && !rights.is_empty() && self.owes(&run.item, &rights);
            let stops = gang.preemptible && (by_priority || borrowed);
            if (!stops && size.min == size.max) || self.asked.contains(&gang.id) {
                continue;
            }
            let Some(running) = self.cluster.running().get(&gang.id).filter(|running| !running.stopping)
            else {
                continue;
            };
            // What started in this cycle is no more than a plan: it is not undone.
            if running.started_ms >= self.now {
                continue;
            }
            let least = (size.min as usize).min(running.tasks.len());
            if running.tasks.len() > least {
                let tasks = running.tasks[least..].to_vec();
                let cost = Cost { stops: 0, priority: gang.priority, lost: 0, gangs: 1 };
                units.push(Unit { run: at, tasks, first_rank: size.min, cost, borrowed: false });
            }
            if stops {
                let tasks = running.tasks[..least].to_vec();
                let cost = Cost { stops: 1, priority: gang.priority, lost: self.lost(running), gangs: 1 };
                units.push(Unit { run: at, tasks, first_rank: 0, cost, borrowed: !by_priority });
            }
        }
        units.sort_by_key(|unit| (unit.cost, std::cmp::Reverse(unit.run)));
        units
    }

    /// Work that is done again: GPU-milliseconds (in thousandths); CPUs count where there are no GPUs.
    fn lost(&self, running: &Running) -> u128 {
        let ran = self.now.saturating_sub(running.started_ms);
        let again = if running.gang.grace_ms > 0 { ran.min(running.gang.grace_ms) } else { ran };
        let gpus: u64 =
            running.tasks.iter().flat_map(|task| &task.gpus).map(|gpu| u64::from(gpu.part.milli)).sum();
        let cpus = running.gang.task.amount.cpu_milli * running.tasks.len() as u64;
        // A CPU is worth a hundredth of a GPU: enough to tell gangs without GPUs apart.
        u128::from(again) * (u128::from(gpus) * 100 + u128::from(cpus))
    }

    /// Whether a pool is another one or a part of it.
    fn within(&self, inner: Option<usize>, outer: usize) -> bool {
        inner.is_some_and(|inner| self.pools.lines[inner].contains(&outer))
    }

    /// Guarantees that cover what the gang needs: pools', and tenants' in pools.
    fn rights(&self, item: &Item) -> Vec<(usize, Option<u32>)> {
        let share = item.share(item.gang.tasks.min);
        let line = item.pool.map_or(&[][..], |pool| &self.pools.lines[pool]);
        let mut rights = Vec::new();
        for &pool in line {
            if covers(&self.settings.pools[pool].quota, &self.accounts.pool(pool), &share) {
                rights.push((pool, None));
            }
            for &tenant in &self.tenants[item.tenant as usize].line {
                let used = self.accounts.tenant(pool, tenant);
                if covers(&self.tenants[tenant as usize].quota, &used, &share) {
                    rights.push((pool, Some(tenant)));
                }
            }
        }
        rights
    }

    /// Whether a running gang uses what somebody with one of these rights may have back: it is not his
    /// own, and its owner uses more than is guaranteed to him.
    fn owes(&self, victim: &Item, rights: &[(usize, Option<u32>)]) -> bool {
        let Some(pool) = victim.pool else { return false };
        let line = &self.pools.lines[pool];
        let tenants = &self.tenants[victim.tenant as usize].line;
        rights.iter().any(|&(right, tenant)| match tenant {
            None => {
                !line.contains(&right)
                    && line
                        .iter()
                        .take_while(|one| !self.pools.lines[right].contains(one))
                        .all(|&one| borrows(&self.settings.pools[one].quota, &self.accounts.pool(one)))
            }
            Some(owner) => {
                line.contains(&right)
                    && !tenants.contains(&owner)
                    && tenants.iter().all(|&tenant| {
                        let used = self.accounts.tenant(right, tenant);
                        borrows(&self.tenants[tenant as usize].quota, &used)
                    })
            }
        })
    }

    fn choose(&mut self, item: &Item, pool: usize, units: &[Unit]) -> Option<Choice> {
        let (pools, now) = (self.pools, self.now);
        let length = self.estimator.estimate(&item.similar, item.gang.estimate_ms).mean_ms;
        let until = now.saturating_add(length);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        self.rooms.show(self.cluster, until, Some(&item.gang.id));
        let mut best: Option<Choice> = None;
        for mut candidate in self.candidates(item, units, &admits) {
            candidate.sort_unstable();
            candidate.dedup();
            if let Some(choice) = self.try_units(item, pool, units, &candidate, &admits)
                && best.as_ref().is_none_or(|best| choice.cost < best.cost)
                && self.all_owed(item, units, &choice.units)
            {
                best = Some(choice);
            }
        }
        best
    }

    /// Sets of units that are enough by counting: the cheapest nodes of the cheapest domains.
    fn candidates(&self, item: &Item, units: &[Unit], admits: &dyn Fn(&Node) -> bool) -> Vec<Vec<usize>> {
        let gang = &item.gang;
        let mut on_node: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (at, unit) in units.iter().enumerate() {
            for place in &unit.tasks {
                let here = on_node.entry(place.node).or_default();
                if here.last() != Some(&at) {
                    here.push(at);
                }
            }
        }
        let domains = Domains::of(self.cluster, gang);
        // By domain: what a node holds, what that costs, and the units it takes.
        let mut offers: BTreeMap<u32, Vec<(u32, Cost, Vec<usize>)>> = BTreeMap::new();
        for (node, index) in self.cluster.nodes().iter().zip(0..) {
            if !eligible(node, gang) || !admits(node) {
                continue;
            }
            let mut free = self.cluster.free()[index as usize].clone();
            let held = room::holds(node, &free, gang);
            let of_domain = offers.entry(domains.of_node(index)).or_default();
            if held > 0 {
                of_domain.push((held, Cost::NOTHING, Vec::new()));
            }
            if self.rooms.is_reserved(index) {
                continue;
            }
            let (mut cost, mut taken, mut before) = (Cost::NOTHING, Vec::new(), held);
            for &at in on_node.get(&index).into_iter().flatten() {
                let unit = &units[at];
                for place in unit.tasks.iter().filter(|place| place.node == index) {
                    free.give(node, &self.rooms.runs[unit.run].item.gang, place);
                }
                cost = cost.plus(unit.cost);
                taken.push(at);
                let holds = room::holds(node, &free, gang);
                if holds > before {
                    of_domain.push((holds - before, cost, std::mem::take(&mut taken)));
                    (cost, before) = (Cost::NOTHING, holds);
                }
            }
        }
        let mut sets: Vec<(Cost, Vec<usize>)> = Vec::new();
        for (_, mut of_domain) in offers {
            of_domain.sort_by_key(|(tasks, cost, _)| cost.per(*tasks));
            let (mut tasks, mut cost, mut set) = (0, Cost::NOTHING, Vec::new());
            for (more, price, units) in of_domain {
                if tasks >= gang.tasks.min {
                    break;
                }
                tasks += more;
                cost = cost.plus(price);
                set.extend(units);
            }
            if tasks >= gang.tasks.min && !set.is_empty() {
                sets.push((cost, set));
            }
        }
        sets.sort();
        sets.truncate(MOST_TRIED);
        // Counting may be wrong (switches, isolation): then all that may be touched is tried, too.
        let mut sets: Vec<Vec<usize>> = sets.into_iter().map(|(_, set)| set).collect();
        sets.push((0..units.len()).collect());
        sets
    }

    /// Places the gang as if these units were given up, and leaves out those that it did not need.
    fn try_units(
        &mut self,
        item: &Item,
        pool: usize,
        units: &[Unit],
        set: &[usize],
        admits: &dyn Fn(&Node) -> bool,
    ) -> Option<Choice> {
        let gang = &*item.gang;
        let mut overlay = Overlay::default();
        for &at in set {
            let giving = Arc::clone(&self.rooms.runs[units[at].run].item.gang);
            for place in units[at].tasks.iter().filter(|place| !self.rooms.is_reserved(place.node)) {
                overlay.give(self.cluster, &giving, place);
            }
        }
        let placed = self.placers[pool].seek(self.cluster, gang, gang.tasks.min, admits);
        if let Some(places) = &placed {
            overlay.undo(self.cluster, gang, places);
        }
        overlay.restore(self.cluster);
        let places = placed?;
        let nodes = room::by_node(&places);
        let mut needed: Vec<usize> = set.to_vec();
        needed.retain(|&at| units[at].tasks.iter().any(|place| nodes.contains_key(&place.node)));
        // The dearest first: what is left out is not touched.
        for at in needed.clone().into_iter().rev() {
            let without: Vec<usize> = needed.iter().copied().filter(|other| *other != at).collect();
            if self.enough(gang, units, &without, &nodes) {
                needed = without;
            }
        }
        // A gang that is stopped gives up what it had beyond its least, too.
        let cost = needed.iter().fold(Cost::NOTHING, |cost, &at| cost.plus(units[at].cost));
        Some(Choice { units: needed, places, cost })
    }

    fn enough(
        &self,
        gang: &crate::model::Gang,
        units: &[Unit],
        set: &[usize],
        nodes: &BTreeMap<u32, Vec<&TaskPlace>>,
    ) -> bool {
        nodes.iter().all(|(&index, places)| {
            let node = &self.cluster.nodes()[index as usize];
            let mut free = self.cluster.free()[index as usize].clone();
            if !self.rooms.is_reserved(index) {
                for &at in set {
                    let giving = &self.rooms.runs[units[at].run].item.gang;
                    let here = units[at].tasks.iter().filter(|place| place.node == index);
                    here.for_each(|place| free.give(node, giving, place));
                }
            }
            places.iter().all(|place| free.take(node, gang, place).is_ok())
        })
    }

    /// Whether all that is taken back is owed: an owner keeps what is guaranteed to him.
    fn all_owed(&mut self, item: &Item, units: &[Unit], set: &[usize]) -> bool {
        let rights = self.rights(item);
        let mut gone: Vec<(Arc<Item>, Share)> = Vec::new();
        let mut owed = true;
        for &at in set.iter().filter(|at| units[**at].borrowed) {
            let victim = Arc::clone(&self.rooms.runs[units[at].run].item);
            owed = owed && self.owes(&victim, &rights);
            let share = used_by(&victim, &units[at].tasks);
            if let Some(pool) = victim.pool {
                let line = &self.tenants[victim.tenant as usize].line;
                self.accounts.remove(&self.pools.lines[pool], line, &share);
                gone.push((victim, share));
            }
        }
        for (victim, share) in gone {
            if let Some(pool) = victim.pool {
                let line = &self.tenants[victim.tenant as usize].line;
                self.accounts.add(&self.pools.lines[pool], line, &share);
            }
        }
        owed
    }

    /// Tells the chosen gangs, and reserves what they give up.
    fn ask(&mut self, index: usize, item: &Item, units: &[Unit], choice: Choice) {
        let gang = &item.gang;
        let mut makers = Vec::new();
        let mut grace = 1;
        for &at in &choice.units {
            let unit = &units[at];
            let maker = Arc::clone(&self.rooms.runs[unit.run].item.gang);
            grace = grace.max(maker.grace_ms);
            if unit.cost.stops == 0 {
                if choice.units.iter().all(|&other| units[other].run != unit.run || other == at) {
                    let remove = (unit.first_rank..).take(unit.tasks.len()).collect();
                    let why =
                        format!("job {} needs the room, and job {} goes on with less", gang.id, maker.id);
                    self.plan.resizes.push(Resize { gang: maker.id.clone(), remove, add: Vec::new(), why });
                }
            } else {
                let why = if unit.borrowed {
                    format!("job {} has a right to the room, which job {} borrowed", gang.id, maker.id)
                } else {
                    format!(
                        "job {} of priority {} needs the room, job {} has priority {}",
                        gang.id, gang.priority, maker.id, maker.priority
                    )
                };
                let for_gang = Some(gang.id.clone());
                self.plan.preemptions.push(Preemption { gang: maker.id.clone(), for_gang, why });
            }
            self.asked.insert(maker.id.clone());
            if !makers.contains(&maker.id) {
                makers.push(maker.id.clone());
            }
        }
        let length = self.estimator.estimate(&item.similar, gang.estimate_ms).mean_ms;
        let from_ms = self.now.saturating_add(grace);
        self.kept.remove(&gang.id);
        self.rooms.release(self.cluster, &gang.id);
        let reservation = Reservation {
            gang: Arc::clone(gang),
            names: room::names(self.cluster, &choice.places),
            tasks: choice.places,
            from_ms,
            until_ms: from_ms.saturating_add(length),
            firm: true,
            after: makers.first().cloned(),
            known: true,
            makers: makers.clone(),
        };
        self.hold(item.print, reservation);
        self.outcomes[index] = Outcome::MakingRoom(makers.into());
    }

    /// What was held back for gangs that others make room for stays theirs, and they are tried first.
    pub(super) fn keep_claims(&mut self) {
        let mut claims: Vec<Reservation> =
            self.kept.values().filter(|kept| !kept.makers.is_empty()).cloned().collect();
        if claims.is_empty() {
            return;
        }
        claims.sort_by(|one, other| (one.from_ms, &one.gang.id).cmp(&(other.from_ms, &other.gang.id)));
        let waiting = self.waiters.iter().enumerate();
        let claimants = waiting.filter(|(_, waiter)| self.reserving.contains(&waiter.print));
        let ids: BTreeMap<&str, usize> =
            claimants.map(|(index, waiter)| (waiter.item.gang.id.as_str(), index)).collect();
        let claims: Vec<(Option<usize>, Reservation)> =
            claims.into_iter().map(|claim| (ids.get(claim.gang.id.as_str()).copied(), claim)).collect();
        for (index, claim) in claims {
            let makers: Vec<String> =
                claim.makers.iter().filter(|one| self.makes_room(one)).cloned().collect();
            match index {
                Some(index) => {
                    let why = || "its room was made by others".to_owned();
                    self.outcomes[index] = self.attempt(index, &why);
                    if self.waits_for_room(index) && !makers.is_empty() && self.reserve(index, true) {
                        self.ask_again(&claim.gang.id, &makers);
                        self.outcomes[index] = Outcome::MakingRoom(makers.clone().into());
                        self.rooms.made_by(&claim.gang.id, makers);
                    }
                }
                // One that was told to leave a node, and has not left.
                None if makers.contains(&claim.gang.id) => {
                    let print = Fold::of(&claim.gang.id);
                    self.hold(print, claim);
                }
                None => {}
            }
        }
    }

    /// Whether a gang does what it was told: it stops, or it has not yet given up what it has beyond
    /// its least. One that does not stop was not told, or could not be: another choice is made then.
    fn makes_room(&self, gang: &str) -> bool {
        self.cluster.running().get(gang).is_some_and(|running| running.stopping || beyond_least(running))
    }

    /// Says again what elastic gangs are to give up, until they have.
    fn ask_again(&mut self, for_gang: &str, makers: &[String]) {
        for maker in makers {
            let running = self.cluster.running().get(maker).filter(|one| !one.stopping && beyond_least(one));
            if let Some(running) = running
                && self.asked.insert(maker.clone())
            {
                let remove = (running.gang.tasks.min..running.tasks.len() as u32).collect();
                let why = format!("job {for_gang} needs the room, and job {maker} goes on with less");
                self.plan.resizes.push(Resize { gang: maker.clone(), remove, add: Vec::new(), why });
            }
        }
    }
}

fn beyond_least(running: &Running) -> bool {
    running.tasks.len() > running.gang.tasks.min as usize
}
