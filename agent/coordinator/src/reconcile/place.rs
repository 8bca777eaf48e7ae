//! Carrying out plans: each start is checked again on each of its nodes, and committed by
//! compare-and-swap on what those nodes have promised.
//!
//! Starts go to the store in groups, in the plan's order, each group whole or not at all. Of a group
//! that finds something changed each start is tried alone, and those that no longer hold are left for
//! the next round, which plans them again. So one that lost a race may start after others that were
//! behind it in the plan; the room that those take was planned for them beside the one that lost, so it
//! is not delayed by more than a round.

use std::collections::BTreeMap;

use lathe_api::HostPciAddress;
use lathe_api::job::{JobState, TaskState};
use lathe_api::node::NodeOffer;
use lathe_api::sandbox::Desired;
use lathe_api::scheduling::{DecidedBy, DecisionKind};
use lathe_scheduler::model::TaskPlace;
use lathe_scheduler::plan::{Preemption, Resize, Start};

use super::model::{Model, node, takes_part, waits};
use super::{fresh_tasks, jobs};
use crate::coordinator::Coordinator;
use crate::network::free_address;
use crate::records::{
    ACTIVE_JOBS, ALIVE, ALLOCATIONS, ASSIGNMENTS, Allocation, Allocations, Assignment, Cause, JobRecord,
    OPERATIONS, put,
};
use crate::state::{Contents, Unseen};
use crate::store::{Outcome, Revision, StoreError, Transaction, Write};

/// Tasks that are started with one commit, about: what a group writes stays in the megabytes.
const GROUP_TASKS: usize = 256;

/// Starts gangs; what of them was in vain, to be looked at again.
pub(super) async fn start(
    coordinator: &Coordinator,
    model: &Model,
    starts: Vec<Start>,
    now_ms: u64,
) -> Result<Unseen, StoreError> {
    let mut conflicts = Unseen::default();
    let mut rest = starts.as_slice();
    while !rest.is_empty() {
        let mut tasks = 0;
        let count = rest.iter().take_while(|start| {
            let first = tasks == 0;
            tasks += start.tasks.len();
            first || tasks <= GROUP_TASKS
        });
        let (group, later) = rest.split_at(count.count());
        rest = later;
        if commit(coordinator, model, group, now_ms).await?.is_ok() {
            continue;
        }
        for start in group {
            let alone = commit(coordinator, model, std::slice::from_ref(start), now_ms).await?;
            let Err(broken) = alone else { continue };
            if let Broken::Node(why) = broken {
                refused(coordinator, &start.gang.id, &why, now_ms).await?;
            }
            conflicts.jobs.insert(start.gang.id.clone());
            let nodes = start.tasks.iter().map(|task| model.cluster.nodes()[task.node as usize].name.clone());
            conflicts.nodes.extend(nodes);
        }
    }
    Ok(conflicts)
}

/// Why a start no longer holds.
#[derive(Debug)]
enum Broken {
    /// The job does not wait any more.
    Job,
    /// A node does not take it.
    Node(String),
    /// Something changed at the same moment.
    Raced,
}

/// Writes down that a node did not take what had been planned for it.
async fn refused(coordinator: &Coordinator, job: &str, why: &str, now_ms: u64) -> Result<(), StoreError> {
    let Some(record) = coordinator.view.read(|contents| contents.jobs.get(job).cloned()) else {
        return Ok(());
    };
    let mut next = record.value.clone();
    if next.decide_once(DecisionKind::Refused, DecidedBy::Failure, why, now_ms) {
        // Whoever changed the job meanwhile knows better what became of it.
        jobs::commit(coordinator, &record, &next).await?;
    }
    Ok(())
}

/// Commits these starts together, or says why one of them no longer holds, and nothing was written then.
async fn commit(
    coordinator: &Coordinator,
    model: &Model,
    starts: &[Start],
    now_ms: u64,
) -> Result<Result<(), Broken>, StoreError> {
    let live = coordinator.live().clone();
    let group = coordinator.view.read(|contents| {
        let mut group = Group {
            contents,
            live: &live,
            model,
            staged: BTreeMap::new(),
            transaction: Transaction::default(),
        };
        for start in starts {
            if let Err(broken) = group.stage(start, now_ms)? {
                tracing::debug!(job = start.gang.id, ?broken, "a start no longer holds");
                return Ok::<_, StoreError>(Err(broken));
            }
        }
        group.finish().map(Ok)
    })?;
    let transaction = match group {
        Ok(transaction) => transaction,
        Err(broken) => return Ok(Err(broken)),
    };
    match coordinator.store.commit(transaction).await? {
        Outcome::Committed(revision) => {
            coordinator.view.reached(revision).await;
            for start in starts {
                tracing::info!(
                    job = start.gang.id,
                    tasks = start.tasks.len(),
                    why = start.why,
                    "gang placed"
                );
            }
            Ok(Ok(()))
        }
        Outcome::Conflict { .. } => {
            coordinator.view.catch_up(&*coordinator.store).await?;
            Ok(Err(Broken::Raced))
        }
    }
}

/// Starts that are checked and not committed yet.
struct Group<'a> {
    contents: &'a Contents,
    live: &'a std::collections::HashMap<String, crate::coordinator::Live>,
    model: &'a Model,
    /// What their nodes will have promised, and the revision of what they have now.
    staged: BTreeMap<&'a str, (Allocations, Option<Revision>)>,
    transaction: Transaction,
}

impl<'a> Group<'a> {
    /// Checks one start and adds it, or says why it does not hold.
    fn stage(&mut self, start: &Start, now_ms: u64) -> Result<Result<(), Broken>, StoreError> {
        let id = &start.gang.id;
        let Some(record) = self.contents.jobs.get(id).filter(|record| waits(&record.value)) else {
            return Ok(Err(Broken::Job));
        };
        let mut next = record.value.clone();
        let size = u32::try_from(start.tasks.len()).unwrap_or(u32::MAX);
        next.job.attempt += 1;
        next.job.state = JobState::Running;
        next.job.tasks = fresh_tasks(size);
        next.job.size = next.job.spec.tasks_min.map(|_| size);
        next.job.why = (!start.why.is_empty()).then(|| start.why.clone());
        next.placed_ms = Some(now_ms);
        // Why it waited is over; why it had to start again is still worth knowing.
        next.job.reason.clone_from(&next.restart_reason);
        for (rank, place) in start.tasks.iter().enumerate() {
            if let Err(why) = self.stage_task(&mut next, rank, place)? {
                return Ok(Err(Broken::Node(why)));
            }
        }
        next.decide(DecisionKind::Placed, DecidedBy::Policy, start.why.clone(), now_ms);
        let key = format!("{ACTIVE_JOBS}{id}");
        self.transaction.expect.push((key.clone(), Some(record.revision)));
        self.transaction.writes.push(put(key, &next)?);
        Ok(Ok(()))
    }

    fn stage_task(
        &mut self,
        next: &mut JobRecord,
        rank: usize,
        place: &TaskPlace,
    ) -> Result<Result<(), String>, StoreError> {
        let name = &self.model.cluster.nodes()[place.node as usize].name;
        let Some((name, record)) = self.contents.nodes.get_key_value(name) else {
            return Ok(Err(format!("there is no node {name} any more")));
        };
        if !self.staged.contains_key(name.as_str()) {
            if let Err(why) = self.offers(name) {
                return Ok(Err(why));
            }
            let known = self.contents.allocations.get(name);
            let staged = known.map(|of| (of.value.clone(), Some(of.revision))).unwrap_or_default();
            self.staged.insert(name, staged);
        }
        let Some((allocations, _)) = self.staged.get_mut(name.as_str()) else {
            return Ok(Err(String::new()));
        };
        let planned = &self.model.cluster.nodes()[place.node as usize].gpus;
        let gpus: Vec<HostPciAddress> = place
            .gpus
            .iter()
            .filter_map(|gpu| planned.get(usize::from(gpu.index))?.id.parse().ok())
            .collect();
        let resources = &next.job.spec.resources;
        let allocation = Allocation {
            cpus: resources.cpus,
            memory_bytes: resources.memory.bytes(),
            gpus,
            numa: place.numa,
            address: std::net::Ipv4Addr::UNSPECIFIED,
        };
        let wanted = usize::try_from(resources.gpus).unwrap_or(usize::MAX);
        if let Err(why) = fits(&record.value.inventory, allocations, &allocation, wanted) {
            return Ok(Err(format!("node {name} {why}")));
        }
        let taken = |address| allocations.sandboxes.values().any(|one| one.address == address);
        let Some(address) = free_address(&record.value.subnet, allocations.last_address, taken) else {
            return Ok(Err(format!("node {name} has no address left")));
        };
        let id = next.job.id.clone();
        let sandbox = format!("{id}-{rank}-{}", next.job.attempt);
        allocations.sandboxes.insert(sandbox.clone(), Allocation { address, ..allocation });
        allocations.last_address = Some(address);
        let rank_number = u32::try_from(rank).unwrap_or(u32::MAX);
        let assignment =
            Assignment { job: id, rank: rank_number, desired: Desired::Running, observed: false };
        self.transaction.writes.push(put(format!("{ASSIGNMENTS}{name}/{sandbox}"), &assignment)?);
        if let Some(task) = next.job.tasks.get_mut(rank) {
            task.sandbox = Some(sandbox);
            task.node = Some(name.clone());
            task.address = Some(address.to_string());
            task.state = TaskState::Preparing;
        }
        Ok(Ok(()))
    }

    /// Whether the node takes work, which must hold until the commit, too.
    fn offers(&mut self, name: &str) -> Result<(), String> {
        let Some(alive) =
            self.contents.alive.get(name).filter(|_| takes_part(self.contents, self.live, name))
        else {
            return Err(format!("node {name} is lost"));
        };
        let operations = self.contents.operations.get(name);
        if operations.is_some_and(|of| of.value.offer != NodeOffer::Open) {
            return Err(format!("node {name} takes no work"));
        }
        let expect = &mut self.transaction.expect;
        expect.push((format!("{ALIVE}{name}"), Some(*alive)));
        expect.push((format!("{OPERATIONS}{name}"), operations.map(|of| of.revision)));
        Ok(())
    }

    fn finish(mut self) -> Result<Transaction, StoreError> {
        for (name, (allocations, revision)) in self.staged {
            let key = format!("{ALLOCATIONS}{name}");
            self.transaction.expect.push((key.clone(), revision));
            self.transaction.writes.push(put(key, &allocations)?);
        }
        // Jobs come last, so that whoever reads the writes in order finds what they refer to.
        self.transaction.writes.sort_by_key(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => key.starts_with(ACTIVE_JOBS),
        });
        Ok(self.transaction)
    }
}

/// Whether an allocation fits beside those that a node has promised.
fn fits(
    inventory: &lathe_api::node::Inventory,
    allocations: &Allocations,
    new: &Allocation,
    gpus: usize,
) -> Result<(), String> {
    let total = node::total(inventory);
    let used = allocations.sandboxes.values().fold(new.amount(), |sum, one| sum.plus(&one.amount()));
    if !total.fits(&used) {
        return Err("has no room beside what was promised there since".to_owned());
    }
    if new.gpus.len() != gpus {
        return Err(format!("has not the {gpus} GPUs that were planned"));
    }
    for address in &new.gpus {
        let found = node::usable(inventory).find(|gpu| gpu.address == *address);
        let free = found.is_some_and(|gpu| gpu.state == lathe_api::gpu::GpuState::Free);
        if !free || node::is_promised(*address, allocations) {
            return Err(format!("has GPU {address} no longer free"));
        }
    }
    Ok(())
}

/// Stops gangs that make room, and those that get another size.
pub(super) async fn stop(
    coordinator: &Coordinator,
    preemptions: &[Preemption],
    resizes: &[Resize],
    now_ms: u64,
) -> Result<(), StoreError> {
    for Preemption { gang, for_gang, why } in preemptions {
        let (reason, by) = match for_gang {
            Some(other) => (format!("preempted for job {other}: {why}"), DecidedBy::Policy),
            None => (format!("moved from its node: {why}"), DecidedBy::Operator),
        };
        stop_one(coordinator, gang, Cause::Preemption, reason, by, now_ms).await?;
    }
    for Resize { gang, remove, add, why } in resizes {
        let size = coordinator
            .view
            .read(|contents| contents.jobs.get(gang).map_or(0, |record| record.value.job.tasks.len()));
        let next = (size + add.len()).saturating_sub(remove.len());
        let reason = format!("starts again with {next} tasks instead of {size}: {why}");
        stop_one(coordinator, gang, Cause::Resize, reason, DecidedBy::Policy, now_ms).await?;
    }
    Ok(())
}

async fn stop_one(
    coordinator: &Coordinator,
    gang: &str,
    cause: Cause,
    reason: String,
    by: DecidedBy,
    now_ms: u64,
) -> Result<(), StoreError> {
    let found = coordinator.view.read(|contents| contents.jobs.get(gang).cloned());
    let running = found.filter(|of| of.value.job.state == JobState::Running && of.value.stopping.is_none());
    if let Some(record) = running {
        let mut next = record.value.clone();
        jobs::stop_for(&mut next, cause, reason, by, now_ms);
        // Lost races are for the next round.
        jobs::commit(coordinator, &record, &next).await?;
    }
    let unseen = Unseen { jobs: [gang.to_owned()].into(), ..Unseen::default() };
    coordinator.view.unsee(unseen);
    Ok(())
}
