//! Which gang goes next, what is held back for it, what is stopped for it.
//!
//! - [`accounts`]: what pools and tenants use, may use, and have a right to.
//! - [`cycle`]: one cycle: who is tried, in which order, and what comes of it.
//! - [`known`]: gangs as indices, so that a cycle over many is fast. [`lists`]: what waits and what runs, kept
//!   from cycle to cycle.
//! - [`make_room`]: what is stopped or made smaller for a gang that waits.
//! - [`reshape`]: drained nodes are emptied, elastic gangs grow.
//! - [`room`]: room over time, with what is reserved of it.
//! - [`search`]: the earliest time at which a gang fits.
//! - [`usage`]: what tenants had, to be kept elsewhere.
//!
//! **Nothing starves.** A gang that waited `starvation_ms` of its pool is *starved*: it goes before all
//! that are not, oldest first, and when it does not fit at once it gets a firm reservation: places
//! that nobody else gets, however short he says he will run, until it starts there or (earlier)
//! anywhere. So, if no gang runs longer than D, no node fails, and no limit of its own stands in its
//! way, a gang that at most n starved gangs of before still wait ahead of starts at most
//! `starvation_ms + (n + 1) D` after it came: what runs on the first one's places is gone after D, and
//! nothing new came there; then it runs at most D, and the next is the first. (Gangs that are told to
//! make room have their grace on top.) [`MOST_FIRM`] starved gangs have their places at a time.

mod accounts;
mod cycle;
mod known;
mod lists;
mod make_room;
mod reshape;
mod room;
mod search;
mod usage;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use accounts::{Accounts, Pools};
use cycle::{Cycle, Refused, Shapes};
use known::Known;
use lists::{Lists, Runner};
use room::{Reservation, Rooms, Run};
pub use usage::{TenantUsage, Usage};

use crate::model::{Cluster, Fold, Gang, Running};
use crate::placement::Placer;
use crate::plan::Plan;
use crate::policy::{Settings, Share};
use crate::queue::estimate::Estimator;
use crate::queue::fair::Ledger;

/// After this time, what a tenant had counts half.
const HALF_LIFE_MS: u64 = 24 * 3_600_000;
/// Starved gangs that have firm reservations at a time, in all pools.
pub const MOST_FIRM: usize = 16;

/// Plans cycle after cycle.
///
/// What it keeps between them: how long gangs ran and what tenants had, which the policies go by; the
/// places that are reserved, so that they do not wander; and much that only makes it faster.
#[derive(Clone, Debug)]
pub struct Planner {
    settings: Settings,
    placers: Vec<Placer>,
    pools: Pools,
    known: Known,
    lists: Lists,
    estimator: Estimator,
    ledger: Ledger,
    reserved: HashMap<String, Reservation>,
    shapes: Shapes,
    /// What each pool's nodes have, and of which nodes that is.
    capacity: (u64, Vec<Share>),
}

impl Planner {
    /// For these pools and tenants; `seed` decides what is left to chance.
    pub fn new(settings: Settings, seed: u64) -> Self {
        let placers = settings.pools.iter().map(|pool| Placer::new(pool.placement, seed)).collect();
        Self {
            placers,
            pools: Pools::new(&settings),
            known: Known::new(&settings),
            lists: Lists::default(),
            estimator: Estimator::default(),
            ledger: Ledger::new(HALF_LIFE_MS),
            reserved: HashMap::new(),
            shapes: Shapes::default(),
            capacity: (0, Vec::new()),
            settings,
        }
    }

    /// After this time, what a tenant had counts half for fair shares; a day unless said.
    #[must_use]
    pub fn half_life_ms(mut self, half_life_ms: u64) -> Self {
        self.ledger = Ledger::new(half_life_ms);
        self
    }

    /// Pools and tenants.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A gang ended after running so long by itself: gangs like it will run similarly long.
    pub fn ended(&mut self, gang: &Gang, ran_ms: u64) {
        self.estimator.ended(gang, ran_ms);
    }

    /// How long it is thought that a gang will run, milliseconds.
    pub fn estimate_ms(&mut self, gang: &Gang) -> u64 {
        let similar = self.estimator.similar(gang);
        self.estimator.fit();
        self.estimator.estimate(&similar, gang.estimate_ms).mean_ms
    }

    /// One cycle: plans the gangs that wait, and starts on `cluster` what it plans to start.
    ///
    /// Gangs of `pending` that came at the same time are thought to have come in its order.
    pub fn cycle(&mut self, cluster: &mut Cluster, pending: &[Arc<Gang>], now_ms: u64) -> Plan {
        self.ledger.advance(now_ms);
        self.look_at(cluster, pending);
        let mut accounts = Accounts::new(self.capacity(cluster));
        let runs = self.runs(cluster, now_ms, &mut accounts);
        let elastic = runs.iter().any(|run| run.item.gang.tasks.min < run.item.gang.tasks.max);
        let most = cluster.nodes().iter().map(|node| node.gpus.len()).max().unwrap_or(0);
        let mut whole = vec![0; most + 1];
        cluster.free().iter().for_each(|free| whole[free.whole_gpus() as usize] += 1);
        let kept = std::mem::take(&mut self.reserved);
        let mut cycle = Cycle {
            now: now_ms,
            limited: self.settings.limits(),
            settings: &self.settings,
            pools: &self.pools,
            tenants: &self.known.tenants,
            estimator: &self.estimator,
            ledger: &self.ledger,
            placers: &mut self.placers,
            refused: Refused::new(self.known.shapes(), cluster.nodes().len()),
            cluster,
            waiters: &self.lists.waiters,
            accounts,
            running: runs.iter().map(|run| run.item.print).collect(),
            rooms: Rooms::new(now_ms, runs),
            reserving: kept.keys().map(Fold::of).collect(),
            kept,
            looks: 0,
            shapes: &mut self.shapes,
            outcomes: vec![cycle::Outcome::Unseen; pending.len()],
            whole,
            searches: 0,
            held_limits: Vec::new(),
            elastic,
            asked: BTreeSet::new(),
            sought: 0,
            sought_in_vain: Vec::new(),
            plan: Plan::default(),
        };
        cycle.run();
        let (plan, reserved, accounts) = cycle.finish();
        self.reserved = reserved;
        self.ledger.set(accounts.fractions());
        plan
    }

    /// Brings what is known of gangs up to date.
    fn look_at(&mut self, cluster: &Cluster, pending: &[Arc<Gang>]) {
        let Self { known, lists, pools, estimator, shapes, .. } = self;
        let sync = |lists: &mut Lists, known: &mut Known, estimator: &mut Estimator| {
            lists.sync(pending, cluster, |gang| known.item(gang, &pools.by_name, estimator, cluster));
        };
        sync(lists, known, estimator);
        if known.begin(estimator, lists.isolated()) {
            shapes.clear();
            lists.clear();
            sync(lists, known, estimator);
        }
        shapes.resize(known.shapes());
        known.end(lists.waiters.len() + lists.runners.len());
    }

    fn capacity(&mut self, cluster: &Cluster) -> Vec<Share> {
        let nodes = cluster.nodes_fingerprint();
        if self.capacity.0 != nodes || self.capacity.1.is_empty() {
            self.capacity = (nodes, self.pools.capacity(cluster.nodes()));
        }
        self.capacity.1.clone()
    }

    /// What runs, and counts it.
    fn runs(&mut self, cluster: &Cluster, now_ms: u64, accounts: &mut Accounts) -> Vec<Run> {
        let mut guesses = self.lists.guesses();
        self.estimator.begin();
        for (running, Runner { item, used, .. }) in cluster.running().values().zip(&self.lists.runners) {
            if let Some(pool) = item.pool {
                let line = &self.known.tenants[item.tenant as usize].line;
                accounts.add(&self.pools.lines[pool], line, used);
            }
            let asked =
                running.gang.estimate_ms.is_none() || running.expected_end_ms.is_none_or(|end| end <= now_ms);
            guesses |= !running.stopping && asked;
            self.estimator.runs(&item.similar, now_ms.saturating_sub(running.started_ms));
        }
        // Where users' estimates do, nothing is asked that a fit would tell.
        if guesses {
            self.estimator.fit();
        }
        let run = |(running, runner): (&Running, &Runner)| {
            let (end_ms, known) = self.end(running, &runner.item, now_ms);
            Run { item: Arc::clone(&runner.item), nodes: Arc::clone(&runner.nodes), end_ms, known }
        };
        cluster.running().values().zip(&self.lists.runners).map(run).collect()
    }

    /// When a running gang will have ended: later than now, for now it runs.
    fn end(&self, running: &Running, item: &known::Item, now_ms: u64) -> (u64, bool) {
        let ran = now_ms.saturating_sub(running.started_ms);
        if running.stopping {
            return (now_ms.saturating_add(running.gang.grace_ms.max(1)), true);
        }
        let gang = &running.gang;
        // What was guessed when it started is known better now, unless its size has changed since.
        let guessed = gang.estimate_ms.is_none() && gang.tasks.min == gang.tasks.max;
        let (expected, known) = match running.expected_end_ms.filter(|_| !guessed) {
            Some(end) => (end, true),
            None => {
                let estimate = self.estimator.estimate(&item.similar, running.gang.estimate_ms);
                (running.started_ms.saturating_add(estimate.mean_ms), estimate.known)
            }
        };
        if expected > now_ms {
            return (expected, known);
        }
        (now_ms.saturating_add(self.estimator.remaining_ms(&item.similar, ran)), false)
    }
}
