//! The published procedure for the openb traces (Weng et al., "Beware of Fragmentation", ATC'23): tasks
//! arrive one at a time in a random order and never leave, more of them than the GPUs can hold; one that
//! does not fit is skipped. What matters is how much of the GPUs is allocated when as much has arrived
//! as there is.

use std::sync::Arc;

use crate::model::{Amount, Cluster, Gang, Gpu, GpuRequest, Node, Share, Sharing, Size, TaskRequest, WHOLE};
use crate::placement::{Demand, PlaceRequest, Placer, Ties};
use crate::policy::Strategy;

/// Tasks are drawn again until this part of the GPUs was asked for.
const ASKED: f64 = 1.3;

/// A node of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceNode {
    /// Unique.
    pub name: String,
    /// Thousandths of CPUs.
    pub cpu_milli: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// GPUs.
    pub gpus: u8,
    /// Their model.
    pub model: String,
}

/// A task of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceTask {
    /// Thousandths of CPUs.
    pub cpu_milli: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// GPUs.
    pub gpus: u32,
    /// Thousandths of each, 1 to 1000; 1000 if there are several.
    pub gpu_milli: u16,
    /// Models that do; all if empty.
    pub models: Vec<String>,
}

/// How to run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where tasks go.
    pub strategy: Strategy,
    /// Which of several nodes is taken.
    pub ties: Ties,
    /// For the order of arrival, and ties.
    pub seed: u64,
    /// The mix that fragmentation is measured against: true takes it from the whole trace, as published;
    /// false lets the placer learn it from what arrives.
    pub known_demand: bool,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Percent of the GPUs that was allocated when so many percent of them had been asked for, from 0 on.
    pub percent_gpu_allocated: Vec<f64>,
    /// Percent of the GPUs that was free but of no use for the typical task then (the paper's measure).
    pub percent_gpu_fragmented: Vec<f64>,
    /// Tasks that arrived.
    pub arrived: usize,
    /// Tasks that were placed.
    pub placed: usize,
}

impl Outcome {
    /// Percent of the GPUs that was allocated when as much had been asked for.
    pub fn at_full_demand(&self) -> f64 {
        self.percent_gpu_allocated.get(100).copied().unwrap_or(0.0)
    }
}

/// Runs the procedure.
pub fn arrivals(nodes: &[TraceNode], tasks: &[TraceTask], options: Options) -> Outcome {
    let mut cluster = Cluster::new(nodes.iter().map(node).collect());
    let gangs: Vec<Arc<Gang>> = tasks.iter().map(|task| Arc::new(gang(task))).collect();
    let demand = Demand::of(gangs.iter().map(|gang| (&gang.task, 1.0)));
    let mut placer = Placer::new(options.strategy, options.seed).with_ties(options.ties);
    if options.known_demand {
        placer.set_demand(&demand);
    }
    let capacity: u64 = nodes.iter().map(|node| u64::from(node.gpus) * u64::from(WHOLE)).sum();
    let mut outcome = Outcome::default();
    let (mut asked, mut allocated) = (0, 0);
    for index in order(tasks, capacity, options.seed) {
        asked += gpu_milli(&tasks[index]);
        outcome.arrived += 1;
        let request =
            PlaceRequest { gang: &gangs[index], tasks: 1, admits: &|_| true, admits_key: None, span: None };
        if placer.try_place(&mut cluster, &request).is_some() {
            allocated += gpu_milli(&tasks[index]);
            outcome.placed += 1;
        }
        // The state nearest to each percent: the last one that rounds to it.
        let percent = (asked as f64 / capacity as f64 * 100.0).round() as usize;
        let first = outcome.percent_gpu_allocated.len().min(percent);
        for at in first..=percent {
            let now = allocated as f64 / capacity as f64 * 100.0;
            if at == outcome.percent_gpu_allocated.len() {
                outcome.percent_gpu_allocated.push(now);
                outcome.percent_gpu_fragmented.push(fragmented(&cluster, &demand) / capacity as f64 * 100.0);
            } else if asked as f64 / capacity as f64 * 100.0 <= at as f64 {
                outcome.percent_gpu_allocated[at] = now;
            }
        }
    }
    outcome
}

/// GPU thousandths that are of no use for the typical task.
fn fragmented(cluster: &Cluster, demand: &Demand) -> f64 {
    crate::placement::fragmented_milli(cluster, demand)
}

/// Indices of tasks in their order of arrival: all, shuffled, and then some of them again.
fn order(tasks: &[TraceTask], capacity: u64, seed: u64) -> Vec<usize> {
    let mut random = Random(seed);
    let mut order: Vec<usize> = (0..tasks.len()).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last + 1));
    }
    let mut asked: u64 = tasks.iter().map(gpu_milli).sum();
    while !tasks.is_empty() && capacity > 0 {
        let drawn = random.below(tasks.len());
        // As published: one device's worth of the task decides, not all of them.
        if (asked + u64::from(tasks[drawn].gpu_milli)) as f64 > ASKED * capacity as f64 {
            break;
        }
        asked += gpu_milli(&tasks[drawn]);
        order.push(drawn);
    }
    order
}

/// Numbers that look random and are the same for a seed (Steele et al., "Fast splittable pseudorandom
/// number generators", OOPSLA'14).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

fn gpu_milli(task: &TraceTask) -> u64 {
    u64::from(task.gpus) * u64::from(task.gpu_milli)
}

fn node(node: &TraceNode) -> Node {
    let gpu = Gpu {
        id: String::new(),
        model: node.model.clone(),
        memory_bytes: 0,
        numa: None,
        switch: None,
        link: None,
        partition: None,
        sharing: Sharing::Milli,
    };
    Node {
        name: node.name.clone(),
        total: Amount {
            cpu_milli: node.cpu_milli,
            memory_bytes: node.memory_mib << 20,
            hugepage_bytes: 0,
            sandboxes: u32::MAX,
        },
        gpus: vec![gpu; usize::from(node.gpus)],
        classes: vec![Gang::default().class],
        ..Node::default()
    }
}

fn gang(task: &TraceTask) -> Gang {
    let share = if task.gpu_milli >= WHOLE { Share::Whole } else { Share::Milli(task.gpu_milli) };
    let gpus = (task.gpus > 0).then(|| GpuRequest {
        count: task.gpus,
        share,
        models: task.models.clone(),
        memory_bytes: 0,
    });
    Gang {
        tasks: Size::exactly(1),
        task: TaskRequest {
            amount: Amount {
                cpu_milli: task.cpu_milli,
                memory_bytes: task.memory_mib << 20,
                hugepage_bytes: 0,
                sandboxes: 1,
            },
            gpus,
        },
        ..Gang::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> (Vec<TraceNode>, Vec<TraceTask>) {
        let node = |index: usize| TraceNode {
            name: format!("n{index}"),
            cpu_milli: 96_000,
            memory_mib: 393_216,
            gpus: 8,
            model: "G2".to_owned(),
        };
        let task = |gpus: u32, gpu_milli: u16| TraceTask {
            cpu_milli: 8_000 * u64::from(gpus),
            memory_mib: 1024,
            gpus,
            gpu_milli,
            models: Vec::new(),
        };
        let tasks = [task(1, 1000), task(1, 500), task(2, 1000), task(1, 300)];
        ((0..10).map(node).collect(), tasks.iter().cycle().take(80).cloned().collect())
    }

    #[test]
    fn what_arrives_is_allocated_until_the_devices_are_full() {
        let (nodes, tasks) = trace();
        let options =
            Options { strategy: Strategy::Balanced, ties: Ties::Seeded, seed: 1, known_demand: true };
        let outcome = arrivals(&nodes, &tasks, options);
        assert_eq!(outcome, arrivals(&nodes, &tasks, options));
        assert!(outcome.percent_gpu_allocated.is_sorted());
        assert!((outcome.percent_gpu_allocated[50] - 50.0).abs() < 1.0);
        assert!(outcome.at_full_demand() > 95.0 && outcome.percent_gpu_allocated.len() >= 129);
        let other = arrivals(&nodes, &tasks, Options { seed: 2, ..options });
        assert_ne!(outcome.percent_gpu_allocated, other.percent_gpu_allocated);
        assert!(outcome.placed < outcome.arrived);
    }
}
