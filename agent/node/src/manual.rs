//! `lathe-agent sandbox run`: one sandbox by hand, for trying an image or a host without a cluster.
//!
//! It goes through the same reconciler, journal and supervisor as under an agent, with the
//! specification as the only wish, and leaves nothing behind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use lathe_api::job::TaskExit;
use lathe_api::node::{LogStream, SandboxStatus};
use lathe_api::sandbox::{Desired, NodeDesired, NodeNetwork, SandboxSpec, TenantAddresses};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::agent::{lock_host, open_host};
use crate::files;
use crate::gpus::Policy;
use crate::images::blobs::BlobSource;
use crate::paths::{Paths, is_valid_id};
use crate::reconcile::Reconciler;
use crate::supervisor::SPOOL;
use crate::supervisor::spool::SpoolReader;

/// How often the sandbox is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// Runs the sandbox of `spec` and exits as its task did. SIGINT and SIGTERM stop it.
///
/// # Errors
/// When the specification cannot be read, an agent runs here, or the host does not allow it.
pub async fn run(
    spec: &Path,
    blobs: PathBuf,
    subnet: &str,
    gpus: Policy,
    paths: Paths,
) -> anyhow::Result<ExitCode> {
    let spec: SandboxSpec = files::read_json(spec)?;
    anyhow::ensure!(is_valid_id(&spec.id), "id: {:?} is not of [a-z0-9-], 1 to 96 characters", spec.id);
    let _lock = lock_host()?;
    let host = Arc::new(open_host(paths, BlobSource::Folder(blobs), gpus)?);
    let tenant = TenantAddresses { tenant: spec.tenant.clone(), addresses: vec![spec.address.clone()] };
    let network = NodeNetwork {
        subnet: subnet.to_owned(),
        routes: Vec::new(),
        tenants: vec![tenant],
        served: Vec::new(),
    };
    host.network.configure(&network).await?;
    let mut desired =
        NodeDesired { revision: 1, network: Some(network), services: None, sandboxes: vec![spec.clone()] };

    let mut reconciler = Reconciler::new(host.clone(), Arc::new(Notify::new()));
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut end: Option<SandboxStatus> = None;
    loop {
        // Whatever there is of output is printed below, in the same turn.
        let found = reconciler.pass(Some(&desired), |_| false).await?.sandboxes;
        print_output(&host.paths, &spec.id)?;
        match found.into_iter().find(|status| status.id == spec.id) {
            Some(status) if status.state.is_terminal() => {
                end = Some(status);
                // Ended: forget it too.
                desired.sandboxes.clear();
            }
            None if end.is_some() => break,
            _ => {}
        }
        let stop = async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        };
        if timeout(INTERVAL, stop).await.is_ok() {
            desired.sandboxes.iter_mut().for_each(|spec| spec.desired = Desired::Stopped);
        }
    }
    reconciler.finish().await;
    host.network.remove_all().await?;
    Ok(end.map_or(ExitCode::FAILURE, |status| conclude(&status)))
}

/// Prints what is new in the spool, and lets go of it.
fn print_output(paths: &Paths, id: &str) -> anyhow::Result<()> {
    let dir = paths.sandbox(id).join(SPOOL);
    if !dir.exists() {
        return Ok(());
    }
    let mut reader = SpoolReader::open(&dir)?;
    let lines = reader.read(id, usize::MAX)?;
    for line in &lines {
        match line.stream {
            LogStream::Stdout => writeln!(std::io::stdout(), "{}", line.text)?,
            LogStream::Stderr => writeln!(std::io::stderr(), "{}", line.text)?,
            LogStream::Lathe => writeln!(std::io::stderr(), "lathe: {}", line.text)?,
        }
    }
    if let Some(last) = lines.last() {
        reader.acknowledge(last.seq + 1)?;
    }
    Ok(())
}

/// As shells do: a signal is 128 and its number; what is not the task's own end is 125.
fn conclude(status: &SandboxStatus) -> ExitCode {
    let stages = &status.stages;
    tracing::info!(
        image_ms = stages.image_ms,
        datasets_ms = stages.datasets_ms,
        prepare_ms = stages.prepare_ms,
        start_ms = stages.start_ms,
        run_ms = stages.run_ms,
        cpu_us = status.usage.cpu_us,
        memory_peak_bytes = status.usage.memory_peak_bytes,
        "the sandbox ended"
    );
    if let Some(reason) = &status.reason {
        eprintln!("lathe-agent: {}{reason}", if status.lost { "lost: " } else { "" });
    }
    let code = match status.exit {
        Some(TaskExit::Code(code)) => u8::try_from(code & 0xff).unwrap_or(1),
        Some(TaskExit::Signal(signal)) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(255),
        Some(TaskExit::OutOfMemory) => 137,
        None => 125,
    };
    ExitCode::from(code)
}
