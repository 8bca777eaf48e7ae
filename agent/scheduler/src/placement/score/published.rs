//! Strategies as they were published, so that figures can be compared: those of Weng et al., "Beware of
//! Fragmentation", ATC'23, as its artefact (hkust-adsl/kubernetes-scheduler-simulator) defines them.
//! Scores there are integers up to 100, and the highest wins; here the cost is their negative. The
//! truncation to integers is part of the definitions: it makes ties, which somebody must break.

use super::super::demand::Demand;
use super::super::fragmentation::{Kinds, Measure};
use super::value::Values;
use super::{Ask, Devices, Score};
use crate::model::{GpuPlace, Share};

/// Thousandths of GPUs that a task takes.
fn gpu_milli(gpus: &[GpuPlace]) -> f64 {
    gpus.iter().map(|gpu| f64::from(gpu.part.milli)).sum()
}

/// Anywhere.
#[derive(Clone, Debug)]
pub(super) struct Random;

impl Score for Random {
    fn cost(&mut self, _: &Ask<'_>, _: &[GpuPlace]) -> f64 {
        0.0
    }

    fn devices(&self) -> Devices {
        Devices::Drawn
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// The smaller the product of what is asked and what is free, the better: CPUs and GPUs, each as a part
/// of the largest node.
#[derive(Clone, Debug)]
pub(super) struct DotProduct;

impl Score for DotProduct {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        let cpu = |milli: u64| milli as f64 / ask.largest.cpu_milli;
        let gpu = |milli: f64| milli / ask.largest.gpu_milli;
        let product = cpu(ask.free.amount.cpu_milli) * cpu(ask.taken.cpu_milli)
            + gpu(ask.free.gpu_milli() as f64) * gpu(gpu_milli(gpus));
        -(100.0 * (1.0 - product / 2.0)).trunc()
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// Beside tasks that use GPUs in the same way.
#[derive(Clone, Debug)]
pub(super) struct GpuClustering;

impl Score for GpuClustering {
    fn cost(&mut self, ask: &Ask<'_>, _: &[GpuPlace]) -> f64 {
        let Some(request) = &ask.task.gpus else { return 0.0 };
        let kind = if request.share == Share::Whole { request.count } else { 0 };
        let uses = &ask.free.uses;
        let quarter = match (uses.iter().any(|(gpus, _)| *gpus == kind), uses.len()) {
            (true, 1) => 75.0,
            (true, _) => 50.0,
            (false, 0) => 25.0,
            (false, _) => 0.0,
        };
        let used = ask.largest.gpu_milli - ask.free.gpu_milli() as f64;
        -(quarter + (25.0 * used / ask.largest.gpu_milli).trunc())
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// GPUs in use first, then nodes in use, then others.
#[derive(Clone, Debug)]
pub(super) struct GpuPacking;

impl Score for GpuPacking {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        if gpus.is_empty() {
            return 0.0;
        }
        let (free, all) = (ask.free.whole_gpus(), ask.node.gpus.len());
        if free as usize == all {
            return -f64::from((33 - free.min(33)).max(free.min(33)));
        }
        let left = |place: &GpuPlace| ask.free.gpus[usize::from(place.index)];
        let fresh = gpus.iter().filter(|place| left(place).is_whole()).count();
        if fresh > 0 {
            return -(50.0 - fresh as f64).max(33.0);
        }
        let rest: u32 = gpus.iter().map(|place| u32::from(left(place).milli) * 100 / 1000).sum();
        -(100.0 - f64::from(rest / 10)).max(50.0)
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// Where least is left of CPUs and GPUs.
#[derive(Clone, Debug)]
pub(super) struct BestFit;

impl Score for BestFit {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        let cpu = ask.free.amount.less(&ask.taken).cpu_milli as f64 / ask.largest.cpu_milli;
        let gpu = (ask.free.gpu_milli() as f64 - gpu_milli(gpus)) / ask.largest.gpu_milli;
        -(100.0 * (1.0 - 0.5 * cpu - 0.5 * gpu)).trunc()
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// Away from what runs: where most of the scarcest is free.
#[derive(Clone, Debug)]
pub(super) struct Spread;

impl Score for Spread {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        let (after, total) = (ask.free.amount.less(&ask.taken), ask.node.total);
        let used = |left: u64, all: u64| if all == 0 { 0.0 } else { 1.0 - left as f64 / all as f64 };
        let all = 1000.0 * ask.node.gpus.len() as f64;
        let gpu = if all == 0.0 { 0.0 } else { 1.0 - (ask.free.gpu_milli() as f64 - gpu_milli(gpus)) / all };
        let most = used(after.cpu_milli, total.cpu_milli).max(used(after.memory_bytes, total.memory_bytes));
        // A task without GPUs stays away from nodes that have some, if others are as free.
        let spared = if gpus.is_empty() { all / ask.largest.gpu_milli } else { 0.0 };
        most.max(gpu) + 0.1 * spared
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}

/// Where fragmentation grows least: `int(100 * sigmoid(-growth / 1000))`, growth in thousandths of GPUs.
#[derive(Clone, Debug, Default)]
pub(super) struct GradientDescent {
    demand: Demand,
    kinds: Kinds,
    measures: Vec<Option<Measure>>,
    values: Values<f64>,
}

impl Score for GradientDescent {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        let kind = self.kinds.of(ask.index, ask.node, ask.node_print);
        let number = kind.number as usize;
        if self.measures.len() <= number {
            self.measures.resize(number + 1, None);
        }
        let measure = self.measures[number].get_or_insert_with(|| Measure::published(ask.node, &self.demand));
        let (before, after) = self.values.before_and_after(ask, kind, gpus, |amount, free| {
            measure.of(&ask.node.gpus, amount, free).stranded
        });
        -(100.0 / (1.0 + ((after - before) / 1000.0).exp())).trunc()
    }

    fn demand(&mut self, demand: &Demand) -> bool {
        self.demand = demand.processors_alone();
        self.measures.clear();
        self.values.clear();
        true
    }

    fn devices(&self) -> Devices {
        Devices::First
    }

    fn learns(&self) -> bool {
        true
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}
