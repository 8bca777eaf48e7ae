//! Several ways to schedule the same jobs, over several seeds.

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;

use super::arrivals::{self, TraceNode, TraceTask};
use super::events::{Job, Options, simulate};
use super::metrics;
use super::outcome::Figures;
use super::scenario::{self, Arrivals, Estimates};
use crate::model::Node;
use crate::policy::{Backfill, Pool, Queue, Strategy};

/// One way to schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Which gang goes next.
    pub queue: Queue,
    /// What may go before one that waits.
    pub backfill: Backfill,
    /// Where a gang goes.
    pub placement: Strategy,
    /// What is known of how long gangs run.
    pub estimates: Estimates,
}

/// Figures of one placement by the procedure of [`super::arrivals`], over several seeds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ArrivalFigures {
    /// Percent of the GPUs that was allocated when so many percent of them had been asked for, from 0 on:
    /// the mean over the seeds.
    pub percent_gpu_allocated: Vec<f64>,
    /// Percent of the GPUs that was free in pieces too small for typical tasks then.
    pub percent_gpu_fragmented: Vec<f64>,
    /// Allocated when as much had been asked for as there is, by seed.
    pub percent_gpu_allocated_at_100: Spread,
    /// Pods that arrived, and those that were placed: the means.
    pub arrived: f64,
    /// See `arrived`.
    pub placed: f64,
}

/// A figure over several seeds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Their mean.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// In the order of the seeds.
    pub by_seed: Vec<f64>,
}

impl Spread {
    fn of(by_seed: Vec<f64>) -> Self {
        let fold = |with: fn(f64, f64) -> f64| by_seed.iter().copied().reduce(with).unwrap_or_default();
        let mean = metrics::mean(by_seed.iter().copied());
        Self { mean, min: fold(f64::min), max: fold(f64::max), by_seed }
    }
}

/// Runs the procedure with each seed; `options.seed` does not matter.
pub fn arrivals(
    nodes: &[TraceNode],
    tasks: &[TraceTask],
    options: arrivals::Options,
    seeds: &[u64],
) -> ArrivalFigures {
    let run = |&seed: &u64| arrivals::arrivals(nodes, tasks, arrivals::Options { seed, ..options });
    let runs: Vec<arrivals::Outcome> = seeds.iter().map(run).collect();
    // As far as every run went.
    let curve = |of: fn(&arrivals::Outcome) -> &Vec<f64>| -> Vec<f64> {
        let length = runs.iter().map(|run| of(run).len()).min().unwrap_or(0);
        (0..length).map(|at| metrics::mean(runs.iter().map(|run| of(run)[at]))).collect()
    };
    ArrivalFigures {
        percent_gpu_allocated: curve(|run| &run.percent_gpu_allocated),
        percent_gpu_fragmented: curve(|run| &run.percent_gpu_fragmented),
        percent_gpu_allocated_at_100: Spread::of(
            runs.iter().map(arrivals::Outcome::at_full_demand).collect(),
        ),
        arrived: metrics::mean(runs.iter().map(|run| run.arrived as f64)),
        placed: metrics::mean(runs.iter().map(|run| run.placed as f64)),
    }
}

/// The same for every way.
#[derive(Clone, Debug, Default)]
pub struct Study {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// What comes.
    pub arrivals: Arrivals,
    /// Tenants that jobs without one are dealt to; all are one's if 0.
    pub tenants: u32,
    /// The pool; a choice replaces its queue, backfill and placement.
    pub pool: Pool,
    /// Time for a checkpoint before a gang is stopped, milliseconds.
    pub grace_ms: u64,
    /// The rest; a run replaces the seed, and the pools.
    pub options: Options,
}

impl Study {
    /// GPUs of the node that has most.
    pub fn gpus_per_node(&self) -> u32 {
        let most = self.nodes.iter().map(|node| node.gpus.len()).max().unwrap_or(0);
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// The jobs of one seed.
    pub fn jobs(&self, estimates: Estimates, seed: u64) -> Vec<Job> {
        let mut jobs = match &self.arrivals {
            Arrivals::Pods(pods) => scenario::pods(pods, estimates, seed),
            Arrivals::Jobs(jobs) => {
                let mut jobs = jobs.clone();
                scenario::deal_to_tenants(&mut jobs, self.tenants, seed);
                scenario::jobs(&jobs, self.gpus_per_node(), estimates, seed)
            }
        };
        for job in &mut jobs {
            let gang = Arc::make_mut(&mut job.gang);
            gang.preemptible = self.pool.preemption;
            gang.grace_ms = self.grace_ms;
            gang.pool.clone_from(&self.pool.name);
        }
        jobs
    }

    /// Takes out the jobs that could never run here: their names and why.
    pub fn leave_out_misfits(&mut self) -> Vec<(String, String)> {
        let mut jobs = self.jobs(Estimates::Perfect, 0);
        let misfits = scenario::misfits(&self.nodes, &mut jobs);
        let out: HashSet<&str> = misfits.iter().map(|(id, _)| id.as_str()).collect();
        match &mut self.arrivals {
            Arrivals::Jobs(jobs) => jobs.retain(|job| !out.contains(job.id.as_str())),
            Arrivals::Pods(pods) => pods.retain(|pod| !out.contains(pod.gang.id.as_str())),
        }
        misfits
    }

    /// One way, over these seeds: the mean of each figure.
    pub fn run(&self, choice: &Choice, seeds: &[u64]) -> Figures {
        Figures::mean_of(&seeds.iter().map(|&seed| self.run_once(choice, seed).figures()).collect::<Vec<_>>())
    }

    /// One way with one seed.
    pub fn run_once(&self, choice: &Choice, seed: u64) -> super::Outcome {
        let mut options = self.options.clone();
        options.seed = seed;
        options.policy.pools = vec![Pool {
            queue: choice.queue,
            backfill: choice.backfill,
            placement: choice.placement,
            ..self.pool.clone()
        }];
        simulate(self.nodes.clone(), self.jobs(choice.estimates, seed), options)
    }
}
