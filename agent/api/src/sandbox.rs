//! What the coordinator wants of a node.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::HostPciAddress;
use crate::artefact::{Dataset, Image};
use crate::job::{IsolationClass, Resources};
use crate::service::NodeService;

/// The desired state of one node, whole: what the lines of `GET /v1/agent/desired` ([`DesiredUpdate`]) add
/// up to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeDesired {
    /// The store's revision this was read at.
    pub revision: u64,
    /// What the sandboxes' network looks like from this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NodeNetwork>,
    /// Services that this node takes requests for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<NodeService>>,
    /// Every sandbox that should exist here, running or stopping. One the agent knows and that is not
    /// listed is stopped and forgotten.
    pub sandboxes: Vec<SandboxSpec>,
}

/// A line of `GET /v1/agent/desired` (mTLS): the parts of a node's desired state that are
/// not as the line before left them. The first line of a stream has `network`, `services` and
/// `sandboxes`.
///
/// The parts change for different reasons, and are long: a node that joins anywhere changes every node's
/// network, and a sandbox that comes changes nothing of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredUpdate {
    /// The store's revision this was read at.
    pub revision: u64,
    /// The network, whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NodeNetwork>,
    /// What is different of the network; never beside `network`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_changes: Option<NetworkChanges>,
    /// All services that the node takes requests for; absent if they are what they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<NodeService>>,
    /// All sandboxes that should exist; absent if they are what they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandboxes: Option<Vec<SandboxSpec>>,
}

/// What is different of a [`NodeNetwork`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkChanges {
    /// Subnets that are new, or behind another address than before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Subnets to which there is no route any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes_gone: Vec<String>,
    /// Tenants of which addresses came or went, or that are new here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<TenantChanges>,
    /// Tenants that have no sandbox here any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants_gone: Vec<String>,
}

/// What is different of a [`TenantAddresses`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantChanges {
    /// Its name.
    pub tenant: String,
    /// Addresses that are its now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub came: Vec<String>,
    /// Addresses that are not any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub went: Vec<String>,
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
    /// What is desired after this line; none if the line builds on something that was not told, and the
    /// stream has to begin anew.
    pub fn follow(before: Option<Self>, update: DesiredUpdate) -> Option<Self> {
        let DesiredUpdate { revision, network, network_changes, services, sandboxes } = update;
        let (known_network, known_services, known_sandboxes) = before
            .map_or((None, None, None), |before| (before.network, before.services, Some(before.sandboxes)));
        let network = match (network, network_changes) {
            (Some(network), _) => Some(network),
            (None, Some(changes)) => {
                let mut network = known_network?;
                network.apply(changes);
                Some(network)
            }
            (None, None) => known_network,
        };
        let services = services.or(known_services);
        Some(Self { revision, network, services, sandboxes: sandboxes.or(known_sandboxes)? })
    }

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

impl NodeNetwork {
    /// Takes over what is different now. Doing it twice is doing it once.
    pub fn apply(&mut self, changes: NetworkChanges) {
        let NetworkChanges { routes, routes_gone, tenants, tenants_gone } = changes;
        let (mut by_subnet, mut by_tenant): (BTreeMap<_, _>, BTreeMap<_, BTreeSet<_>>) = (
            self.routes.drain(..).map(|route| (route.subnet, route.via)).collect(),
            self.tenants.drain(..).map(|of| (of.tenant, of.addresses.into_iter().collect())).collect(),
        );
        for subnet in routes_gone {
            by_subnet.remove(&subnet);
        }
        by_subnet.extend(routes.into_iter().map(|route| (route.subnet, route.via)));
        for tenant in tenants_gone {
            by_tenant.remove(&tenant);
        }
        for TenantChanges { tenant, came, went } in tenants {
            let addresses = by_tenant.entry(tenant).or_default();
            for address in went {
                addresses.remove(&address);
            }
            addresses.extend(came);
        }
        self.routes = by_subnet.into_iter().map(|(subnet, via)| Route { subnet, via }).collect();
        let tenants = by_tenant.into_iter();
        self.tenants = tenants
            .map(|(tenant, addresses)| TenantAddresses { tenant, addresses: addresses.into_iter().collect() })
            .collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn route(subnet: &str, via: &str) -> Route {
        Route { subnet: subnet.to_owned(), via: via.to_owned() }
    }

    fn addresses(tenant: &str, addresses: &[&str]) -> TenantAddresses {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        TenantAddresses { tenant: tenant.to_owned(), addresses }
    }

    #[test]
    fn lines_add_up_and_one_that_builds_on_nothing_is_refused() {
        let network = NodeNetwork {
            subnet: "10.0.0.0/24".to_owned(),
            routes: vec![route("10.0.1.0/24", "a"), route("10.0.2.0/24", "b")],
            tenants: vec![addresses("red", &["10.0.0.2"]), addresses("blue", &["10.0.1.2"])],
            served: Vec::new(),
        };
        let changes = NetworkChanges {
            routes: vec![route("10.0.2.0/24", "c"), route("10.0.3.0/24", "d")],
            routes_gone: vec!["10.0.1.0/24".to_owned()],
            tenants: vec![TenantChanges {
                tenant: "red".to_owned(),
                came: vec!["10.0.2.2".to_owned()],
                went: vec!["10.0.0.2".to_owned()],
            }],
            tenants_gone: vec!["blue".to_owned()],
        };
        let change =
            DesiredUpdate { revision: 2, network_changes: Some(changes.clone()), ..DesiredUpdate::default() };
        assert_eq!(NodeDesired::follow(None, change.clone()), None);
        let first = DesiredUpdate {
            revision: 1,
            network: Some(network),
            services: Some(Vec::new()),
            sandboxes: Some(Vec::new()),
            ..DesiredUpdate::default()
        };
        let first = NodeDesired::follow(None, first).expect("whole");
        let mut second = NodeDesired::follow(Some(first), change).expect("it follows");
        assert_eq!(second.services, Some(Vec::new()), "not told again");
        let network = second.network.clone().expect("known");
        assert_eq!(network.routes, [route("10.0.2.0/24", "c"), route("10.0.3.0/24", "d")]);
        assert_eq!(network.tenants, [addresses("red", &["10.0.2.2"])]);
        second.network.as_mut().expect("known").apply(changes);
        assert_eq!(second.network, Some(network), "told twice");
    }
}
