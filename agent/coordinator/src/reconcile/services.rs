//! Services: as many replicas as what is in flight needs, which [`crate::services`] decides; here it is
//! carried out. Whatever loses a race is decided again in the next round.

use std::sync::Arc;

use lathe_api::job::JobState;
use lathe_api::scheduling::{DecidedBy, DecisionKind};
use lathe_api::service::ServiceState;

use super::jobs;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{
    ACTIVE_JOBS, ACTIVE_SERVICES, ENDED_JOBS, ENDED_SERVICES, JobRecord, SERVICE_PORTS, Versioned, put,
};
use crate::services::steps::{Replica, Steps, steps};
use crate::services::{ServiceRecord, restart};
use crate::store::{Outcome, Revision, StoreError, Transaction, Write};
use crate::tokens;

type Stored<T> = Arc<Versioned<T>>;

/// Brings all services up to what is in flight at them and what their replicas say.
pub(super) async fn advance_all(coordinator: &Coordinator) -> Result<(), StoreError> {
    let services: Vec<Stored<ServiceRecord>> =
        coordinator.view.read(|contents| contents.services.values().cloned().collect());
    coordinator.loads.retain(|id| services.iter().any(|service| service.value.id == id));
    for service in services {
        advance(coordinator, &service, now_ms()).await?;
    }
    Ok(())
}

async fn advance(
    coordinator: &Coordinator,
    service: &Versioned<ServiceRecord>,
    now_ms: u64,
) -> Result<(), StoreError> {
    let id = &service.value.id;
    let expiry_ms = u64::try_from(coordinator.options.node_expiry.as_millis()).unwrap_or(u64::MAX);
    let mut next = service.value.clone();
    scale(coordinator, &mut next, now_ms, expiry_ms);
    let jobs = coordinator.view.read(|contents| contents.replicas(id));
    let seen = coordinator.loads.seen(id, now_ms, expiry_ms);
    let replicas: Vec<Replica> = jobs.iter().map(|job| Replica::of(&job.value, &seen)).collect();
    let drain_ms = next.service().map_or(0, |service| service.drain.milliseconds());
    let steps = steps(next.state, next.wanted, drain_ms, &replicas, seen.known, now_ms);
    if steps.finish {
        return finish(coordinator, service, next, now_ms).await;
    }
    let Some(revision) = keep(coordinator, service, &next).await? else { return Ok(()) };
    for job in &jobs {
        change(coordinator, job, &steps, now_ms).await?;
    }
    create(coordinator, &next, revision, steps.create, now_ms).await
}

/// Sets how many replicas there should be.
fn scale(coordinator: &Coordinator, next: &mut ServiceRecord, now_ms: u64, expiry_ms: u64) {
    if next.state != ServiceState::Active {
        return;
    }
    let Some(policy) = next.policy() else { return };
    let decision = coordinator.loads.decide(&next.id, &policy, next.wanted, now_ms, expiry_ms);
    if decision.replicas == next.wanted {
        return;
    }
    let why = format!("{} replicas instead of {}: {}", decision.replicas, next.wanted, decision.why);
    tracing::info!(service = next.id, why, "service scaled");
    next.wanted = decision.replicas;
    next.why = Some(decision.why);
    next.decide(DecisionKind::Scaled, DecidedBy::Service, why, now_ms);
}

/// Stores the service if it changed; the revision it has then, or none if somebody was quicker.
async fn keep(
    coordinator: &Coordinator,
    service: &Versioned<ServiceRecord>,
    next: &ServiceRecord,
) -> Result<Option<Revision>, StoreError> {
    if *next == service.value {
        return Ok(Some(service.revision));
    }
    let key = format!("{ACTIVE_SERVICES}{}", next.id);
    let transaction =
        Transaction { expect: vec![(key.clone(), Some(service.revision))], writes: vec![put(key, next)?] };
    match coordinator.store.commit(transaction).await? {
        Outcome::Committed(revision) => {
            coordinator.view.reached(revision).await;
            Ok(Some(revision))
        }
        Outcome::Conflict { .. } => Ok(None),
    }
}

/// What the steps say of one replica.
async fn change(
    coordinator: &Coordinator,
    job: &Versioned<JobRecord>,
    steps: &Steps,
    now_ms: u64,
) -> Result<(), StoreError> {
    let id = &job.value.job.id;
    let mut next = job.value.clone();
    let stop = steps.stop.iter().find(|(stopped, _)| stopped == id);
    if let Some((_, why)) = stop {
        next.cancelled = true;
        next.job.state = JobState::Cancelling;
        next.job.reason = None;
        next.decide(DecisionKind::Cancelled, DecidedBy::Service, why.clone(), now_ms);
        jobs::advance(&mut next, now_ms);
    } else if let Some(replica) = &mut next.replica {
        if steps.drain.contains(id) {
            replica.draining_since_ms = Some(now_ms);
        } else if steps.keep.contains(id) {
            replica.draining_since_ms = None;
        }
        restart::release(&mut next, now_ms);
    }
    if next != job.value {
        jobs::commit(coordinator, job, &next).await?;
    }
    Ok(())
}

/// Makes replicas, if the service still is as it was at `revision`: one that is cancelled meanwhile gets
/// none.
async fn create(
    coordinator: &Coordinator,
    service: &ServiceRecord,
    revision: Revision,
    count: u32,
    now_ms: u64,
) -> Result<(), StoreError> {
    if count == 0 {
        return Ok(());
    }
    let mut transaction = Transaction {
        expect: vec![(format!("{ACTIVE_SERVICES}{}", service.id), Some(revision))],
        writes: Vec::new(),
    };
    for _ in 0..count {
        let suffix = tokens::random_hex(3).map_err(|error| StoreError::Corrupt {
            key: "(randomness)".to_owned(),
            reason: error.to_string(),
        })?;
        let id = format!("{}-{suffix}", service.spec.name);
        let mut replica = service.replica(id.clone(), now_ms);
        replica.sequence = coordinator.sequence.next(&*coordinator.store).await?;
        let key = format!("{ACTIVE_JOBS}{id}");
        transaction.expect.push((key.clone(), None));
        transaction.expect.push((format!("{ENDED_JOBS}{id}"), None));
        transaction.writes.push(put(key, &replica)?);
    }
    if let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? {
        coordinator.view.reached(revision).await;
        tracing::info!(service = service.id, count, "replicas made");
    }
    Ok(())
}

/// Nothing is left of it: its port is free again.
async fn finish(
    coordinator: &Coordinator,
    service: &Versioned<ServiceRecord>,
    mut next: ServiceRecord,
    now_ms: u64,
) -> Result<(), StoreError> {
    next.state = ServiceState::Cancelled;
    next.finished_ms = Some(now_ms);
    let key = format!("{ACTIVE_SERVICES}{}", next.id);
    let writes = vec![
        put(format!("{ENDED_SERVICES}{}", next.id), &next)?,
        Write::Delete { key: key.clone() },
        Write::Delete { key: format!("{SERVICE_PORTS}{}", next.listen) },
    ];
    let transaction = Transaction { expect: vec![(key, Some(service.revision))], writes };
    if let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? {
        coordinator.view.reached(revision).await;
        tracing::info!(service = next.id, "service cancelled");
    }
    Ok(())
}
