//! Nodes whose heartbeats ended.

use std::sync::Arc;

use lathe_api::node::NodeState;

use crate::coordinator::Coordinator;
use crate::observe;
use crate::records::{ALIVE, NODES, NodeRecord, Versioned, put};
use crate::store::{Outcome, StoreError, Transaction};

/// Marks nodes without a live heartbeat as lost, and everything on them.
pub(super) async fn expire(coordinator: &Coordinator) -> Result<(), StoreError> {
    let gone: Vec<(Arc<Versioned<NodeRecord>>, bool)> = coordinator.view.read(|contents| {
        let gone = contents.nodes.iter().filter(|(name, _)| !contents.alive.contains_key(*name));
        gone.map(|(name, node)| (Arc::clone(node), contents.assignments.contains_key(name)))
            .filter(|(node, used)| *used || node.value.state == NodeState::Ready)
            .collect()
    });
    for (node, used) in gone {
        let name = &node.value.name;
        if node.value.state == NodeState::Ready {
            let last_heartbeat_ms =
                coordinator.live().get(name).map_or(node.value.last_heartbeat_ms, |l| l.last_heartbeat_ms);
            let key = format!("{NODES}{name}");
            let lost =
                NodeRecord { state: NodeState::Lost, lease: None, last_heartbeat_ms, ..node.value.clone() };
            let transaction = Transaction {
                // Neither a report nor a join may have come in between.
                expect: vec![(key.clone(), Some(node.revision)), (format!("{ALIVE}{name}"), None)],
                writes: vec![put(key, &lost)?],
            };
            match coordinator.store.commit(transaction).await? {
                Outcome::Committed(revision) => coordinator.view.reached(revision).await,
                Outcome::Conflict { .. } => continue,
            }
            tracing::warn!(node = name, "node lost: no report in time");
        }
        // Apart from the above, so that a crash between the two leaves nothing undone.
        if used {
            observe::lose_node(coordinator, name, &format!("node {name} stopped reporting")).await?;
        }
    }
    Ok(())
}
