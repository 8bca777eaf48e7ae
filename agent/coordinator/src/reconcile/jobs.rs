//! Gangs: what the states of the tasks mean for the job.
//!
//! [`advance`] is the whole of the rules, and pure: a job's record in, the record it should become
//! out. The tasks of one attempt live and die together: once one fails or is lost the others are
//! stopped, and when all have ended the gang starts again, if its policy allows, or the job ends. A
//! service's replica always starts again.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use lathe_api::job::{Job, JobState, Task, TaskExit, TaskState};
use lathe_api::sandbox::Desired;
use lathe_api::scheduling::{DecidedBy, DecisionKind};

use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{
    ACTIVE_JOBS, ASSIGNMENTS, Assignment, Cause, ENDED_JOBS, JobRecord, Stopping, Versioned, put,
};
use crate::services::restart;
use crate::store::{Outcome, StoreError, Transaction, Write};

/// Commits that are under way at once: the store makes them durable together.
const COMMITS: usize = 128;

/// Brings these jobs (all, if there are none named) up to what their tasks say; those that succeeded.
pub(super) async fn advance_all(
    coordinator: &Coordinator,
    which: Option<&BTreeSet<String>>,
) -> Result<Vec<JobRecord>, StoreError> {
    let now = now_ms();
    let changes: Vec<_> = coordinator.view.read(|contents| {
        let next = |record: &Arc<Versioned<JobRecord>>| {
            let mut next = record.value.clone();
            advance(&mut next, now);
            // What has to stop may have been told so only in part.
            (next != record.value || next.stopping.is_some()).then(|| (Arc::clone(record), next))
        };
        match which {
            Some(ids) => ids.iter().filter_map(|id| contents.jobs.get(id)).filter_map(next).collect(),
            None => contents.jobs.values().filter_map(next).collect(),
        }
    });
    let commits = changes.into_iter().map(|(record, next)| async move {
        let committed = commit(coordinator, &record, &next).await?;
        Ok::<_, StoreError>((committed && next.job.state == JobState::Succeeded).then_some(next))
    });
    let mut succeeded = Vec::new();
    let mut commits = stream::iter(commits).buffer_unordered(COMMITS);
    while let Some(done) = commits.next().await {
        succeeded.extend(done?);
    }
    Ok(succeeded)
}

/// Writes the record's next form, and tells the nodes to stop what has to stop; whether that happened.
/// Whoever got in between wakes the next round, which decides on what is then.
pub(super) async fn commit(
    coordinator: &Coordinator,
    record: &Versioned<JobRecord>,
    next: &JobRecord,
) -> Result<bool, StoreError> {
    let id = &record.value.job.id;
    let key = format!("{ACTIVE_JOBS}{id}");
    let mut transaction =
        Transaction { expect: vec![(key.clone(), Some(record.revision))], writes: Vec::new() };
    if next.stopping.is_some() {
        stop_assignments(coordinator, &next.job, &mut transaction)?;
    }
    if next.job.state.is_terminal() {
        transaction.writes.push(Write::Delete { key });
        transaction.writes.push(put(format!("{ENDED_JOBS}{id}"), next)?);
    } else if *next != record.value {
        transaction.writes.push(put(key, next)?);
    }
    if transaction.writes.is_empty() {
        return Ok(false);
    }
    let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? else { return Ok(false) };
    coordinator.view.reached(revision).await;
    if next.job.state != record.value.job.state {
        let (state, reason) = (next.job.state, next.job.reason.as_deref().unwrap_or_default());
        tracing::info!(job = id, ?state, attempt = next.job.attempt, reason, "job changed");
    }
    Ok(true)
}

fn stop_assignments(
    coordinator: &Coordinator,
    job: &Job,
    transaction: &mut Transaction,
) -> Result<(), StoreError> {
    coordinator.view.read(|contents| {
        for task in job.tasks.iter().filter(|task| !task.state.is_terminal()) {
            let (Some(node), Some(sandbox)) = (&task.node, &task.sandbox) else { continue };
            let found = contents.assignments.get(node).and_then(|of_node| of_node.get(sandbox));
            let Some(assignment) = found.filter(|found| found.value.desired != Desired::Stopped) else {
                continue;
            };
            let key = format!("{ASSIGNMENTS}{node}/{sandbox}");
            transaction.expect.push((key.clone(), Some(assignment.revision)));
            let stopped = Assignment { desired: Desired::Stopped, ..assignment.value.clone() };
            transaction.writes.push(put(key, &stopped)?);
        }
        Ok(())
    })
}

/// Begins to stop a gang that has to make room or to start again with another size. Nothing of what it
/// may use up is used up.
pub(crate) fn stop_for(record: &mut JobRecord, cause: Cause, reason: String, by: DecidedBy, now_ms: u64) {
    let kind = match cause {
        Cause::Resize => DecisionKind::Resized,
        _ => DecisionKind::Preempted,
    };
    record.decide(kind, by, reason.clone(), now_ms);
    record.job.state = JobState::Preempting;
    record.job.reason = Some(reason.clone());
    if cause == Cause::Preemption {
        record.job.preemptions += 1;
    }
    record.stopping = Some(Stopping { cause, reason });
    advance(record, now_ms);
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
        let ended = record.job.tasks.iter().filter_map(ended_badly).min_by_key(|s| s.0).map(|s| s.1);
        record.stopping = ended.or_else(|| restart::ended_well(record));
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
        Cause::Preemption | Cause::Resize => {
            record.restart_reason = Some(stopping.reason.clone());
            return wait_again(record);
        }
        _ if restart::hold(record, stopping, now_ms) => return wait_again(record),
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
    let why = stopping.reason.clone();
    record.decide(DecisionKind::Restarted, DecidedBy::Failure, why, now_ms);
    wait_again(record);
}

/// The gang is back in the queue, as it was before it was placed.
fn wait_again(record: &mut JobRecord) {
    record.stopping = None;
    record.placed_ms = None;
    record.job.state = JobState::Pending;
    record.job.reason.clone_from(&record.restart_reason);
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
            ready: false,
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
