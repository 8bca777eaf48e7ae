//! A coordinator on loopback and agents that speak to it over real TLS.
//!
//! The agents run nothing: they say of their desired sandboxes what a test tells them to say. All
//! waiting is for a state, bounded far above what it takes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use lathe_api::MemorySize;
use lathe_api::artefact::{Digest, Image};
use lathe_api::client::{Client, ClientIdentity, ClientOptions};
use lathe_api::gpu::Gpu;
use lathe_api::job::{IsolationClass, Job, JobSpec, TaskExit, TaskState};
use lathe_api::node::{Cpus, Inventory, JoinRequest, LogLine, LogStream, NodeReport, SandboxStatus};
use lathe_api::sandbox::{Desired, DesiredUpdate, NodeDesired, SandboxSpec};
use lathe_api::service::{BackendLoad, NodeService, ServiceLoad};
use lathe_api::token::{TokenKind, TokenRequest};
use lathe_coordinator::coordinator::{Coordinator, Options};
use lathe_coordinator::init::{InitOptions, Initialized, init};
use lathe_coordinator::provider::registry::Programs;
use lathe_coordinator::server;
use rcgen::{CertificateParams, KeyPair};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Long enough for any step on a busy machine; only a broken test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Cluster {
    _dir: tempfile::TempDir,
    pub data_dir: PathBuf,
    pub made: Initialized,
    pub address: String,
    pub node_expiry: Duration,
    providers: Programs,
    running: Option<(Arc<Coordinator>, JoinHandle<()>)>,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_with_expiry(Duration::from_secs(3600)).await
    }

    pub async fn start_with_expiry(node_expiry: Duration) -> Self {
        Self::start_with(node_expiry, Programs::new()).await
    }

    pub async fn start_with(node_expiry: Duration, providers: Programs) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data_dir = dir.path().join("data");
        let made = init(&InitOptions {
            data_dir: data_dir.clone(),
            addresses: vec!["127.0.0.1:7700".to_owned()],
            cidr: "10.42.0.0/16".parse().expect("a CIDR"),
            token_expires_seconds: 3600,
        })
        .await
        .expect("a new cluster");
        let mut cluster =
            Self { _dir: dir, data_dir, made, address: String::new(), node_expiry, providers, running: None };
        cluster.run("127.0.0.1:0").await;
        cluster
    }

    async fn run(&mut self, listen: &str) {
        let options = Options {
            data_dir: self.data_dir.clone(),
            node_expiry: self.node_expiry,
            log_limit_bytes: 1 << 20,
            blob_limit_bytes: 1 << 20,
            providers: self.providers.clone(),
        };
        // The store is released when the last connection of a stopped coordinator is gone.
        let coordinator =
            eventually("the store opens", || async { Coordinator::open(options.clone()).await.ok() }).await;
        let listener = TcpListener::bind(listen).await.expect("a free port");
        self.address = listener.local_addr().expect("bound").to_string();
        let coordinator = Arc::new(coordinator);
        let served = Arc::clone(&coordinator);
        let task = tokio::spawn(async move { server::serve(served, listener).await.expect("served") });
        self.running = Some((coordinator, task));
    }

    pub async fn stop(&mut self) {
        let (coordinator, task) = self.running.take().expect("running");
        coordinator.shutdown.cancel();
        task.await.expect("no panic");
    }

    pub async fn restart(&mut self) {
        self.stop().await;
        self.restart_stopped().await;
    }

    pub async fn restart_stopped(&mut self) {
        let address = self.address.clone();
        self.run(&address).await;
    }

    /// The coordinator itself, for what no caller can do.
    pub fn coordinator(&self) -> &Coordinator {
        &self.running.as_ref().expect("running").0
    }

    pub fn ca(&self) -> String {
        std::fs::read_to_string(&self.made.ca).expect("the CA")
    }

    pub fn client(&self, token: Option<String>, identity: Option<ClientIdentity>) -> Client {
        let options = ClientOptions { address: self.address.clone(), ca_pem: self.ca(), identity, token };
        Client::new(&options).expect("a client")
    }

    pub fn admin(&self) -> Client {
        self.client(Some(std::fs::read_to_string(&self.made.admin_token).expect("a token")), None)
    }

    pub async fn user(&self, tenant: &str) -> Client {
        let request =
            TokenRequest { kind: TokenKind::User, tenant: tenant.to_owned(), expires_seconds: 3600 };
        let created = self.admin().create_token(&request).await.expect("a token");
        self.client(Some(created.token), None)
    }

    pub fn join_token(&self) -> String {
        std::fs::read_to_string(&self.made.join_token).expect("a token")
    }

    pub async fn join(&self, name: &str) -> ClientIdentity {
        let (key, request) = join_request(&self.join_token(), name);
        let answer = self.client(None, None).join(&request).await.expect("joined");
        ClientIdentity { certificate_pem: answer.certificate_pem, key_pem: key }
    }

    /// A node with an agent that runs until it is dropped.
    pub async fn node(&self, name: &str, cpus: u32) -> FakeAgent {
        let identity = self.join(name).await;
        FakeAgent::start(self.client(None, Some(identity)), name, cpus)
    }

    /// An image with real blobs, and its name.
    pub async fn image(&self) -> Image {
        add_image(&self.admin(), "test").await
    }

    pub async fn job(&self, id: &str) -> Job {
        self.admin().job(id).await.expect("the job")
    }

    /// The job once `accept` says so.
    pub async fn job_when(&self, id: &str, accept: impl Fn(&Job) -> bool) -> Job {
        let admin = self.admin();
        eventually(id, || async { admin.job(id).await.ok().filter(|job| accept(job)) }).await
    }
}

pub fn join_request(token: &str, name: &str) -> (String, JoinRequest) {
    let key = KeyPair::generate().expect("a key");
    let csr = CertificateParams::default().serialize_request(&key).expect("a request").pem().expect("PEM");
    (key.serialize_pem(), JoinRequest { token: token.to_owned(), name: name.to_owned(), csr_pem: csr })
}

pub async fn add_image(client: &Client, name: &str) -> Image {
    let (config, layer) = (b"{}".to_vec(), b"layer".to_vec());
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{}"}},"layers":[{{"digest":"{}"}}]}}"#,
        Digest::of(&config),
        Digest::of(&layer)
    );
    let digest = Digest::of(manifest.as_bytes());
    for blob in [config, layer, manifest.into_bytes()] {
        client.put_small_blob(&Digest::of(&blob), blob.into()).await.expect("stored");
    }
    let image = Image { name: name.to_owned(), digest, size_bytes: 5 };
    client.add_image(&image).await.expect("added")
}

pub fn spec(tasks: u32) -> JobSpec {
    let text = r#"{"name": "fit", "class": "microvm", "image": "test", "resources": {"memory": "64 MiB"}}"#;
    JobSpec { tasks, ..serde_json::from_str(text).expect("a job") }
}

/// So much in flight at a service, spread over the replicas that take something; all of it waits if none
/// does.
pub fn in_flight(service: &NodeService, count: u32) -> ServiceLoad {
    let accepting = service.replicas.iter().filter(|replica| replica.accepts).count() as u32;
    let mut left = count;
    let replicas = service.replicas.iter().map(|replica| {
        let own = if replica.accepts { left.min(count.div_ceil(accepting)) } else { 0 };
        left -= own;
        BackendLoad { sandbox: replica.sandbox.clone(), in_flight: own, accepts: replica.accepts }
    });
    let replicas = replicas.collect();
    ServiceLoad {
        service: service.id.clone(),
        mean_in_flight_milli: u64::from(count) * 1000,
        in_flight: count,
        waiting: if accepting == 0 { count } else { 0 },
        replicas,
        ..ServiceLoad::default()
    }
}

pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let search = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Reports what it is told to, of what it is desired to run.
pub struct FakeAgent {
    pub client: Client,
    state: Arc<Mutex<AgentState>>,
    alive: CancellationToken,
}

struct AgentState {
    report: NodeReport,
    desired: Option<NodeDesired>,
    sandboxes: BTreeMap<String, SandboxStatus>,
    /// Every sandbox that was ever to run here.
    seen: Vec<SandboxSpec>,
    /// Why nothing starts.
    refusal: Option<String>,
    /// What is in flight at a service.
    loads: Box<dyn Fn(&NodeService) -> ServiceLoad + Send>,
}

impl FakeAgent {
    pub fn start(client: Client, name: &str, cpus: u32) -> Self {
        let inventory = Inventory {
            hostname: name.to_owned(),
            boot_id: "boot-1".to_owned(),
            cpus: Cpus { online: cpus, ..Default::default() },
            memory: Some(MemorySize::from_mib(2048)),
            classes: vec![IsolationClass::Microvm, IsolationClass::Container],
            ..Default::default()
        };
        let report =
            NodeReport { address: "127.0.0.1".to_owned(), inventory, sandboxes: vec![], services: vec![] };
        let state = AgentState {
            report,
            desired: None,
            sandboxes: BTreeMap::new(),
            seen: vec![],
            refusal: None,
            loads: Box::new(|service| in_flight(service, 0)),
        };
        let agent = Self { client, state: Arc::new(Mutex::new(state)), alive: CancellationToken::new() };
        tokio::spawn(watch(agent.client.clone(), Arc::clone(&agent.state), agent.alive.clone()));
        tokio::spawn(report_always(agent.client.clone(), Arc::clone(&agent.state), agent.alive.clone()));
        agent
    }

    /// As if the host had lost its power.
    pub fn kill(&self) {
        self.alive.cancel();
    }

    pub fn desired(&self) -> Option<NodeDesired> {
        self.state.lock().expect("no panic").desired.clone()
    }

    pub fn seen(&self) -> Vec<SandboxSpec> {
        self.state.lock().expect("no panic").seen.clone()
    }

    pub fn running(&self) -> Vec<String> {
        let state = self.state.lock().expect("no panic");
        let running = state.sandboxes.values().filter(|status| status.state == TaskState::Running);
        running.map(|status| status.id.clone()).collect()
    }

    /// Once so many sandboxes run here: their names.
    pub async fn running_when(&self, count: usize) -> Vec<String> {
        eventually("sandboxes to run", || async { Some(self.running()).filter(|r| r.len() == count) }).await
    }

    /// The sandbox's process ends.
    pub fn exit(&self, sandbox: &str, exit: TaskExit) {
        self.set(sandbox, |status| {
            status.state = TaskState::Exited;
            status.exit = Some(exit);
        });
    }

    pub fn set(&self, sandbox: &str, change: impl FnOnce(&mut SandboxStatus)) {
        let mut state = self.state.lock().expect("no panic");
        change(state.sandboxes.get_mut(sandbox).expect("a known sandbox"));
    }

    /// What the host has is something else.
    pub fn set_inventory(&self, change: impl FnOnce(&mut Inventory)) {
        change(&mut self.state.lock().expect("no panic").report.inventory);
    }

    /// Whatever is to be started here is not, for this reason.
    pub fn refuse_with(&self, reason: Option<&str>) {
        self.state.lock().expect("no panic").refusal = reason.map(str::to_owned);
    }

    /// What is in flight at a service from here, from now on.
    pub fn load_with(&self, loads: impl Fn(&NodeService) -> ServiceLoad + Send + 'static) {
        self.state.lock().expect("no panic").loads = Box::new(loads);
    }

    /// The services that it takes requests for.
    pub fn services(&self) -> Vec<NodeService> {
        self.desired().and_then(|desired| desired.services).unwrap_or_default()
    }

    /// The node has other GPUs, or the same in other states.
    pub fn set_gpus(&self, gpus: Vec<Gpu>) {
        self.state.lock().expect("no panic").report.inventory.gpus = gpus;
    }

    /// The host starts again and has forgotten everything.
    pub fn reboot(&self) {
        let mut state = self.state.lock().expect("no panic");
        state.report.inventory.boot_id = "boot-2".to_owned();
        state.sandboxes.clear();
        state.desired = None;
    }

    pub async fn log(&self, sandbox: &str, from: u64, texts: &[&str]) {
        let line = |(index, text): (usize, &&str)| LogLine {
            sandbox: sandbox.to_owned(),
            seq: from + index as u64,
            time_ms: 1000 + from + index as u64,
            stream: LogStream::Stdout,
            text: (*text).to_owned(),
        };
        let lines = texts.iter().enumerate().map(line).collect();
        self.client.send_logs(&lathe_api::node::LogBatch { lines }).await.expect("stored");
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.alive.cancel();
    }
}

async fn watch(client: Client, state: Arc<Mutex<AgentState>>, alive: CancellationToken) {
    let follow = async {
        loop {
            if let Ok(mut stream) = client.watch_desired().await {
                while let Some(Ok(update)) = stream.next().await {
                    state.lock().expect("no panic").take(update);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = follow => {}
        () = alive.cancelled() => {}
    }
}

impl AgentState {
    /// What an agent does: start what should run and is not known, stop what should stop, forget
    /// what is not desired.
    fn take(&mut self, update: DesiredUpdate) {
        let desired = NodeDesired::follow(self.desired.take(), update).expect("built on what was told");
        self.sandboxes.retain(|id, _| desired.sandboxes.iter().any(|spec| spec.id == *id));
        for spec in &desired.sandboxes {
            match (self.sandboxes.get_mut(&spec.id), spec.desired) {
                (None, Desired::Running) => {
                    self.seen.push(spec.clone());
                    let status = SandboxStatus {
                        id: spec.id.clone(),
                        state: if self.refusal.is_some() { TaskState::Failed } else { TaskState::Running },
                        ready: spec.port.is_some() && self.refusal.is_none(),
                        reason: self.refusal.clone(),
                        lost: self.refusal.is_some(),
                        exit: None,
                        usage: Default::default(),
                        stages: Default::default(),
                    };
                    self.sandboxes.insert(spec.id.clone(), status);
                }
                (Some(status), Desired::Stopped) if !status.state.is_terminal() => {
                    status.state = TaskState::Exited;
                    status.exit = Some(TaskExit::Signal(15));
                }
                _ => {}
            }
        }
        self.desired = Some(desired);
    }
}

async fn report_always(client: Client, state: Arc<Mutex<AgentState>>, alive: CancellationToken) {
    while !alive.is_cancelled() {
        let report = {
            let state = state.lock().expect("no panic");
            let services = state.desired.iter().flat_map(|desired| &desired.services).flatten();
            let services = services.map(|service| (state.loads)(service)).collect();
            let sandboxes = state.sandboxes.values().cloned().collect();
            NodeReport { sandboxes, services, ..state.report.clone() }
        };
        // The coordinator may be away: the next report says it all again.
        let _ = client.report(&report).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
