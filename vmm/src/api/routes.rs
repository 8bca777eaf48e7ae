//! The resources of the control API.

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use super::metrics;
use crate::config::VmConfig;
use crate::machine::{Controls, State};

/// A machine as the API shows it.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmView {
    /// Whether the vCPUs run.
    pub state: State,
    /// Seconds since the guest's first instruction, pauses included.
    pub uptime_seconds: f64,
    /// The machine's description.
    pub config: VmConfig,
}

/// An error, as RFC 9457 has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// A URI reference that identifies the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// The HTTP status code.
    pub status: u16,
    /// The kind, for people.
    pub title: String,
    /// This occurrence, for people.
    pub detail: String,
}

impl Problem {
    fn new(status: StatusCode, detail: String) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        Self { kind: "about:blank".to_owned(), status: status.as_u16(), title, detail }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let json = serde_json::to_vec(&self).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, "application/problem+json")], json).into_response()
    }
}

/// What every handler gets.
type Machine = Extract<Arc<Controls>>;

#[derive(OpenApi)]
#[openapi(
    info(title = "lathe-vmm", description = "Control of one microVM, over its Unix socket."),
    paths(show, pause, resume, power_button, kill, show_metrics, openapi),
    components(schemas(Problem))
)]
struct Document;

/// The OpenAPI document as pretty JSON.
pub fn openapi_json() -> String {
    Document::openapi().to_pretty_json().unwrap_or_default()
}

pub(super) fn router(machine: Arc<Controls>) -> Router {
    let unknown = async || Problem::new(StatusCode::NOT_FOUND, "no such resource".to_owned());
    let wrong = async || Problem::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method".to_owned());
    Router::new()
        .route("/v1/vm", get(show))
        .route("/v1/vm/pause", put(pause))
        .route("/v1/vm/resume", put(resume))
        .route("/v1/vm/power-button", put(power_button))
        .route("/v1/vm/kill", put(kill))
        .route("/metrics", get(show_metrics))
        .route("/openapi.json", get(openapi))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong)
        .with_state(machine)
}

/// The machine and its state.
#[utoipa::path(get, path = "/v1/vm", responses((status = 200, body = VmView)))]
async fn show(machine: Machine) -> Json<VmView> {
    Json(VmView {
        state: machine.state(),
        uptime_seconds: machine.uptime().as_secs_f64(),
        config: machine.config().clone(),
    })
}

/// Stops the vCPUs and devices; a paused machine stays so.
#[utoipa::path(put, path = "/v1/vm/pause", responses(
    (status = 204, description = "Paused"),
    (status = 500, description = "A vCPU did not stop", body = Problem, content_type = "application/problem+json"),
))]
async fn pause(machine: Machine) -> Result<StatusCode, Problem> {
    done(machine.pause())
}

/// Lets a paused machine run again.
#[utoipa::path(put, path = "/v1/vm/resume", responses((status = 204, description = "Running")))]
async fn resume(machine: Machine) -> StatusCode {
    machine.resume();
    StatusCode::NO_CONTENT
}

/// Presses the power button; what follows is the guest's choice.
#[utoipa::path(put, path = "/v1/vm/power-button", responses(
    (status = 204, description = "Pressed"),
    (status = 500, description = "Not pressed", body = Problem, content_type = "application/problem+json"),
))]
async fn power_button(machine: Machine) -> Result<StatusCode, Problem> {
    done(machine.press_power_button())
}

/// Ends the machine at once, as if its plug were pulled.
#[utoipa::path(put, path = "/v1/vm/kill", responses((status = 204, description = "Ending")))]
async fn kill(machine: Machine) -> StatusCode {
    machine.kill();
    StatusCode::NO_CONTENT
}

/// Counters as Prometheus text.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
async fn show_metrics(machine: Machine) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::render(&machine)).into_response()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, content_type = "application/json", body = String)))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}

fn done<E: std::fmt::Display>(result: Result<(), E>) -> Result<StatusCode, Problem> {
    match result {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_openapi_document() {
        insta::assert_snapshot!(super::openapi_json());
    }
}
