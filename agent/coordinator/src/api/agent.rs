//! What agents call: join, report, desired state, logs.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use lathe_api::node::{JoinRequest, JoinResponse, LogBatch, LogLine, NodeReport};
use lathe_api::problem::Problem;
use lathe_api::sandbox::{DesiredUpdate, NetworkChanges, SandboxSpec};
use lathe_api::service::NodeService;
use lathe_api::token::TokenKind;

use super::error::ApiError;
use super::extract::{AgentNode, Json};
use super::stream::{Gone, Lines, json_lines};
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::desired::NetworkKnown;
use crate::logs::LogFile;
use crate::records::{ASSIGNMENTS, Assignment, load};
use crate::state::Contents;
use crate::store::Revision;
use crate::{check, desired, observe, submit, tokens};

const JOIN_BYTES: usize = 64 << 10;
/// 253 sandboxes and an inventory of thousands of devices fit.
const REPORT_BYTES: usize = 8 << 20;
/// 256 lines of 16 KiB with every character escaped fit.
const LOGS_BYTES: usize = 32 << 20;
const MAX_LOG_LINES: usize = 256;
const MAX_LOG_TEXT_BYTES: usize = 16 << 10;

/// Gives a node its certificate, against a join token.
#[utoipa::path(post, path = "/v1/agent/join", tag = "agent", request_body = JoinRequest,
    responses((status = 200, body = JoinResponse), (status = "4XX", body = Problem)))]
pub async fn join(
    State(coordinator): State<Arc<Coordinator>>,
    Json(request): Json<JoinRequest, JOIN_BYTES>,
) -> Result<axum::Json<JoinResponse>, ApiError> {
    let token = tokens::verify(&*coordinator.store, request.token.trim(), "join").await?;
    if token.kind != TokenKind::Join {
        return Err(ApiError::forbidden("this is not a join token"));
    }
    check::check_name(&request.name).map_err(|reason| ApiError::field("name", reason))?;
    let (certificate_pem, fingerprint) = coordinator.authority.sign_node(&request.csr_pem, &request.name)?;
    observe::join(&coordinator, &request.name, fingerprint).await?;
    Ok(axum::Json(JoinResponse { certificate_pem }))
}

/// Takes a node's whole observed state; the heartbeat.
#[utoipa::path(post, path = "/v1/agent/report", tag = "agent", request_body = NodeReport,
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn report(
    State(coordinator): State<Arc<Coordinator>>,
    AgentNode(node): AgentNode,
    Json(report): Json<NodeReport, REPORT_BYTES>,
) -> Result<StatusCode, ApiError> {
    if report.address.parse::<Ipv4Addr>().is_err() {
        return Err(ApiError::field("address", format!("{:?} is not an IPv4 address", report.address)));
    }
    coordinator.metrics.reports.add(1);
    // A first report makes a node usable although nothing may have changed in the store.
    let first = !coordinator.live().contains_key(&node);
    observe::report(&coordinator, &node, &report).await?;
    take_loads(&coordinator, &node, &report);
    if first {
        coordinator.view.touch(&node);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// What is in flight at services there; who waits for a replica does not wait for the next round, too.
fn take_loads(coordinator: &Coordinator, node: &str, report: &NodeReport) {
    coordinator.view.read(|contents| {
        let is_service = |id: &str| contents.services.contains_key(id);
        coordinator.loads.report(node, &report.services, now_ms(), is_service);
    });
    if report.services.iter().any(|load| load.waiting > 0) {
        coordinator.changed.notify_one();
    }
}

/// Streams the node's desired state as JSON lines: all of it at once, then after every change the
/// parts that changed.
#[utoipa::path(get, path = "/v1/agent/desired", tag = "agent",
    responses((status = 200, body = DesiredUpdate, content_type = "application/jsonl"),
              (status = "4XX", body = Problem)))]
pub async fn desired_state(
    State(coordinator): State<Arc<Coordinator>>,
    AgentNode(node): AgentNode,
) -> Response {
    let shared = Arc::clone(&coordinator);
    json_lines(&coordinator, move |lines| async move {
        // A reader that has gone needs no more.
        let _ = watch_desired(&shared, &node, &lines).await;
    })
}

/// How often a node is told at most that its network changed, and by how much the next time is put off for
/// each route and address that it was told: every node and task anywhere changes it, and a thousand nodes
/// hear of it.
const NETWORK_INTERVAL: Duration = Duration::from_secs(1);
const NETWORK_INTERVAL_EACH: Duration = Duration::from_millis(1);
/// Whatever changes, it is told of it after this time.
const NETWORK_INTERVAL_MAX: Duration = Duration::from_secs(30);

async fn watch_desired(coordinator: &Coordinator, node: &str, lines: &Lines) -> Result<(), Gone> {
    let view = &coordinator.view;
    let mut changed = view.watch_desired(node);
    let mut told: Option<Vec<SandboxSpec>> = None;
    let mut look_at_sandboxes = true;
    let mut network = NetworkTold { known: None, due: Instant::now() };
    let mut services = ServicesTold::default();
    loop {
        look_at_sandboxes |= changed.has_changed().unwrap_or(true);
        changed.mark_unchanged();
        let update = view.read(|contents| {
            let mut update = DesiredUpdate { revision: contents.revision, ..DesiredUpdate::default() };
            if look_at_sandboxes {
                let sandboxes = desired::sandboxes(contents, node)?;
                update.sandboxes = Some(sandboxes).filter(|now| told.as_ref() != Some(now));
            }
            network.update(contents, node, &mut update);
            update.services = services.news(contents, node);
            Some(update)
        });
        let Some(update) = update else { return Ok(()) };
        if update != (DesiredUpdate { revision: update.revision, ..DesiredUpdate::default() }) {
            lines.send(&update).await?;
        }
        told = update.sandboxes.or(told);
        let network_timer =
            tokio::time::sleep_until(network.due.max(Instant::now() + NETWORK_INTERVAL).into());
        look_at_sandboxes = tokio::select! {
            changed = changed.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                true
            }
            () = network_timer => false,
            () = lines.closed() => return Ok(()),
        };
    }
}

/// What a node was told of services, and when that was put together.
#[derive(Default)]
struct ServicesTold {
    told: Option<Vec<NodeService>>,
    at: Option<Revision>,
}

impl ServicesTold {
    /// What it is to be told now; nothing if it knows.
    fn news(&mut self, contents: &Contents, node: &str) -> Option<Vec<NodeService>> {
        if self.at == Some(contents.services_changed) {
            return None;
        }
        self.at = Some(contents.services_changed);
        let services =
            Some(desired::node_services(contents, node)).filter(|now| self.told.as_ref() != Some(now))?;
        self.told = Some(services.clone());
        Some(services)
    }
}

/// How far a node was told its network, and when it may be told of it again.
struct NetworkTold {
    known: Option<NetworkKnown>,
    due: Instant,
}

impl NetworkTold {
    /// Adds what there is to tell now.
    fn update(&mut self, contents: &Contents, node: &str, update: &mut DesiredUpdate) {
        let now = Instant::now();
        if now < self.due || self.known.as_ref().is_some_and(|known| known.is_current(contents, node)) {
            return;
        }
        let changes = self.known.as_ref().and_then(|known| known.changes(contents, node));
        let length = match changes {
            Some(changes) => {
                let length = length(&changes);
                update.network_changes = Some(changes).filter(|_| length > 0);
                length
            }
            None => {
                update.network = desired::network(contents, node);
                update.network.as_ref().map_or(0, |network| network.routes.len())
            }
        };
        self.known = Some(NetworkKnown::now(contents, node));
        let each = NETWORK_INTERVAL_EACH * u32::try_from(length).unwrap_or(u32::MAX);
        self.due = now + (NETWORK_INTERVAL + each).min(NETWORK_INTERVAL_MAX);
    }
}

/// Routes, addresses and tenants that are told.
fn length(changes: &NetworkChanges) -> usize {
    let addresses: usize = changes.tenants.iter().map(|tenant| tenant.came.len() + tenant.went.len()).sum();
    changes.routes.len() + changes.routes_gone.len() + changes.tenants_gone.len() + addresses
}

/// Stores output of the node's sandboxes. Lines stored before are skipped.
#[utoipa::path(post, path = "/v1/agent/logs", tag = "agent", request_body = LogBatch,
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn logs(
    State(coordinator): State<Arc<Coordinator>>,
    AgentNode(node): AgentNode,
    Json(batch): Json<LogBatch, LOGS_BYTES>,
) -> Result<StatusCode, ApiError> {
    if batch.lines.len() > MAX_LOG_LINES {
        return Err(ApiError::field("lines", format!("at most {MAX_LOG_LINES} lines a batch")));
    }
    let mut by_sandbox: BTreeMap<String, Vec<LogLine>> = BTreeMap::new();
    for (index, line) in batch.lines.into_iter().enumerate() {
        if line.text.len() > MAX_LOG_TEXT_BYTES {
            let detail = format!("longer than {MAX_LOG_TEXT_BYTES} bytes; split it");
            return Err(ApiError::field(format!("lines.{index}.text"), detail));
        }
        by_sandbox.entry(line.sandbox.clone()).or_default().push(line);
    }
    for (sandbox, lines) in by_sandbox {
        let log = writable_log(&coordinator, &node, &sandbox).await?;
        let Some(log) = log else {
            // Of a job this cluster does not know, or another node's: dropping it lets the agent go
            // on with the rest, which an error would not.
            tracing::warn!(node, sandbox, "output of an unknown sandbox is dropped");
            continue;
        };
        let shared = Arc::clone(&coordinator);
        let stored = tokio::task::spawn_blocking(move || shared.logs.append(&log, &lines)).await;
        let stored = stored.map_err(|_| ApiError::conflict("the write was interrupted; send it again"))?;
        coordinator.metrics.log_lines.add(stored?);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The log that this node may write for this sandbox: one it is assigned, or has written to before.
async fn writable_log(
    coordinator: &Coordinator,
    node: &str,
    sandbox: &str,
) -> Result<Option<LogFile>, ApiError> {
    let Some((job, _, _)) = submit::parse_sandbox_id(sandbox) else { return Ok(None) };
    let log = LogFile { job: job.to_owned(), sandbox: sandbox.to_owned(), node: node.to_owned() };
    if coordinator.logs.exists(&log) {
        return Ok(Some(log));
    }
    let key = format!("{ASSIGNMENTS}{node}/{sandbox}");
    if load::<Assignment>(&*coordinator.store, &key).await?.is_some() {
        return Ok(Some(log));
    }
    // Its end was reported before its first output.
    let record = submit::find_job(coordinator, job).await?;
    let was_here = record.is_some_and(|record| {
        let tasks = &record.value.job.tasks;
        tasks
            .iter()
            .any(|task| task.sandbox.as_deref() == Some(sandbox) && task.node.as_deref() == Some(node))
    });
    Ok(was_here.then_some(log))
}
