//! What a cycle comes to.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Cycle, Outcome};
use crate::plan::{Plan, Reason, Waiting};
use crate::planner::accounts::Accounts;
use crate::planner::room::Reservation;

/// Gangs that a reason names: those that make room may be many.
const NAMED: usize = 3;

impl Cycle<'_> {
    /// The plan, with a reason for each gang that waits, and what is reserved for the next cycle.
    pub fn finish(mut self) -> (Plan, HashMap<String, Reservation>, Accounts) {
        self.rooms.hide(self.cluster);
        let reserved: HashMap<String, Reservation> = std::mem::take(&mut self.rooms.reservations)
            .into_iter()
            .map(|reservation| (reservation.gang.id.clone(), reservation))
            .collect();
        let waiting = self.outcomes.iter().filter(|outcome| !matches!(outcome, Outcome::Started)).count();
        self.plan.waiting.reserve_exact(waiting);
        for (waiter, outcome) in self.waiters.iter().zip(self.outcomes) {
            let gang = &waiter.item.gang;
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
                Outcome::Unseen => match self.shapes.words(waiter.shape) {
                    Some(shortage) => Reason::Shortage(Arc::clone(shortage)),
                    None => Reason::Unseen,
                },
            };
            let held = self.reserving.contains(&waiter.print).then(|| reserved.get(&gang.id)).flatten();
            self.plan.waiting.push(Waiting {
                gang: gang.id.clone(),
                reason,
                expected_ms: held.filter(|held| held.known).map(|held| held.from_ms),
                after: held.and_then(|held| held.after.clone()),
            });
        }
        (self.plan, reserved, self.accounts)
    }
}
