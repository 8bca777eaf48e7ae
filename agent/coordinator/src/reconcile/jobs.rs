//! Gangs: what the states of the tasks mean for the job.
//!
//! [`advance`] is the whole of the rules, and pure: a job's record in, the record it should become
//! out. The tasks of one attempt live and die together: once one fails or is lost the others are
//! stopped, and when all have ended the gang starts again, if its policy allows, or the job ends.

use lathe_api::job::{Job, JobState, Task, TaskExit, TaskState};
use lathe_api::sandbox::Desired;
use lathe_api::scheduling::{DecidedBy, DecisionKind};

use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{
    ACTIVE_JOBS, ASSIGNMENTS, Assignment, Cause, ENDED_JOBS, JobRecord, Stopping, Versioned, load, of_prefix,
    put,
};
use crate::store::{Outcome, StoreError, Transaction, Write};

pub(super) async fn advance_all(coordinator: &Coordinator) -> Result<(), StoreError> {
    let listing = coordinator.store.list(&[ACTIVE_JOBS]).await?;
    for record in of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS) {
        let (id, record) = record?;
        let mut next = record.value.clone();
        advance(&mut next, now_ms());
        commit(coordinator, &id, record, next).await?;
    }
    Ok(())
}

/// Writes the record's next form, and tells the nodes to stop what has to stop.
async fn commit(
    coordinator: &Coordinator,
    id: &str,
    record: Versioned<JobRecord>,
    next: JobRecord,
) -> Result<(), StoreError> {
    let key = format!("{ACTIVE_JOBS}{id}");
    let mut transaction =
        Transaction { expect: vec![(key.clone(), Some(record.revision))], writes: Vec::new() };
    if next.stopping.is_some() {
        stop_assignments(coordinator, &next.job, &mut transaction).await?;
    }
    if next.job.state.is_terminal() {
        transaction.writes.push(Write::Delete { key });
        transaction.writes.push(put(format!("{ENDED_JOBS}{id}"), &next)?);
    } else if next != record.value {
        transaction.writes.push(put(key, &next)?);
    }
    if transaction.writes.is_empty() {
        return Ok(());
    }
    // Whoever got in between wakes the next round, which decides on what is then.
    if let Outcome::Committed(_) = coordinator.store.commit(transaction).await?
        && next.job.state != record.value.job.state
    {
        let (state, reason) = (next.job.state, next.job.reason.as_deref().unwrap_or_default());
        tracing::info!(job = id, ?state, attempt = next.job.attempt, reason, "job changed");
    }
    Ok(())
}

async fn stop_assignments(
    coordinator: &Coordinator,
    job: &Job,
    transaction: &mut Transaction,
) -> Result<(), StoreError> {
    for task in job.tasks.iter().filter(|task| !task.state.is_terminal()) {
        let (Some(node), Some(sandbox)) = (&task.node, &task.sandbox) else { continue };
        let key = format!("{ASSIGNMENTS}{node}/{sandbox}");
        let Some(assignment) = load::<Assignment>(&*coordinator.store, &key).await? else { continue };
        if assignment.value.desired != Desired::Stopped {
            transaction.expect.push((key.clone(), Some(assignment.revision)));
            let stopped = Assignment { desired: Desired::Stopped, ..assignment.value };
            transaction.writes.push(put(key, &stopped)?);
        }
    }
    Ok(())
}

/// Brings a job's record up to what its tasks say. Idempotent.
pub(crate) fn advance(record: &mut JobRecord, now_ms: u64) {
    if record.job.state.is_terminal() {
        return;
    }
    if record.cancelled && record.stopping.as_ref().is_none_or(|stopping| stopping.cause != Cause::Cancel) {
        record.stopping = Some(Stopping { cause: Cause::Cancel, reason: "cancelled".to_owned() });
        record.job.state = JobState::Cancelling;
        record.job.reason = None;
    }
    let placed = record.job.tasks.iter().any(|task| task.sandbox.is_some());
    if !placed {
        if record.cancelled {
            finish(record, JobState::Cancelled, Some("cancelled before it started".to_owned()), now_ms);
        }
        return;
    }
    if record.stopping.is_none() {
        record.stopping = record.job.tasks.iter().filter_map(ended_badly).min_by_key(|s| s.0).map(|s| s.1);
    }
    let Some(stopping) = record.stopping.clone() else {
        if record.job.tasks.iter().all(|task| task.state == TaskState::Exited) {
            finish(record, JobState::Succeeded, None, now_ms);
        }
        return;
    };
    for task in &mut record.job.tasks {
        if matches!(task.state, TaskState::Preparing | TaskState::Starting | TaskState::Running) {
            task.state = TaskState::Stopping;
        }
    }
    if record.job.tasks.iter().all(|task| task.state.is_terminal()) {
        end_attempt(record, &stopping, now_ms);
    }
}

/// Every task of a stopped attempt has ended.
fn end_attempt(record: &mut JobRecord, stopping: &Stopping, now_ms: u64) {
    let policy = record.job.spec.restart;
    let (used, allowed, what) = match stopping.cause {
        Cause::Cancel => return finish(record, JobState::Cancelled, Some("cancelled".to_owned()), now_ms),
        Cause::Preemption => return wait_again(record),
        Cause::Failure => (&mut record.failures, policy.on_failure, "restart.on_failure"),
        Cause::Loss => (&mut record.losses, policy.on_loss, "restart.on_loss"),
    };
    if *used >= allowed {
        let spent = if allowed == 0 { String::new() } else { format!(" ({what} = {allowed} is used up)") };
        let reason = format!("{}{spent}", stopping.reason);
        return finish(record, JobState::Failed, Some(reason), now_ms);
    }
    *used += 1;
    record.restart_reason = Some(format!("attempt {} ended: {}", record.job.attempt, stopping.reason));
    record.job.reason.clone_from(&record.restart_reason);
    let why = stopping.reason.clone();
    record.decide(DecisionKind::Restarted, DecidedBy::Failure, why, now_ms);
    wait_again(record);
}

/// The gang is back in the queue, as it was before it was placed.
fn wait_again(record: &mut JobRecord) {
    record.stopping = None;
    record.job.state = JobState::Pending;
    record.job.why = None;
    record.job.size = None;
    record.job.tasks = fresh_tasks(record.job.spec.tasks);
}

fn finish(record: &mut JobRecord, state: JobState, reason: Option<String>, now_ms: u64) {
    record.job.state = state;
    record.job.reason = reason;
    record.job.finished_ms = Some(now_ms);
}

/// Tasks that are not placed yet.
pub(crate) fn fresh_tasks(count: u32) -> Vec<Task> {
    (0..count)
        .map(|rank| Task {
            rank,
            sandbox: None,
            node: None,
            address: None,
            state: TaskState::Pending,
            reason: None,
            exit: None,
            usage: Default::default(),
            stages: Default::default(),
        })
        .collect()
}

/// Why a task's end is the end of the attempt. Lower numbers are nearer to the cause: a lost node or
/// VMM makes its peers' connections fail, hardly ever the other way round.
fn ended_badly(task: &Task) -> Option<(u8, Stopping)> {
    let rank = task.rank;
    let because = || task.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let (order, cause, what) = match (task.state, task.exit) {
        (TaskState::Lost, _) => (0, Cause::Loss, "was lost".to_owned()),
        (TaskState::Failed, _) => (1, Cause::Failure, "could not be run".to_owned()),
        (TaskState::Exited, Some(TaskExit::Code(0))) => return None,
        (TaskState::Exited, Some(TaskExit::OutOfMemory)) => {
            (1, Cause::Failure, "ran out of memory; give it more resources.memory".to_owned())
        }
        (TaskState::Exited, Some(TaskExit::Signal(signal))) => {
            (2, Cause::Failure, format!("was killed by signal {signal}"))
        }
        (TaskState::Exited, Some(TaskExit::Code(code))) => {
            (2, Cause::Failure, format!("exited with code {code}"))
        }
        (TaskState::Exited, None) => (2, Cause::Failure, "ended without saying how".to_owned()),
        _ => return None,
    };
    Some((order, Stopping { cause, reason: format!("rank {rank} {what}{}", because()) }))
}
