//! One cycle: who is tried, in which order, and what comes of it.
//!
//! - [`queues`]: whose turn it is.
//! - [`start`]: a gang's try: whether it may, whether it fits, and its start.
//! - [`refused`]: what is known of gangs that found no room, so that those like them are not tried.
//! - [`reserve`]: what is held for those that wait.
//! - [`report`]: the plan, with a reason for each that waits.
//!
//! Of a long queue most gangs are like one that was tried already: they are refused at sight, by what
//! their [`Waiter`] says, without a look at the gang.

mod queues;
mod refused;
mod report;
mod reserve;
mod start;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::accounts::{Accounts, LimitKey, Pools};
use super::known::{Item, TenantInfo};
use super::lists::Waiter;
use super::room::{Reservation, Rooms};
use crate::model::{Cluster, Node, Printed};
use crate::placement::{Placer, Shortage};
use crate::plan::{LimitReached, Plan};
use crate::policy::Settings;
use crate::queue::estimate::Estimator;
use crate::queue::fair::Ledger;
pub(in crate::planner) use refused::Refused;

/// For so long a shortage is said in the same words, milliseconds, unless its kind or a node changes: how
/// much is free changes all the time, and is what nobody waits for.
const SAME_WORDS_MS: u64 = 60_000;

/// What came of a gang.
#[derive(Clone, Debug)]
pub(in crate::planner) enum Outcome {
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

/// What the planner knows of shapes, by number, from the cycles before.
#[derive(Clone, Debug, Default)]
pub(in crate::planner) struct Shapes {
    list: Vec<OfShape>,
    /// The number of the round ([`Cycle::end_round`]).
    round: u64,
}

#[derive(Clone, Debug, Default)]
struct OfShape {
    /// One more than the round in which it was last tried in vain.
    tried: u64,
    /// Why it has no room.
    words: Option<Words>,
    /// Since when it is known that it would not fit if nothing ran.
    impossible: Option<u64>,
}

/// A shortage in the words that are said of it.
#[derive(Clone, Debug)]
struct Words {
    words: Arc<Shortage>,
    /// Since when they are.
    since_ms: u64,
    /// When the reason was last looked for, and on which nodes.
    looked_ms: u64,
    nodes: u64,
}

impl Words {
    /// Whether they are said again while the nodes are these.
    fn hold(&self, now_ms: u64, nodes: u64) -> bool {
        self.nodes == nodes && now_ms < self.since_ms.saturating_add(SAME_WORDS_MS)
    }
}

impl Shapes {
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// There are so many now.
    pub fn resize(&mut self, count: usize) {
        self.list.resize_with(count, OfShape::default);
    }

    fn tried(&mut self, shape: u32) {
        self.list[shape as usize].tried = self.round + 1;
    }

    fn is_tried(&self, shape: u32) -> bool {
        self.list[shape as usize].tried > self.round
    }

    fn words(&self, shape: u32) -> Option<&Arc<Shortage>> {
        self.list[shape as usize].words.as_ref().map(|known| &known.words)
    }
}

pub(in crate::planner) struct Cycle<'a> {
    pub now: u64,
    pub settings: &'a Settings,
    pub pools: &'a Pools,
    pub tenants: &'a [TenantInfo],
    pub estimator: &'a Estimator,
    pub ledger: &'a Ledger,
    pub placers: &'a mut [Placer],
    pub cluster: &'a mut Cluster,
    pub waiters: &'a [Waiter],
    pub accounts: Accounts,
    /// Whether any pool or tenant has a limit.
    pub limited: bool,
    pub rooms: Rooms,
    /// Reservations of the cycle before.
    pub kept: HashMap<String, Reservation>,
    pub shapes: &'a mut Shapes,
    pub outcomes: Vec<Outcome>,
    /// Nodes by the number of their GPUs that nobody uses.
    pub whole: Vec<u64>,
    pub refused: Refused,
    /// Known reasons that were looked for again.
    pub looks: usize,
    pub searches: usize,
    /// Limits that leave no room for a starved gang: what comes free of them is its.
    pub held_limits: Vec<(LimitKey, usize)>,
    /// Of the IDs of all that run, and of all that have, or had in this cycle, a reservation.
    pub running: HashSet<u64, Printed>,
    pub reserving: HashSet<u64, Printed>,
    /// Whether any gang that runs is elastic.
    pub elastic: bool,
    /// Gangs that were told something in this cycle.
    pub asked: BTreeSet<String>,
    /// Gangs that room was sought for, and shapes for which there is none to be made, with priority and
    /// tenant.
    pub sought: usize,
    pub sought_in_vain: Vec<(u32, i32, u32)>,
    pub plan: Plan,
}

impl Cycle<'_> {
    pub fn run(&mut self) {
        self.keep_claims();
        self.serve_queues();
        self.drain();
        self.grow();
        self.end_round();
    }

    pub fn item(&self, index: usize) -> Arc<Item> {
        Arc::clone(&self.waiters[index].item)
    }

    pub fn waits_for_room(&self, index: usize) -> bool {
        matches!(self.outcomes[index], Outcome::Shortage(_) | Outcome::Behind(_))
    }

    /// The first limit that so many tasks would pass.
    pub fn limit(&self, item: &Item, tasks: u32) -> Option<(LimitKey, LimitReached)> {
        if !self.limited {
            return None;
        }
        let line = &self.pools.lines[item.pool?];
        self.accounts.limit(self.settings, self.tenants, line, item, &item.share(tasks))
    }
}

/// Whether a gang that runs until then may be on a node: the node is its pool's, and stays there.
pub(in crate::planner) fn admits(
    pools: &Pools,
    pool: usize,
    node: &Node,
    from_ms: u64,
    until_ms: u64,
) -> bool {
    pools.admits(pool, node)
        && node.maintenance.iter().all(|window| window.until_ms <= from_ms || window.from_ms >= until_ms)
}
