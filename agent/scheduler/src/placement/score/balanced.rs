//! The default: where it leaves most room for what typically comes.
//!
//! The cost of a place is the loss of value of the node there, in thousandths of a GPU:
//!
//! 1. *Cuts*: the loss of value of the devices by dual prices ([`cutting`](super::super::cutting)): 0.32 of a device goes
//!    beside 0.65, not beside 0.47. It counts in full: what is lost here is lost whatever else comes.
//! 2. *Room*: how much of that value is within reach of the CPUs, the memory and the models of the node
//!    ([`Fragments::reach`](super::super::fragmentation::Fragments)), and the two measures of
//!    fragmentation. These are expectations over the mix, and much of what looks lost is taken by a
//!    task that happens to fit, so they count in part.
//! 3. *Fit*: what is left of CPUs and GPUs, at most one and a half thousandths: it decides where the
//!    rest says nothing, and packs CPU tasks.
//!
//! The weights of the parts were chosen on runs of the published traces; see the benchmark's table for
//! how little depends on them.

use super::super::demand::Demand;
use super::super::fragmentation::{Fragments, Kinds, Measure, Prices};
use super::value::Values;
use super::{Ask, Score};
use crate::model::{GpuPlace, Node};

/// Parts of the cost; see the module.
const STRANDED: f64 = 0.05;
const STARVED: f64 = 0.01;
const REACH: f64 = 0.05;
const FIT: f64 = 1.5;

/// A task's weight in the measures is its part of the demand times the GPUs of one task to this power:
/// small tasks are what rests are for.
const IMPORTANCE: f64 = -0.3;

#[derive(Clone, Debug, Default)]
pub(super) struct Balanced {
    demand: Demand,
    prices: Prices,
    kinds: Kinds,
    measures: Vec<Option<Measure>>,
    values: Values<f64>,
}

impl Balanced {
    fn measure(&mut self, kind: usize, node: &Node) {
        if self.measures.len() <= kind {
            self.measures.resize(kind + 1, None);
        }
        if self.measures[kind].is_none() {
            let prices = self.prices.clone().with_partitions_of(node, &self.demand);
            self.measures[kind] = Some(Measure::new(node, &self.demand, IMPORTANCE, prices));
        }
    }
}

impl Score for Balanced {
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64 {
        let after = ask.free.amount.less(&ask.taken);
        let taken: f64 = gpus.iter().map(|gpu| f64::from(gpu.part.milli)).sum();
        let fit = 0.5 * after.cpu_milli as f64 / ask.largest.cpu_milli
            + 0.5 * (ask.free.gpu_milli() as f64 - taken) / ask.largest.gpu_milli;
        if ask.node.gpus.is_empty() {
            return FIT * fit;
        }
        let kind = self.kinds.of(ask.index, ask.node, ask.node_print);
        self.measure(kind.number as usize, ask.node);
        let Some(Some(measure)) = self.measures.get_mut(kind.number as usize) else { return FIT * fit };
        let (before, after) = self.values.before_and_after(ask, kind, gpus, |amount, free| {
            let Fragments { stranded, starved, worth, reach } = measure.of(&ask.node.gpus, amount, free);
            STRANDED * stranded + STARVED * starved - worth - REACH * reach
        });
        after - before + FIT * fit
    }

    fn demand(&mut self, demand: &Demand) -> bool {
        self.demand = demand.clone();
        self.prices = Prices::new(demand);
        self.measures.clear();
        self.values.clear();
        true
    }

    fn learns(&self) -> bool {
        true
    }

    fn boxed(&self) -> Box<dyn Score> {
        Box::new(self.clone())
    }
}
