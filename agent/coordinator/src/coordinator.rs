//! What the API's handlers and the reconciler share.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::blobs::{BlobError, Blobs};
use crate::dry_run::DryRuns;
use crate::explain::Explanations;
use crate::init::STORE_FILE;
use crate::logs::{LogError, Logs};
use crate::metrics::Metrics;
use crate::network::Cidr;
use crate::pki::{Authority, PkiError};
use crate::provider::Helped;
use crate::provider::registry::Programs;
use crate::records::{self, CLUSTER, ClusterRecord};
use crate::sequence::Sequence;
use crate::services::Loads;
use crate::state::View;
use crate::store::redb::RedbStore;
use crate::store::{Store, StoreError};
use crate::suspicion::Refusals;

/// File of the address the running coordinator listens on, for tools on the same machine.
pub const ADDRESS_FILE: &str = "address";

/// How a coordinator is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Made by [`crate::init::init`].
    pub data_dir: PathBuf,
    /// After how long without a report a node is lost.
    pub node_expiry: Duration,
    /// Output kept of each sandbox, bytes.
    pub log_limit_bytes: u64,
    /// Longest blob, bytes.
    pub blob_limit_bytes: u64,
    /// Programs that make nodes for pools.
    pub providers: Programs,
}

/// The coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no cluster.
    #[error("{0} holds no cluster: make one with `lathe-coordinator init`")]
    NoCluster(String),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blobs' directory.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The logs' directory.
    #[error(transparent)]
    Logs(#[from] LogError),
}

/// The coordinator's state: the store, and what can be had again by waiting for the next reports.
pub struct Coordinator {
    /// All that must not be forgotten.
    pub store: Arc<dyn Store>,
    /// Content by digest.
    pub blobs: Blobs,
    /// Output of sandboxes.
    pub logs: Logs,
    /// Signs nodes' certificates.
    pub authority: Authority,
    /// What `init` decided.
    pub cluster: ClusterRecord,
    /// The range of sandboxes' addresses.
    pub cidr: Cidr,
    /// How it is run.
    pub options: Options,
    /// Counters.
    pub metrics: Metrics,
    /// The store's records in memory.
    pub view: Arc<View>,
    /// Numbers of jobs.
    pub sequence: Sequence,
    /// Why jobs wait.
    pub explanations: Explanations,
    /// What is in flight at services.
    pub loads: Loads,
    /// Held by the one join at a time.
    pub joining: tokio::sync::Mutex<()>,
    /// What would become of jobs.
    pub dry_runs: DryRuns,
    /// Jobs that more nodes would help.
    pub helped: Helped,
    /// Wakes the reconciler.
    pub changed: Notify,
    /// Ends everything.
    pub shutdown: CancellationToken,
    live: Mutex<HashMap<String, Live>>,
    _follower: DropGuard,
}

/// What is known of a node from its reports since this process started.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Of the last report, by this machine's clock.
    pub last_heartbeat_ms: u64,
    /// Sandboxes that still run there although they should not: until they are gone, what they use
    /// is not free.
    pub strays: usize,
    /// Sandboxes that were reported before and are missing, and in how many reports in a row.
    pub missing: HashMap<String, u32>,
    /// What it refused or could not start.
    pub refusals: Refusals,
}

impl Coordinator {
    /// Opens the data directory. Call within a Tokio runtime.
    ///
    /// # Errors
    /// When it holds no cluster, is in use, or cannot be read.
    pub async fn open(options: Options) -> Result<Self, OpenError> {
        let dir = &options.data_dir;
        let store_path = dir.join(STORE_FILE);
        if !store_path.exists() {
            return Err(OpenError::NoCluster(dir.display().to_string()));
        }
        let store = RedbStore::open(&store_path)?;
        let cluster = records::load::<ClusterRecord>(&store, CLUSTER)
            .await?
            .ok_or_else(|| OpenError::NoCluster(dir.display().to_string()))?
            .value;
        let cidr = cluster.cidr.parse().map_err(|source: crate::network::ParseCidrError| {
            StoreError::Corrupt { key: CLUSTER.to_owned(), reason: source.to_string() }
        })?;
        let store: Arc<dyn Store> = Arc::new(store);
        let view = Arc::new(View::load(&*store).await?);
        let followed = CancellationToken::new();
        let (follower, of, ended) = (Arc::clone(&view), Arc::clone(&store), followed.clone());
        tokio::spawn(async move { ended.run_until_cancelled(follower.follow(of)).await });
        Ok(Self {
            store,
            view,
            sequence: Sequence::default(),
            explanations: Explanations::default(),
            loads: Loads::default(),
            dry_runs: DryRuns::default(),
            helped: Helped::default(),
            _follower: followed.drop_guard(),
            blobs: Blobs::open(&dir.join("blobs"), options.blob_limit_bytes)?,
            logs: Logs::open(&dir.join("logs"), options.log_limit_bytes)?,
            authority: Authority::load(dir)?,
            cluster,
            cidr,
            options,
            metrics: Metrics::default(),
            joining: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            shutdown: CancellationToken::new(),
            live: Mutex::default(),
        })
    }

    /// Writes down where this process listens, as a tool on this machine reaches it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish_address(&self, listening: SocketAddr) -> io::Result<()> {
        let host = match listening.ip() {
            ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
            ip => SocketAddr::new(ip, 0).to_string().trim_end_matches(":0").to_owned(),
        };
        let path = self.options.data_dir.join(ADDRESS_FILE);
        std::fs::write(path, format!("{host}:{}\n", listening.port()))
    }

    /// What is known of the nodes since this process started.
    pub fn live(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        // Whole whatever panicked while holding it: every change is a single assignment.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
