//! What the coordinator wants of a node: assignments and their jobs put together.
//!
//! Pure functions of the records, so that they can be computed again after every change and compared
//! with what the node was last told.

use std::collections::BTreeSet;

use lathe_api::job::{Job, TaskState};
use lathe_api::sandbox::{
    NetworkChanges, NodeNetwork, Route, SandboxDataset, SandboxSpec, TenantAddresses, TenantChanges,
};
use lathe_api::service::{Backend, NodeService, ServiceState};

use crate::policy;
use crate::records::{Assignment, JobRecord};
use crate::services::ServiceRecord;
use crate::state::Contents;
use crate::store::Revision;

/// Port rank 0 listens on; torchrun's default.
const MASTER_PORT: u16 = 29500;

/// The sandboxes that should be on a node; none if it is not registered.
pub fn sandboxes(contents: &Contents, node: &str) -> Option<Vec<SandboxSpec>> {
    contents.nodes.get(node)?;
    let sandboxes = contents.assigned(node).filter_map(|(sandbox, assignment)| {
        let job = contents.jobs.get(&assignment.value.job)?;
        sandbox_spec(contents, &job.value, &assignment.value, node, sandbox)
    });
    Some(sandboxes.collect())
}

/// What the sandboxes' network looks like from a node; none if it is not registered.
pub fn network(contents: &Contents, node: &str) -> Option<NodeNetwork> {
    let subnet = contents.nodes.get(node)?.value.subnet.clone();
    // Also nodes that are lost: they may be back any moment, with the same subnet.
    let others = contents.routes.iter().filter(|(of, _)| **of != subnet);
    let routes = others.map(|(subnet, via)| Route { subnet: subnet.clone(), via: via.clone() }).collect();
    let tenants = tenants_on(contents, node)
        .into_iter()
        .filter_map(|tenant| {
            let addresses = contents.addresses.get(tenant)?.iter().cloned().collect();
            Some(TenantAddresses { tenant: tenant.to_owned(), addresses })
        })
        .collect();
    Some(NodeNetwork { subnet, routes, tenants, served: Vec::new() })
}

/// The services that a node takes requests for: those of the pools that it is in.
pub fn node_services(contents: &Contents, node: &str) -> Vec<NodeService> {
    if contents.services.is_empty() {
        return Vec::new();
    }
    let Some(record) = contents.nodes.get(node) else { return Vec::new() };
    let pools = contents.all_pools();
    let operations = contents.operations.get(node).map(|record| record.value.clone()).unwrap_or_default();
    let labels = operations.labels_of(&record.value.inventory);
    let here = |service: &&ServiceRecord| {
        let pool = pools.get(&service.spec.pool);
        pool.is_some_and(|pool| policy::has_node(&pools, pool, node, &labels))
    };
    let services = contents.services.values().map(|record| &record.value).filter(here);
    services.filter_map(|service| node_service(contents, service)).collect()
}

fn node_service(contents: &Contents, record: &ServiceRecord) -> Option<NodeService> {
    let service = record.service()?;
    let replicas = contents.replicas(&record.id);
    Some(NodeService {
        id: record.id.clone(),
        // What is in flight still has the replicas' grace periods.
        closing: record.state != ServiceState::Active,
        protocol: service.protocol,
        listen: record.listen,
        expose: service.expose,
        max_waiting: service.max_waiting,
        max_wait_seconds: service.max_wait.seconds(),
        replicas: replicas.iter().filter_map(|job| backend(&job.value)).collect(),
    })
}

/// A replica that has something in flight, or may get something.
pub fn backend(record: &JobRecord) -> Option<Backend> {
    let port = record.job.spec.service.as_ref()?.port;
    let replica = record.replica.as_ref()?;
    let task = record.job.tasks.first()?;
    if !matches!(task.state, TaskState::Running | TaskState::Stopping) {
        return None;
    }
    let stays = !record.cancelled && record.stopping.is_none() && replica.draining_since_ms.is_none();
    Some(Backend {
        sandbox: task.sandbox.clone()?,
        address: task.address.clone()?,
        port,
        accepts: stays && task.ready && task.state == TaskState::Running,
    })
}

/// How far a node knows its network. What it was told is not kept: a thousand nodes that each know of
/// a thousand would be a million routes.
#[derive(Debug, PartialEq, Eq)]
pub struct NetworkKnown {
    /// The commit that it was told of last.
    revision: Revision,
    /// Tenants that it was told of: one that leaves the node has to be taken back, although nothing of
    /// the others changed.
    tenants: BTreeSet<String>,
}

impl NetworkKnown {
    /// Once a node was told [`network`].
    pub fn now(contents: &Contents, node: &str) -> Self {
        let tenants = tenants_on(contents, node).into_iter().map(str::to_owned).collect();
        Self { revision: contents.revision, tenants }
    }

    /// Whether there is nothing to tell.
    pub fn is_current(&self, contents: &Contents, node: &str) -> bool {
        let tenants = tenants_on(contents, node);
        let changed = |tenant: &&str| {
            contents.addresses_changed(tenant).is_some_and(|changes| changes.last() > self.revision)
        };
        contents.routes_changed.last() <= self.revision
            && tenants.iter().copied().eq(self.tenants.iter().map(String::as_str))
            && !tenants.iter().any(changed)
    }

    /// What is different now of the network that the node knows; none if that is no longer known, and all
    /// has to be told again.
    pub fn changes(&self, contents: &Contents, node: &str) -> Option<NetworkChanges> {
        let own = &contents.nodes.get(node)?.value.subnet;
        let mut changes = NetworkChanges::default();
        for subnet in contents.routes_changed.since(self.revision)?.into_iter().filter(|one| *one != own) {
            match contents.routes.get(subnet) {
                Some(via) => {
                    changes.routes.push(Route { subnet: subnet.to_owned(), via: via.clone() });
                }
                None => changes.routes_gone.push(subnet.to_owned()),
            }
        }
        let tenants = tenants_on(contents, node);
        let gone = self.tenants.iter().filter(|tenant| !tenants.contains(tenant.as_str()));
        changes.tenants_gone = gone.cloned().collect();
        for tenant in tenants {
            let different = self.tenant_changes(contents, tenant)?;
            if !different.came.is_empty() || !different.went.is_empty() {
                changes.tenants.push(different);
            }
        }
        Some(changes)
    }

    fn tenant_changes(&self, contents: &Contents, tenant: &str) -> Option<TenantChanges> {
        let none = BTreeSet::new();
        let addresses = contents.addresses.get(tenant).unwrap_or(&none);
        let mut changes = TenantChanges { tenant: tenant.to_owned(), ..TenantChanges::default() };
        if !self.tenants.contains(tenant) {
            changes.came = addresses.iter().cloned().collect();
            return Some(changes);
        }
        let Some(changed) = contents.addresses_changed(tenant) else { return Some(changes) };
        for address in changed.since(self.revision)? {
            let list = if addresses.contains(address) { &mut changes.came } else { &mut changes.went };
            list.push(address.to_owned());
        }
        Some(changes)
    }
}

fn tenants_on<'a>(contents: &'a Contents, node: &str) -> BTreeSet<&'a str> {
    contents.assigned(node).filter_map(|(sandbox, _)| contents.tenant_of(sandbox)).collect()
}

fn address_of(job: &Job, rank: u32) -> Option<&str> {
    job.tasks.get(rank as usize)?.address.as_deref()
}

fn sandbox_spec(
    contents: &Contents,
    record: &JobRecord,
    assignment: &Assignment,
    node: &str,
    id: &str,
) -> Option<SandboxSpec> {
    let JobRecord { job, image, datasets, .. } = record;
    let spec = &job.spec;
    let mounts = spec.datasets.iter().zip(datasets);
    let allocation = contents.allocations.get(node).and_then(|of| of.value.sandboxes.get(id));
    Some(SandboxSpec {
        id: id.to_owned(),
        tenant: job.tenant.clone(),
        job: job.id.clone(),
        rank: assignment.rank,
        desired: assignment.desired,
        class: spec.class,
        image: image.clone(),
        entrypoint: spec.entrypoint.clone(),
        args: spec.args.clone(),
        env: environment(job, assignment.rank)?,
        resources: spec.resources.clone(),
        gpus: allocation.map(|allocation| allocation.gpus.clone()).unwrap_or_default(),
        numa_node: allocation.and_then(|allocation| {
            // The planner counts them by their place in the list.
            let inventory = &contents.nodes.get(node)?.value.inventory;
            inventory.numa.get(usize::from(allocation.numa?)).map(|numa| numa.id)
        }),
        datasets: mounts
            .map(|(mount, dataset)| SandboxDataset { dataset: dataset.clone(), mount: mount.mount.clone() })
            .collect(),
        address: address_of(job, assignment.rank)?.to_owned(),
        port: spec.service.as_ref().map(|service| service.port),
        hosts: hosts(job),
        grace_seconds: spec.grace_seconds,
    })
}

/// The job's own variables and those of the gang, which win: a job that sets `RANK` itself would
/// only break.
///
/// Every sandbox is a machine of its own with its own devices and address, so each is a node with
/// one local rank, as torchrun and MPI would see separate hosts.
fn environment(job: &Job, rank: u32) -> Option<Vec<(String, String)>> {
    let mut env = job.spec.env.clone();
    let gang = [
        ("MASTER_ADDR", address_of(job, 0)?.to_owned()),
        ("MASTER_PORT", MASTER_PORT.to_string()),
        ("RANK", rank.to_string()),
        // As many as were placed: an elastic gang has fewer than it asked for at times.
        ("WORLD_SIZE", job.tasks.len().to_string()),
        ("LOCAL_RANK", "0".to_owned()),
        ("LOCAL_WORLD_SIZE", "1".to_owned()),
        ("NODE_RANK", rank.to_string()),
    ];
    env.extend(job.spec.service.as_ref().map(|service| ("PORT".to_owned(), service.port.to_string())));
    env.extend(gang.map(|(name, value)| (name.to_owned(), value)));
    Some(env.into_iter().collect())
}

/// `<job>-<rank>` for each member: stable over restarts of the gang.
fn hosts(job: &Job) -> Vec<(String, String)> {
    job.tasks
        .iter()
        .filter_map(|task| Some((task.address.clone()?, format!("{}-{}", job.id, task.rank))))
        .collect()
}
