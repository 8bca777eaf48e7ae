//! What the coordinator wants of a node: assignments and their jobs put together.
//!
//! A pure function of the records, so that it can be computed again after every change and compared
//! with what the node was last told.

use std::collections::BTreeSet;

use lathe_api::job::{Job, TaskState};
use lathe_api::sandbox::{NodeDesired, NodeNetwork, Route, SandboxDataset, SandboxSpec, TenantAddresses};
use lathe_api::service::{Backend, NodeService, ServiceState};

use crate::policy;
use crate::records::{Assignment, JobRecord};
use crate::services::ServiceRecord;
use crate::state::Contents;

/// Port rank 0 listens on; torchrun's default.
const MASTER_PORT: u16 = 29500;

/// What should be on a node, without its network; none if it is not registered.
pub fn node_desired(contents: &Contents, node: &str) -> Option<NodeDesired> {
    contents.nodes.get(node)?;
    let sandboxes = contents.assigned(node).filter_map(|(sandbox, assignment)| {
        let job = contents.jobs.get(&assignment.value.job)?;
        sandbox_spec(contents, &job.value, &assignment.value, node, sandbox)
    });
    Some(NodeDesired {
        revision: contents.revision,
        network: None,
        services: None,
        sandboxes: sandboxes.collect(),
    })
}

/// What the sandboxes' network looks like from a node; none if it is not registered.
pub fn node_network(contents: &Contents, node: &str) -> Option<NodeNetwork> {
    let subnet = contents.nodes.get(node)?.value.subnet.clone();
    // Also nodes that are lost: they may be back any moment, with the same subnet.
    let others = contents.nodes.iter().filter(|(name, of)| *name != node && !of.value.address.is_empty());
    let routes = others
        .map(|(_, of)| Route { subnet: of.value.subnet.clone(), via: of.value.address.clone() })
        .collect();
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

/// What [`node_network`] is made of, as far as it takes to see that it changed.
#[derive(Debug, PartialEq, Eq)]
pub struct NetworkBasis {
    /// The commit that last changed a route or an address of these tenants.
    changed: u64,
    /// Those with sandboxes on the node: one that leaves takes its addresses with it, although none of
    /// the others changed.
    tenants: BTreeSet<String>,
}

/// What [`node_network`] would be made of.
pub fn network_basis(contents: &Contents, node: &str) -> NetworkBasis {
    let tenants = tenants_on(contents, node);
    let changed = contents.routes_changed.max(contents.addresses_changed(tenants.iter().copied()));
    NetworkBasis { changed, tenants: tenants.into_iter().map(str::to_owned).collect() }
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
