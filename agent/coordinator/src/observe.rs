//! What agents say: joining, and reports of what is.
//!
//! A report is the whole observed state of a node. It is folded into the store in one transaction:
//! a task's end, the end of its sandbox's assignment and the release of what it took happen
//! together, so that a sandbox is desired until its end is known for good, and not a moment longer.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lathe_api::artefact::Digest;
use lathe_api::job::{Task, TaskState};
use lathe_api::node::{NodeReport, NodeState, SandboxStatus};
use lathe_api::sandbox::Desired;
use lathe_api::scheduling::{DecidedBy, DecisionKind};

use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{
    self, ACTIVE_JOBS, ALIVE, ALLOCATIONS, ASSIGNMENTS, Allocations, Assignment, JobRecord, NODES,
    NodeRecord, SUBNETS, Versioned, put,
};
use crate::store::{Outcome, StoreError, Transaction, Write};

/// How often a change is tried again when others change the same records.
const ATTEMPTS: usize = 16;
/// In how many reports in a row a sandbox that was reported before must be missing to count as
/// lost. More than one: a report that was under way when its sender gave up on it may arrive late.
const MISSING_REPORTS: u32 = 3;
/// Longest reason taken from an agent, characters.
const MAX_REASON_CHARS: usize = 1000;

/// A node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The name is in use by a node that is alive.
    #[error(
        "a node named {0:?} is connected: choose another name, or stop that agent and wait until it is lost"
    )]
    Taken(String),
    /// All subnets are given away.
    #[error("the cluster's range {0} has no subnet left for another node")]
    NoSubnet(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Registers a node with its new certificate, which replaces any former one.
///
/// # Errors
/// When a node of that name is alive, or no subnet is left.
pub async fn join(coordinator: &Coordinator, name: &str, certificate: Digest) -> Result<(), JoinError> {
    let store = &*coordinator.store;
    // A thousand hosts that are switched on together would only get in each other's way.
    let _one = coordinator.joining.lock().await;
    for _ in 0..ATTEMPTS {
        let last = records::load::<String>(store, SUBNETS).await?;
        coordinator.view.catch_up(store).await?;
        let (known, alive, taken) = coordinator.view.read(|contents| {
            let taken = |of: &Arc<Versioned<NodeRecord>>| of.value.subnet.clone();
            let known = contents.nodes.get(name).cloned();
            (known, contents.alive.contains_key(name), contents.nodes.values().map(taken).collect())
        });
        if alive {
            return Err(JoinError::Taken(name.to_owned()));
        }
        let record = match &known {
            Some(known) => NodeRecord { certificate, ..known.value.clone() },
            None => {
                let subnet = coordinator.cidr.free_subnet(&taken);
                let subnet = subnet.ok_or_else(|| JoinError::NoSubnet(coordinator.cidr.to_string()))?;
                NodeRecord {
                    name: name.to_owned(),
                    certificate,
                    subnet,
                    address: String::new(),
                    // Until it reports.
                    state: NodeState::Lost,
                    inventory: Default::default(),
                    joined_ms: now_ms(),
                    last_heartbeat_ms: 0,
                    lease: None,
                }
            }
        };
        let key = format!("{NODES}{name}");
        let mut expect =
            vec![(key.clone(), known.as_ref().map(|known| known.revision)), (format!("{ALIVE}{name}"), None)];
        let mut writes = vec![put(&key, &record)?];
        if known.is_none() {
            // Read before the nodes: of two that join at once and chose the same subnet, the second
            // finds this changed.
            expect.push((SUBNETS.to_owned(), last.map(|last| last.revision)));
            writes.push(put(SUBNETS, &record.subnet)?);
        }
        if let Outcome::Committed(revision) = store.commit(Transaction { expect, writes }).await? {
            coordinator.view.reached(revision).await;
            tracing::info!(node = name, subnet = record.subnet, "node joined");
            return Ok(());
        }
    }
    Err(StoreError::Contended(NODES.to_owned()).into())
}

/// Folds a report into the store, and counts as the node's heartbeat.
///
/// # Errors
/// When the node is not registered or the store fails.
pub async fn report(coordinator: &Coordinator, node: &str, report: &NodeReport) -> Result<(), StoreError> {
    heartbeat(coordinator, node, report).await?;
    for _ in 0..ATTEMPTS {
        if let Outcome::Committed(_) = fold(coordinator, node, report).await? {
            return Ok(());
        }
    }
    Err(StoreError::Contended(format!("{ASSIGNMENTS}{node}")))
}

/// Keeps the node's lease, and writes its record if something worth a write changed.
async fn heartbeat(coordinator: &Coordinator, node: &str, report: &NodeReport) -> Result<(), StoreError> {
    let store = &*coordinator.store;
    let key = format!("{NODES}{node}");
    let now = now_ms();
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            coordinator.view.catch_up(store).await?;
        }
        let (known, alive) = coordinator
            .view
            .read(|contents| (contents.nodes.get(node).cloned(), contents.alive.contains_key(node)));
        let Some(known) = known else {
            return Err(StoreError::Corrupt { key, reason: "the node is not registered".to_owned() });
        };
        let Versioned { value: known, revision } = &*known;
        let kept = match known.lease {
            Some(lease) => alive && store.keep_alive(lease).await.is_ok(),
            None => false,
        };
        let same = known.state == NodeState::Ready
            && known.address == report.address
            && known.inventory == report.inventory;
        if kept && same {
            coordinator.live().entry(node.to_owned()).or_default().last_heartbeat_ms = now;
            return Ok(());
        }
        // A restarted host runs nothing of what it ran: that is known before it is ready again.
        if !known.inventory.boot_id.is_empty() && known.inventory.boot_id != report.inventory.boot_id {
            let reason = format!("node {node} was restarted");
            lose_missing(coordinator, node, &report.sandboxes, &reason).await?;
        }
        let lease = match known.lease {
            Some(lease) if kept => lease,
            _ => store.grant_lease(coordinator.options.node_expiry).await?,
        };
        let record = NodeRecord {
            address: report.address.clone(),
            inventory: report.inventory.clone(),
            state: NodeState::Ready,
            last_heartbeat_ms: now,
            lease: Some(lease),
            ..known.clone()
        };
        let mut writes = vec![put(&key, &record)?];
        if !kept {
            // Not with every change of the host: placements expect this key as it was when the node
            // came, which says that it was there all the time since.
            let mut alive = put(format!("{ALIVE}{node}"), &())?;
            if let Write::Put { lease: of, .. } = &mut alive {
                *of = Some(lease);
            }
            writes.push(alive);
        }
        let transaction = Transaction { expect: vec![(key.clone(), Some(*revision))], writes };
        match store.commit(transaction).await {
            Ok(Outcome::Committed(revision)) => {
                coordinator.view.reached(revision).await;
                coordinator.live().entry(node.to_owned()).or_default().last_heartbeat_ms = now;
                return Ok(());
            }
            // It ended between the two: the next try asks for another one.
            Ok(Outcome::Conflict { .. }) | Err(StoreError::NoLease(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(StoreError::Contended(key))
}

/// The records of a node that change together.
struct Changes {
    node: String,
    allocations: Option<Arc<Versioned<Allocations>>>,
    /// What remains of them, if something was released.
    allocations_left: Option<Allocations>,
    assignments: BTreeMap<String, Versioned<Assignment>>,
    jobs: HashMap<String, Arc<Versioned<JobRecord>>>,
    changed_jobs: Vec<String>,
    writes: Vec<Write>,
    expect: Vec<(String, Option<u64>)>,
}

impl Changes {
    /// As the view has them. A commit expects them as they are here, so what the view lacks yet costs
    /// a second try.
    fn load(coordinator: &Coordinator, node: &str) -> Self {
        coordinator.view.read(|contents| {
            let assignments = contents.assignments.get(node).cloned().unwrap_or_default();
            let jobs = assignments.values().filter_map(|assignment| {
                let (id, record) = contents.jobs.get_key_value(&assignment.value.job)?;
                Some((id.clone(), Arc::clone(record)))
            });
            let jobs = jobs.collect();
            Self {
                node: node.to_owned(),
                allocations: contents.allocations.get(node).cloned(),
                allocations_left: None,
                jobs,
                assignments,
                changed_jobs: Vec::new(),
                writes: Vec::new(),
                expect: Vec::new(),
            }
        })
    }

    /// The task that a sandbox is, if it still is one's.
    fn task(&self, sandbox: &str) -> Option<&Task> {
        let assignment = &self.assignments.get(sandbox)?.value;
        let task = self.jobs.get(&assignment.job)?.value.job.tasks.get(assignment.rank as usize)?;
        (task.sandbox.as_deref() == Some(sandbox)).then_some(task)
    }

    /// Replaces that task.
    fn set_task(&mut self, sandbox: &str, task: Task) {
        let Some(assignment) = self.assignments.get(sandbox) else { return };
        if let Some(record) = self.jobs.get_mut(&assignment.value.job)
            && let Some(of_rank) =
                Arc::make_mut(record).value.job.tasks.get_mut(assignment.value.rank as usize)
        {
            *of_rank = task;
            self.touch(sandbox);
        }
    }

    /// The node did not start the sandbox, which is a part of the job's history.
    fn refused(&mut self, sandbox: &str, why: &str) {
        let why = format!("node {}: {why}", self.node);
        if let Some(assignment) = self.assignments.get(sandbox)
            && let Some(record) = self.jobs.get_mut(&assignment.value.job)
        {
            let record = &mut Arc::make_mut(record).value;
            record.decide_once(DecisionKind::Refused, DecidedBy::Failure, &why, now_ms());
            self.touch(sandbox);
        }
    }

    fn touch(&mut self, sandbox: &str) {
        if let Some(assignment) = self.assignments.get(sandbox)
            && !self.changed_jobs.contains(&assignment.value.job)
        {
            self.changed_jobs.push(assignment.value.job.clone());
        }
    }

    /// The sandbox is no longer desired, and what it took is free.
    fn release(&mut self, sandbox: &str) {
        let key = format!("{ASSIGNMENTS}{}/{sandbox}", self.node);
        if let Some(assignment) = self.assignments.get(sandbox) {
            self.expect.push((key.clone(), Some(assignment.revision)));
            self.writes.push(Write::Delete { key });
        }
        if let Some(allocations) = &self.allocations
            && allocations.value.sandboxes.contains_key(sandbox)
        {
            let left = self.allocations_left.get_or_insert_with(|| allocations.value.clone());
            left.sandboxes.remove(sandbox);
        }
    }

    fn end(&mut self, sandbox: &str, state: TaskState, reason: &str) {
        if let Some(task) = self.task(sandbox)
            && !task.state.is_terminal()
        {
            let task = Task { state, reason: Some(reason.to_owned()), ..task.clone() };
            self.set_task(sandbox, task);
        }
        self.release(sandbox);
    }

    async fn commit(mut self, coordinator: &Coordinator) -> Result<Outcome, StoreError> {
        for id in &self.changed_jobs {
            if let Some(record) = self.jobs.get(id) {
                let key = format!("{ACTIVE_JOBS}{id}");
                self.expect.push((key.clone(), Some(record.revision)));
                self.writes.push(put(key, &record.value)?);
            }
        }
        if let Some(left) = &self.allocations_left {
            let key = format!("{ALLOCATIONS}{}", self.node);
            self.expect.push((key.clone(), self.allocations.as_ref().map(|of| of.revision)));
            self.writes.push(put(key, left)?);
        }
        if self.writes.is_empty() {
            return Ok(Outcome::Committed(0));
        }
        let transaction = Transaction { expect: self.expect, writes: self.writes };
        let outcome = coordinator.store.commit(transaction).await?;
        match outcome {
            // What was written here is seen by whoever looks next.
            Outcome::Committed(revision) => coordinator.view.reached(revision).await,
            Outcome::Conflict { .. } => coordinator.view.catch_up(&*coordinator.store).await?,
        }
        Ok(outcome)
    }
}

async fn fold(coordinator: &Coordinator, node: &str, report: &NodeReport) -> Result<Outcome, StoreError> {
    let mut changes = Changes::load(coordinator, node);
    let mut strays = 0;
    let mut starts = Vec::new();
    for status in &report.sandboxes {
        if changes.assignments.contains_key(&status.id) {
            starts.extend(fold_status(&mut changes, status)?);
        } else if !status.state.is_terminal() {
            strays += 1;
        }
    }
    for (sandbox, misses) in missing(coordinator, node, &changes, report) {
        let assignment = &changes.assignments[&sandbox].value;
        if assignment.observed {
            if misses >= MISSING_REPORTS {
                changes.end(&sandbox, TaskState::Lost, &format!("node {node} no longer knows the sandbox"));
            }
        } else if assignment.desired == Desired::Stopped {
            // The agent may be about to start it; it will find it undesired and remove it.
            changes.end(&sandbox, TaskState::Failed, "stopped before it started");
        }
    }
    let freed = {
        let mut live = coordinator.live();
        let live = live.entry(node.to_owned()).or_default();
        std::mem::replace(&mut live.strays, strays) != strays
    };
    if freed {
        // Nothing in the store says so.
        coordinator.view.touch(node);
    }
    let outcome = changes.commit(coordinator).await?;
    if let Outcome::Committed(_) = outcome {
        judge(coordinator, node, starts);
    }
    Ok(outcome)
}

/// How the start of a task went.
struct StartOutcome {
    job: String,
    /// Why it did not run, if it did not and its node is to blame.
    refused: Option<String>,
}

/// What its tasks' starts say about a node.
fn judge(coordinator: &Coordinator, node: &str, starts: Vec<StartOutcome>) {
    if starts.is_empty() {
        return;
    }
    let mut live = coordinator.live();
    let refusals = &mut live.entry(node.to_owned()).or_default().refusals;
    let mut suspected = false;
    for StartOutcome { job, refused } in starts {
        match refused {
            None => refusals.started(),
            Some(why) => suspected |= refusals.refused(&job, &why, now_ms()),
        }
    }
    if suspected {
        let reason = refusals.suspected(now_ms()).unwrap_or_default();
        tracing::warn!(node, reason, "node suspected: it gets no work for a while");
        drop(live);
        coordinator.view.touch(node);
    }
}

/// The node's assignments that the report does not list, with how often in a row.
fn missing(
    coordinator: &Coordinator,
    node: &str,
    changes: &Changes,
    report: &NodeReport,
) -> Vec<(String, u32)> {
    let mut live = coordinator.live();
    let counts = &mut live.entry(node.to_owned()).or_default().missing;
    let listed = |id: &str| report.sandboxes.iter().any(|status| status.id == id);
    let missing: Vec<_> = changes.assignments.keys().filter(|id| !listed(id)).cloned().collect();
    counts.retain(|id, _| missing.contains(id));
    missing
        .into_iter()
        .map(|id| {
            let count = counts.entry(id.clone()).or_default();
            *count += 1;
            (id, *count)
        })
        .collect()
}

/// Takes over what is said of one sandbox, and tells how its start went if that is known only now.
fn fold_status(changes: &mut Changes, status: &SandboxStatus) -> Result<Option<StartOutcome>, StoreError> {
    let Some(assignment) = changes.assignments.get(&status.id) else { return Ok(None) };
    let (stopping, observed) = (assignment.value.desired == Desired::Stopped, assignment.value.observed);
    let (revision, job) = (assignment.revision, assignment.value.job.clone());
    let mut start = None;
    if let Some(task) = changes.task(&status.id)
        && !task.state.is_terminal()
    {
        let ran = matches!(task.state, TaskState::Running | TaskState::Stopping);
        let mut next = task.clone();
        if update(&mut next, status, stopping) {
            start = match next.state {
                TaskState::Running | TaskState::Exited if !ran => Some(StartOutcome { job, refused: None }),
                TaskState::Failed | TaskState::Lost if !ran && !stopping => {
                    let refused =
                        Some(next.reason.clone().unwrap_or_else(|| "it did not say why".to_owned()));
                    Some(StartOutcome { job, refused })
                }
                _ => None,
            };
            changes.set_task(&status.id, next);
            if let Some(StartOutcome { refused: Some(why), .. }) = &start {
                changes.refused(&status.id, why);
            }
        }
    }
    if status.state.is_terminal() {
        changes.release(&status.id);
    } else if !observed && let Some(assignment) = changes.assignments.get(&status.id) {
        let key = format!("{ASSIGNMENTS}{}/{}", changes.node, status.id);
        let record = Assignment { observed: true, ..assignment.value.clone() };
        changes.expect.push((key.clone(), Some(revision)));
        changes.writes.push(put(key, &record)?);
    }
    Ok(start)
}

/// Takes over what the agent says. Whether something worth a write changed: use alone is not,
/// because it changes with every report.
fn update(task: &mut Task, status: &SandboxStatus, stopping: bool) -> bool {
    let state = match status.state {
        // The VMM or the host failed, not the task.
        TaskState::Failed if status.lost => TaskState::Lost,
        // Nothing of that kind comes from an agent; it has the sandbox and does not run it yet.
        TaskState::Pending => TaskState::Preparing,
        TaskState::Preparing | TaskState::Starting | TaskState::Running if stopping => TaskState::Stopping,
        other => other,
    };
    let reason = status.reason.as_ref().map(|reason| one_line(reason));
    let changed = task.state != state
        || task.ready != status.ready
        || task.exit != status.exit
        || task.reason != reason
        || task.stages != status.stages;
    task.state = state;
    task.ready = status.ready;
    task.exit = status.exit;
    task.reason = reason;
    task.stages = status.stages;
    task.usage = status.usage;
    changed
}

/// What an agent says, as people see it: one line, and not a long one.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON_CHARS).collect()
}

/// All of a node's tasks are lost.
///
/// # Errors
/// When the store fails.
pub async fn lose_node(coordinator: &Coordinator, node: &str, reason: &str) -> Result<(), StoreError> {
    lose(coordinator, node, reason, |_, _| true).await
}

/// Those that were seen there and are not listed now are lost.
async fn lose_missing(
    coordinator: &Coordinator,
    node: &str,
    listed: &[SandboxStatus],
    reason: &str,
) -> Result<(), StoreError> {
    let listed = |id: &str| listed.iter().any(|status| status.id == id);
    lose(coordinator, node, reason, |id, assignment| assignment.observed && !listed(id)).await
}

async fn lose(
    coordinator: &Coordinator,
    node: &str,
    reason: &str,
    which: impl Fn(&str, &Assignment) -> bool,
) -> Result<(), StoreError> {
    for _ in 0..ATTEMPTS {
        let mut changes = Changes::load(coordinator, node);
        let lost: Vec<_> = changes
            .assignments
            .iter()
            .filter(|(id, assignment)| which(id, &assignment.value))
            .map(|(id, _)| id.clone())
            .collect();
        for sandbox in lost {
            changes.end(&sandbox, TaskState::Lost, reason);
        }
        if let Outcome::Committed(_) = changes.commit(coordinator).await? {
            return Ok(());
        }
    }
    Err(StoreError::Contended(format!("{ASSIGNMENTS}{node}")))
}
