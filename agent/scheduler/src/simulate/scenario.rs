//! Jobs and nodes made ready for a run.

use std::collections::HashMap;
use std::sync::Arc;

use super::arrivals::{TraceNode, TraceTask};
use super::events::Job;
use super::trace::{self, Pod, TraceJob};
use crate::model::{Amount, Cluster, Gang, Gpu, Node, Scope, Share, TaskRequest, WHOLE};
use crate::placement::Placer;
use crate::policy::Strategy;

/// GPUs of a node that is made up.
pub const NODE_GPUS: u32 = 8;

/// CPUs by GPU and memory by GPU of a node that is made up: no job of a list without CPUs lacks them.
const CPU_MILLI_BY_GPU: u64 = 16_000;
const MEMORY_BY_GPU: u64 = 128 << 30;

/// Users ask for more time than they need: for a factor between 1 and this (the `f`-model of Mu'alem
/// and Feitelson, "Utilization, Predictability, Workloads, and User Runtime Estimates", TPDS'01).
const USER_FACTOR: f64 = 5.0;

/// What the planner is told of how long jobs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Estimates {
    /// How long they run.
    #[default]
    Perfect,
    /// What their users say: the list's, or else made up, too long by a random factor of 1 to 5.
    User,
    /// Nothing: it knows how long similar jobs ran.
    History,
}

/// How much work there is for how many GPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// GPUs that jobs use on average while jobs arrive, were there room: time on GPUs by the time
    /// between the first and the last arrival.
    pub gpus: f64,
    /// GPUs of the largest job.
    pub largest: u32,
}

impl Load {
    /// Of these arrivals.
    pub fn of(arrivals: &Arrivals) -> Self {
        let times = arrivals.times();
        let first = times.iter().map(|time| time.arrival_ms).min().unwrap_or(0);
        let last = times.iter().map(|time| time.arrival_ms).max().unwrap_or(0);
        let work: f64 = times.iter().map(|time| time.duration_ms as f64 * time.gpus).sum();
        Self {
            gpus: work / (last - first).max(1) as f64,
            largest: times.iter().map(|time| time.gpus.ceil() as u32).max().unwrap_or(0),
        }
    }

    /// Nodes of `per_node` GPUs on which this is nearest to `load`, at least what the largest job needs.
    pub fn nodes(&self, load: f64, per_node: u32) -> u32 {
        let per_node = per_node.max(1);
        let sized = (self.gpus / load / f64::from(per_node)).round().clamp(1.0, 1e6) as u32;
        sized.max(self.largest.div_ceil(per_node))
    }
}

/// Equal nodes.
pub fn equal_nodes(count: u32, gpus: u32) -> Vec<Node> {
    let width = count.saturating_sub(1).to_string().len();
    let amount = Amount {
        cpu_milli: CPU_MILLI_BY_GPU * u64::from(gpus),
        memory_bytes: MEMORY_BY_GPU * u64::from(gpus),
        ..Amount::default()
    };
    (0..count).map(|index| trace::node(format!("node-{index:0width$}"), amount, gpus, "")).collect()
}

/// What comes, with times.
#[derive(Clone, Debug, PartialEq)]
pub enum Arrivals {
    /// Jobs.
    Jobs(Vec<TraceJob>),
    /// Pods; those that do not say when they came and how long they ran are left out.
    Pods(Vec<Pod>),
}

impl Default for Arrivals {
    fn default() -> Self {
        Self::Jobs(Vec::new())
    }
}

/// When one comes, for how long, on how many GPUs.
struct Times {
    arrival_ms: u64,
    duration_ms: u64,
    gpus: f64,
}

impl Arrivals {
    fn times(&self) -> Vec<Times> {
        match self {
            Self::Jobs(jobs) => jobs
                .iter()
                .map(|&TraceJob { arrival_ms, duration_ms, gpus, .. }| Times {
                    arrival_ms,
                    duration_ms,
                    gpus: gpus.into(),
                })
                .collect(),
            Self::Pods(pods) => pods
                .iter()
                .filter_map(|pod| {
                    let (arrival_ms, duration_ms) = pod.lifetime_ms?;
                    Some(Times { arrival_ms, duration_ms, gpus: pod.gpus() })
                })
                .collect(),
        }
    }

    /// Moves arrivals closer together or apart, around the first, by `factor`.
    pub fn stretch(&mut self, factor: f64) {
        let first = self.times().iter().map(|time| time.arrival_ms).min().unwrap_or(0);
        let moved = |at: u64| first + (at.saturating_sub(first) as f64 * factor).round() as u64;
        match self {
            Self::Jobs(jobs) => jobs.iter_mut().for_each(|job| job.arrival_ms = moved(job.arrival_ms)),
            Self::Pods(pods) => {
                for pod in pods {
                    if let Some((arrival_ms, _)) = &mut pod.lifetime_ms {
                        *arrival_ms = moved(*arrival_ms);
                        pod.gang.submitted_ms = *arrival_ms;
                    }
                }
            }
        }
    }
}

/// Gives jobs without a tenant to one of `count`, by chance: each tenant has the same chance.
pub fn deal_to_tenants(jobs: &mut [TraceJob], count: u32, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let width = count.saturating_sub(1).to_string().len();
    for job in jobs.iter_mut().filter(|job| job.tenant.is_empty()) {
        job.tenant = format!("tenant-{:0width$}", random.u32(0..count.max(1)));
    }
}

/// Jobs of a list of jobs, for nodes with up to `per_node` GPUs.
pub fn jobs(list: &[TraceJob], per_node: u32, estimates: Estimates, seed: u64) -> Vec<Job> {
    let mut random = fastrand::Rng::with_seed(seed);
    let job = |job: &TraceJob| {
        let mut gang = job.gang(per_node);
        gang.estimate_ms = estimates.of(job.duration_ms, job.estimate_ms, &mut random);
        Job { gang: Arc::new(gang), duration_ms: job.duration_ms }
    };
    list.iter().map(job).collect()
}

/// Jobs of a list of pods; those that do not say how long they ran are left out.
pub fn pods(list: &[Pod], estimates: Estimates, seed: u64) -> Vec<Job> {
    let mut random = fastrand::Rng::with_seed(seed);
    let job = |pod: &Pod| {
        let (_, duration_ms) = pod.lifetime_ms?;
        let estimate_ms = estimates.of(duration_ms, None, &mut random);
        Some(Job { gang: Arc::new(Gang { estimate_ms, ..pod.gang.clone() }), duration_ms })
    };
    list.iter().filter_map(job).collect()
}

impl Estimates {
    fn of(self, duration_ms: u64, given_ms: Option<u64>, random: &mut fastrand::Rng) -> Option<u64> {
        // Drawn always, so that the other jobs' do not depend on who gave one.
        let factor = 1.0 + random.f64() * (USER_FACTOR - 1.0);
        match self {
            Self::Perfect => Some(duration_ms),
            Self::User => Some(given_ms.unwrap_or((duration_ms as f64 * factor).round() as u64)),
            Self::History => None,
        }
    }
}

/// Nodes as the procedure of [`super::arrivals`] wants them: those with GPUs.
pub fn arrival_nodes(nodes: &[Node]) -> Vec<TraceNode> {
    let with_gpus = nodes.iter().filter_map(|node| Some((node, node.gpus.first()?)));
    let node = |(node, gpu): (&Node, &Gpu)| TraceNode {
        name: node.name.clone(),
        cpu_milli: node.total.cpu_milli,
        memory_mib: node.total.memory_bytes >> 20,
        gpus: u8::try_from(node.gpus.len()).unwrap_or(u8::MAX),
        model: gpu.model.clone(),
    };
    with_gpus.map(node).collect()
}

/// Pods as the procedure of [`super::arrivals`] wants them.
pub fn arrival_tasks(pods: &[Pod]) -> Vec<TraceTask> {
    let task = |pod: &Pod| {
        let TaskRequest { amount, gpus } = &pod.gang.task;
        TraceTask {
            cpu_milli: amount.cpu_milli,
            memory_mib: amount.memory_bytes >> 20,
            gpus: gpus.as_ref().map_or(0, |gpus| gpus.count),
            gpu_milli: gpus.as_ref().map_or(0, |gpus| match gpus.share {
                Share::Milli(milli) => milli,
                Share::Whole | Share::Profile(_) => WHOLE,
            }),
            models: gpus.as_ref().map(|gpus| gpus.models.clone()).unwrap_or_default(),
        }
    };
    pods.iter().map(task).collect()
}

/// Takes out the jobs that do not fit on these nodes even when nothing runs, and says why not: no
/// policy could ever run them, and some would wait for them for ever.
pub fn misfits(nodes: &[Node], jobs: &mut Vec<Job>) -> Vec<(String, String)> {
    let mut cluster = Cluster::new(nodes.to_vec());
    let mut placer = Placer::new(Strategy::BestFit, 0);
    let mut known: HashMap<(TaskRequest, u32, Scope), Option<String>> = HashMap::new();
    let mut misfits = Vec::new();
    jobs.retain(|Job { gang, .. }| {
        let shape = (gang.task.clone(), gang.tasks.min, gang.scope);
        let problem = known.entry(shape).or_insert_with(|| {
            match placer.place(&mut cluster, gang, gang.tasks.min, &|_| true) {
                Err(shortage) => Some(shortage.to_string()),
                Ok(places) => {
                    places.iter().for_each(|place| cluster.give(gang, place));
                    None
                }
            }
        });
        problem.as_ref().map(|problem| misfits.push((gang.id.clone(), problem.clone()))).is_none()
    });
    misfits
}
