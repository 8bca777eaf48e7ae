//! Rounds of the planner: the model is brought up to date, planned on, and the plan is carried out.

use std::sync::Arc;

use lathe_scheduler::planner::Usage;
use lathe_scheduler::{Gang, Plan, Planner};

use super::model::Model;
use super::place;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::dry_run::Moment;
use crate::records::{ENDED_JOBS, JobRecord, decode};
use crate::state::Unseen;
use crate::store::StoreError;
use crate::usage::Kept;

/// How long what is planned holds although nothing changed: times pass for policies that look at them.
const REPLAN_MS: u64 = 5_000;
/// Past jobs that the planner learns lengths from after it was made anew.
const HISTORY: usize = 10_000;
/// Read at once.
const PAGE: usize = 512;
/// Chance plays no part in the coordinator, so that a plan can be explained.
const SEED: u64 = 1;

/// What is kept from round to round.
#[derive(Debug, Default)]
pub struct Planning {
    model: Model,
    planner: Option<Planner>,
    /// Jobs that ended by themselves, oldest first, with how long they ran.
    history: std::collections::VecDeque<(Arc<Gang>, u64)>,
    /// What is written of what tenants had; none before it was read, with the history.
    kept: Option<Kept>,
    /// What the next planner goes on from.
    usage: Usage,
    planned_ms: u64,
}

impl Planning {
    /// One round.
    ///
    /// # Errors
    /// When the store fails; everything must then be looked at again.
    pub(super) async fn round(
        &mut self,
        coordinator: &Arc<Coordinator>,
        unseen: Unseen,
        succeeded: &[JobRecord],
    ) -> Result<(), StoreError> {
        let Some((plan, now)) = self.plan(coordinator, unseen, succeeded).await? else { return Ok(()) };
        self.carry_out(coordinator, plan, now).await?;
        if self.kept.as_ref().is_some_and(|kept| kept.is_due(now)) {
            self.save_usage(coordinator).await?;
        }
        Ok(())
    }

    /// Plans with what is true now, and says when that was; none if nothing changed.
    pub(super) async fn plan(
        &mut self,
        coordinator: &Arc<Coordinator>,
        unseen: Unseen,
        succeeded: &[JobRecord],
    ) -> Result<Option<(Plan, u64)>, StoreError> {
        let now = now_ms();
        if self.kept.is_none() {
            self.read_history(coordinator).await?;
            let (kept, usage) = Kept::load(&*coordinator.store, now).await?;
            (self.kept, self.usage) = (Some(kept), usage);
        }
        for record in succeeded {
            self.learn(record);
        }
        let unseen = with_recovered(coordinator, unseen, now);
        let dry_run = coordinator.dry_runs.take();
        if dry_run.is_none() && unseen.is_empty() && now.saturating_sub(self.planned_ms) < REPLAN_MS {
            return Ok(None);
        }
        let live = coordinator.live().clone();
        coordinator.view.read(|contents| self.model.sync(contents, &live, &unseen, now));
        self.keep_planner();
        if let Some((ask, planner)) = dry_run.zip(self.planner.clone()) {
            let (cluster, pending) = (self.model.cluster.clone(), self.model.pending());
            // Whoever gave up meanwhile does not need it.
            let _ = ask.send(Moment { cluster, pending, planner, now_ms: now });
        }
        self.planned_ms = now;
        // Whole cores for some time: not on a thread that answers requests.
        let mut moved = std::mem::take(self);
        let planned = tokio::task::spawn_blocking(move || {
            let plan = moved.cycle(now);
            (moved, plan)
        });
        let (moved, plan) = planned.await.map_err(|error| StoreError::Corrupt {
            key: "(planner)".to_owned(),
            reason: error.to_string(),
        })?;
        *self = moved;
        Ok(Some((plan, now)))
    }

    /// Writes down what tenants had, for the coordinator that comes next.
    pub(super) async fn save_usage(&mut self, coordinator: &Coordinator) -> Result<(), StoreError> {
        let (Some(kept), Some(planner)) = (&mut self.kept, &self.planner) else { return Ok(()) };
        kept.save(&*coordinator.store, planner.usage(), now_ms()).await
    }

    /// A node's name, by its number in plans.
    #[cfg(test)]
    pub(super) fn node_name(&self, node: u32) -> &str {
        &self.model.cluster.nodes()[node as usize].name
    }

    fn cycle(&mut self, now_ms: u64) -> Plan {
        let pending = self.model.pending();
        match &mut self.planner {
            Some(planner) => planner.cycle(&mut self.model.cluster, &pending, now_ms),
            None => Plan::default(),
        }
    }

    /// Commits what was planned, as far as it still holds.
    pub(super) async fn carry_out(
        &mut self,
        coordinator: &Arc<Coordinator>,
        plan: Plan,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        if coordinator.explanations.set(plan.waiting) {
            coordinator.view.reasons_changed();
        }
        place::stop(coordinator, &plan.preemptions, &plan.resizes, now_ms).await?;
        let conflicts = place::start(coordinator, &self.model, plan.starts, now_ms).await?;
        if !conflicts.is_empty() {
            coordinator.metrics.placement_conflicts.add(conflicts.jobs.len() as u64);
            // They are planned again with what is true now; those that were committed stay.
            coordinator.view.unsee(conflicts);
        }
        Ok(())
    }

    /// A planner for the pools and tenants as they are.
    fn keep_planner(&mut self) {
        if self.planner.as_ref().is_some_and(|planner| *planner.settings() == self.model.settings) {
            return;
        }
        if let Some(planner) = &self.planner {
            self.usage = planner.usage();
        }
        let mut planner = Planner::new(self.model.settings.clone(), SEED);
        planner.restore(&self.usage);
        for (gang, ran_ms) in &self.history {
            planner.ended(gang, *ran_ms);
        }
        self.planner = Some(planner);
    }

    fn learn(&mut self, record: &JobRecord) {
        let (Some(finished), Some(placed)) = (record.job.finished_ms, record.placed_ms) else { return };
        let gang = self.model.gang(&record.job.id).cloned();
        let gang = gang.unwrap_or_else(|| Arc::new(super::model::gang::gang(record)));
        let ran_ms = finished.saturating_sub(placed);
        if let Some(planner) = &mut self.planner {
            planner.ended(&gang, ran_ms);
        }
        self.history.push_back((gang, ran_ms));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    /// The lengths of the latest jobs that succeeded, once after a start.
    async fn read_history(&mut self, coordinator: &Coordinator) -> Result<(), StoreError> {
        let mut found: Vec<(u64, Arc<Gang>, u64)> = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = coordinator.store.page(ENDED_JOBS, after.as_deref(), PAGE).await?;
            let Some(last) = page.entries.last() else { break };
            after = Some(last.key.clone());
            for entry in &page.entries {
                let Ok(record) = decode::<JobRecord>(&entry.key, &entry.value, entry.revision) else {
                    continue;
                };
                let job = &record.value.job;
                if job.state == lathe_api::job::JobState::Succeeded
                    && let (Some(finished), Some(placed)) = (job.finished_ms, record.value.placed_ms)
                {
                    let gang = Arc::new(super::model::gang::gang(&record.value));
                    found.push((finished, gang, finished.saturating_sub(placed)));
                }
            }
            if found.len() > 2 * HISTORY {
                keep_latest(&mut found);
            }
        }
        keep_latest(&mut found);
        self.history = found.into_iter().map(|(_, gang, ran_ms)| (gang, ran_ms)).collect();
        Ok(())
    }
}

/// The latest, oldest first.
fn keep_latest(found: &mut Vec<(u64, Arc<Gang>, u64)>) {
    found.sort_by(|one, other| (one.0, &one.1.id).cmp(&(other.0, &other.1.id)));
    found.drain(..found.len().saturating_sub(HISTORY));
}

/// With the nodes whose suspicion ended since: no record says so.
fn with_recovered(coordinator: &Coordinator, mut unseen: Unseen, now_ms: u64) -> Unseen {
    let mut live = coordinator.live();
    for (name, live) in live.iter_mut() {
        if live.refusals.recover(now_ms) {
            tracing::info!(node = name, "node no longer suspected: it is tried again");
            unseen.nodes.insert(name.clone());
        }
    }
    unseen
}
