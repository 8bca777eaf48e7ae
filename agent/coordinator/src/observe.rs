//! What agents say: joining, and reports of what is.
//!
//! A report is the whole observed state of a node. It is folded into the store in one transaction:
//! a task's end, the end of its sandbox's assignment and the release of what it took happen
//! together, so that a sandbox is desired until its end is known for good, and not a moment longer.

use std::collections::{BTreeMap, HashMap};

use lathe_api::artefact::Digest;
use lathe_api::job::{Task, TaskState};
use lathe_api::node::{NodeReport, NodeState, SandboxStatus};
use lathe_api::sandbox::Desired;

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
    for _ in 0..ATTEMPTS {
        let listing = store.list(&[NODES, SUBNETS]).await?;
        let nodes = records::of_prefix::<NodeRecord>(&listing.entries, NODES)
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        if store.get(&format!("{ALIVE}{name}")).await?.is_some() {
            return Err(JoinError::Taken(name.to_owned()));
        }
        let record = match nodes.get(name) {
            Some(known) => NodeRecord { certificate, ..known.value.clone() },
            None => {
                let taken = nodes.values().map(|node| node.value.subnet.clone()).collect();
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
        let mut expect = vec![
            (key.clone(), nodes.get(name).map(|known| known.revision)),
            (format!("{ALIVE}{name}"), None),
        ];
        let mut writes = vec![put(&key, &record)?];
        if !nodes.contains_key(name) {
            // Read together with the nodes: of two that join at once and chose the same subnet,
            // the second finds this changed.
            let last = listing.entries.iter().find(|entry| entry.key == SUBNETS);
            expect.push((SUBNETS.to_owned(), last.map(|entry| entry.revision)));
            writes.push(put(SUBNETS, &record.subnet)?);
        }
        if let Outcome::Committed(_) = store.commit(Transaction { expect, writes }).await? {
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
    for _ in 0..ATTEMPTS {
        let Some(Versioned { value: known, revision }) = records::load::<NodeRecord>(store, &key).await?
        else {
            return Err(StoreError::Corrupt { key, reason: "the node is not registered".to_owned() });
        };
        let kept = match known.lease {
            Some(lease) => store.keep_alive(lease).await.is_ok(),
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
            ..known
        };
        let mut alive = put(format!("{ALIVE}{node}"), &())?;
        if let Write::Put { lease: of, .. } = &mut alive {
            *of = Some(lease);
        }
        let transaction = Transaction {
            expect: vec![(key.clone(), Some(revision))],
            writes: vec![put(&key, &record)?, alive],
        };
        if let Outcome::Committed(_) = store.commit(transaction).await? {
            coordinator.live().entry(node.to_owned()).or_default().last_heartbeat_ms = now;
            return Ok(());
        }
    }
    Err(StoreError::Contended(key))
}

/// The records of a node that change together.
struct Changes {
    node: String,
    allocations: Versioned<Option<Allocations>>,
    assignments: BTreeMap<String, Versioned<Assignment>>,
    jobs: HashMap<String, Versioned<JobRecord>>,
    changed_jobs: Vec<String>,
    writes: Vec<Write>,
    expect: Vec<(String, Option<u64>)>,
    released: bool,
}

impl Changes {
    async fn load(coordinator: &Coordinator, node: &str) -> Result<Self, StoreError> {
        let prefix = format!("{ASSIGNMENTS}{node}/");
        let allocations_key = format!("{ALLOCATIONS}{node}");
        let listing = coordinator.store.list(&[&prefix, ACTIVE_JOBS, &allocations_key]).await?;
        let assignments = records::of_prefix(&listing.entries, &prefix).collect::<Result<_, _>>()?;
        let jobs = records::of_prefix(&listing.entries, ACTIVE_JOBS).collect::<Result<_, _>>()?;
        let mut allocations = Versioned { value: None, revision: 0 };
        for found in records::of_prefix::<Allocations>(&listing.entries, &allocations_key) {
            let (rest, found) = found?;
            // `allocations/n1` is also a prefix of `allocations/n10`.
            if rest.is_empty() {
                allocations = Versioned { value: Some(found.value), revision: found.revision };
            }
        }
        Ok(Self {
            node: node.to_owned(),
            allocations,
            assignments,
            jobs,
            changed_jobs: Vec::new(),
            writes: Vec::new(),
            expect: Vec::new(),
            released: false,
        })
    }

    /// The task that a sandbox is, if it still is one's.
    fn task(&mut self, sandbox: &str) -> Option<&mut Task> {
        let assignment = &self.assignments.get(sandbox)?.value;
        let record = self.jobs.get_mut(&assignment.job)?;
        let task = record.value.job.tasks.get_mut(assignment.rank as usize)?;
        (task.sandbox.as_deref() == Some(sandbox)).then_some(task)
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
        if let Some(allocations) = &mut self.allocations.value {
            self.released |= allocations.sandboxes.remove(sandbox).is_some();
        }
    }

    fn end(&mut self, sandbox: &str, state: TaskState, reason: &str) {
        if let Some(task) = self.task(sandbox)
            && !task.state.is_terminal()
        {
            task.state = state;
            task.reason = Some(reason.to_owned());
            self.touch(sandbox);
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
        if self.released
            && let Some(allocations) = &self.allocations.value
        {
            let key = format!("{ALLOCATIONS}{}", self.node);
            self.expect.push((key.clone(), Some(self.allocations.revision)));
            self.writes.push(put(key, allocations)?);
        }
        if self.writes.is_empty() {
            return Ok(Outcome::Committed(0));
        }
        coordinator.store.commit(Transaction { expect: self.expect, writes: self.writes }).await
    }
}

async fn fold(coordinator: &Coordinator, node: &str, report: &NodeReport) -> Result<Outcome, StoreError> {
    let mut changes = Changes::load(coordinator, node).await?;
    let mut strays = 0;
    for status in &report.sandboxes {
        if changes.assignments.contains_key(&status.id) {
            fold_status(&mut changes, status)?;
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
    coordinator.live().entry(node.to_owned()).or_default().strays = strays;
    changes.commit(coordinator).await
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

fn fold_status(changes: &mut Changes, status: &SandboxStatus) -> Result<(), StoreError> {
    let Some(assignment) = changes.assignments.get(&status.id) else { return Ok(()) };
    let (stopping, observed) = (assignment.value.desired == Desired::Stopped, assignment.value.observed);
    let revision = assignment.revision;
    if let Some(task) = changes.task(&status.id)
        && !task.state.is_terminal()
        && update(task, status, stopping)
    {
        changes.touch(&status.id);
    }
    if status.state.is_terminal() {
        changes.release(&status.id);
    } else if !observed && let Some(assignment) = changes.assignments.get(&status.id) {
        let key = format!("{ASSIGNMENTS}{}/{}", changes.node, status.id);
        let record = Assignment { observed: true, ..assignment.value.clone() };
        changes.expect.push((key.clone(), Some(revision)));
        changes.writes.push(put(key, &record)?);
    }
    Ok(())
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
        || task.exit != status.exit
        || task.reason != reason
        || task.stages != status.stages;
    task.state = state;
    task.exit = status.exit;
    task.reason = reason;
    task.stages = status.stages;
    task.usage = status.usage;
    changed
}

fn one_line(text: &str) -> String {
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
        let mut changes = Changes::load(coordinator, node).await?;
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
