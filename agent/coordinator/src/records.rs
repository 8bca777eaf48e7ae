//! What is in the store: the records, their keys, and typed reading and writing.
//!
//! | key | record |
//! | --- | --- |
//! | `cluster` | [`ClusterRecord`] |
//! | `nodes/NAME` | [`NodeRecord`] |
//! | `subnets` | the subnet given last |
//! | `alive/NAME` | empty, under a lease: there while heartbeats arrive |
//! | `allocations/NODE` | [`Allocations`]: what the node's sandboxes take |
//! | `assignments/NODE/SANDBOX` | [`Assignment`]: a sandbox that should exist |
//! | `jobs/active/ID`, `jobs/ended/ID` | [`JobRecord`], in one of the two |
//! | `jobs/sequence` | how many jobs and services were submitted |
//! | `services/active/ID`, `services/ended/ID` | [`ServiceRecord`](crate::services::ServiceRecord), in one of the two |
//! | `service-ports/PORT` | the service that nodes listen there for |
//! | `images/NAME`, `datasets/NAME` | [`Owned`] image or dataset |
//! | `tokens/ID` | [`TokenRecord`] |
//! | `pools/NAME`, `tenants/NAME` | [`Pool`](lathe_api::pool::Pool), [`Tenant`](lathe_api::pool::Tenant), as they were set |
//! | `fleets/POOL` | [`Fleet`](crate::provider::fleet::Fleet): what the pool's provider was asked for and made |
//! | `usage` | [`UsageRecord`](crate::usage::UsageRecord): what tenants had |
//! | `operations/NODE` | [`Operations`]: what operators want of a node |
//! | `audit/SLOT` | [`AuditEntry`](lathe_api::scheduling::AuditEntry): a ring of what operators did |
//! | `audit-sequence` | how much they did |
//!
//! `allocations/NODE` is the record that placements on a node compare and swap: two plans that were
//! made from the same snapshot cannot both take the last CPU.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use lathe_api::HostPciAddress;
use lathe_api::artefact::{Dataset, Digest, Image};
use lathe_api::job::Job;
use lathe_api::node::{Inventory, MaintenanceWindow, NodeOffer, NodeState};
use lathe_api::sandbox::Desired;
use lathe_api::scheduling::{DecidedBy, Decision, DecisionKind, Taint};
use lathe_api::token::TokenInfo;
use lathe_scheduler::Amount;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::store::{Entry, LeaseId, Revision, Store, StoreError, Write};

/// Key of [`ClusterRecord`].
pub const CLUSTER: &str = "cluster";
/// Key of the number of jobs ever submitted.
pub const JOB_SEQUENCE: &str = "jobs/sequence";
/// The subnet given last: nodes that join at once compare and swap it.
pub const SUBNETS: &str = "subnets";
/// Prefix of nodes.
pub const NODES: &str = "nodes/";
/// Prefix of heartbeats.
pub const ALIVE: &str = "alive/";
/// Prefix of allocations.
pub const ALLOCATIONS: &str = "allocations/";
/// Prefix of assignments.
pub const ASSIGNMENTS: &str = "assignments/";
/// Prefix of jobs that have not ended.
pub const ACTIVE_JOBS: &str = "jobs/active/";
/// Prefix of jobs that have.
pub const ENDED_JOBS: &str = "jobs/ended/";
/// Prefix of services that have not ended.
pub const ACTIVE_SERVICES: &str = "services/active/";
/// Prefix of services that have.
pub const ENDED_SERVICES: &str = "services/ended/";
/// Prefix of ports that nodes listen on for services.
pub const SERVICE_PORTS: &str = "service-ports/";
/// Prefix of images.
pub const IMAGES: &str = "images/";
/// Prefix of datasets.
pub const DATASETS: &str = "datasets/";
/// Prefix of tokens.
pub const TOKENS: &str = "tokens/";
/// Prefix of pools.
pub const POOLS: &str = "pools/";
/// Prefix of what pools' providers made.
pub const FLEETS: &str = "fleets/";
/// Prefix of tenants.
pub const TENANTS: &str = "tenants/";
/// Key of what tenants had.
pub const USAGE: &str = "usage";
/// Prefix of what operators want of nodes.
pub const OPERATIONS: &str = "operations/";
/// Prefix of what operators did.
pub const AUDIT: &str = "audit/";
/// Key of how much operators did: the sequence of the last entry.
pub const AUDIT_SEQUENCE: &str = "audit-sequence";

/// Decisions kept of a job: its first ones, and the latest. A job that is stopped for others every
/// minute must not grow its record, which is read in every round.
const MAX_DECISIONS: usize = 32;
/// Of them the first that are kept.
const FIRST_DECISIONS: usize = 4;

/// What `init` decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Names and addresses the coordinator is reached at, without ports.
    pub names: Vec<String>,
    /// `HOST:PORT` that people and agents use.
    pub address: String,
    /// Sandboxes' addresses, as `10.42.0.0/16`.
    pub cidr: String,
}

/// A node that joined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: String,
    /// Digest of the one certificate it may use: that of its last join.
    pub certificate: Digest,
    /// Its subnet for sandboxes; kept for good.
    pub subnet: String,
    /// Address that other nodes reach it at; empty before its first report.
    pub address: String,
    /// Ready while its heartbeats arrive.
    pub state: NodeState,
    /// As last reported.
    pub inventory: Inventory,
    /// When it first joined.
    pub joined_ms: u64,
    /// Last heartbeat, as far as it was worth a write.
    pub last_heartbeat_ms: u64,
    /// Of its `alive/` key.
    pub lease: Option<LeaseId>,
}

/// What operators want of a node. Apart from [`NodeRecord`], which every change of the host writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Operations {
    /// Open, cordoned or draining; suspicion is not an operator's.
    pub offer: NodeOffer,
    /// Above those of the agent.
    pub labels: BTreeMap<String, String>,
    /// By key, unique.
    pub taints: Vec<Taint>,
    /// By time.
    pub maintenance: Vec<MaintenanceWindow>,
}

impl Operations {
    /// The node's labels: the agent's with the operator's above them.
    pub fn labels_of(&self, inventory: &Inventory) -> BTreeMap<String, String> {
        let mut labels = inventory.labels.clone();
        labels.extend(self.labels.clone());
        labels
    }
}

/// What the sandboxes of one node take of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocations {
    /// By sandbox.
    pub sandboxes: BTreeMap<String, Allocation>,
    /// The last address given: the next one is searched after it, so that an address rests before
    /// it is used again.
    pub last_address: Option<Ipv4Addr>,
}

/// What one sandbox takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// CPUs.
    pub cpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
    /// Its GPUs, as the node names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<HostPciAddress>,
    /// The NUMA node that its CPUs and memory come from, if from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<u8>,
    /// Its address.
    pub address: Ipv4Addr,
}

impl Allocation {
    /// What of it adds up.
    pub fn amount(&self) -> Amount {
        Amount {
            cpu_milli: u64::from(self.cpus) * 1000,
            memory_bytes: self.memory_bytes,
            hugepage_bytes: 0,
            sandboxes: 1,
        }
    }
}

/// A sandbox that should exist on a node. The rest of its description follows from its job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Its job.
    pub job: String,
    /// Its rank.
    pub rank: u32,
    /// Run or stop.
    pub desired: Desired,
    /// The node has reported it at least once.
    pub observed: bool,
}

/// A job with what users do not see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// As users see it.
    pub job: Job,
    /// Order of submission.
    pub sequence: u64,
    /// Resolved at submission: later changes of the name do not reach the job.
    pub image: Image,
    /// Resolved at submission, in the order of the job's mounts.
    pub datasets: Vec<Dataset>,
    /// Starts used up by failures of tasks.
    pub failures: u32,
    /// Starts used up by losses.
    pub losses: u32,
    /// Why the gang had to start again, if it had to.
    #[serde(default)]
    pub restart_reason: Option<String>,
    /// When the present attempt was placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed_ms: Option<u64>,
    /// A cancel was asked for.
    pub cancelled: bool,
    /// The present attempt is being stopped, and why.
    pub stopping: Option<Stopping>,
    /// What was decided about it, oldest first.
    #[serde(default)]
    pub decisions: Vec<Decision>,
    /// It is a replica of [`Job::service`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaRecord>,
}

impl JobRecord {
    /// Adds to the job's history, which stays bounded.
    pub fn decide(&mut self, kind: DecisionKind, by: DecidedBy, why: impl Into<String>, now_ms: u64) {
        let decision = Decision { time_ms: now_ms, attempt: self.job.attempt, kind, by, why: why.into() };
        remember(&mut self.decisions, decision);
    }

    /// The same, unless it was said of this attempt already.
    pub fn decide_once(&mut self, kind: DecisionKind, by: DecidedBy, why: &str, now_ms: u64) -> bool {
        let attempt = self.job.attempt;
        let said = |one: &Decision| one.attempt == attempt && one.kind == kind && one.why == why;
        if self.decisions.iter().any(said) {
            return false;
        }
        self.decide(kind, by, why, now_ms);
        true
    }
}

/// Adds to a history, which stays bounded: the first decisions and the latest are kept.
pub fn remember(decisions: &mut Vec<Decision>, decision: Decision) {
    if decisions.len() >= MAX_DECISIONS {
        decisions.remove(FIRST_DECISIONS);
    }
    decisions.push(decision);
}

/// What a job that is a service's replica has beyond others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicaRecord {
    /// Since when it gets nothing new, because it is to end.
    pub draining_since_ms: Option<u64>,
    /// Until when it is not to be placed again, because it ended by itself.
    pub held_until_ms: Option<u64>,
    /// How often it ended in a row, each time soon after it had been placed.
    pub ends_in_a_row: u32,
}

/// Why an attempt is being stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    /// Whose fault.
    pub cause: Cause,
    /// One line.
    pub reason: String,
}

/// Whose fault the end of an attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A task's.
    Failure,
    /// A node's or a VMM's.
    Loss,
    /// Somebody cancelled it.
    Cancel,
    /// The policy, or an operator, needs its room.
    Preemption,
    /// It starts again with more or fewer tasks.
    Resize,
}

/// An image or dataset with the tenant that may change what its name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owned<T> {
    /// Who added it.
    pub tenant: String,
    /// The artefact.
    pub artefact: T,
}

/// A token without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What users see.
    pub info: TokenInfo,
    /// Hexadecimal.
    pub salt: String,
    /// SHA-256 of salt and secret.
    pub hash: Digest,
}

/// A record and the commit that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Versioned<T> {
    /// The record.
    pub value: T,
    /// The commit.
    pub revision: Revision,
}

/// Reads one record.
///
/// # Errors
/// When the store fails or the record does not decode.
pub async fn load<T: DeserializeOwned>(
    store: &dyn Store,
    key: &str,
) -> Result<Option<Versioned<T>>, StoreError> {
    let entry = store.get(key).await?;
    entry.map(|entry| decode(&entry.key, &entry.value, entry.revision)).transpose()
}

/// Reads all records under a prefix, with the rest of each key.
///
/// # Errors
/// When the store fails or a record does not decode.
pub async fn load_all<T: DeserializeOwned>(
    store: &dyn Store,
    prefix: &str,
) -> Result<Vec<(String, Versioned<T>)>, StoreError> {
    let listing = store.list(&[prefix]).await?;
    of_prefix(&listing.entries, prefix).collect()
}

/// The records of a listing that are under a prefix.
pub fn of_prefix<'a, T: DeserializeOwned>(
    entries: &'a [Entry],
    prefix: &'a str,
) -> impl Iterator<Item = Result<(String, Versioned<T>), StoreError>> + 'a {
    entries.iter().filter_map(move |entry| {
        let rest = entry.key.strip_prefix(prefix)?;
        let record = decode(&entry.key, &entry.value, entry.revision);
        Some(record.map(|record| (rest.to_owned(), record)))
    })
}

/// A record from what the store holds.
///
/// # Errors
/// When it does not decode.
pub fn decode<T: DeserializeOwned>(
    key: &str,
    value: &[u8],
    revision: Revision,
) -> Result<Versioned<T>, StoreError> {
    serde_json::from_slice(value)
        .map(|value| Versioned { value, revision })
        .map_err(|source| StoreError::Corrupt { key: key.to_owned(), reason: source.to_string() })
}

/// A write of a record.
///
/// # Errors
/// Never with the records here, whose map keys are all text.
pub fn put(key: impl Into<String>, record: &impl Serialize) -> Result<Write, StoreError> {
    let key = key.into();
    let value = serde_json::to_vec(record)
        .map_err(|source| StoreError::Corrupt { key: key.clone(), reason: source.to_string() })?;
    Ok(Write::Put { key, value, lease: None })
}
