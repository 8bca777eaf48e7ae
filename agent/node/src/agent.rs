//! `lathe-agent run`: the tasks of a running agent, and what passes between them.
//!
//! | task | takes | gives |
//! | --- | --- | --- |
//! | [`watch_desired`] | the coordinator's stream | the latest [`NodeDesired`] |
//! | [`reconcile`] | that, and what is on the host | sandboxes as observed |
//! | [`read_inventories`] | the host's files and drivers | the inventory |
//! | [`report`] | sandboxes as observed, the inventory | reports, which are the heartbeat too |
//! | [`ship`] | spools | output |
//! | [`balancer::run`] | services that are desired | requests in flight, for the reports |
//! | [`readiness::run`] | replicas that are desired and run | whether they are ready, for the reports |
//!
//! Each goes on by itself when the coordinator is away, and retries with a capped delay.
//! Sandboxes do not notice, nor do they when the agent ends.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use lathe_api::HostPciAddress;
use lathe_api::client::{Client, ClientOptions};
use lathe_api::gpu::{DeviceCheck, Gpu};
use lathe_api::node::{Inventory, NodeReport, REPORT_INTERVAL_MS, SandboxStatus};
use lathe_api::sandbox::NodeDesired;
use nix::fcntl::Flock;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::balancer::readiness::{self, Readiness};
use crate::balancer::{self, Balancers};
use crate::cgroup::CgroupTree;
use crate::files;
use crate::gpus::{Gpus, Policy};
use crate::identity;
use crate::images::ImageStore;
use crate::images::blobs::BlobSource;
use crate::inventory::{self, ClassInputs};
use crate::journal::Step;
use crate::metrics::{self, Snapshot};
use crate::network::Network;
use crate::paths::{Paths, SandboxKey};
use crate::reconcile::{Pass, Reconciler};
use crate::sandbox::observe::{Observed, observe};
use crate::sandbox::prepare::Host;
use crate::shipping::{Shipped, Shipper};

/// How often the host is looked at when nothing rings.
const PASS_INTERVAL: Duration = Duration::from_millis(200);

/// How often bridge, routes and filter are made anew whatever is believed of them.
const NETWORK_INTERVAL: Duration = Duration::from_secs(60);

/// How often the inventory is read again.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(60);

/// How often spools are looked at when nothing rings.
const SHIP_INTERVAL: Duration = Duration::from_millis(250);

/// The longest pause between attempts to reach the coordinator: short enough that a node is back
/// within its expiry when the coordinator is.
const MAX_BACKOFF: Duration = Duration::from_secs(4);

/// What `run` was told.
#[derive(Debug)]
pub struct Settings {
    /// The coordinator's address.
    pub coordinator: String,
    /// The cluster's CA, PEM.
    pub ca_pem: String,
    /// A join token, needed only before the first join.
    pub token: Option<String>,
    /// The node's name.
    pub name: String,
    /// Where other nodes reach this one.
    pub address: String,
    /// Directories.
    pub paths: Paths,
    /// Where to serve metrics, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Which devices may be lent.
    pub gpus: Policy,
    /// What to say of the host.
    pub labels: BTreeMap<String, String>,
}

/// Runs the agent until SIGTERM or SIGINT; sandboxes go on.
///
/// # Errors
/// When it cannot begin.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let paths = settings.paths.clone();
    for dir in [&paths.state, &paths.run] {
        files::make_private_dir(dir)?;
    }
    let _lock = lock_host()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let client = tokio::select! {
        client = connect(&settings) => client?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let host = Arc::new(open_host(paths, BlobSource::Coordinator(client.clone()), settings.gpus.clone())?);
    adopt(&host).await?;

    let changed = Arc::new(Notify::new());
    let (desired_sender, desired) = watch::channel(None);
    let (snapshot_sender, snapshot) = watch::channel(Snapshot::default());
    let shipped = watch::channel(Shipped::default());
    let ended = Arc::new(Notify::new());
    let (connected_sender, connected) = watch::channel(false);
    if let Some(address) = settings.metrics {
        let (snapshot, gpus) = (snapshot.clone(), host.gpus.clone());
        tokio::spawn(async move {
            if let Err(error) = metrics::serve(address, snapshot, gpus).await {
                tracing::error!(%address, %error, "cannot serve metrics");
            }
        });
    }
    let balancers = Arc::new(Balancers::new(settings.address.parse().unwrap_or(Ipv4Addr::UNSPECIFIED)));
    let ready = Arc::new(Readiness::default());
    tokio::spawn(balancer::run(balancers.clone(), desired.clone()));
    tokio::spawn(readiness::run(ready.clone(), desired.clone(), snapshot.clone()));
    tokio::spawn(watch_desired(client.clone(), host.clone(), desired_sender, changed.clone()));
    tokio::spawn(ship(client.clone(), host.clone(), shipped.0, ended.clone(), changed.clone()));
    let inventory = watch::channel(first_inventory(&host.paths, &host.gpus));
    tokio::spawn(read_inventories(host.paths.clone(), host.gpus.clone(), inventory.0));
    let reporter = Reporter {
        client,
        address: settings.address.clone(),
        labels: settings.labels.clone(),
        host: host.clone(),
        balancers,
        ready,
    };
    tokio::spawn(report(reporter, inventory.1, snapshot, connected_sender));
    let reconciler = Reconciler::new(host.clone(), changed.clone());
    let stop = Arc::new(Notify::new());
    let state = ReconcileState { desired, shipped: shipped.1, ended, connected, snapshot: snapshot_sender };
    let reconciling = tokio::spawn(reconcile(host, reconciler, state, changed, stop.clone()));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the agent ends; sandboxes go on");
    stop.notify_one();
    reconciling.await?;
    Ok(())
}

/// The client with the node's identity; joins first if the node never has.
async fn connect(settings: &Settings) -> anyhow::Result<Client> {
    let dir = settings.paths.identity();
    let mut backoff = Backoff::default();
    let identity = loop {
        if let Some(identity) = identity::stored(&dir)? {
            break identity;
        }
        let token = settings.token.as_deref().ok_or(identity::IdentityError::NoToken)?;
        let joined =
            identity::join(&dir, &settings.coordinator, &settings.ca_pem, token, &settings.name).await;
        match joined {
            Ok(identity) => {
                tracing::info!(node = settings.name, "joined the cluster");
                break identity;
            }
            Err(
                error @ identity::IdentityError::Join(lathe_api::client::ClientError::Unreachable { .. }),
            ) => {
                tracing::warn!(%error, "trying again");
                backoff.pause().await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    Ok(Client::new(&ClientOptions {
        address: settings.coordinator.clone(),
        ca_pem: settings.ca_pem.clone(),
        identity: Some(identity),
        token: None,
    })?)
}

/// Makes this process the host's only agent, whatever directories it uses: bridge, filter and
/// cgroups have one name a host.
///
/// # Errors
/// When another agent runs.
pub fn lock_host() -> anyhow::Result<Flock<File>> {
    let path = Path::new("/run/lathe-agent.lock");
    files::try_lock(path)?
        .with_context(|| format!("another lathe-agent runs on this host (it holds {})", path.display()))
}

/// Loads the kernel modules that sandboxes need, where they are modules: what is asked for in
/// `/proc/filesystems` and `/dev` shows only what is loaded. Without modprobe nothing is lost but that.
pub fn load_modules() {
    let modules = [
        "tun",
        "bridge",
        "veth",
        "loop",
        "overlay",
        "erofs",
        "nf_tables",
        "kvm_intel",
        "kvm_amd",
        "vfio-pci",
        "vfio_iommu_type1",
        "iommufd",
    ];
    for module in modules {
        let command = std::process::Command::new("modprobe")
            .args(["-q", module])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        if command.is_err() {
            break;
        }
    }
}

/// Opens what all sandboxes share on this host.
///
/// # Errors
/// When there is no cgroup v2 tree, or directories cannot be made.
pub fn open_host(paths: Paths, source: BlobSource, gpus: Policy) -> anyhow::Result<Host> {
    load_modules();
    for dir in [&paths.state, &paths.run, &paths.sandboxes(), &paths.runs()] {
        files::make_private_dir(dir)?;
    }
    let (tree, problem) = CgroupTree::find(Path::new("/"));
    let cgroups = match (tree, problem) {
        (Some(tree), problem) => {
            if let Some(problem) = problem {
                tracing::warn!(%problem, "containers cannot run here");
            }
            tree
        }
        (None, Some(problem)) => return Err(problem.into()),
        (None, None) => anyhow::bail!("no cgroup filesystem was found"),
    };
    // Made now, so that it is there before and after every sandbox alike.
    let base = cgroups.sandboxes();
    std::fs::create_dir_all(&base).with_context(|| format!("cannot make the cgroup {}", base.display()))?;
    let images = ImageStore::open(paths.images(), paths.datasets(), paths.staging(), source)?;
    let boot_id = inventory::boot_id(Path::new("/"));
    let gpus = Arc::new(gpus_of(&paths, gpus));
    Ok(Host { images, network: Network::new()?, cgroups, gpus, boot_id, paths })
}

/// Takes up what an earlier agent left: the network as it was, ports of sandboxes that run, and
/// away with interfaces and runtime directories that no journal knows.
async fn adopt(host: &Host) -> anyhow::Result<()> {
    let (found, _) = observe(&host.paths)?;
    let mut known = Vec::new();
    for observed in &found {
        let key = SandboxKey::of(observed.id());
        if observed.record.boot_id == host.boot_id && !observed.record.cleaned {
            known.push(key.interface());
            if let Ok(address) = observed.record.spec.address.parse() {
                host.network.admit(&key, address).await?;
            }
        }
        tracing::info!(id = observed.id(), running = observed.supervised, "found a sandbox");
    }
    host.network.sweep(&known).await?;
    recover_gpus(host, &found)?;
    if let Ok(desired) = files::read_json::<NodeDesired>(&last_desired(&host.paths))
        && let Err(error) = host.network.configure(&desired.network_with_gangs()).await
    {
        tracing::warn!(%error, "the network as it was last");
    }
    Ok(())
}

/// Takes back devices that no sandbox has. Which those are is seen now, before any is started; the work is
/// done beside everything else, because proving a large memory clean takes minutes. Until then they are
/// not free.
fn recover_gpus(host: &Host, found: &[Observed]) -> Result<(), files::FileError> {
    let has = |o: &Observed| o.record.steps.iter().any(|step| matches!(step, Step::Gpus { .. }));
    let owners: HashSet<&str> = found.iter().filter(|o| has(o)).map(Observed::id).collect();
    let stale = host.gpus.stale(|id| owners.contains(id))?;
    let gpus = host.gpus.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = gpus.take_back_stale(stale) {
            tracing::error!(%error, "devices that an earlier agent had are not all back");
        }
    });
    Ok(())
}

fn last_desired(paths: &Paths) -> PathBuf {
    paths.state.join("desired.json")
}

/// Follows the coordinator's wishes, for ever.
async fn watch_desired(
    client: Client,
    host: Arc<Host>,
    sender: watch::Sender<Option<NodeDesired>>,
    changed: Arc<Notify>,
) {
    let mut backoff = Backoff::default();
    loop {
        match client.watch_desired().await {
            Ok(mut stream) => {
                while let Some(next) = stream.next().await {
                    match next {
                        Ok(update) => {
                            let before = sender.borrow().clone();
                            let Some(desired) = NodeDesired::follow(before, update) else {
                                tracing::warn!("the coordinator builds on what it never told");
                                break;
                            };
                            backoff = Backoff::default();
                            if let Err(error) = files::write_json(&last_desired(&host.paths), &desired) {
                                tracing::warn!(%error, "the network will not be known after a restart");
                            }
                            sender.send_replace(Some(desired));
                            changed.notify_one();
                        }
                        Err(error) => {
                            tracing::warn!(%error, "the stream of wishes broke");
                            break;
                        }
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "cannot hear the coordinator; sandboxes go on"),
        }
        backoff.pause().await;
    }
}

struct ReconcileState {
    desired: watch::Receiver<Option<NodeDesired>>,
    shipped: watch::Receiver<Shipped>,
    /// Rung while the end of a sandbox waits for its output.
    ended: Arc<Notify>,
    connected: watch::Receiver<bool>,
    snapshot: watch::Sender<Snapshot>,
}

/// The reconciler's timer and bell.
async fn reconcile(
    host: Arc<Host>,
    mut reconciler: Reconciler,
    state: ReconcileState,
    changed: Arc<Notify>,
    stop: Arc<Notify>,
) {
    let mut configured: Option<(lathe_api::sandbox::NodeNetwork, Instant)> = None;
    let mut passes = 0;
    loop {
        let desired = state.desired.borrow().clone();
        let network = desired.as_ref().filter(|desired| desired.network.is_some());
        if let Some(wanted) = network.map(NodeDesired::network_with_gangs) {
            let fresh = configured
                .as_ref()
                .is_some_and(|(known, when)| *known == wanted && when.elapsed() < NETWORK_INTERVAL);
            if !fresh {
                host.network.doubt().await;
                match host.network.configure(&wanted).await {
                    Ok(()) => configured = Some((wanted, Instant::now())),
                    Err(error) => {
                        tracing::error!(%error, "the network is not as it should be");
                        // Once a second is enough for an error that stays.
                        configured =
                            Some((wanted, Instant::now() - NETWORK_INTERVAL + Duration::from_secs(1)));
                    }
                }
            }
        }
        let shipped = state.shipped.borrow().clone();
        match reconciler.pass(desired.as_ref(), |id| shipped.waits(&host.paths, id)).await {
            Ok(Pass { sandboxes, ends_wait }) => {
                passes += 1;
                if ends_wait {
                    state.ended.notify_one();
                }
                let connected = *state.connected.borrow();
                state.snapshot.send_replace(Snapshot { sandboxes, connected, passes });
            }
            Err(error) => tracing::error!(%error, "a pass failed"),
        }
        tokio::select! {
            () = stop.notified() => break,
            _ = timeout(PASS_INTERVAL, changed.notified()) => {}
        }
    }
    reconciler.finish().await;
}

/// Who reports, and where.
struct Reporter {
    client: Client,
    address: String,
    labels: BTreeMap<String, String>,
    host: Arc<Host>,
    balancers: Arc<Balancers>,
    ready: Arc<Readiness>,
}

/// Reports on every change, and often enough to count as alive.
async fn report(
    reporter: Reporter,
    inventory: watch::Receiver<Inventory>,
    mut snapshot: watch::Receiver<Snapshot>,
    connected: watch::Sender<bool>,
) {
    let Reporter { client, address, labels, host, balancers, ready } = reporter;
    let mut waited = false;
    let mut last: Option<(Vec<SandboxStatus>, Instant)> = None;
    let interval = Duration::from_millis(REPORT_INTERVAL_MS);
    loop {
        let Snapshot { mut sandboxes, passes, .. } = snapshot.borrow_and_update().clone();
        ready.tell(&mut sandboxes);
        // Whoever is the first to wait for a replica does not wait for the next report too.
        let waits = balancers.waiting() > 0;
        let first = waits && !waited;
        // Before the first pass nothing was observed: an empty report would be a lie.
        let due = passes > 0
            && last.as_ref().is_none_or(|(sent, when)| {
                first || when.elapsed() >= interval || !same_states(sent, &sandboxes)
            });
        if due {
            let mut inventory = inventory.borrow().clone();
            // Who has a device changes more often than the device.
            host.gpus.describe(&mut inventory.gpus);
            inventory.labels.clone_from(&labels);
            inventory.artefacts = host.images.list();
            waited = waits;
            let services = balancers.loads();
            let sent = sandboxes.clone();
            let report = NodeReport { address: address.clone(), inventory, sandboxes: sent, services };
            let sent = client.report(&report).await;
            let was_connected = connected.send_replace(sent.is_ok());
            match sent {
                Ok(()) => last = Some((sandboxes, Instant::now())),
                Err(error) => {
                    // Once an outage: the next two hundred attempts say the same.
                    if was_connected {
                        tracing::warn!(%error, "not reported; sandboxes go on");
                    }
                    last = None;
                    sleep(Duration::from_millis(500)).await;
                }
            }
        }
        let _ = timeout(Duration::from_millis(250), snapshot.changed()).await;
    }
}

/// What deserves a report at once; figures that grow all the time wait for the next.
fn same_states(a: &[SandboxStatus], b: &[SandboxStatus]) -> bool {
    let key = |s: &SandboxStatus| (s.id.clone(), s.state, s.ready, s.exit, s.lost, s.reason.clone());
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| key(a) == key(b))
}

/// The inventory with what can run here, and what drivers say of their GPUs: may take a minute.
pub fn read_inventory(paths: &Paths, gpus: &Gpus) -> Inventory {
    let mut inventory = read_files(paths, gpus);
    let known = paths.state.join("known-gpus.json");
    inventory::ask_nvml(Path::new("/"), &mut inventory.gpus, &nvml_program(), &known);
    inventory
}

/// The GPUs of the inventory, with who has them.
pub fn read_gpus(paths: &Paths, policy: Policy) -> Vec<Gpu> {
    let gpus = gpus_of(paths, policy);
    let mut all = read_inventory(paths, &gpus).gpus;
    gpus.describe(&mut all);
    all
}

/// The devices that this host lends.
pub fn gpus_of(paths: &Paths, policy: Policy) -> Gpus {
    Gpus::new(paths.gpus(), inventory::boot_id(Path::new("/")), policy)
}

/// What files tell of it.
fn read_files(paths: &Paths, gpus: &Gpus) -> Inventory {
    let root = Path::new("/");
    let search = std::env::var("PATH").unwrap_or_default();
    let (classes, class_problems) = inventory::classes(ClassInputs { root, paths, search: &search });
    Inventory { classes, class_problems, ..inventory::read(root, &gpus.devices()) }
}

/// What can be reported at once: GPUs whose driver was not asked yet are not offered.
fn first_inventory(paths: &Paths, gpus: &Gpus) -> Inventory {
    let mut inventory = read_files(paths, gpus);
    inventory::hold_back_unasked(&mut inventory.gpus);
    inventory.gpus.iter_mut().for_each(Gpu::clear_readings);
    inventory
}

/// Reads the inventory again and again, away from the reports: a driver with a sick GPU must not make
/// the node look dead.
async fn read_inventories(paths: Paths, gpus: Arc<Gpus>, inventory: watch::Sender<Inventory>) {
    loop {
        let (paths, devices) = (paths.clone(), gpus.clone());
        match tokio::task::spawn_blocking(move || read_inventory(&paths, &devices)).await {
            Ok(mut read) => {
                gpus.learn(&read.gpus);
                read.gpus.iter_mut().for_each(Gpu::clear_readings);
                inventory.send_replace(read);
            }
            Err(error) => tracing::error!(%error, "the inventory was not read"),
        }
        sleep(INVENTORY_INTERVAL).await;
    }
}

/// `lathe-nvml` beside this program, unless `LATHE_NVML` says otherwise.
fn nvml_program() -> PathBuf {
    let beside = || std::env::current_exe().unwrap_or_default().with_file_name("lathe-nvml");
    std::env::var_os("LATHE_NVML").map_or_else(beside, PathBuf::from)
}

/// Whether functions can be given to sandboxes; all GPUs of this host where none is named.
pub fn check_devices(addresses: &[HostPciAddress]) -> Vec<DeviceCheck> {
    inventory::check(Path::new("/"), addresses)
}

/// Ships output, for ever; at once when the end of a sandbox waits for it.
async fn ship(
    client: Client,
    host: Arc<Host>,
    shipped: watch::Sender<Shipped>,
    ended: Arc<Notify>,
    changed: Arc<Notify>,
) {
    let mut shipper = Shipper::default();
    let mut rung = false;
    let mut backoff = Backoff::default();
    loop {
        let more = shipper.pass(&host.paths, &client).await;
        shipped.send_replace(shipper.shipped().clone());
        match more {
            Ok(true) => backoff = Backoff::default(),
            Ok(false) => {
                // All is shipped: the end that waited for it can be reported.
                if rung {
                    changed.notify_one();
                }
                rung = timeout(SHIP_INTERVAL, ended.notified()).await.is_ok();
            }
            Err(error) => {
                tracing::warn!(%error, "output waits");
                backoff.pause().await;
            }
        }
    }
}

/// Pauses that double up to [`MAX_BACKOFF`].
#[derive(Debug)]
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(250))
    }
}

impl Backoff {
    async fn pause(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}
