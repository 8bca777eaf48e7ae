//! What the coordinator wants of a node: assignments and their jobs put together.
//!
//! A pure function of one listing of the store, so that it can be computed again after every change
//! and compared with what the node was last told.

use std::collections::BTreeMap;

use lathe_api::job::Job;
use lathe_api::sandbox::{NodeDesired, NodeNetwork, Route, SandboxDataset, SandboxSpec, TenantAddresses};

use crate::records::{
    ACTIVE_JOBS, ASSIGNMENTS, Assignment, JobRecord, NODES, NodeRecord, Versioned, of_prefix,
};
use crate::store::{Listing, StoreError};

/// What [`node_desired`] needs listed.
pub const PREFIXES: [&str; 3] = [NODES, ASSIGNMENTS, ACTIVE_JOBS];

/// Port rank 0 listens on; torchrun's default.
const MASTER_PORT: u16 = 29500;

/// The desired state of a node; none if it is not registered.
///
/// # Errors
/// When a record does not decode.
pub fn node_desired(listing: &Listing, node: &str) -> Result<Option<NodeDesired>, StoreError> {
    let mut subnet = None;
    let mut routes = Vec::new();
    for record in of_prefix::<NodeRecord>(&listing.entries, NODES) {
        let (name, Versioned { value, .. }) = record?;
        if name == node {
            subnet = Some(value.subnet);
        } else if !value.address.is_empty() {
            // Also nodes that are lost: they may be back any moment, with the same subnet.
            routes.push(Route { subnet: value.subnet, via: value.address });
        }
    }
    let Some(subnet) = subnet else { return Ok(None) };

    let jobs: BTreeMap<String, JobRecord> = of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS)
        .map(|record| record.map(|(id, record)| (id, record.value)))
        .collect::<Result<_, _>>()?;
    let mut tenants: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut sandboxes = Vec::new();
    for record in of_prefix::<Assignment>(&listing.entries, ASSIGNMENTS) {
        let (key, Versioned { value, .. }) = record?;
        let Some((on, sandbox)) = key.split_once('/') else { continue };
        let Some(job) = jobs.get(&value.job) else { continue };
        let Some(address) = address_of(&job.job, value.rank) else { continue };
        tenants.entry(&job.job.tenant).or_default().push(address.to_owned());
        if on == node {
            sandboxes.extend(sandbox_spec(job, &value, sandbox));
        }
    }
    let tenants = tenants
        .into_iter()
        .map(|(tenant, addresses)| TenantAddresses { tenant: tenant.to_owned(), addresses })
        .collect();
    let network = NodeNetwork { subnet, routes, tenants };
    Ok(Some(NodeDesired { revision: listing.revision, network, sandboxes }))
}

fn address_of(job: &Job, rank: u32) -> Option<&str> {
    job.tasks.get(rank as usize)?.address.as_deref()
}

fn sandbox_spec(record: &JobRecord, assignment: &Assignment, id: &str) -> Option<SandboxSpec> {
    let JobRecord { job, image, datasets, .. } = record;
    let spec = &job.spec;
    let mounts = spec.datasets.iter().zip(datasets);
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
        datasets: mounts
            .map(|(mount, dataset)| SandboxDataset { dataset: dataset.clone(), mount: mount.mount.clone() })
            .collect(),
        address: address_of(job, assignment.rank)?.to_owned(),
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
        ("WORLD_SIZE", job.spec.tasks.to_string()),
        ("LOCAL_RANK", "0".to_owned()),
        ("LOCAL_WORLD_SIZE", "1".to_owned()),
        ("NODE_RANK", rank.to_string()),
    ];
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
