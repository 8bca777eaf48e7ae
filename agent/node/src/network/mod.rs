//! The sandboxes' network on this node: a routed subnet on a bridge, and who may talk to whom.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`address`] | subnets, and hardware addresses made from IP addresses |
//! | [`links`], [`tap`] | the kernel's interfaces, addresses and routes |
//! | [`filter`] | the nftables ruleset |
//!
//! [`Network`] holds what should be; each change makes the kernel's state equal to it.

pub mod address;
pub mod filter;
pub mod links;
pub mod tap;

use std::net::Ipv4Addr;

use lathe_api::sandbox::{NodeNetwork, TenantAddresses};
use rtnetlink::Handle;
use tokio::sync::Mutex;

use crate::paths::{INTERFACE_PREFIX, SandboxKey};
use address::{ParseSubnetError, Subnet};
use filter::{FilterError, Ports, Served};
use links::LinkError;

/// The bridge of a node's sandboxes.
pub const BRIDGE: &str = "lathe0";

/// The network could not be made as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Interfaces, addresses, routes.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The ruleset.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// What the coordinator says makes no sense.
    #[error(transparent)]
    Subnet(#[from] ParseSubnetError),
    /// A route's next hop.
    #[error("{0:?} is not an IPv4 address")]
    Address(String),
    /// The coordinator has not said anything yet.
    #[error("this node has no subnet for sandboxes yet: the coordinator was never reached")]
    NoSubnet,
}

#[derive(Debug, Default)]
struct State {
    subnet: Option<Subnet>,
    tenants: Vec<TenantAddresses>,
    ports: Ports,
    served: Served,
    /// What the kernel has, as far as this process knows.
    applied: Option<String>,
}

/// The node's network.
#[derive(Debug)]
pub struct Network {
    handle: Handle,
    state: Mutex<State>,
}

impl Network {
    /// Connects to the kernel. Changes nothing.
    ///
    /// # Errors
    /// When netlink cannot be opened.
    pub fn new() -> Result<Self, NetworkError> {
        Ok(Self { handle: links::connect()?, state: Mutex::default() })
    }

    /// Makes bridge, routes and tenants' filter as the coordinator says.
    ///
    /// # Errors
    /// When a value makes no sense or the kernel refuses. May be repeated.
    pub async fn configure(&self, wanted: &NodeNetwork) -> Result<(), NetworkError> {
        let subnet: Subnet = wanted.subnet.parse()?;
        let mut routes = Vec::new();
        for route in &wanted.routes {
            let via = route.via.parse().map_err(|_| NetworkError::Address(route.via.clone()))?;
            routes.push((route.subnet.parse()?, via));
        }
        let mut state = self.state.lock().await;
        state.subnet = Some(subnet);
        state.tenants.clone_from(&wanted.tenants);
        state.served = Served {
            nodes: routes.iter().map(|(_, via)| *via).collect(),
            replicas: wanted
                .served
                .iter()
                .filter_map(|one| Some((one.address.parse().ok()?, one.port)))
                .collect(),
        };
        // The filter first: an open bridge without one would be open.
        Self::refilter(&mut state).await?;
        links::ensure_bridge(&self.handle, subnet).await?;
        links::ensure_routes(&self.handle, &routes).await?;
        Ok(())
    }

    /// Forgets what the kernel is known to have, so that the next change is made whatever it is.
    pub async fn doubt(&self) {
        self.state.lock().await.applied = None;
    }

    /// The node's subnet.
    ///
    /// # Errors
    /// When the coordinator has not said it yet.
    pub async fn subnet(&self) -> Result<Subnet, NetworkError> {
        self.state.lock().await.subnet.ok_or(NetworkError::NoSubnet)
    }

    /// Lets a sandbox's port send from its address. Before the port exists.
    ///
    /// # Errors
    /// When nft refuses.
    pub async fn admit(&self, key: &SandboxKey, address: Ipv4Addr) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        state.ports.insert(key.interface(), address);
        Self::refilter(&mut state).await
    }

    /// Makes a microVM's tap device, on the bridge.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn make_tap(&self, name: &str) -> Result<(), NetworkError> {
        Ok(links::ensure_tap(&self.handle, name).await?)
    }

    /// Removes a sandbox's interface and what the filter knows of it. May be repeated.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn dismiss(&self, name: &str) -> Result<(), NetworkError> {
        links::remove(&self.handle, name).await?;
        let mut state = self.state.lock().await;
        state.ports.remove(name);
        Self::refilter(&mut state).await
    }

    /// Removes sandboxes' interfaces that are not among `known`: a journal that was lost with its
    /// disk leaves them behind.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn sweep(&self, known: &[String]) -> Result<(), NetworkError> {
        for name in links::names_with(&self.handle, INTERFACE_PREFIX).await? {
            if !known.contains(&name) {
                tracing::warn!(name, "removing an interface that belongs to no sandbox");
                links::remove(&self.handle, &name).await?;
            }
        }
        Ok(())
    }

    /// Removes bridge and filter: for a sandbox run by hand.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn remove_all(&self) -> Result<(), NetworkError> {
        links::remove(&self.handle, BRIDGE).await?;
        Ok(filter::apply(&filter::nothing()).await?)
    }

    async fn refilter(state: &mut State) -> Result<(), NetworkError> {
        let wanted = filter::ruleset(&state.tenants, &state.ports, &state.served);
        if state.applied.as_ref() != Some(&wanted) {
            state.applied = None;
            filter::apply(&wanted).await?;
            state.applied = Some(wanted);
        }
        Ok(())
    }
}
