//! Whose turn it is: those that waited too long, then pool after pool, each in the order of its policy.

use std::sync::Arc;

use super::{Cycle, Outcome};
use crate::planner::MOST_FIRM;
use crate::policy::{Backfill, Queue};
use crate::queue::fair::{FairQueue, Fractions, Standing};
use crate::queue::{Entry, Order, Sorted};

/// Gangs of a pool that have reservations with conservative backfill. Those behind them may be
/// delayed by what starts before them, as with EASY.
const MOST_RESERVATIONS: usize = 32;

/// Where a pool's queue is.
struct Turn {
    pool: usize,
    queue: Box<dyn Order>,
    rank: usize,
    head: Option<Arc<str>>,
    reservations: usize,
}

impl Cycle<'_> {
    pub(super) fn serve_queues(&mut self) {
        let mut entries: Vec<Vec<Entry>> = vec![Vec::new(); self.settings.pools.len()];
        let mut urgent: Vec<(u64, usize)> = Vec::new();
        let looks_at_estimates: Vec<bool> =
            self.settings.pools.iter().map(|pool| pool.queue.looks_at_estimates()).collect();
        for (index, waiter) in self.waiters.iter().enumerate() {
            let Some(pool) = waiter.pool.map(|pool| pool as usize) else {
                self.outcomes[index] = Outcome::NoPool;
                continue;
            };
            if matches!(self.outcomes[index], Outcome::Started | Outcome::MakingRoom(_)) {
                continue;
            }
            let waited_ms = self.now.saturating_sub(waiter.submitted_ms);
            let starvation_ms = self.settings.pools[pool].starvation_ms;
            if starvation_ms > 0 && waited_ms >= starvation_ms {
                urgent.push((waiter.submitted_ms, index));
                continue;
            }
            entries[pool].push(Entry {
                gang: index,
                submitted_ms: waiter.submitted_ms,
                waited_ms,
                estimate_ms: if looks_at_estimates[pool] { self.length_ms(index) } else { 0 },
                priority: waiter.priority,
                tenant: waiter.tenant,
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

    /// How long a gang is thought to run, milliseconds.
    fn length_ms(&self, index: usize) -> u64 {
        let item = &self.waiters[index].item;
        self.estimator.estimate(&item.similar, item.gang.estimate_ms).mean_ms
    }

    /// With conservative backfill, who has a reservation keeps it, whoever comes after: gangs that are
    /// tried before it in this cycle get nothing of it.
    fn keep_promises(&mut self, turns: &mut [Turn]) {
        if self.kept.is_empty() {
            return;
        }
        let conservative = |pool: u32| self.settings.pools[pool as usize].backfill == Backfill::Conservative;
        let mut promised: Vec<(u64, usize, usize)> = self
            .waiters
            .iter()
            .enumerate()
            .filter(|(_, waiter)| self.reserving.contains(&waiter.print))
            .filter_map(|(index, waiter)| {
                let pool = waiter.pool.filter(|pool| conservative(*pool))?;
                let kept = self.kept.get(&waiter.item.gang.id)?;
                Some((kept.from_ms, index, pool as usize))
            })
            .collect();
        promised.sort_unstable();
        for (_, index, pool) in promised {
            let item = self.item(index);
            if self.limit(&item, item.gang.tasks.min).is_none() && self.reserve(index, false) {
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
                let item = self.item(index);
                let Some(pool) = item.pool.filter(|_| firm < MOST_FIRM) else { continue };
                if self.reserve(index, true) {
                    firm += 1;
                    turns[pool].head.get_or_insert_with(|| item.gang.id.as_str().into());
                }
            }
        }
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
        let borrows = crate::planner::accounts::borrows(&settings.quota, &used);
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
            let item = &self.waiters[index].item;
            let tasks = self.plan.starts.last().map_or(0, |start| start.tasks.len());
            let share = item.share(u32::try_from(tasks).unwrap_or(u32::MAX));
            turn.queue.started(&Fractions::of(&share, self.accounts.capacity(turn.pool)));
            return true;
        }
        if self.waits_for_room(index) {
            self.hold_room(turn, index);
        }
        false
    }

    /// Room for a gang that found none: made by others, or reserved.
    fn hold_room(&mut self, turn: &mut Turn, index: usize) {
        let pool = &self.settings.pools[turn.pool];
        let most = match pool.backfill {
            Backfill::None | Backfill::Easy => 1,
            Backfill::Conservative => MOST_RESERVATIONS,
        };
        let made = self.make_room(index);
        if turn.reservations >= most && turn.head.is_some() {
            return;
        }
        let id = &self.waiters[index].item.gang.id;
        let has = made || self.rooms.reservation(id).is_some();
        let gets = !has && turn.reservations < most && self.reserve(index, false);
        turn.reservations += usize::from(gets);
        if has || gets {
            turn.head.get_or_insert_with(|| self.waiters[index].item.gang.id.as_str().into());
        }
    }
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
