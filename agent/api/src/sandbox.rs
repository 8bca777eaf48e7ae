//! What the coordinator wants of a node.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::artefact::{Dataset, Image};
use crate::job::{IsolationClass, Resources};

/// The desired state of one node, whole. `GET /v1/agent/desired?after=REVISION` (mTLS) answers with
/// a stream of these as JSON lines: at once if the revision differs, then after every change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeDesired {
    /// The store's revision this was read at.
    pub revision: u64,
    /// What the sandboxes' network looks like from this node.
    pub network: NodeNetwork,
    /// Every sandbox that should exist here, running or stopping. One the agent knows and that is not
    /// listed is stopped and forgotten.
    pub sandboxes: Vec<SandboxSpec>,
}

/// Addresses, routes and who may talk to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeNetwork {
    /// This node's own subnet for sandboxes, as `10.42.3.0/24`; the first address is the bridge's.
    pub subnet: String,
    /// The other nodes' subnets.
    pub routes: Vec<Route>,
    /// The addresses of each tenant's sandboxes in the whole cluster. Sandboxes talk within
    /// their tenant only.
    pub tenants: Vec<TenantAddresses>,
}

/// A subnet behind another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Route {
    /// As `10.42.4.0/24`.
    pub subnet: String,
    /// The node's address.
    pub via: String,
}

/// Who belongs to a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantAddresses {
    /// Its name.
    pub tenant: String,
    /// IPv4 addresses of its sandboxes.
    pub addresses: Vec<String>,
}

/// One sandbox that should exist.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxSpec {
    /// `<job>-<rank>-<attempt>`: `[a-z0-9-]`, at most 96 characters.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// The job, for logs and metrics.
    pub job: String,
    /// The gang member.
    pub rank: u32,
    /// Run it, or stop it (SIGTERM, grace, SIGKILL) and report how it ended.
    pub desired: Desired,
    /// Isolation.
    pub class: IsolationClass,
    /// Its image; blobs at `GET /v1/blobs/<digest>`.
    pub image: Image,
    /// Replaces the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's `Cmd` unless empty.
    pub args: Vec<String>,
    /// Added to the image's environment; the gang's variables (`MASTER_ADDR`, `RANK`, ...) are here.
    pub env: Vec<(String, String)>,
    /// The carve.
    pub resources: Resources,
    /// Datasets and where they appear.
    pub datasets: Vec<SandboxDataset>,
    /// Its address, in the node's subnet.
    pub address: String,
    /// `/etc/hosts` lines beyond localhost, as `(address, name)`: the gang's members.
    pub hosts: Vec<(String, String)>,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: u32,
}

/// What should become of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// It runs until its task ends. An ended one is not started again: another attempt has another ID.
    Running,
    /// It is stopped.
    Stopped,
}

/// A dataset in a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SandboxDataset {
    /// The files; contents at `GET /v1/blobs/<digest>`.
    pub dataset: Dataset,
    /// Absolute path of its folder in the task.
    pub mount: String,
}
