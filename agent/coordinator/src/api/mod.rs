//! The HTTP API.
//!
//! - `agent`: join, report, desired state, logs: for nodes.
//! - `jobs`, `services`, `nodes`, `pools` (with tenants and the audit log), `artefacts`, `blobs`, `tokens`: for people.
//! - `meta`: health, metrics, the description.
//! - `extract`: who asks; bounded bodies. `error`: problem documents. `stream`: JSON lines.
//!   `redact`: what a tenant is not told.

mod agent;
mod artefacts;
mod blobs;
pub mod error;
pub mod extract;
mod jobs;
mod meta;
mod nodes;
pub mod openapi;
mod pools;
mod redact;
mod services;
mod stream;
pub mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post};

use crate::coordinator::Coordinator;
use error::ApiError;

/// All endpoints.
pub fn router(coordinator: Arc<Coordinator>) -> Router {
    Router::new()
        .route("/v1/agent/join", post(agent::join))
        .route("/v1/agent/report", post(agent::report))
        .route("/v1/agent/desired", get(agent::desired_state))
        .route("/v1/agent/logs", post(agent::logs))
        .route("/v1/blobs/{digest}", get(blobs::get).put(blobs::put))
        .route("/v1/images", get(artefacts::images).post(artefacts::add_image))
        .route("/v1/images/{*name}", get(artefacts::image))
        .route("/v1/datasets", get(artefacts::datasets).post(artefacts::add_dataset))
        .route("/v1/datasets/{name}", get(artefacts::dataset))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/nodes/{name}", get(nodes::show))
        .route("/v1/nodes/{name}/operations", post(nodes::operate))
        .route("/v1/pools", get(pools::pools))
        .route("/v1/pools/{name}", get(pools::pool).put(pools::set_pool).delete(pools::remove_pool))
        .route("/v1/tenants", get(pools::tenants))
        .route("/v1/tenants/{name}", get(pools::tenant).put(pools::set_tenant).delete(pools::remove_tenant))
        .route("/v1/audit", get(pools::audit_log))
        .route("/v1/jobs", get(jobs::list).post(jobs::submit))
        .route("/v1/jobs/plan", post(jobs::plan))
        .route("/v1/jobs/{id}", get(jobs::show))
        .route("/v1/jobs/{id}/why", get(jobs::why))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/watch", get(jobs::watch))
        .route("/v1/jobs/{id}/logs", get(jobs::logs))
        .route("/v1/services", get(services::list).post(services::submit))
        .route("/v1/services/{id}", get(services::show))
        .route("/v1/services/{id}/cancel", post(services::cancel))
        .route("/v1/tokens", get(tokens::list).post(tokens::create))
        .route("/v1/tokens/{id}", delete(tokens::revoke))
        .route("/healthz", get(meta::health))
        .route("/metrics", get(meta::metrics))
        .route("/openapi.json", get(meta::openapi))
        .fallback(no_such_endpoint)
        .layer(middleware::from_fn_with_state(Arc::clone(&coordinator), count))
        .with_state(coordinator)
}

async fn no_such_endpoint(request: Request) -> ApiError {
    ApiError::not_found("endpoint", request.uri().path())
}

async fn count(State(coordinator): State<Arc<Coordinator>>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let metrics = &coordinator.metrics;
    match response.status().as_u16() {
        0..400 => metrics.responses_ok.add(1),
        400..500 => metrics.responses_refused.add(1),
        _ => metrics.responses_failed.add(1),
    }
    response
}
