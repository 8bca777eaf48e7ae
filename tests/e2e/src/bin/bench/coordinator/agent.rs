//! An agent that runs nothing: over the real API, with a certificate of its own, it says of what it is
//! told to run that it runs, and after a while that it ended. It watches that it is never given more than
//! it has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::StreamExt;
use lathe_api::MemorySize;
use lathe_api::client::{Client, ClientIdentity, ClientOptions};
use lathe_api::job::{IsolationClass, TaskExit, TaskState};
use lathe_api::node::{Cpus, Inventory, JoinRequest, NodeReport, REPORT_INTERVAL_MS, SandboxStatus};
use lathe_api::sandbox::{Desired, SandboxSpec};
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::Notify;

/// CPUs of each node.
pub const CPUS: u32 = 16;
const MEMORY_MIB: u64 = 64 << 10;
/// Changes that come within this time are reported together, as the agent's passes do.
const GATHER: Duration = Duration::from_millis(100);

/// What all agents saw together.
#[derive(Debug, Default)]
pub struct Seen {
    /// When the first task of each job was to run, by job.
    pub started: Mutex<BTreeMap<String, Instant>>,
    /// Tasks that ended.
    pub ended: AtomicU64,
    /// Reports that failed.
    pub failed_reports: AtomicU64,
    /// Nodes that were given more than they have, or something twice.
    pub overcommitted: AtomicU64,
}

/// Joins: the node's own client.
pub async fn join(address: &str, ca: &str, token: &str, name: &str) -> anyhow::Result<Client> {
    let key = KeyPair::generate()?;
    let csr = CertificateParams::default().serialize_request(&key)?.pem()?;
    let options = |identity| ClientOptions {
        address: address.to_owned(),
        ca_pem: ca.to_owned(),
        identity,
        token: None,
    };
    let request = JoinRequest { token: token.to_owned(), name: name.to_owned(), csr_pem: csr };
    let answer =
        Client::new(&options(None))?.join(&request).await.with_context(|| format!("{name} joins"))?;
    let identity = ClientIdentity { certificate_pem: answer.certificate_pem, key_pem: key.serialize_pem() };
    Ok(Client::new(&options(Some(identity)))?)
}

/// The node's report when nothing runs.
pub fn report(name: &str) -> NodeReport {
    let inventory = Inventory {
        hostname: name.to_owned(),
        boot_id: "boot".to_owned(),
        cpus: Cpus { online: CPUS, ..Cpus::default() },
        memory: Some(MemorySize::from_mib(MEMORY_MIB)),
        classes: vec![IsolationClass::Microvm, IsolationClass::Container],
        ..Inventory::default()
    };
    NodeReport { address: "127.0.0.1".to_owned(), inventory, sandboxes: Vec::new(), services: Vec::new() }
}

/// Sandboxes of one agent, with the time at which each that runs ends.
#[derive(Default)]
struct Sandboxes {
    known: BTreeMap<String, (SandboxStatus, Instant)>,
}

/// Lives until it is dropped. Each task runs for `run`.
pub async fn live(client: Client, mut report: NodeReport, run: Duration, seen: &Seen) {
    let sandboxes = Mutex::new(Sandboxes::default());
    let changed = Notify::new();
    let watching = async {
        loop {
            if let Ok(mut stream) = client.watch_desired().await {
                while let Some(Ok(update)) = stream.next().await {
                    // It has no network to set up.
                    let Some(wanted) = update.sandboxes else { continue };
                    lock(&sandboxes).take(&wanted, run, seen);
                    changed.notify_one();
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let reporting = async {
        loop {
            let due = lock(&sandboxes).end_those_due(seen);
            report.sandboxes = lock(&sandboxes).known.values().map(|(status, _)| status.clone()).collect();
            if client.report(&report).await.is_err() {
                seen.failed_reports.fetch_add(1, Ordering::Relaxed);
            }
            tokio::time::sleep(GATHER).await;
            let heartbeat = Duration::from_millis(REPORT_INTERVAL_MS);
            let wait =
                due.map_or(heartbeat, |due| due.saturating_duration_since(Instant::now()).min(heartbeat));
            // Either is a reason to report.
            let _ = tokio::time::timeout(wait, changed.notified()).await;
        }
    };
    tokio::join!(watching, reporting);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Sandboxes {
    /// Starts what should run and is not known, stops what should stop, forgets what is not desired.
    fn take(&mut self, desired: &[SandboxSpec], run: Duration, seen: &Seen) {
        check(desired, seen);
        let wanted: BTreeSet<&str> = desired.iter().map(|spec| spec.id.as_str()).collect();
        self.known.retain(|id, _| wanted.contains(id.as_str()));
        let now = Instant::now();
        for spec in desired {
            match (self.known.get_mut(&spec.id), spec.desired) {
                (None, Desired::Running) => {
                    lock(&seen.started).entry(spec.job.clone()).or_insert(now);
                    let status = SandboxStatus {
                        id: spec.id.clone(),
                        state: TaskState::Running,
                        ready: false,
                        reason: None,
                        lost: false,
                        exit: None,
                        usage: Default::default(),
                        stages: Default::default(),
                    };
                    self.known.insert(spec.id.clone(), (status, now + run));
                }
                (Some((status, _)), Desired::Stopped) if !status.state.is_terminal() => {
                    (status.state, status.exit) = (TaskState::Exited, Some(TaskExit::Signal(15)));
                }
                _ => {}
            }
        }
    }

    /// When the next one ends.
    fn end_those_due(&mut self, seen: &Seen) -> Option<Instant> {
        let now = Instant::now();
        for (status, end) in self.known.values_mut() {
            if *end <= now && !status.state.is_terminal() {
                (status.state, status.exit) = (TaskState::Exited, Some(TaskExit::Code(0)));
                seen.ended.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.known.values().filter(|(status, _)| !status.state.is_terminal()).map(|(_, end)| *end).min()
    }
}

/// What is desired at one time must fit, and nothing may be given twice.
fn check(specs: &[SandboxSpec], seen: &Seen) {
    let cpus: u32 = specs.iter().map(|spec| spec.resources.cpus).sum();
    let addresses: BTreeSet<&str> = specs.iter().map(|spec| spec.address.as_str()).collect();
    let gpus: Vec<_> = specs.iter().flat_map(|spec| &spec.gpus).collect();
    let distinct: BTreeSet<_> = gpus.iter().collect();
    if cpus > CPUS || addresses.len() != specs.len() || distinct.len() != gpus.len() {
        seen.overcommitted.fetch_add(1, Ordering::Relaxed);
    }
}
