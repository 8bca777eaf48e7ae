//! The resources of the control API.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path as UrlPath, Query, State as Extract};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use super::metrics;
use crate::config::{PassthroughConfig, VmConfig};
use crate::machine::{Controls, DeviceView, PlugError, State};
use crate::vfio::VfioError;

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
    paths(
        show,
        pause,
        resume,
        power_button,
        kill,
        list_devices,
        plug_device,
        unplug_device,
        show_metrics,
        openapi
    ),
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
        .route("/v1/vm/devices", get(list_devices).post(plug_device))
        .route("/v1/vm/devices/{id}", delete(unplug_device))
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

/// The passed-through devices.
#[utoipa::path(get, path = "/v1/vm/devices", responses((status = 200, body = Vec<DeviceView>)))]
async fn list_devices(machine: Machine) -> Result<Json<Vec<DeviceView>>, Problem> {
    Ok(Json(apart(move || machine.passthrough().devices()).await?))
}

/// Plugs a device of the host into a free slot of the running guest.
#[utoipa::path(post, path = "/v1/vm/devices", request_body = PassthroughConfig, responses(
    (status = 201, description = "Plugged; the guest's driver finds it in its own time", body = DeviceView),
    (status = 400, description = "Not a device description", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "No free slot, the ID is taken, or the device cannot be passed through", body = Problem, content_type = "application/problem+json"),
))]
async fn plug_device(
    machine: Machine,
    body: Result<Json<PassthroughConfig>, JsonRejection>,
) -> Result<(StatusCode, Json<DeviceView>), Problem> {
    let Json(config) = body.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    let plugged = apart(move || machine.passthrough().plug(config)).await?;
    Ok((StatusCode::CREATED, Json(plugged.map_err(plug_problem)?)))
}

/// How a device is taken out.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
struct Unplug {
    /// Take it away at once, whatever the guest does with it.
    surprise: bool,
}

/// Takes a device out of the guest.
#[utoipa::path(delete, path = "/v1/vm/devices/{id}", params(("id" = String, Path, description = "The device's ID"), Unplug), responses(
    (status = 202, description = "The guest was asked to let go; the device is gone from the list when it has"),
    (status = 204, description = "Taken away"),
    (status = 404, description = "No such device", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "It sits in no slot", body = Problem, content_type = "application/problem+json"),
))]
async fn unplug_device(
    machine: Machine,
    UrlPath(id): UrlPath<String>,
    query: Result<Query<Unplug>, QueryRejection>,
) -> Result<StatusCode, Problem> {
    let Query(Unplug { surprise }) =
        query.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    let act = move || {
        let passthrough = machine.passthrough();
        if surprise { passthrough.surprise_remove(&id) } else { passthrough.request_unplug(&id) }
    };
    apart(act).await?.map_err(plug_problem)?;
    Ok(if surprise { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED })
}

/// Does what waits for passed-through devices on a thread of its own. Whoever plugs one has them for seconds, where the
/// memory of a large machine is mapped; meanwhile others are served, who may want to end it.
async fn apart<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(act).await;
    done.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

fn plug_problem(error: PlugError) -> Problem {
    let status = match &error {
        PlugError::Field(_) => StatusCode::BAD_REQUEST,
        PlugError::Vfio(VfioError::NoSuchDevice(_)) => StatusCode::NOT_FOUND,
        PlugError::Watch(_) => StatusCode::INTERNAL_SERVER_ERROR,
        PlugError::Vfio(_) | PlugError::Slot(_) => StatusCode::CONFLICT,
    };
    Problem::new(status, error.to_string())
}

/// Counters as Prometheus text.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
async fn show_metrics(machine: Machine) -> Result<Response, Problem> {
    let text = apart(move || metrics::render(&machine)).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
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
