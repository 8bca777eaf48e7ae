//! Placing: pending gangs are planned on a snapshot, and each placement is checked again and
//! committed by compare-and-swap.

use std::collections::{BTreeMap, HashMap};

use lathe_api::gpu::{GpuHealth, GpuState, Severity};
use lathe_api::job::{JobState, TaskState};
use lathe_api::node::{Inventory, NodeState};
use lathe_api::sandbox::Desired;
use lathe_scheduler::old::{Capacity, Gang, Node, Placement, Policy};

use crate::coordinator::Coordinator;
use crate::network::{SANDBOXES_PER_NODE, free_address};
use crate::records::{
    self, ACTIVE_JOBS, ALIVE, ALLOCATIONS, Allocation, Allocations, Assignment, JobRecord, NODES, NodeRecord,
    Versioned, of_prefix, put,
};
use crate::store::{Listing, Outcome, StoreError, Transaction};

/// Memory of a node that tasks do not get: its kernel, agent and page cache, and what each VMM needs
/// beyond its guest's memory. A sixteenth, and no less than this.
const RESERVED_BYTES_MIN: u64 = 256 << 20;

/// Places what can be placed, and writes down why the rest waits.
pub(super) async fn place(coordinator: &Coordinator) -> Result<(), StoreError> {
    let listing = coordinator.store.list(&[NODES, ALLOCATIONS, ACTIVE_JOBS]).await?;
    let mut pending: Vec<_> = of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS)
        .filter(|record| record.as_ref().map_or(true, |(_, record)| waits(&record.value)))
        .collect::<Result<_, _>>()?;
    if pending.is_empty() {
        return Ok(());
    }
    pending.sort_by_key(|(_, record)| record.value.sequence);
    let gangs: Vec<Gang> = pending.iter().map(|(id, record)| gang(id, &record.value)).collect();
    let nodes = snapshot(coordinator, &listing)?;
    let plan = lathe_scheduler::old::plan(&nodes, &gangs, Policy::FirstComeFirstServed);

    let mut jobs: HashMap<String, Versioned<JobRecord>> = pending.into_iter().collect();
    for placement in &plan.placements {
        let Some(record) = jobs.remove(&placement.gang) else { continue };
        if !commit(coordinator, record, placement).await? {
            coordinator.metrics.placement_conflicts.add(1);
            // Gangs after this one were planned as if it had been placed, and must not overtake it:
            // they are planned again with it.
            coordinator.changed.notify_one();
            return Ok(());
        }
    }
    for waiting in plan.waiting {
        if let Some(record) = jobs.remove(&waiting.gang) {
            explain(coordinator, record, waiting.reason.to_string()).await?;
        }
    }
    Ok(())
}

fn waits(record: &JobRecord) -> bool {
    record.job.state == JobState::Pending && !record.cancelled
}

fn gang(id: &str, record: &JobRecord) -> Gang {
    let spec = &record.job.spec;
    Gang { id: id.to_owned(), class: spec.class, tasks: spec.tasks, task: task_size(record) }
}

fn task_size(record: &JobRecord) -> Capacity {
    let resources = &record.job.spec.resources;
    Capacity {
        cpus: resources.cpus,
        memory_bytes: resources.memory.bytes(),
        gpus: resources.gpus,
        sandboxes: 1,
    }
}

/// Nodes that take part: those whose reports arrive, with nothing on them that should be gone.
pub(crate) fn snapshot(coordinator: &Coordinator, listing: &Listing) -> Result<Vec<Node>, StoreError> {
    let allocations: BTreeMap<String, Versioned<Allocations>> =
        of_prefix(&listing.entries, ALLOCATIONS).collect::<Result<_, _>>()?;
    let live = coordinator.live();
    let mut nodes = Vec::new();
    for record in of_prefix::<NodeRecord>(&listing.entries, NODES) {
        let (name, Versioned { value, .. }) = record?;
        let Some(live) = live.get(&name) else { continue };
        if value.state != NodeState::Ready {
            continue;
        }
        let total = total(&value);
        let none = Allocations::default();
        let mut free = left(&value, allocations.get(&name).map_or(&none, |of| &of.value));
        if live.strays > 0 {
            // What they use is unknown to the records: nothing is placed beside them.
            free = Capacity::default();
        }
        let gpu_problems = gpu_problems(&value.inventory);
        let inventory = value.inventory;
        nodes.push(Node {
            name,
            total,
            free,
            classes: inventory.classes,
            class_problems: inventory.class_problems,
            gpu_problems,
        });
    }
    Ok(nodes)
}

fn total(node: &NodeRecord) -> Capacity {
    let memory = node.inventory.memory.map_or(0, |memory| memory.bytes());
    let reserved = RESERVED_BYTES_MIN.max(memory / 16);
    Capacity {
        cpus: node.inventory.cpus.online,
        memory_bytes: memory.saturating_sub(reserved),
        gpus: count(node.inventory.gpus.iter().filter(|gpu| gpu.is_usable())),
        sandboxes: SANDBOXES_PER_NODE,
    }
}

fn count(gpus: impl Iterator) -> u32 {
    u32::try_from(gpus.count()).unwrap_or(u32::MAX)
}

/// Why GPUs cannot be used: for each the first thing in the way.
fn gpu_problems(inventory: &Inventory) -> Vec<String> {
    let unusable = inventory.gpus.iter().filter(|gpu| !gpu.is_usable());
    let reasons = unusable.map(|gpu| {
        let blocking = || gpu.problems.iter().find(|problem| problem.severity == Severity::Blocks);
        let reason = match &gpu.health {
            GpuHealth::Failed(reason) => Some(reason),
            _ => gpu.reason.as_ref().or_else(|| blocking().map(|problem| &problem.what)),
        };
        format!("{}: {}", gpu.address, reason.map_or("quarantined", String::as_str))
    });
    reasons.collect()
}

/// GPUs that nobody has and nobody was promised. One in use by a sandbox that was promised it counts
/// on both sides, because the promise and the node's report do not come at one moment. One that is
/// scrubbed, or that nobody promised to who has it, is not free.
fn gpus_left(inventory: &Inventory, allocations: &Allocations) -> u32 {
    let promised_to =
        |task: &Option<String>| task.as_ref().is_some_and(|task| allocations.sandboxes.contains_key(task));
    let offered = inventory.gpus.iter().filter(|gpu| {
        gpu.is_usable()
            && match gpu.state {
                GpuState::Free => true,
                GpuState::InUse => promised_to(&gpu.task),
                GpuState::Scrubbing | GpuState::Quarantined => false,
            }
    });
    let promised = allocations.sandboxes.values().fold(0_u32, |sum, one| sum.saturating_add(one.gpus));
    count(offered).saturating_sub(promised)
}

fn left(node: &NodeRecord, allocations: &Allocations) -> Capacity {
    let total = total(node);
    let used = allocations.sandboxes.values();
    let cpus = used.clone().fold(0_u32, |sum, one| sum.saturating_add(one.cpus));
    let memory = used.fold(0_u64, |sum, one| sum.saturating_add(one.memory_bytes));
    let sandboxes = u32::try_from(allocations.sandboxes.len()).unwrap_or(u32::MAX);
    Capacity {
        cpus: total.cpus.saturating_sub(cpus),
        memory_bytes: total.memory_bytes.saturating_sub(memory),
        gpus: gpus_left(&node.inventory, allocations),
        sandboxes: total.sandboxes.saturating_sub(sandboxes),
    }
}

/// A node's records as they are at commit.
struct Target {
    node: Versioned<NodeRecord>,
    allocations: Allocations,
    /// None if there is no such key yet.
    revision: Option<u64>,
}

/// Commits one placement; false if something has changed and it no longer holds.
async fn commit(
    coordinator: &Coordinator,
    record: Versioned<JobRecord>,
    placement: &Placement,
) -> Result<bool, StoreError> {
    let id = &placement.gang;
    let job_key = format!("{ACTIVE_JOBS}{id}");
    let size = task_size(&record.value);
    let mut next = record.value;
    next.job.attempt += 1;
    next.job.state = JobState::Running;
    let mut targets: BTreeMap<&str, Target> = BTreeMap::new();
    let mut transaction =
        Transaction { expect: vec![(job_key.clone(), Some(record.revision))], writes: Vec::new() };
    for (task, name) in next.job.tasks.iter_mut().zip(&placement.nodes) {
        let target = match targets.entry(name.as_str()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let Some(target) = target(coordinator, name).await? else { return Ok(false) };
                entry.insert(target)
            }
        };
        if left(&target.node.value, &target.allocations).holds(size) == 0 {
            return Ok(false);
        }
        let taken = |address| target.allocations.sandboxes.values().any(|one| one.address == address);
        let last = target.allocations.last_address;
        let Some(address) = free_address(&target.node.value.subnet, last, taken) else { return Ok(false) };
        let sandbox = format!("{id}-{}-{}", task.rank, next.job.attempt);
        let allocation =
            Allocation { cpus: size.cpus, memory_bytes: size.memory_bytes, gpus: size.gpus, address };
        target.allocations.sandboxes.insert(sandbox.clone(), allocation);
        target.allocations.last_address = Some(address);
        let assignment =
            Assignment { job: id.clone(), rank: task.rank, desired: Desired::Running, observed: false };
        let key = format!("{}{name}/{sandbox}", records::ASSIGNMENTS);
        transaction.writes.push(put(key, &assignment)?);
        task.sandbox = Some(sandbox);
        task.node = Some(name.clone());
        task.address = Some(address.to_string());
        task.state = TaskState::Preparing;
    }
    let nodes: Vec<_> = targets.keys().map(|name| (*name).to_owned()).collect();
    for (name, target) in targets {
        let key = format!("{ALLOCATIONS}{name}");
        transaction.expect.push((format!("{NODES}{name}"), Some(target.node.revision)));
        transaction.expect.push((key.clone(), target.revision));
        transaction.writes.push(put(key, &target.allocations)?);
    }
    // Why it waited is over; why it had to start again is still worth knowing.
    next.job.reason.clone_from(&next.restart_reason);
    transaction.writes.push(put(job_key, &next)?);
    let placed = matches!(coordinator.store.commit(transaction).await?, Outcome::Committed(_));
    if placed {
        tracing::info!(job = id, attempt = next.job.attempt, ?nodes, "gang placed");
    }
    Ok(placed)
}

async fn target(coordinator: &Coordinator, name: &str) -> Result<Option<Target>, StoreError> {
    let store = &*coordinator.store;
    let node = records::load::<NodeRecord>(store, &format!("{NODES}{name}")).await?;
    let alive = store.get(&format!("{ALIVE}{name}")).await?.is_some();
    let Some(node) = node.filter(|node| alive && node.value.state == NodeState::Ready) else {
        return Ok(None);
    };
    let allocations = records::load::<Allocations>(store, &format!("{ALLOCATIONS}{name}")).await?;
    let revision = allocations.as_ref().map(|record| record.revision);
    let allocations = allocations.map(|record| record.value).unwrap_or_default();
    Ok(Some(Target { node, allocations, revision }))
}

/// Writes down why a gang waits, if that is news.
async fn explain(
    coordinator: &Coordinator,
    record: Versioned<JobRecord>,
    reason: String,
) -> Result<(), StoreError> {
    let reason = match &record.value.restart_reason {
        Some(restart) => format!("{reason} ({restart})"),
        None => reason,
    };
    if record.value.job.reason.as_ref() == Some(&reason) {
        return Ok(());
    }
    let mut next = record.value;
    next.job.reason = Some(reason);
    let key = format!("{ACTIVE_JOBS}{}", next.job.id);
    let transaction =
        Transaction { expect: vec![(key.clone(), Some(record.revision))], writes: vec![put(key, &next)?] };
    // Lost races are for the next round.
    coordinator.store.commit(transaction).await.map(drop)
}
