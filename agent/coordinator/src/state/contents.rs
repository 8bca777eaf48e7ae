//! The records, and how a commit changes them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use lathe_api::pool::{DEFAULT_POOL, Pool, Tenant};
use serde::de::DeserializeOwned;

use super::changes::Changes;
use crate::desired;
use crate::policy::Pools;
use crate::records::{
    ACTIVE_JOBS, ACTIVE_SERVICES, ALIVE, ALLOCATIONS, ASSIGNMENTS, Allocations, Assignment, JobRecord, NODES,
    NodeRecord, OPERATIONS, Operations, POOLS, TENANTS, Versioned, decode,
};
use crate::services::ServiceRecord;
use crate::store::{Entry, Event, Listing, Revision};

/// What is kept.
pub const PREFIXES: [&str; 9] =
    [NODES, ALIVE, ALLOCATIONS, ASSIGNMENTS, ACTIVE_JOBS, ACTIVE_SERVICES, OPERATIONS, POOLS, TENANTS];

/// The records at one moment.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// That moment.
    pub revision: Revision,
    /// Nodes that joined.
    pub nodes: BTreeMap<String, Arc<Versioned<NodeRecord>>>,
    /// Nodes whose heartbeats arrive, with the commit that began it.
    pub alive: BTreeMap<String, Revision>,
    /// By node.
    pub allocations: BTreeMap<String, Arc<Versioned<Allocations>>>,
    /// By node, then sandbox.
    pub assignments: BTreeMap<String, BTreeMap<String, Versioned<Assignment>>>,
    /// Jobs that have not ended.
    pub jobs: BTreeMap<String, Arc<Versioned<JobRecord>>>,
    /// Services that have not ended.
    pub services: BTreeMap<String, Arc<Versioned<ServiceRecord>>>,
    /// Jobs that are their replicas, by service.
    replicas: BTreeMap<String, BTreeSet<String>>,
    /// The commit that last changed something that nodes are told of services.
    pub services_changed: Revision,
    /// What operators want of nodes.
    pub operations: BTreeMap<String, Arc<Versioned<Operations>>>,
    /// As they were set.
    pub pools: BTreeMap<String, Versioned<Pool>>,
    /// As they were set.
    pub tenants: BTreeMap<String, Versioned<Tenant>>,
    /// Nodes' subnets, with the address that each is behind.
    pub routes: BTreeMap<String, String>,
    /// Subnets of which that changed.
    pub routes_changed: Changes,
    /// Addresses of each tenant's sandboxes.
    pub addresses: BTreeMap<String, BTreeSet<String>>,
    /// By tenant: those that came or went.
    addresses_changed: HashMap<String, Changes>,
    /// The other way round: sandbox to tenant and address.
    sandboxes: HashMap<String, (String, String)>,
}

/// What a commit touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Nodes of which a record changed.
    pub nodes: BTreeSet<String>,
    /// Jobs of which the record changed.
    pub jobs: BTreeSet<String>,
    /// Nodes that are told something else now.
    pub desired: BTreeSet<String>,
    /// Pools or tenants.
    pub settings: bool,
    /// What nodes are told of services.
    pub services: bool,
}

impl Touched {
    /// Another commit's, too.
    pub fn extend(&mut self, other: Self) {
        self.nodes.extend(other.nodes);
        self.jobs.extend(other.jobs);
        self.desired.extend(other.desired);
        self.settings |= other.settings;
        self.services |= other.services;
    }
}

impl Contents {
    /// All of a listing of [`PREFIXES`].
    pub fn of(listing: &Listing) -> Self {
        let mut contents = Self::default();
        let mut touched = Touched::default();
        let mut assigned = Vec::new();
        for Entry { key, value, revision } in &listing.entries {
            contents.change(key, Some(value), *revision, &mut touched, &mut assigned);
        }
        contents.readdress(assigned, listing.revision);
        contents.revision = listing.revision;
        contents.services_changed = listing.revision;
        contents.routes_changed = Changes::from(listing.revision);
        for changes in contents.addresses_changed.values_mut() {
            *changes = Changes::from(listing.revision);
        }
        contents
    }

    /// Takes in a commit.
    pub fn apply(&mut self, event: &Event) -> Touched {
        let mut touched = Touched::default();
        let mut assigned = Vec::new();
        for change in &event.changes {
            self.change(&change.key, change.value.as_deref(), event.revision, &mut touched, &mut assigned);
        }
        self.readdress(assigned, event.revision);
        self.revision = event.revision;
        if touched.services {
            self.services_changed = event.revision;
        }
        touched
    }

    /// Sets or removes one record.
    fn change(
        &mut self,
        key: &str,
        value: Option<&[u8]>,
        revision: Revision,
        touched: &mut Touched,
        assigned: &mut Vec<(String, String)>,
    ) {
        if let Some(id) = key.strip_prefix(ACTIVE_JOBS) {
            self.set_job(id, read(key, value, revision).map(Arc::new), touched);
            touched.jobs.insert(id.to_owned());
        } else if let Some(id) = key.strip_prefix(ACTIVE_SERVICES) {
            set(&mut self.services, id, read(key, value, revision).map(Arc::new));
            touched.services = true;
        } else if let Some(rest) = key.strip_prefix(ASSIGNMENTS) {
            let Some((node, sandbox)) = rest.split_once('/') else { return };
            let of_node = self.assignments.entry(node.to_owned()).or_default();
            set(of_node, sandbox, read(key, value, revision));
            if of_node.is_empty() {
                self.assignments.remove(node);
            }
            touched.nodes.insert(node.to_owned());
            touched.desired.insert(node.to_owned());
            assigned.push((node.to_owned(), sandbox.to_owned()));
        } else if let Some(node) = key.strip_prefix(ALLOCATIONS) {
            set(&mut self.allocations, node, read(key, value, revision).map(Arc::new));
            touched.nodes.insert(node.to_owned());
        } else if let Some(node) = key.strip_prefix(NODES) {
            let record = read::<NodeRecord>(key, value, revision);
            let before = self.nodes.get(node).cloned();
            let (before, after) = (before.as_ref().map(|record| &record.value), record.as_ref());
            if self.reroute(before, after.map(|record| &record.value), revision) {
                touched.desired.insert(node.to_owned());
            }
            // Pools select nodes by labels.
            let labels = |record: Option<&NodeRecord>| record.map(|record| record.inventory.labels.clone());
            let relabelled = labels(before) != labels(after.map(|record| &record.value));
            touched.services |= !self.services.is_empty() && relabelled;
            set(&mut self.nodes, node, record.map(Arc::new));
            touched.nodes.insert(node.to_owned());
        } else if let Some(node) = key.strip_prefix(OPERATIONS) {
            set(&mut self.operations, node, read(key, value, revision).map(Arc::new));
            touched.nodes.insert(node.to_owned());
            touched.services |= !self.services.is_empty();
        } else if let Some(name) = key.strip_prefix(POOLS) {
            set(&mut self.pools, name, read(key, value, revision));
            touched.settings = true;
            touched.services |= !self.services.is_empty();
        } else if let Some(name) = key.strip_prefix(TENANTS) {
            set(&mut self.tenants, name, read(key, value, revision));
            touched.settings = true;
        } else if let Some(node) = key.strip_prefix(ALIVE) {
            set(&mut self.alive, node, value.map(|_| revision));
            touched.nodes.insert(node.to_owned());
        }
    }

    /// Sets or removes a job, with what follows from it for its service.
    fn set_job(&mut self, id: &str, job: Option<Arc<Versioned<JobRecord>>>, touched: &mut Touched) {
        let before = self.jobs.get(id);
        let backend = |job: &Arc<Versioned<JobRecord>>| desired::backend(&job.value);
        touched.services |= before.and_then(backend) != job.as_ref().and_then(backend);
        if let Some(service) = before.and_then(|job| job.value.job.service.as_ref())
            && let Some(replicas) = self.replicas.get_mut(service)
        {
            replicas.remove(id);
            if replicas.is_empty() {
                self.replicas.remove(service);
            }
        }
        if let Some(service) = job.as_ref().and_then(|job| job.value.job.service.clone()) {
            self.replicas.entry(service).or_default().insert(id.to_owned());
        }
        set(&mut self.jobs, id, job);
    }

    /// The jobs that are a service's replicas and have not ended.
    pub fn replicas(&self, service: &str) -> Vec<Arc<Versioned<JobRecord>>> {
        let ids = self.replicas.get(service).into_iter().flatten();
        ids.filter_map(|id| self.jobs.get(id).cloned()).collect()
    }

    /// All pools by name, the default one included.
    pub fn all_pools(&self) -> Pools {
        let mut pools: Pools =
            self.pools.iter().map(|(name, record)| (name.clone(), record.value.clone())).collect();
        pools.entry(DEFAULT_POOL.to_owned()).or_insert_with(|| Pool::named(DEFAULT_POOL));
        pools
    }

    /// Keeps the routes right for a node that came, changed or went; whether that changes any.
    fn reroute(
        &mut self,
        before: Option<&NodeRecord>,
        after: Option<&NodeRecord>,
        revision: Revision,
    ) -> bool {
        let route = |record: &NodeRecord| (record.subnet.clone(), record.address.clone());
        let (before, after) = (before.map(route), after.map(route));
        if before == after {
            return false;
        }
        if let Some((subnet, _)) = before {
            self.routes.remove(&subnet);
            self.routes_changed.add(revision, &subnet, self.routes.len());
        }
        // Before its first report nobody knows where it is.
        if let Some((subnet, address)) = after.filter(|(_, address)| !address.is_empty()) {
            self.routes_changed.add(revision, &subnet, self.routes.len());
            self.routes.insert(subnet, address);
        }
        true
    }

    /// Keeps the tenants' addresses right for assignments that came, changed or went.
    fn readdress(&mut self, assigned: Vec<(String, String)>, revision: Revision) {
        for (node, sandbox) in assigned {
            let now = self.address(&node, &sandbox);
            if self.sandboxes.get(&sandbox) == now.as_ref() {
                continue;
            }
            if let Some((tenant, address)) = self.sandboxes.remove(&sandbox)
                && let Some(addresses) = self.addresses.get_mut(&tenant)
            {
                addresses.remove(&address);
                let left = addresses.len();
                if left == 0 {
                    self.addresses.remove(&tenant);
                }
                self.addresses_changed.entry(tenant).or_default().add(revision, &address, left);
            }
            if let Some((tenant, address)) = now {
                let addresses = self.addresses.entry(tenant.clone()).or_default();
                addresses.insert(address.clone());
                let changes = self.addresses_changed.entry(tenant.clone()).or_default();
                changes.add(revision, &address, addresses.len());
                self.sandboxes.insert(sandbox, (tenant, address));
            }
        }
    }

    /// Tenant and address of a sandbox that should exist.
    fn address(&self, node: &str, sandbox: &str) -> Option<(String, String)> {
        let assignment = &self.assignments.get(node)?.get(sandbox)?.value;
        let job = &self.jobs.get(&assignment.job)?.value.job;
        let address = job.tasks.get(assignment.rank as usize)?.address.clone()?;
        Some((job.tenant.clone(), address))
    }

    /// What changed of a tenant's addresses; none if it never had any.
    pub fn addresses_changed(&self, tenant: &str) -> Option<&Changes> {
        self.addresses_changed.get(tenant)
    }

    /// What should be on a node.
    pub fn assigned(&self, node: &str) -> impl Iterator<Item = (&String, &Versioned<Assignment>)> {
        self.assignments.get(node).into_iter().flatten()
    }

    /// The tenant of a sandbox that should exist.
    pub fn tenant_of(&self, sandbox: &str) -> Option<&str> {
        self.sandboxes.get(sandbox).map(|(tenant, _)| tenant.as_str())
    }
}

fn set<T>(map: &mut BTreeMap<String, T>, key: &str, value: Option<T>) {
    match value {
        Some(value) => drop(map.insert(key.to_owned(), value)),
        None => drop(map.remove(key)),
    }
}

/// A record that does not decode is as if it were not there, but for that it cannot be written over:
/// whoever tries expects another revision of it.
fn read<T: DeserializeOwned>(key: &str, value: Option<&[u8]>, revision: Revision) -> Option<Versioned<T>> {
    match decode(key, value?, revision) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::error!(%error, "a record is left out");
            None
        }
    }
}
