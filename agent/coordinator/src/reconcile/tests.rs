//! Races between a plan and its commit, on a real store.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use lathe_api::MemorySize;
use lathe_api::artefact::{Digest, Image};
use lathe_api::job::{IsolationClass, JobSpec, JobState};
use lathe_api::node::{Cpus, Inventory, NodeReport};
use lathe_api::scheduling::DecisionKind;

use super::planning::Planning;
use super::{jobs, nodes};
use crate::coordinator::{Coordinator, OpenError, Options};
use crate::init::{InitOptions, init};
use crate::provider::registry::Programs;
use crate::records::{ALIVE, IMAGES, JobRecord, Owned, put};
use crate::store::{
    Entry, LeaseId, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch, WatchError, Write,
};
use crate::{observe, submit};

/// A store in which a node's heartbeats end just before a commit: when it was prepared they had not.
struct LosesNode {
    store: Arc<dyn Store>,
    node: Mutex<Option<String>>,
}

impl Store for LosesNode {
    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        Box::pin(async move {
            let lost = self.node.lock().expect("no panic").take();
            if let Some(node) = lost {
                let writes = vec![Write::Delete { key: format!("{ALIVE}{node}") }];
                let _ = self.store.commit(Transaction { expect: vec![], writes }).await?;
            }
            self.store.commit(transaction).await
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        self.store.get(key)
    }

    fn list<'a>(&'a self, prefixes: &'a [&'a str]) -> BoxFuture<'a, Result<Listing, StoreError>> {
        self.store.list(prefixes)
    }

    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Listing, StoreError>> {
        self.store.page(prefix, after, limit)
    }

    fn watch(&self, from: Revision) -> Result<Watch, WatchError> {
        self.store.watch(from)
    }

    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        self.store.grant_lease(ttl)
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.keep_alive(lease)
    }

    fn revoke_lease(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.revoke_lease(lease)
    }
}

/// A coordinator whose rounds the test runs itself.
async fn coordinator(dir: &std::path::Path) -> (Coordinator, Arc<LosesNode>) {
    let data_dir = dir.join("data");
    init(&InitOptions {
        data_dir: data_dir.clone(),
        addresses: vec!["127.0.0.1:7700".to_owned()],
        cidr: "10.42.0.0/16".parse().expect("a CIDR"),
        token_expires_seconds: 3600,
    })
    .await
    .expect("a new cluster");
    let options = Options {
        data_dir,
        node_expiry: Duration::from_secs(3600),
        log_limit_bytes: 1 << 20,
        blob_limit_bytes: 1 << 20,
        providers: Programs::default(),
    };
    // The store is released a moment after the cluster was made.
    let mut tries = 0;
    let mut coordinator = loop {
        match Coordinator::open(options.clone()).await {
            Ok(coordinator) => break coordinator,
            Err(OpenError::Store(StoreError::InUse { .. })) if tries < 1000 => tries += 1,
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let store = Arc::new(LosesNode { store: Arc::clone(&coordinator.store), node: Mutex::default() });
    coordinator.store = Arc::clone(&store) as Arc<dyn Store>;
    let image = Image { name: "test".to_owned(), digest: Digest::of(b"image"), size_bytes: 5 };
    let image = put(format!("{IMAGES}test"), &Owned { tenant: "t".to_owned(), artefact: image });
    let writes = vec![image.expect("it encodes")];
    let _ = coordinator.store.commit(Transaction { expect: vec![], writes }).await.expect("works");
    (coordinator, store)
}

async fn node(coordinator: &Coordinator, name: &str, cpus: u32) {
    observe::join(coordinator, name, Digest::of(name.as_bytes())).await.expect("joined");
    let inventory = Inventory {
        hostname: name.to_owned(),
        boot_id: "boot".to_owned(),
        cpus: Cpus { online: cpus, ..Cpus::default() },
        memory: Some(MemorySize::from_mib(2048)),
        classes: vec![IsolationClass::Microvm],
        ..Inventory::default()
    };
    let report =
        NodeReport { address: "127.0.0.1".to_owned(), inventory, sandboxes: vec![], services: vec![] };
    observe::report(coordinator, name, &report).await.expect("reported");
}

async fn job(coordinator: &Coordinator, tasks: u32) -> String {
    let text = r#"{"name": "fit", "class": "microvm", "image": "test", "resources": {"memory": "64 MiB"}}"#;
    let spec = JobSpec { tasks, ..serde_json::from_str(text).expect("a job") };
    submit::submit(coordinator, "t", spec).await.expect("accepted").id
}

fn record(coordinator: &Coordinator, job: &str) -> JobRecord {
    coordinator.view.read(|contents| contents.jobs[job].value.clone())
}

/// Nodes with something of the job: assignments, or room that was promised.
fn nodes_with(coordinator: &Coordinator, job: &str) -> Vec<String> {
    let of_job = |sandbox: &String| sandbox.starts_with(job);
    coordinator.view.read(|contents| {
        let nodes = contents.nodes.keys().filter(|node| {
            let promised = contents.allocations.get(*node).map(|of| &of.value.sandboxes);
            contents.assigned(node).any(|(sandbox, _)| of_job(sandbox))
                || promised.is_some_and(|promised| promised.keys().any(of_job))
        });
        nodes.cloned().collect()
    })
}

async fn caught_up(coordinator: &Coordinator) {
    coordinator.view.catch_up(&*coordinator.store).await.expect("works");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_whose_node_is_lost_between_plan_and_commit_is_planned_again_and_never_half_placed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (coordinator, store) = coordinator(dir.path()).await;
    let coordinator = Arc::new(coordinator);
    for name in ["n1", "n2", "n3", "n4"] {
        node(&coordinator, name, 2).await;
    }
    let (gang, other) = (job(&coordinator, 4).await, job(&coordinator, 2).await);
    caught_up(&coordinator).await;
    let mut planning = Planning::default();
    let unseen = coordinator.view.take_unseen();
    let (plan, now) = planning.plan(&coordinator, unseen, &[]).await.expect("works").expect("a plan");
    assert_eq!(plan.starts.len(), 2, "there is room for both: {plan:?}");
    let start = plan.starts.iter().find(|start| start.gang.id == gang).expect("it starts");
    let lost = planning.node_name(start.tasks[0].node).to_owned();
    *store.node.lock().expect("no panic") = Some(lost.clone());
    planning.carry_out(&coordinator, plan, now).await.expect("works");

    caught_up(&coordinator).await;
    assert_eq!(nodes_with(&coordinator, &gang), Vec::<String>::new(), "no part of it was placed");
    let record = record(&coordinator, &gang);
    assert_eq!((record.job.state, record.job.attempt), (JobState::Pending, 0));
    assert_eq!(record.decisions.len(), 1, "{:?}", record.decisions);
    assert_eq!(record.decisions[0].kind, DecisionKind::Refused);
    assert_eq!(record.decisions[0].why, format!("node {lost} is lost"));
    assert_eq!(self::record(&coordinator, &other).job.state, JobState::Running, "it was not concerned");

    nodes::expire(&coordinator).await.expect("works");
    let unseen = coordinator.view.take_unseen();
    jobs::advance_all(&coordinator, None).await.expect("works");
    planning.round(&coordinator, unseen, &[]).await.expect("works");
    let placed = self::record(&coordinator, &gang);
    assert_eq!((placed.job.state, placed.job.attempt), (JobState::Running, 1));
    let nodes = nodes_with(&coordinator, &gang);
    assert!(nodes.len() == 2 && !nodes.contains(&lost), "{nodes:?} without {lost}");
    let kinds: Vec<_> = placed.decisions.iter().map(|decision| decision.kind).collect();
    assert_eq!(kinds, [DecisionKind::Refused, DecisionKind::Placed]);
}
