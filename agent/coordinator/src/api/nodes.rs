//! Nodes, as people see them.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Path, State};
use lathe_api::MemorySize;
use lathe_api::node::{Node, NodeOperation};
use lathe_api::problem::Problem;

use super::error::ApiError;
use super::extract::{Admin, Json, User};
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::reconcile::model::node;
use crate::records::{
    ALLOCATIONS, Allocations, NODES, NodeRecord, OPERATIONS, Operations, POOLS, Versioned, of_prefix,
};
use crate::{operate, policy};

const REQUEST_BYTES: usize = 64 << 10;

/// All nodes, by name.
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes",
    responses((status = 200, body = Vec<Node>), (status = "4XX", body = Problem)))]
pub async fn list(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
) -> Result<axum::Json<Vec<Node>>, ApiError> {
    nodes(&coordinator, Some(&user)).await.map(axum::Json)
}

/// One node.
#[utoipa::path(get, path = "/v1/nodes/{name}", tag = "nodes", params(("name" = String, Path)),
    responses((status = 200, body = Node), (status = "4XX", body = Problem)))]
pub async fn show(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(name): Path<String>,
) -> Result<axum::Json<Node>, ApiError> {
    let found = nodes(&coordinator, Some(&user)).await?.into_iter().find(|node| node.name == name);
    found.map(axum::Json).ok_or_else(|| ApiError::not_found("node", &name))
}

/// Cordons, drains, labels, taints a node, or announces its maintenance (admin).
#[utoipa::path(post, path = "/v1/nodes/{name}/operations", tag = "nodes", params(("name" = String, Path)),
    request_body = NodeOperation, responses((status = 200, body = Node), (status = "4XX", body = Problem)))]
pub async fn operate(
    State(coordinator): State<Arc<Coordinator>>,
    Admin(who): Admin,
    Path(name): Path<String>,
    Json(operation): Json<NodeOperation, REQUEST_BYTES>,
) -> Result<axum::Json<Node>, ApiError> {
    operate::operate(&coordinator, &who, &name, &operation).await?;
    if operation == NodeOperation::Uncordon {
        // Whoever says that it takes work again has looked at what was wrong.
        if let Some(live) = coordinator.live().get_mut(&name) {
            live.refusals = Default::default();
        }
        coordinator.view.touch(&name);
    }
    let found = nodes(&coordinator, None).await?.into_iter().find(|node| node.name == name);
    found.map(axum::Json).ok_or_else(|| ApiError::not_found("node", &name))
}

/// All nodes as the API shows them, to this user or to the coordinator itself: pools that others have
/// for themselves are not named to a user.
pub(super) async fn nodes(coordinator: &Coordinator, user: Option<&User>) -> Result<Vec<Node>, ApiError> {
    let listing = coordinator.store.list(&[NODES, ALLOCATIONS, OPERATIONS, POOLS]).await?;
    let allocations: HashMap<String, Versioned<Allocations>> =
        of_prefix(&listing.entries, ALLOCATIONS).collect::<Result<_, _>>()?;
    let mut operations: HashMap<String, Versioned<Operations>> =
        of_prefix(&listing.entries, OPERATIONS).collect::<Result<_, _>>()?;
    let pools = policy::pools(&listing.entries)?;
    let (live, now) = (coordinator.live(), now_ms());
    of_prefix::<NodeRecord>(&listing.entries, NODES)
        .map(|record| {
            let (name, Versioned { value, .. }) = record?;
            let used = || allocations.get(&name).into_iter().flat_map(|of| of.value.sandboxes.values());
            let operations = operations.remove(&name).map(|of| of.value).unwrap_or_default();
            let labels = operations.labels_of(&value.inventory);
            let own = pools.values().filter(|pool| {
                user.is_none_or(|user| user.is_admin() || pool.admits(&user.0.tenant))
                    && policy::has_node(&pools, pool, &name, &labels)
            });
            Ok(Node {
                pools: own.map(|pool| pool.name.clone()).collect(),
                labels,
                offer: live
                    .get(&name)
                    .map_or(operations.offer.clone(), |live| node::offer(&operations, live, now)),
                taints: operations.taints,
                maintenance: operations.maintenance,
                address: value.address,
                subnet: value.subnet,
                state: value.state,
                allocated_cpus: used().map(|one| one.cpus).sum(),
                allocated_memory: MemorySize::from_bytes(used().map(|one| one.memory_bytes).sum()),
                allocated_gpus: used().map(|one| u32::try_from(one.gpus.len()).unwrap_or(u32::MAX)).sum(),
                last_heartbeat_ms: live
                    .get(&name)
                    .map_or(value.last_heartbeat_ms, |live| live.last_heartbeat_ms),
                inventory: value.inventory,
                name,
            })
        })
        .collect()
}
