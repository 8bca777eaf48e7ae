//! What came out of a simulation, and the figures of it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::metrics::{self, Distribution, Sample, Step};

/// How many samples over time a report has.
const SAMPLES: usize = 200;

/// One run, as it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The first arrival.
    pub first_ms: u64,
    /// All GPUs, thousandths.
    pub total_milli: u64,
    /// Every job.
    pub jobs: Vec<JobTimes>,
    /// The cluster over time.
    pub steps: Vec<Step>,
    /// Planning cycles.
    pub cycles: u64,
    /// Gangs that were stopped for others.
    pub preemptions: u64,
    /// Gangs that got another size.
    pub resizes: u64,
    /// Nodes that failed.
    pub failures: u64,
    /// Work that was done and lost, milliseconds of one GPU.
    pub lost_gpu_ms: f64,
}

/// One job, as it went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobTimes {
    /// Which.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// GPUs at its full size, thousandths; 0 when it never ran.
    pub gpu_milli: u64,
    /// When it came.
    pub arrived_ms: u64,
    /// How long it runs at its full size.
    pub duration_ms: u64,
    /// How long it waited, before it ran and after it was stopped.
    pub waited_ms: u64,
    /// When it first ran.
    pub started_ms: Option<u64>,
    /// When it was done.
    pub ended_ms: Option<u64>,
}

/// Figures of one run, or means over several.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Jobs.
    pub jobs: usize,
    /// Jobs that were done; the others found no room to the end.
    pub completed: usize,
    /// From arrival until it ran, and from being stopped until it ran again, seconds.
    pub waiting_s: Distribution,
    /// From arrival until it was done, seconds.
    pub completion_s: Distribution,
    /// Completion by running time, bounded as [`metrics::SLOWDOWN_BOUND_S`] says.
    pub bounded_slowdown: Distribution,
    /// From the first arrival until all was done, seconds.
    pub makespan_s: f64,
    /// Jain's index over the tenants' mean bounded slowdown.
    pub jain_fairness_tenants: f64,
    /// Jain's index over the jobs' bounded slowdown.
    pub jain_fairness_jobs: f64,
    /// Mean share of the GPUs that gangs had, over the makespan, percent.
    pub mean_percent_gpu_allocated: f64,
    /// Share of the GPUs' time that went into work that was kept, over the makespan, percent.
    pub percent_gpu_utilized: f64,
    /// Mean share of the GPUs that were free in pieces too small for typical jobs, percent.
    pub mean_percent_gpu_fragmented: f64,
    /// Gangs that were stopped for others.
    pub preemptions: f64,
    /// Gangs that got another size.
    pub resizes: f64,
    /// Nodes that failed.
    pub node_failures: f64,
    /// Work that was done and lost, hours of one GPU.
    pub lost_gpu_hours: f64,
    /// Planning cycles.
    pub cycles: f64,
    /// The cluster over equal parts of the makespan.
    pub samples: Vec<Sample>,
    /// Completion times at each percent of the jobs, from 0 to 100, seconds: for plots.
    #[serde(skip)]
    pub completion_curve_s: Vec<f64>,
}

impl Outcome {
    /// Nothing yet, for a cluster with so many thousandths of GPUs.
    pub fn new(first_ms: u64, total_milli: u64) -> Self {
        Self { first_ms, total_milli, ..Self::default() }
    }

    /// The last end.
    pub fn last_ms(&self) -> u64 {
        let ends = self.jobs.iter().filter_map(|job| job.ended_ms);
        ends.max().unwrap_or(self.first_ms).max(self.first_ms)
    }

    /// GPUs that gangs had, by how long they had them: thousandths times milliseconds.
    pub fn allocated_milli_ms(&self) -> f64 {
        self.integral(|step| step.allocated_milli as f64)
    }

    fn integral(&self, of: impl Fn(&Step) -> f64) -> f64 {
        let last = self.last_ms();
        let until = self.steps.iter().skip(1).map(|step| step.from_ms).chain([last]);
        let parts = self.steps.iter().zip(until);
        parts.map(|(step, until)| of(step) * until.min(last).saturating_sub(step.from_ms) as f64).sum()
    }

    /// The figures.
    pub fn figures(&self) -> Figures {
        let done: Vec<(&JobTimes, u64)> =
            self.jobs.iter().filter_map(|job| job.ended_ms.map(|ended| (job, ended))).collect();
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let slowdown = |&(job, ended): &(&JobTimes, u64)| {
            metrics::bounded_slowdown(seconds(ended - job.arrived_ms), seconds(job.duration_ms))
        };
        let slowdowns: Vec<f64> = done.iter().map(slowdown).collect();
        let mut tenants: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for ((job, _), &slowdown) in done.iter().zip(&slowdowns) {
            tenants.entry(&job.tenant).or_default().push(slowdown);
        }
        let tenants: Vec<f64> = tenants.into_values().map(|of| metrics::mean(of.into_iter())).collect();
        let makespan_ms = self.last_ms() - self.first_ms;
        let capacity = (self.total_milli as f64 * makespan_ms as f64).max(1.0);
        let useful: f64 = done.iter().map(|(job, _)| job.gpu_milli as f64 * job.duration_ms as f64).sum();
        let percent = |part: f64| 100.0 * part / capacity;
        Figures {
            jobs: self.jobs.len(),
            completed: done.len(),
            waiting_s: Distribution::of(done.iter().map(|(job, _)| seconds(job.waited_ms)).collect()),
            completion_s: Distribution::of(
                done.iter().map(|(job, ended)| seconds(ended - job.arrived_ms)).collect(),
            ),
            jain_fairness_tenants: metrics::jain(&tenants),
            jain_fairness_jobs: metrics::jain(&slowdowns),
            bounded_slowdown: Distribution::of(slowdowns),
            makespan_s: seconds(makespan_ms),
            mean_percent_gpu_allocated: percent(self.allocated_milli_ms()),
            percent_gpu_utilized: percent(useful),
            mean_percent_gpu_fragmented: percent(self.integral(|step| step.fragmented_milli)),
            preemptions: self.preemptions as f64,
            resizes: self.resizes as f64,
            node_failures: self.failures as f64,
            lost_gpu_hours: self.lost_gpu_ms / 3.6e6,
            cycles: self.cycles as f64,
            completion_curve_s: metrics::curve(
                done.iter().map(|(job, ended)| seconds(ended - job.arrived_ms)).collect(),
            ),
            samples: metrics::resample(&self.steps, self.first_ms, self.last_ms(), self.total_milli, SAMPLES),
        }
    }
}

impl Figures {
    /// The mean of each figure over several runs of the same jobs.
    pub fn mean_of(runs: &[Self]) -> Self {
        let mean = |figure: fn(&Self) -> f64| metrics::mean(runs.iter().map(figure));
        let distribution = |figure: fn(&Self) -> Distribution| {
            Distribution::mean_of(&runs.iter().map(figure).collect::<Vec<_>>())
        };
        let samples = (0..SAMPLES).filter(|&at| runs.iter().any(|run| at < run.samples.len())).map(|at| {
            let of = |figure: fn(&Sample) -> f64| {
                metrics::mean(runs.iter().filter_map(|run| run.samples.get(at)).map(figure))
            };
            Sample {
                time_s: of(|sample| sample.time_s),
                percent_gpu_allocated: of(|sample| sample.percent_gpu_allocated),
                percent_gpu_fragmented: of(|sample| sample.percent_gpu_fragmented),
                waiting: of(|sample| sample.waiting),
            }
        });
        Self {
            jobs: runs.first().map_or(0, |run| run.jobs),
            completed: runs.iter().map(|run| run.completed).min().unwrap_or(0),
            waiting_s: distribution(|run| run.waiting_s),
            completion_s: distribution(|run| run.completion_s),
            bounded_slowdown: distribution(|run| run.bounded_slowdown),
            makespan_s: mean(|run| run.makespan_s),
            jain_fairness_tenants: mean(|run| run.jain_fairness_tenants),
            jain_fairness_jobs: mean(|run| run.jain_fairness_jobs),
            mean_percent_gpu_allocated: mean(|run| run.mean_percent_gpu_allocated),
            percent_gpu_utilized: mean(|run| run.percent_gpu_utilized),
            mean_percent_gpu_fragmented: mean(|run| run.mean_percent_gpu_fragmented),
            preemptions: mean(|run| run.preemptions),
            resizes: mean(|run| run.resizes),
            node_failures: mean(|run| run.node_failures),
            lost_gpu_hours: mean(|run| run.lost_gpu_hours),
            cycles: mean(|run| run.cycles),
            samples: samples.collect(),
            completion_curve_s: (0..=100)
                .map(|at| {
                    metrics::mean(runs.iter().filter_map(|run| run.completion_curve_s.get(at).copied()))
                })
                .collect(),
        }
    }
}
