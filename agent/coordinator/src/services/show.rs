//! A service as the API shows it: its record, its replicas' jobs, and what nodes say.

use std::sync::Arc;

use lathe_api::job::{Job, TaskState};
use lathe_api::service::{Service, ServiceReplica, ServiceState};

use super::ServiceRecord;
use super::load::Seen;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{JobRecord, Versioned};

/// The service with all that is known of it now. What its replicas wait for may name other tenants' jobs.
pub fn service(coordinator: &Coordinator, record: ServiceRecord) -> Service {
    let expiry_ms = u64::try_from(coordinator.options.node_expiry.as_millis()).unwrap_or(u64::MAX);
    let seen = match record.state {
        ServiceState::Cancelled => Seen::default(),
        _ => coordinator.loads.seen(&record.id, now_ms(), expiry_ms),
    };
    let jobs = coordinator.view.read(|contents| contents.replicas(&record.id));
    let mut replicas: Vec<(u64, ServiceReplica)> =
        jobs.iter().map(|job| (job.value.sequence, replica(coordinator, job, &seen))).collect();
    replicas.sort_by_key(|(sequence, _)| *sequence);
    let replicas: Vec<ServiceReplica> = replicas.into_iter().map(|(_, replica)| replica).collect();
    let ready = replicas.iter().filter(|replica| replica.ready && !replica.draining).count();
    Service {
        id: record.id,
        tenant: record.tenant,
        image_digest: record.image.digest,
        spec: record.spec,
        state: record.state,
        listen: record.listen,
        wanted: record.wanted,
        why: record.why,
        ready: u32::try_from(ready).unwrap_or(u32::MAX),
        in_flight: seen.in_flight,
        waiting: seen.waiting,
        turned_away: seen.turned_away,
        problems: seen.problems,
        replicas,
        decisions: record.decisions,
        submitted_ms: record.submitted_ms,
        finished_ms: record.finished_ms,
    }
}

fn replica(coordinator: &Coordinator, record: &Arc<Versioned<JobRecord>>, seen: &Seen) -> ServiceReplica {
    let record = &record.value;
    let mut job: Job = record.job.clone();
    coordinator.explanations.complete(&mut job);
    let task = job.tasks.first();
    let sandbox = task.and_then(|task| task.sandbox.as_ref());
    let in_flight = sandbox.and_then(|sandbox| seen.replicas.get(sandbox)).map_or(0, |(count, _)| *count);
    let draining = record.cancelled
        || record.stopping.is_some()
        || record.replica.as_ref().is_some_and(|replica| replica.draining_since_ms.is_some());
    ServiceReplica {
        node: task.and_then(|task| task.node.clone()),
        address: task.and_then(|task| task.address.clone()),
        state: task.map_or(TaskState::Pending, |task| task.state),
        ready: task.is_some_and(|task| task.ready && task.state == TaskState::Running),
        draining,
        in_flight,
        attempt: job.attempt,
        reason: task.and_then(|task| task.reason.clone()).or(job.reason),
        job: job.id,
    }
}
