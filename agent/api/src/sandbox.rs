//! What the coordinator wants of a node.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::HostPciAddress;
use crate::artefact::{Dataset, Image};
use crate::job::{IsolationClass, Resources};
use crate::service::NodeService;

/// The desired state of one node, whole. `GET /v1/agent/desired?after=REVISION` (mTLS) answers with
/// a stream of these as JSON lines: at once if the revision differs, then after every change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeDesired {
    /// The store's revision this was read at.
    pub revision: u64,
    /// What the sandboxes' network looks like from this node. The first line of a stream has it, later
    /// ones only when it changed: it is long, and grows with the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NodeNetwork>,
    /// Services that this node takes requests for. The first line of a stream has them, later ones only
    /// when they changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<NodeService>>,
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
    /// The addresses of the sandboxes, in the whole cluster, of each tenant that has one here. Sandboxes
    /// talk within their tenant only. Told with a delay of seconds for what is not of this node; a
    /// gang's own addresses are in [`SandboxSpec::hosts`] at once.
    pub tenants: Vec<TenantAddresses>,
    /// Replicas' ports on this node, which the nodes themselves reach. Never told: they follow from the
    /// sandboxes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served: Vec<ServedPort>,
}

/// A replica's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServedPort {
    /// The replica's address.
    pub address: String,
    /// TCP.
    pub port: u16,
}

impl NodeDesired {
    /// The network with the gangs' addresses and the replicas' ports that are known from the sandboxes
    /// alone.
    pub fn network_with_gangs(&self) -> NodeNetwork {
        let mut network = self.network.clone().unwrap_or_default();
        let served =
            |spec: &SandboxSpec| spec.port.map(|port| ServedPort { address: spec.address.clone(), port });
        network.served = self.sandboxes.iter().filter_map(served).collect();
        for spec in &self.sandboxes {
            let at = network.tenants.iter().position(|tenant| tenant.tenant == spec.tenant);
            let at = at.unwrap_or_else(|| {
                let addresses = Vec::new();
                network.tenants.push(TenantAddresses { tenant: spec.tenant.clone(), addresses });
                network.tenants.len() - 1
            });
            let own = std::iter::once(&spec.address).chain(spec.hosts.iter().map(|(address, _)| address));
            network.tenants[at].addresses.extend(own.cloned());
        }
        for tenant in &mut network.tenants {
            tenant.addresses.sort_unstable();
            tenant.addresses.dedup();
        }
        network
    }
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
    /// The GPUs it gets: these and no others. Where there are none and `resources` has a number, the
    /// node chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub gpus: Vec<HostPciAddress>,
    /// The NUMA node that its CPUs and memory should come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Datasets and where they appear.
    pub datasets: Vec<SandboxDataset>,
    /// Its address, in the node's subnet.
    pub address: String,
    /// TCP port of a service's replica: what the node tries, to learn whether it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
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
