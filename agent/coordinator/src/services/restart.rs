//! Replicas that ended, and when they may start again. Pure.
//!
//! A replica never is done: however it ended, by itself or with its node, it starts again, elsewhere if
//! need be. One that ends again and again is held longer each time, up to [`LONGEST_HOLD_MS`].

use lathe_api::job::{Task, TaskState};
use lathe_api::scheduling::{DecidedBy, DecisionKind};

use crate::records::{Cause, JobRecord, Stopping};

/// How long a replica is held that ended for the first time.
const FIRST_HOLD_MS: u64 = 1_000;
/// And for the longest.
const LONGEST_HOLD_MS: u64 = 300_000;
/// A replica that was up for so long has not ended "again".
const LONG_RUN_MS: u64 = 600_000;

/// What the end of a replica's task means that would be success for a job's.
pub fn ended_well(record: &JobRecord) -> Option<Stopping> {
    record.replica.as_ref()?;
    let done = |task: &&Task| task.state == TaskState::Exited;
    let task = record.job.tasks.iter().find(done)?;
    let reason = format!("rank {} exited with code 0, and services stay up", task.rank);
    Some(Stopping { cause: Cause::Failure, reason })
}

/// Notes that an attempt of a replica ended by itself; whether the record is a replica's at all. What
/// remains is to make it wait.
pub fn hold(record: &mut JobRecord, stopping: &Stopping, now_ms: u64) -> bool {
    let Some(replica) = &mut record.replica else { return false };
    let up_ms = now_ms.saturating_sub(record.placed_ms.unwrap_or(now_ms));
    replica.ends_in_a_row = if up_ms >= LONG_RUN_MS { 1 } else { replica.ends_in_a_row.saturating_add(1) };
    let hold_ms = hold_ms(replica.ends_in_a_row);
    replica.held_until_ms = Some(now_ms.saturating_add(hold_ms));
    match stopping.cause {
        Cause::Loss => record.losses = record.losses.saturating_add(1),
        _ => record.failures = record.failures.saturating_add(1),
    }
    let attempt = record.job.attempt;
    let seconds = hold_ms / 1000;
    record.restart_reason =
        Some(format!("attempt {attempt} ended: {}; starts again after {seconds} s", stopping.reason));
    record.decide(DecisionKind::Restarted, DecidedBy::Failure, stopping.reason.clone(), now_ms);
    true
}

/// Whether a replica that was held may be placed now; it is not held any more then.
pub fn release(record: &mut JobRecord, now_ms: u64) -> bool {
    let Some(replica) = &mut record.replica else { return false };
    if replica.held_until_ms.is_none_or(|until| now_ms < until) {
        return false;
    }
    replica.held_until_ms = None;
    true
}

fn hold_ms(ends_in_a_row: u32) -> u64 {
    let doublings = ends_in_a_row.saturating_sub(1).min(16);
    (FIRST_HOLD_MS << doublings).min(LONGEST_HOLD_MS)
}

#[cfg(test)]
mod tests {
    use lathe_api::job::{JobState, TaskExit};

    use super::*;
    use crate::reconcile::advance;
    use crate::services::steps::tests::replica;

    fn end(record: &mut JobRecord, exit: i32, now_ms: u64) {
        record.job.state = JobState::Running;
        record.job.attempt += 1;
        record.job.tasks[0].sandbox = Some(format!("web-ab12cd-0-{}", record.job.attempt));
        record.job.tasks[0].state = TaskState::Exited;
        record.job.tasks[0].exit = Some(TaskExit::Code(exit));
        advance(record, now_ms);
    }

    #[test]
    fn a_replica_that_ends_waits_longer_each_time_and_is_never_done() {
        let mut record = replica("web-ab12cd");
        let mut now = 1_000_000;
        let mut held = Vec::new();
        for round in 0..12 {
            record.placed_ms = Some(now);
            now += 500;
            end(&mut record, i32::from(round % 2 == 1), now);
            assert_eq!(record.job.state, JobState::Pending, "{:?}", record.job.reason);
            let until = record.replica.as_ref().unwrap().held_until_ms.unwrap();
            held.push((until - now) / 1000);
            assert!(!release(&mut record, until - 1) && release(&mut record, until));
            now = until;
        }
        assert_eq!(held, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert!(record.job.reason.as_ref().unwrap().contains("exited with code 1; starts again after 300 s"));
        record.placed_ms = Some(now);
        now += LONG_RUN_MS;
        end(&mut record, 0, now);
        assert_eq!(record.replica.as_ref().unwrap().held_until_ms, Some(now + FIRST_HOLD_MS));
        assert!(record.job.reason.as_ref().unwrap().contains("services stay up"));
    }

    #[test]
    fn any_count_of_ends_gives_a_bounded_hold() {
        for ends in [0, 1, 40, u32::MAX] {
            assert!((FIRST_HOLD_MS..=LONGEST_HOLD_MS).contains(&hold_ms(ends)));
        }
    }
}
