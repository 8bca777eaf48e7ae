//! What is held for gangs that wait.

use std::sync::Arc;

use super::{Cycle, SAME_WORDS_MS, admits};
use crate::model::Node;
use crate::planner::room::{self, Reservation};
use crate::planner::search;

/// Searches for the earliest time of a gang in a cycle: each may look at all that runs.
const MOST_SEARCHES: usize = 8;

impl Cycle<'_> {
    /// Reserves room for a gang that found none now; false if it never finds any.
    pub(in crate::planner) fn reserve(&mut self, index: usize, firm: bool) -> bool {
        let item = self.item(index);
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
        let impossible = &mut self.shapes.list[item.shape as usize].impossible;
        let never = impossible.is_some_and(|since| now < since.saturating_add(SAME_WORDS_MS))
            || (late && !search::ever(self.cluster, gang, &admits));
        if late && !never && self.searches < MOST_SEARCHES {
            self.searches += 1;
            let placer = &mut self.placers[pool];
            let new = search::earliest(&mut self.rooms, self.cluster, placer, gang, &admits);
            if new.is_none() {
                *impossible = Some(now);
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
        self.hold(item.print, reservation);
        true
    }

    /// Holds the room of a gang whose ID has this fingerprint.
    pub(in crate::planner) fn hold(&mut self, print: u64, reservation: Reservation) {
        self.reserving.insert(print);
        self.rooms.reserve(self.cluster, reservation);
    }
}
