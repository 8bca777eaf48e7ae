//! About the coordinator itself: health, metrics, the API's description.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use lathe_api::job::JobState;
use lathe_api::node::NodeState;
use lathe_api::provider::ProvidedState;
use utoipa::OpenApi;

use super::error::ApiError;
use super::openapi::ApiDoc;
use crate::coordinator::Coordinator;
use crate::provider::fleet::Fleet;
use crate::records::{ACTIVE_JOBS, ENDED_JOBS, FLEETS, JobRecord, load_all, of_prefix};

/// Whether the store answers.
#[utoipa::path(get, path = "/healthz", tag = "meta", responses((status = 200, body = String)))]
pub async fn health(State(coordinator): State<Arc<Coordinator>>) -> Result<&'static str, ApiError> {
    coordinator.store.list(&[]).await?;
    Ok("ok\n")
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "meta", responses((status = 200)))]
pub async fn openapi() -> impl IntoResponse {
    axum::Json(ApiDoc::openapi())
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "meta", responses((status = 200, body = String)))]
pub async fn metrics(State(coordinator): State<Arc<Coordinator>>) -> Result<impl IntoResponse, ApiError> {
    let mut page = Page::default();
    cluster_gauges(&coordinator, &mut page).await?;
    process_counters(&coordinator, &mut page);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page.0))
}

async fn cluster_gauges(coordinator: &Coordinator, page: &mut Page) -> Result<(), ApiError> {
    let nodes = super::nodes::nodes(coordinator, None).await?;
    let count = |state| nodes.iter().filter(|node| node.state == state).count() as u64;
    page.family("lathe_nodes", "gauge", "Nodes by state.");
    page.sample("lathe_nodes", "state=\"ready\"", count(NodeState::Ready));
    page.sample("lathe_nodes", "state=\"lost\"", count(NodeState::Lost));
    page.family("lathe_node_cpus", "gauge", "CPUs of ready nodes, and those promised to tasks.");
    let ready = || nodes.iter().filter(|node| node.state == NodeState::Ready);
    let total: u64 = ready().map(|node| u64::from(node.inventory.cpus.online)).sum();
    let allocated: u64 = ready().map(|node| u64::from(node.allocated_cpus)).sum();
    page.sample("lathe_node_cpus", "kind=\"total\"", total);
    page.sample("lathe_node_cpus", "kind=\"allocated\"", allocated);

    let listing = coordinator.store.list(&[ACTIVE_JOBS, ENDED_JOBS]).await?;
    let mut states = [0_u64; JOB_STATES.len()];
    for prefix in [ACTIVE_JOBS, ENDED_JOBS] {
        for record in of_prefix::<JobRecord>(&listing.entries, prefix) {
            let state = record?.1.value.job.state;
            if let Some(at) = JOB_STATES.iter().position(|(known, _)| *known == state) {
                states[at] += 1;
            }
        }
    }
    page.family("lathe_jobs", "gauge", "Jobs by state.");
    for ((_, name), count) in JOB_STATES.iter().zip(states) {
        page.sample("lathe_jobs", &format!("state=\"{name}\""), count);
    }
    let fleets = load_all::<Fleet>(&*coordinator.store, FLEETS).await?;
    provider_gauges(fleets.iter().map(|(pool, fleet)| (pool.as_str(), &fleet.value)), page);
    page.family("lathe_store_revision", "counter", "Commits of the store.");
    page.sample("lathe_store_revision", "", listing.revision);
    Ok(())
}

fn provider_gauges<'a>(fleets: impl Iterator<Item = (&'a str, &'a Fleet)> + Clone, page: &mut Page) {
    page.family("lathe_provider_nodes", "gauge", "Nodes that pools' providers made, by state.");
    for (pool, fleet) in fleets.clone() {
        for (state, name) in PROVIDED_STATES {
            let count = fleet.in_state(state).count() as u64;
            page.sample("lathe_provider_nodes", &format!("pool=\"{pool}\",state=\"{name}\""), count);
        }
    }
    page.family("lathe_provider_failures", "gauge", "Failures in a row of pools' providers.");
    for (pool, fleet) in fleets {
        let times = fleet.failure.as_ref().map_or(0, |failure| failure.times.into());
        page.sample("lathe_provider_failures", &format!("pool=\"{pool}\""), times);
    }
}

const PROVIDED_STATES: [(ProvidedState, &str); 4] = [
    (ProvidedState::Coming, "coming"),
    (ProvidedState::Joined, "joined"),
    (ProvidedState::Closing, "closing"),
    (ProvidedState::Releasing, "releasing"),
];

const JOB_STATES: [(JobState, &str); 7] = [
    (JobState::Pending, "pending"),
    (JobState::Running, "running"),
    (JobState::Succeeded, "succeeded"),
    (JobState::Failed, "failed"),
    (JobState::Preempting, "preempting"),
    (JobState::Cancelling, "cancelling"),
    (JobState::Cancelled, "cancelled"),
];

fn process_counters(coordinator: &Coordinator, page: &mut Page) {
    let metrics = &coordinator.metrics;
    page.family("lathe_http_responses_total", "counter", "Responses by kind.");
    page.sample("lathe_http_responses_total", "kind=\"ok\"", metrics.responses_ok.get());
    page.sample("lathe_http_responses_total", "kind=\"refused\"", metrics.responses_refused.get());
    page.sample("lathe_http_responses_total", "kind=\"failed\"", metrics.responses_failed.get());
    for (name, help, value) in [
        (
            "lathe_tls_handshakes_failed_total",
            "Connections refused before a request.",
            &metrics.handshakes_failed,
        ),
        ("lathe_agent_reports_total", "Reports of agents.", &metrics.reports),
        ("lathe_log_lines_total", "Lines of output stored.", &metrics.log_lines),
        ("lathe_reconciliations_total", "Rounds of the reconciler.", &metrics.reconciliations),
        ("lathe_reconcile_microseconds_total", "Time spent in them.", &metrics.reconcile_us),
        (
            "lathe_placement_conflicts_total",
            "Placements planned again at commit.",
            &metrics.placement_conflicts,
        ),
    ] {
        page.family(name, "counter", help);
        page.sample(name, "", value.get());
    }
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: u64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::fleet::Fault;

    #[test]
    fn providers_that_fail_or_hang_show() {
        let mut fleet = Fleet::of("cloud");
        fleet.add("n1", "r1", 1);
        fleet.fail(Fault::Grow, "no".to_owned(), 1);
        let mut page = Page::default();
        provider_gauges([("train", &fleet)].into_iter(), &mut page);
        for line in [
            "lathe_provider_nodes{pool=\"train\",state=\"coming\"} 1\n",
            "lathe_provider_nodes{pool=\"train\",state=\"joined\"} 0\n",
            "lathe_provider_failures{pool=\"train\"} 1\n",
        ] {
            assert!(page.0.contains(line), "{}", page.0);
        }
    }
}
