//! `/metrics` in the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::routing::get;
use lathe_api::gpu::GpuState;
use lathe_api::job::TaskState;
use lathe_api::node::SandboxStatus;
use tokio::sync::watch;

use crate::gpus::{Figures, Gpus, Times};

/// What is counted.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Sandboxes as last observed.
    pub sandboxes: Vec<SandboxStatus>,
    /// Whether the last report reached the coordinator.
    pub connected: bool,
    /// Reconciliation passes since the start.
    pub passes: u64,
}

/// Serves the metrics until the process ends.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    snapshot: watch::Receiver<Snapshot>,
    gpus: Arc<Gpus>,
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let handler = async |State((snapshot, gpus)): State<(watch::Receiver<Snapshot>, Arc<Gpus>)>| {
        let text = text(&snapshot.borrow()) + &gpu_text(&gpus.figures());
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
    };
    let router = Router::new().route("/metrics", get(handler)).with_state((snapshot, gpus));
    axum::serve(listener, router).await
}

fn text(snapshot: &Snapshot) -> String {
    let mut states: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut cpu_us, mut dropped) = (0_u64, 0_u64);
    for sandbox in &snapshot.sandboxes {
        *states.entry(name(sandbox.state)).or_default() += 1;
        cpu_us = cpu_us.saturating_add(sandbox.usage.cpu_us);
        dropped = dropped.saturating_add(sandbox.usage.output_dropped_bytes);
    }
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, String)]| {
        write_family(&mut text, name, kind, help, samples);
    };
    let one = |value: String| vec![(String::new(), value)];
    let states: Vec<_> =
        states.into_iter().map(|(s, n)| (format!("{{state=\"{s}\"}}"), n.to_string())).collect();
    family("lathe_agent_sandboxes", "gauge", "Sandboxes on this node by state.", &states);
    let seconds = format!("{}.{:06}", cpu_us / 1_000_000, cpu_us % 1_000_000);
    family(
        "lathe_agent_sandbox_cpu_seconds",
        "gauge",
        "CPU time of the sandboxes that are known.",
        &one(seconds),
    );
    family(
        "lathe_agent_output_dropped_bytes",
        "gauge",
        "Output dropped because of limits.",
        &one(dropped.to_string()),
    );
    let connected = u8::from(snapshot.connected).to_string();
    family(
        "lathe_agent_connected",
        "gauge",
        "Whether the last report reached the coordinator.",
        &one(connected),
    );
    let passes = snapshot.passes.to_string();
    family("lathe_agent_reconcile_passes_total", "counter", "Reconciliation passes.", &one(passes));
    text
}

fn write_family(text: &mut String, name: &str, kind: &str, help: &str, samples: &[(String, String)]) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

fn gpu_text(gpus: &[Figures]) -> String {
    let states = [
        (GpuState::Free, "free"),
        (GpuState::InUse, "in_use"),
        (GpuState::Scrubbing, "scrubbing"),
        (GpuState::Quarantined, "quarantined"),
    ];
    let count = |state: GpuState| gpus.iter().filter(|gpu| gpu.state == state).count().to_string();
    let states = states.map(|(state, name)| (format!("{{state=\"{name}\"}}"), count(state)));
    let stages = gpus.iter().flat_map(|Figures { address, times, .. }| {
        let Times { unbind_ms, reset_ms, scrub_ms, bind_ms } = *times;
        [("unbind", unbind_ms), ("reset", reset_ms), ("scrub", scrub_ms), ("bind", bind_ms)].map(
            |(stage, ms)| {
                let labels = format!("{{address=\"{address}\",stage=\"{stage}\"}}");
                (labels, format!("{}.{:03}", ms / 1000, ms % 1000))
            },
        )
    });
    let mut text = String::new();
    write_family(&mut text, "lathe_agent_gpus", "gauge", "GPUs of this node by state.", &states);
    let (name, help) = ("lathe_agent_gpu_handover_seconds", "How long the parts of its last hand-over took.");
    write_family(&mut text, name, "gauge", help, &stages.collect::<Vec<_>>());
    text
}

fn name(state: TaskState) -> &'static str {
    match state {
        TaskState::Pending => "pending",
        TaskState::Preparing => "preparing",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Stopping => "stopping",
        TaskState::Exited => "exited",
        TaskState::Failed => "failed",
        TaskState::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_by_state_and_their_hand_overs_timed() {
        let times = Times { reset_ms: 36, scrub_ms: 1331, ..Times::default() };
        let gpu = Figures { address: "0000:01:00.0".parse().unwrap(), state: GpuState::InUse, times };
        let text = gpu_text(&[gpu]);
        assert!(text.contains("lathe_agent_gpus{state=\"in_use\"} 1\n"));
        assert!(text.contains("lathe_agent_gpus{state=\"quarantined\"} 0\n"));
        let scrub = "lathe_agent_gpu_handover_seconds{address=\"0000:01:00.0\",stage=\"scrub\"} 1.331\n";
        assert!(text.contains(scrub), "{text}");
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let sandbox = SandboxStatus {
            id: "a-0-1".into(),
            state: TaskState::Running,
            ready: false,
            reason: None,
            lost: false,
            exit: None,
            usage: lathe_api::job::Usage { cpu_us: 1_500_000, ..Default::default() },
            stages: Default::default(),
        };
        let text = text(&Snapshot { sandboxes: vec![sandbox], connected: true, passes: 3 });
        assert!(text.contains("lathe_agent_sandboxes{state=\"running\"} 1\n"));
        assert!(text.contains("lathe_agent_sandbox_cpu_seconds 1.500000\n"));
        assert!(text.contains(
            "# TYPE lathe_agent_reconcile_passes_total counter\nlathe_agent_reconcile_passes_total 3"
        ));
    }
}
