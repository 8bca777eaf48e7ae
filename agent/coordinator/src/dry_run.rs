//! What would become of a job if it were submitted now: the planner's answer, on copies.
//!
//! The reconciler alone has the planner's state, so it is asked for a [`Moment`]: copies of the cluster,
//! the queue and the planner as the next round sees them. The cycle itself, which may take as long as a
//! round, runs for the caller, one at a time: whoever asks often waits for himself and not for rounds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lathe_api::scheduling::{Planned, PlannedTask};
use lathe_scheduler::model::TaskPlace;
use lathe_scheduler::{Cluster, Gang, Planner};
use tokio::sync::{Notify, Semaphore, oneshot};

/// The ID that a job has while it is only thought of; no job's, which all end in six hexadecimal
/// digits.
const NO_JOB: &str = "this job";
/// Dry-runs that wait at most: more are refused.
const MAX_WAITING: usize = 64;
/// How long a round may take to come: rounds that fail all come to nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the planner would plan with in its next round.
#[derive(Debug)]
pub struct Moment {
    /// What is free and what runs.
    pub cluster: Cluster,
    /// What waits, in the order of submission.
    pub pending: Vec<Arc<Gang>>,
    /// With all it has learnt.
    pub planner: Planner,
    /// When.
    pub now_ms: u64,
}

/// Who waits for a moment.
#[derive(Debug)]
pub struct DryRuns {
    asked: Mutex<Option<oneshot::Sender<Moment>>>,
    /// The copies of one moment are all that is held at once.
    one_at_a_time: Semaphore,
    waiting: Semaphore,
}

/// A dry-run that did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DryRunError {
    /// Too many.
    #[error("{MAX_WAITING} dry-runs wait already; try again later")]
    Busy,
    /// The coordinator is going down, or its rounds fail.
    #[error("the planner did not answer; try again later")]
    NoAnswer,
}

impl Default for DryRuns {
    fn default() -> Self {
        Self {
            asked: Mutex::default(),
            one_at_a_time: Semaphore::new(1),
            waiting: Semaphore::new(MAX_WAITING),
        }
    }
}

impl DryRuns {
    /// For the reconciler: who asked since the last round.
    pub fn take(&self) -> Option<oneshot::Sender<Moment>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Plans a job without an ID on the next round's state; `wake` makes that round come at once.
    ///
    /// # Errors
    /// When there are too many, or no round comes.
    pub async fn run(&self, wake: &Notify, gang: Gang) -> Result<Planned, DryRunError> {
        let _waiting = self.waiting.try_acquire().map_err(|_| DryRunError::Busy)?;
        let _turn = self.one_at_a_time.acquire().await.map_err(|_| DryRunError::NoAnswer)?;
        let moment = self.next_moment(wake).await?;
        let planned = tokio::task::spawn_blocking(move || plan(moment, gang));
        planned.await.map_err(|_| DryRunError::NoAnswer)
    }

    /// What the next round plans with, to plan something else with it; `wake` makes that round come at
    /// once.
    ///
    /// # Errors
    /// When no round comes.
    pub async fn moment(&self, wake: &Notify) -> Result<Moment, DryRunError> {
        let _turn = self.one_at_a_time.acquire().await.map_err(|_| DryRunError::NoAnswer)?;
        self.next_moment(wake).await
    }

    async fn next_moment(&self, wake: &Notify) -> Result<Moment, DryRunError> {
        let (sender, moment) = oneshot::channel();
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        wake.notify_one();
        let moment = tokio::time::timeout(PATIENCE, moment).await;
        moment.ok().and_then(Result::ok).ok_or(DryRunError::NoAnswer)
    }
}

/// What the planner makes of one more job. Pure.
pub fn plan(moment: Moment, mut gang: Gang) -> Planned {
    let Moment { mut cluster, mut pending, mut planner, now_ms } = moment;
    NO_JOB.clone_into(&mut gang.id);
    gang.submitted_ms = now_ms;
    pending.push(Arc::new(gang));
    let plan = planner.cycle(&mut cluster, &pending, now_ms);
    let for_it = plan.preemptions.iter().filter(|one| one.for_gang.as_deref() == Some(NO_JOB));
    let preemptions = u32::try_from(for_it.count()).unwrap_or(u32::MAX);
    if let Some(start) = plan.starts.into_iter().find(|start| start.gang.id == NO_JOB) {
        let tasks = start.tasks.iter().zip(0..).map(|(place, rank)| planned_task(&cluster, place, rank));
        return Planned {
            starts: true,
            tasks: tasks.collect(),
            why: (!start.why.is_empty()).then_some(start.why),
            reason: None,
            expected_start_ms: Some(now_ms),
            after: None,
            preemptions,
        };
    }
    let waiting = plan.waiting.into_iter().find(|waiting| waiting.gang == NO_JOB);
    Planned {
        starts: false,
        tasks: Vec::new(),
        why: None,
        reason: waiting.as_ref().map(|waiting| waiting.reason.to_string()),
        expected_start_ms: waiting.as_ref().and_then(|waiting| waiting.expected_ms),
        after: waiting.and_then(|waiting| waiting.after),
        preemptions,
    }
}

fn planned_task(cluster: &Cluster, place: &TaskPlace, rank: u32) -> PlannedTask {
    let node = &cluster.nodes()[place.node as usize];
    let gpus = place.gpus.iter().filter_map(|gpu| node.gpus.get(usize::from(gpu.index)));
    PlannedTask { rank, node: node.name.clone(), gpus: gpus.map(|gpu| gpu.id.clone()).collect() }
}

#[cfg(test)]
mod tests {
    use lathe_api::job::IsolationClass;
    use lathe_scheduler::model::{Amount, Node, Size};
    use lathe_scheduler::policy::{Pool, Settings};

    use super::*;

    fn moment(cpus: u64, pending: Vec<Arc<Gang>>) -> Moment {
        let total =
            Amount { cpu_milli: cpus * 1000, memory_bytes: 1 << 40, hugepage_bytes: 0, sandboxes: 100 };
        let node = Node {
            name: "n1".to_owned(),
            total,
            classes: vec![IsolationClass::Container],
            ..Node::default()
        };
        let pool = Pool { name: "default".to_owned(), ..Pool::default() };
        let settings = Settings { pools: vec![pool], tenants: Vec::new() };
        Moment { cluster: Cluster::new(vec![node]), pending, planner: Planner::new(settings, 1), now_ms: 5 }
    }

    fn gang(id: &str, tasks: u32) -> Gang {
        let mut gang = Gang {
            id: id.to_owned(),
            pool: "default".to_owned(),
            tasks: Size::exactly(tasks),
            ..Gang::default()
        };
        gang.task.amount = Amount { cpu_milli: 1000, sandboxes: 1, ..Amount::default() };
        gang
    }

    #[test]
    fn a_job_that_would_start_is_told_where() {
        let planned = plan(moment(2, vec![]), gang("", 2));
        assert!(planned.starts && planned.reason.is_none());
        assert_eq!(
            planned.tasks.iter().map(|t| (t.rank, t.node.as_str())).collect::<Vec<_>>(),
            [(0, "n1"), (1, "n1")]
        );
    }

    #[test]
    fn a_job_that_would_wait_is_told_why_and_those_before_it_go_first() {
        let planned = plan(moment(2, vec![]), gang("", 3));
        assert!(!planned.starts && planned.tasks.is_empty() && planned.reason.is_some());
        let before = Arc::new(gang("first-ab12cd", 2));
        let planned = plan(moment(2, vec![before]), gang("", 1));
        assert!(!planned.starts, "{planned:?}");
    }

    #[tokio::test]
    async fn whoever_asks_when_nobody_answers_is_not_kept_for_ever() {
        let runs = Arc::new(DryRuns::default());
        let wake = Arc::new(Notify::new());
        let (asking, woken) = (Arc::clone(&runs), Arc::clone(&wake));
        let asked = tokio::spawn(async move { asking.run(&woken, gang("", 1)).await });
        wake.notified().await;
        drop(runs.take());
        assert_eq!(asked.await.expect("no panic"), Err(DryRunError::NoAnswer));
    }
}
