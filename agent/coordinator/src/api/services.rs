//! Services: submit, list, show, cancel.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use lathe_api::job::JobSpec;
use lathe_api::problem::Problem;
use lathe_api::service::Service;

use super::error::ApiError;
use super::extract::{Json, User};
use super::redact::Hidden;
use crate::coordinator::Coordinator;
use crate::records::{ACTIVE_SERVICES, ENDED_SERVICES, of_prefix};
use crate::services::{ServiceRecord, show, submit};

const SPEC_BYTES: usize = 1 << 20;

/// Submits a service: a job's description with a `service` part. Its replicas are jobs of one task that
/// name it.
#[utoipa::path(post, path = "/v1/services", tag = "services", request_body = JobSpec,
    responses((status = 201, body = Service), (status = "4XX", body = Problem)))]
pub async fn submit(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Json(spec): Json<JobSpec, SPEC_BYTES>,
) -> Result<(StatusCode, axum::Json<Service>), ApiError> {
    let record = submit::submit(&coordinator, &user.0.tenant, spec).await?;
    let service = shown(&coordinator, &user, &mut Hidden::default(), record).await?;
    Ok((StatusCode::CREATED, axum::Json(service)))
}

/// All services of the token's tenant, or of everyone for an admin, in the order of submission.
#[utoipa::path(get, path = "/v1/services", tag = "services",
    responses((status = 200, body = Vec<Service>), (status = "4XX", body = Problem)))]
pub async fn list(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
) -> Result<axum::Json<Vec<Service>>, ApiError> {
    let listing = coordinator.store.list(&[ACTIVE_SERVICES, ENDED_SERVICES]).await?;
    let active = of_prefix::<ServiceRecord>(&listing.entries, ACTIVE_SERVICES);
    let ended = of_prefix::<ServiceRecord>(&listing.entries, ENDED_SERVICES);
    let mut records: Vec<ServiceRecord> =
        active.chain(ended).map(|record| record.map(|(_, record)| record.value)).collect::<Result<_, _>>()?;
    records.retain(|record| user.may(&record.tenant));
    records.sort_by_key(|record| record.sequence);
    let mut hidden = Hidden::default();
    let mut services = Vec::with_capacity(records.len());
    for record in records {
        services.push(shown(&coordinator, &user, &mut hidden, record).await?);
    }
    Ok(axum::Json(services))
}

/// One service with its replicas and its history.
#[utoipa::path(get, path = "/v1/services/{id}", tag = "services", params(("id" = String, Path)),
    responses((status = 200, body = Service), (status = "4XX", body = Problem)))]
pub async fn show(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<axum::Json<Service>, ApiError> {
    let record = find(&coordinator, &user, &id).await?;
    Ok(axum::Json(shown(&coordinator, &user, &mut Hidden::default(), record).await?))
}

/// Cancels a service and all its replicas. One that has ended stays as it is.
#[utoipa::path(post, path = "/v1/services/{id}/cancel", tag = "services", params(("id" = String, Path)),
    responses((status = 200, body = Service), (status = "4XX", body = Problem)))]
pub async fn cancel(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<axum::Json<Service>, ApiError> {
    find(&coordinator, &user, &id).await?;
    let record =
        submit::cancel(&coordinator, &id).await?.ok_or_else(|| ApiError::not_found("service", &id))?;
    Ok(axum::Json(shown(&coordinator, &user, &mut Hidden::default(), record).await?))
}

/// The record, if the caller may know of it; others' services look as if they did not exist.
async fn find(coordinator: &Coordinator, user: &User, id: &str) -> Result<ServiceRecord, ApiError> {
    match submit::find(coordinator, id).await? {
        Some(record) if user.may(&record.value.tenant) => Ok(record.value),
        _ => Err(ApiError::not_found("service", id)),
    }
}

async fn shown(
    coordinator: &Coordinator,
    user: &User,
    hidden: &mut Hidden,
    record: ServiceRecord,
) -> Result<Service, ApiError> {
    let mut service = show::service(coordinator, record);
    let reasons: Vec<&str> = service.replicas.iter().filter_map(|one| one.reason.as_deref()).collect();
    hidden.of(coordinator, user, reasons).await?;
    for replica in &mut service.replicas {
        replica.reason = replica.reason.as_ref().map(|reason| hidden.text(reason));
    }
    Ok(service)
}
