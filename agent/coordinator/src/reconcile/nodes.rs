//! Nodes whose heartbeats ended.

use std::collections::BTreeSet;

use lathe_api::node::NodeState;

use crate::coordinator::Coordinator;
use crate::observe;
use crate::records::{ALIVE, ASSIGNMENTS, NODES, NodeRecord, of_prefix, put};
use crate::store::{Outcome, StoreError, Transaction};

/// Marks nodes without a live heartbeat as lost, and everything on them.
pub(super) async fn expire(coordinator: &Coordinator) -> Result<(), StoreError> {
    let listing = coordinator.store.list(&[ALIVE, NODES, ASSIGNMENTS]).await?;
    let under =
        |prefix: &'static str| listing.entries.iter().filter_map(move |entry| entry.key.strip_prefix(prefix));
    let alive: BTreeSet<&str> = under(ALIVE).collect();
    let used: BTreeSet<&str> = under(ASSIGNMENTS).filter_map(|key| key.split('/').next()).collect();
    for node in of_prefix::<NodeRecord>(&listing.entries, NODES) {
        let (name, node) = node?;
        if alive.contains(name.as_str()) {
            continue;
        }
        if node.value.state == NodeState::Ready {
            let last_heartbeat_ms =
                coordinator.live().get(&name).map_or(node.value.last_heartbeat_ms, |l| l.last_heartbeat_ms);
            let key = format!("{NODES}{name}");
            let record = NodeRecord { state: NodeState::Lost, lease: None, last_heartbeat_ms, ..node.value };
            let transaction = Transaction {
                // Neither a report nor a join may have come in between.
                expect: vec![(key.clone(), Some(node.revision)), (format!("{ALIVE}{name}"), None)],
                writes: vec![put(key, &record)?],
            };
            if let Outcome::Conflict { .. } = coordinator.store.commit(transaction).await? {
                continue;
            }
            tracing::warn!(node = name, "node lost: no report in time");
        }
        // Apart from the above, so that a crash between the two leaves nothing undone.
        if used.contains(name.as_str()) {
            observe::lose_node(coordinator, &name, &format!("node {name} stopped reporting")).await?;
        }
    }
    Ok(())
}
