//! The reconciler: makes what is stored follow what is observed.
//!
//! - `nodes`: nodes whose heartbeats ended are lost, and their tasks with them.
//! - `jobs`: gangs whose tasks ended, failed or were lost are finished, stopped or started again.
//! - `services`: as many replicas as what is in flight needs.
//! - [`model`]: the records as the planner sees them. `planning`: rounds of the planner.
//! - `place`: what was planned is checked again and committed.
//!
//! Level-triggered: a round takes nothing but the store's records (and which nodes have reported), is
//! idempotent, and runs on every change and on a timer. What it keeps from round to round (the view
//! knows which records changed, the model holds what the planner needs, the planner the lengths of past
//! jobs) only saves it from looking at everything again: it is thrown away and made anew from the store
//! whenever a round fails, and for certain every [`SWEEP`]. A round that fails or loses a race leaves
//! the rest to the next one. One round runs at a time.

mod jobs;
pub mod model;
mod nodes;
mod place;
mod planning;
mod services;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use jobs::advance;
pub(crate) use jobs::fresh_tasks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use planning::Planning;

use crate::coordinator::Coordinator;
use crate::store::StoreError;

/// A round happens at least this often, whatever is missed.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often everything is looked at, whatever is said to have changed.
const SWEEP: Duration = Duration::from_secs(60);
/// Between rounds: so long that what comes together is handled together, and as long as the last round
/// took, so that reports and submissions have their half of the machine.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Runs rounds until the coordinator shuts down.
pub async fn run(coordinator: Arc<Coordinator>) {
    let mut planning = Planning::default();
    let mut swept = Instant::now();
    loop {
        let started = Instant::now();
        if swept.elapsed() >= SWEEP {
            swept = started;
            coordinator.view.forget_seen();
        }
        if let Err(error) = round(&coordinator, &mut planning).await {
            tracing::error!(%error, "a reconciliation failed; the next one tries again");
            coordinator.view.forget_seen();
        }
        let spent = started.elapsed();
        coordinator.metrics.reconciliations.add(1);
        coordinator.metrics.reconcile_us.add(u64::try_from(spent.as_micros()).unwrap_or(u64::MAX));
        tokio::select! {
            () = coordinator.shutdown.cancelled() => break,
            () = tokio::time::sleep(spent.clamp(PAUSE_MIN, PAUSE_MAX)) => {}
        }
        tokio::select! {
            () = coordinator.shutdown.cancelled() => break,
            () = coordinator.changed.notified() => {}
            () = coordinator.view.news() => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
    if let Err(error) = planning.save_usage(&coordinator).await {
        tracing::error!(%error, "what tenants had lately is forgotten");
    }
}

/// One round.
async fn round(coordinator: &Arc<Coordinator>, planning: &mut Planning) -> Result<(), StoreError> {
    nodes::expire(coordinator).await?;
    let unseen = coordinator.view.take_unseen();
    let succeeded = jobs::advance_all(coordinator, (!unseen.all).then_some(&unseen.jobs)).await?;
    services::advance_all(coordinator).await?;
    planning.round(coordinator, unseen, &succeeded).await
}
