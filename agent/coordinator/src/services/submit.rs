//! Services as they come in: checked, resolved to digests, given a port of the nodes; and the wish that
//! they end.

use lathe_api::job::JobSpec;
use lathe_api::scheduling::{DecidedBy, DecisionKind};
use lathe_api::service::{LISTEN_PORTS, ServiceState};

use super::ServiceRecord;
use crate::api::error::ApiError;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{ACTIVE_SERVICES, ENDED_SERVICES, SERVICE_PORTS, Versioned, load, put};
use crate::store::{Outcome, StoreError, Transaction};
use crate::{submit, tokens};

/// How often a change is tried again when others change the same.
const ATTEMPTS: usize = 64;

/// Accepts a service, or says which field is wrong and changes nothing.
///
/// # Errors
/// See there.
pub async fn submit(
    coordinator: &Coordinator,
    tenant: &str,
    spec: JobSpec,
) -> Result<ServiceRecord, ApiError> {
    let Some(service) = spec.service.clone() else {
        let detail = "missing: a service needs at least its port and max; for work that ends, submit a job";
        return Err(ApiError::field("service", detail));
    };
    let prepared = submit::prepare(coordinator, tenant, spec).await?;
    let now = now_ms();
    let mut record = ServiceRecord {
        id: String::new(),
        tenant: tenant.to_owned(),
        spec: prepared.job.spec,
        sequence: 0,
        image: prepared.image,
        datasets: prepared.datasets,
        listen: 0,
        state: ServiceState::Active,
        wanted: service.min,
        why: Some(format!("min = {}, until something is in flight", service.min)),
        decisions: Vec::new(),
        submitted_ms: now,
        finished_ms: None,
    };
    let store = &*coordinator.store;
    for _ in 0..ATTEMPTS {
        record.id = format!("{}-{}", record.spec.name, tokens::random_hex(3)?);
        record.sequence = coordinator.sequence.next(store).await?;
        record.listen = match service.listen {
            Some(port) => port,
            None => free_port(coordinator).await?,
        };
        let port_key = format!("{SERVICE_PORTS}{}", record.listen);
        if service.listen.is_some()
            && let Some(taken) = load::<String>(store, &port_key).await?
        {
            return Err(taken_port(coordinator, tenant, record.listen, &taken.value).await?);
        }
        let key = format!("{ACTIVE_SERVICES}{}", record.id);
        let ended = (format!("{ENDED_SERVICES}{}", record.id), None);
        let expect = vec![(key.clone(), None), (port_key.clone(), None), ended];
        let writes = vec![put(port_key, &record.id)?, put(key, &record)?];
        if let Outcome::Committed(revision) = store.commit(Transaction { expect, writes }).await? {
            coordinator.view.reached(revision).await;
            tracing::info!(service = record.id, tenant, listen = record.listen, "service submitted");
            return Ok(record);
        }
    }
    Err(StoreError::Contended(ACTIVE_SERVICES.to_owned()).into())
}

/// A port of the nodes that no service has. Not the same one again and again: whoever still talks to a
/// service that ended should find nobody.
async fn free_port(coordinator: &Coordinator) -> Result<u16, ApiError> {
    let listing = coordinator.store.list(&[SERVICE_PORTS]).await?;
    let taken: Vec<&str> =
        listing.entries.iter().filter_map(|entry| entry.key.strip_prefix(SERVICE_PORTS)).collect();
    let free: Vec<u16> = LISTEN_PORTS.filter(|port| !taken.contains(&port.to_string().as_str())).collect();
    let random = u32::from_str_radix(&tokens::random_hex(3)?, 16).unwrap_or(0);
    let index = usize::try_from(random).unwrap_or(0).checked_rem(free.len());
    let port = index.and_then(|index| free.get(index)).copied();
    port.ok_or_else(|| ApiError::conflict("all ports of the nodes are taken; cancel services"))
}

/// Who has a port is told to those who may know of that service only.
async fn taken_port(
    coordinator: &Coordinator,
    tenant: &str,
    port: u16,
    by: &str,
) -> Result<ApiError, StoreError> {
    let owner = find(coordinator, by).await?.filter(|record| record.value.tenant == tenant);
    let by = owner.map_or_else(|| "another service".to_owned(), |_| format!("service {by}"));
    Ok(ApiError::field("service.listen", format!("{port}: {by} has it; choose another, or leave it out")))
}

/// A service, whether it has ended or not.
///
/// # Errors
/// When the store fails.
pub async fn find(
    coordinator: &Coordinator,
    id: &str,
) -> Result<Option<Versioned<ServiceRecord>>, StoreError> {
    let store = &*coordinator.store;
    match load(store, &format!("{ACTIVE_SERVICES}{id}")).await? {
        Some(record) => Ok(Some(record)),
        None => load(store, &format!("{ENDED_SERVICES}{id}")).await,
    }
}

/// Asks for a service to be cancelled. One that has ended stays as it is.
///
/// # Errors
/// When the store fails.
pub async fn cancel(coordinator: &Coordinator, id: &str) -> Result<Option<ServiceRecord>, ApiError> {
    for _ in 0..ATTEMPTS {
        let Some(record) = find(coordinator, id).await? else { return Ok(None) };
        let Versioned { value: mut next, revision } = record;
        if next.state != ServiceState::Active {
            return Ok(Some(next));
        }
        next.state = ServiceState::Cancelling;
        next.wanted = 0;
        next.why = Some("it was cancelled".to_owned());
        next.decide(DecisionKind::Cancelled, DecidedBy::Owner, "asked for", now_ms());
        let key = format!("{ACTIVE_SERVICES}{id}");
        let transaction =
            Transaction { expect: vec![(key.clone(), Some(revision))], writes: vec![put(key, &next)?] };
        if let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? {
            coordinator.view.reached(revision).await;
            tracing::info!(service = id, "cancel requested");
            return Ok(Some(next));
        }
    }
    Err(StoreError::Contended(format!("{ACTIVE_SERVICES}{id}")).into())
}
