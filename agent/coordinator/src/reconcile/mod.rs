//! The reconciler: makes what is stored follow what is observed.
//!
//! - `nodes`: nodes whose heartbeats ended are lost, and their tasks with them.
//! - `jobs`: gangs whose tasks ended, failed or were lost are finished, stopped or started again.
//! - `place`: pending gangs are planned and placed.
//!
//! Level-triggered: a round takes nothing but the store (and which nodes have reported), is
//! idempotent, keeps no state of its own, and runs on every change and on a timer. A round that
//! fails or loses a race leaves the rest to the next one. One round runs at a time.

mod jobs;
mod nodes;
mod place;

pub(crate) use jobs::fresh_tasks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::coordinator::Coordinator;
use crate::store::StoreError;

/// A round happens at least this often, whatever is missed.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs rounds until the coordinator shuts down.
pub async fn run(coordinator: Arc<Coordinator>) {
    loop {
        let revision = match coordinator.store.list(&[]).await {
            Ok(listing) => listing.revision,
            Err(error) => {
                tracing::error!(%error, "cannot read the store");
                0
            }
        };
        let started = Instant::now();
        if let Err(error) = round(&coordinator).await {
            tracing::error!(%error, "a reconciliation failed; the next one tries again");
        }
        coordinator.metrics.reconciliations.add(1);
        let spent = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        coordinator.metrics.reconcile_us.add(spent);
        tokio::select! {
            () = coordinator.shutdown.cancelled() => return,
            () = coordinator.changed.notified() => {}
            () = changed_since(&coordinator, revision) => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

/// Returns when anything was committed after the round began; the round's own commits count too,
/// because they may allow the next step.
async fn changed_since(coordinator: &Coordinator, revision: u64) {
    match coordinator.store.watch(revision) {
        // Whatever the outcome, it is time to look again.
        Ok(mut watch) => {
            let _ = watch.next().await;
        }
        Err(_) => tokio::time::sleep(INTERVAL).await,
    }
}

/// One round.
///
/// # Errors
/// When the store fails.
pub async fn round(coordinator: &Coordinator) -> Result<(), StoreError> {
    nodes::expire(coordinator).await?;
    jobs::advance_all(coordinator).await?;
    place::place(coordinator).await
}
