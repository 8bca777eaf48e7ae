//! Pools and tenants, and what operators did.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use lathe_api::MemorySize;
use lathe_api::job::{Job, JobState};
use lathe_api::node::{Node, NodeState};
use lathe_api::pool::{Amounts, Pool, PoolStatus, Tenant, TenantStatus, TenantUsage};
use lathe_api::problem::Problem;
use lathe_api::scheduling::AuditEntry;

use super::error::ApiError;
use super::extract::{Admin, Json, User};
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::policy::{self, Pools, Tenants};
use crate::provider::{fleet::Fleet, status};
use crate::records::{ACTIVE_JOBS, FLEETS, JobRecord, POOLS, TENANTS, load_all, of_prefix};
use crate::{audit, operate};

const REQUEST_BYTES: usize = 256 << 10;

/// All pools that the caller's tenant may use, by name; all for an admin.
#[utoipa::path(get, path = "/v1/pools", tag = "pools",
    responses((status = 200, body = Vec<PoolStatus>), (status = "4XX", body = Problem)))]
pub async fn pools(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
) -> Result<axum::Json<Vec<PoolStatus>>, ApiError> {
    statuses(&coordinator, &user).await.map(axum::Json)
}

/// One pool.
#[utoipa::path(get, path = "/v1/pools/{name}", tag = "pools", params(("name" = String, Path)),
    responses((status = 200, body = PoolStatus), (status = "4XX", body = Problem)))]
pub async fn pool(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(name): Path<String>,
) -> Result<axum::Json<PoolStatus>, ApiError> {
    let found = statuses(&coordinator, &user).await?.into_iter().find(|status| status.pool.name == name);
    found.map(axum::Json).ok_or_else(|| ApiError::not_found("pool", &name))
}

/// Makes a pool, or replaces what was set of it (admin). Jobs that are in it stay.
#[utoipa::path(put, path = "/v1/pools/{name}", tag = "pools", params(("name" = String, Path)),
    request_body = Pool, responses((status = 200, body = Pool), (status = "4XX", body = Problem)))]
pub async fn set_pool(
    State(coordinator): State<Arc<Coordinator>>,
    Admin(who): Admin,
    Path(name): Path<String>,
    Json(pool): Json<Pool, REQUEST_BYTES>,
) -> Result<axum::Json<Pool>, ApiError> {
    same_name(&name, &pool.name)?;
    operate::set_pool(&coordinator, &who, &pool).await?;
    Ok(axum::Json(pool))
}

/// Removes a pool without jobs and parts (admin). The default pool becomes what it was at first.
#[utoipa::path(delete, path = "/v1/pools/{name}", tag = "pools", params(("name" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn remove_pool(
    State(coordinator): State<Arc<Coordinator>>,
    Admin(who): Admin,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    operate::remove_pool(&coordinator, &who, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The caller's tenant; for an admin all that were set, hold tokens' jobs, or both.
#[utoipa::path(get, path = "/v1/tenants", tag = "tenants",
    responses((status = 200, body = Vec<TenantStatus>), (status = "4XX", body = Problem)))]
pub async fn tenants(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
) -> Result<axum::Json<Vec<TenantStatus>>, ApiError> {
    tenant_statuses(&coordinator, &user).await.map(axum::Json)
}

/// One tenant: the caller's own, or any for an admin.
#[utoipa::path(get, path = "/v1/tenants/{name}", tag = "tenants", params(("name" = String, Path)),
    responses((status = 200, body = TenantStatus), (status = "4XX", body = Problem)))]
pub async fn tenant(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(name): Path<String>,
) -> Result<axum::Json<TenantStatus>, ApiError> {
    let all = tenant_statuses(&coordinator, &user).await?;
    let found = all.into_iter().find(|status| status.tenant.name == name);
    found.map(axum::Json).ok_or_else(|| ApiError::not_found("tenant", &name))
}

/// Sets a tenant's weight and quota (admin).
#[utoipa::path(put, path = "/v1/tenants/{name}", tag = "tenants", params(("name" = String, Path)),
    request_body = Tenant, responses((status = 200, body = Tenant), (status = "4XX", body = Problem)))]
pub async fn set_tenant(
    State(coordinator): State<Arc<Coordinator>>,
    Admin(who): Admin,
    Path(name): Path<String>,
    Json(tenant): Json<Tenant, REQUEST_BYTES>,
) -> Result<axum::Json<Tenant>, ApiError> {
    same_name(&name, &tenant.name)?;
    operate::set_tenant(&coordinator, &who, &tenant).await?;
    Ok(axum::Json(tenant))
}

/// Forgets a tenant's weight and quota (admin). Its jobs and tokens stay.
#[utoipa::path(delete, path = "/v1/tenants/{name}", tag = "tenants", params(("name" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn remove_tenant(
    State(coordinator): State<Arc<Coordinator>>,
    Admin(who): Admin,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    operate::remove_tenant(&coordinator, &who, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What operators did, oldest first; the latest 4,096 (admin).
#[utoipa::path(get, path = "/v1/audit", tag = "audit",
    responses((status = 200, body = Vec<AuditEntry>), (status = "4XX", body = Problem)))]
pub async fn audit_log(
    State(coordinator): State<Arc<Coordinator>>,
    _: Admin,
) -> Result<axum::Json<Vec<AuditEntry>>, ApiError> {
    Ok(axum::Json(audit::entries(&*coordinator.store).await?))
}

fn same_name(path: &str, body: &str) -> Result<(), ApiError> {
    if path == body {
        return Ok(());
    }
    Err(ApiError::field("name", format!("{body:?}: the address says {path:?}")))
}

/// Pools, tenants and jobs that have not ended, of one moment.
async fn settings(coordinator: &Coordinator) -> Result<(Pools, Tenants, Vec<Job>), ApiError> {
    let listing = coordinator.store.list(&[POOLS, TENANTS, ACTIVE_JOBS]).await?;
    let jobs = of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS)
        .map(|record| record.map(|(_, record)| record.value.job))
        .collect::<Result<_, _>>()?;
    Ok((policy::pools(&listing.entries)?, policy::tenants(&listing.entries)?, jobs))
}

async fn statuses(coordinator: &Coordinator, user: &User) -> Result<Vec<PoolStatus>, ApiError> {
    let (pools, _, jobs) = settings(coordinator).await?;
    let nodes = super::nodes::nodes(coordinator, None).await?;
    let fleets: BTreeMap<String, Fleet> = load_all(&*coordinator.store, FLEETS)
        .await?
        .into_iter()
        .map(|(name, fleet)| (name, fleet.value))
        .collect();
    let visible = pools.values().filter(|pool| user.is_admin() || pool.admits(&user.0.tenant));
    let programs = &coordinator.options.providers;
    Ok(visible
        .map(|pool| {
            let fleet = fleets.get(&pool.name);
            let provider = status::status(pool, fleet, programs, user.is_admin(), now_ms());
            PoolStatus { provider, ..status_of(&pools, pool, &nodes, &jobs) }
        })
        .collect())
}

fn status_of(pools: &Pools, pool: &Pool, nodes: &[Node], jobs: &[Job]) -> PoolStatus {
    let mut capacity = Amounts::default();
    let mut count = 0;
    for node in nodes.iter().filter(|node| node.state == NodeState::Ready) {
        if policy::has_node(pools, pool, &node.name, &node.labels) {
            count += 1;
            add(&mut capacity, &amounts_of(node));
        }
    }
    let usage = usage(jobs.iter().filter(|job| job.spec.pool == pool.name));
    PoolStatus {
        pool: pool.clone(),
        nodes: count,
        capacity,
        usage: usage.amounts,
        running: usage.running,
        pending: usage.pending,
        provider: None,
    }
}

fn amounts_of(node: &Node) -> Amounts {
    Amounts {
        cpus: node.inventory.cpus.online.into(),
        memory: node.inventory.memory.unwrap_or(MemorySize::from_bytes(0)),
        gpus: node.inventory.gpus.iter().filter(|gpu| gpu.is_usable()).count() as u64,
        tasks: crate::network::SANDBOXES_PER_NODE,
    }
}

async fn tenant_statuses(coordinator: &Coordinator, user: &User) -> Result<Vec<TenantStatus>, ApiError> {
    let (_, mut tenants, jobs) = settings(coordinator).await?;
    let mut own: BTreeMap<String, Vec<Job>> = BTreeMap::new();
    for job in jobs {
        own.entry(job.tenant.clone()).or_default().push(job);
    }
    // Somebody who was never set and has no job is there too, to himself.
    let known = own.keys().cloned().chain(std::iter::once(user.0.tenant.clone())).collect::<Vec<_>>();
    for name in known {
        tenants.entry(name.clone()).or_insert_with(|| Tenant::named(&name));
    }
    let visible = tenants.into_values().filter(|tenant| user.may(&tenant.name));
    Ok(visible
        .map(|tenant| {
            let jobs = own.get(&tenant.name).map(Vec::as_slice).unwrap_or_default();
            let mut pools: Vec<&str> = jobs.iter().map(|job| job.spec.pool.as_str()).collect();
            pools.sort_unstable();
            pools.dedup();
            let in_pool = |pool: &str| TenantUsage {
                pool: pool.to_owned(),
                ..usage(jobs.iter().filter(|job| job.spec.pool == pool))
            };
            TenantStatus { usage: pools.into_iter().map(in_pool).collect(), tenant }
        })
        .collect())
}

/// What these jobs use; the pool's name is left empty.
fn usage<'a>(jobs: impl Iterator<Item = &'a Job>) -> TenantUsage {
    let mut usage = TenantUsage { pool: String::new(), amounts: Amounts::default(), running: 0, pending: 0 };
    for job in jobs {
        if job.state == JobState::Pending {
            usage.pending += 1;
            continue;
        }
        usage.running += 1;
        let tasks = job.tasks.iter().filter(|task| task.sandbox.is_some() && !task.state.is_terminal());
        let tasks = u32::try_from(tasks.count()).unwrap_or(u32::MAX);
        let each = &job.spec.resources;
        let times = |one: u32| u64::from(one) * u64::from(tasks);
        let memory = MemorySize::from_bytes(each.memory.bytes().saturating_mul(tasks.into()));
        add(&mut usage.amounts, &Amounts { cpus: times(each.cpus), memory, gpus: times(each.gpus), tasks });
    }
    usage
}

fn add(sum: &mut Amounts, more: &Amounts) {
    sum.cpus = sum.cpus.saturating_add(more.cpus);
    sum.memory = MemorySize::from_bytes(sum.memory.bytes().saturating_add(more.memory.bytes()));
    sum.gpus = sum.gpus.saturating_add(more.gpus);
    sum.tasks = sum.tasks.saturating_add(more.tasks);
}
