//! What a place costs: one trait, a score for each [`Strategy`].
//!
//! Costs of the default, [`Strategy::Balanced`], are in thousandths of a GPU that will go unused (see
//! the module above for what else is added to them). The published strategies rank by their own
//! definitions, in units of their own.

mod balanced;
mod published;
mod value;

use std::fmt::Debug;

use super::demand::Demand;
use crate::model::{Amount, Free, GpuPlace, Node, TaskRequest};
use crate::policy::Strategy;

/// A task that could go onto a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    /// Index of the node.
    pub(super) index: u32,
    /// The node.
    pub(super) node: &'a Node,
    /// Its fingerprint, whatever is free of it.
    pub(super) node_print: u64,
    /// What is free of it.
    pub(super) free: &'a Free,
    /// The task.
    pub(super) task: &'a TaskRequest,
    /// What it takes of what adds up, which fits.
    pub(super) taken: Amount,
    /// What the largest node has, to compare amounts with each other.
    pub(super) largest: Largest,
}

/// What the largest node of a cluster has: the most of each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Largest {
    /// Thousandths of CPUs.
    pub(super) cpu_milli: f64,
    /// Bytes.
    pub(super) memory_bytes: f64,
    /// Thousandths of GPUs.
    pub(super) gpu_milli: f64,
}

impl Largest {
    pub(super) fn of(nodes: &[Node]) -> Self {
        nodes.iter().fold(Self { cpu_milli: 1.0, memory_bytes: 1.0, gpu_milli: 1.0 }, |most, node| Self {
            cpu_milli: most.cpu_milli.max(node.total.cpu_milli as f64),
            memory_bytes: most.memory_bytes.max(node.total.memory_bytes as f64),
            gpu_milli: most.gpu_milli.max(1000.0 * node.gpus.len() as f64),
        })
    }
}

/// A score. It is asked about nodes that passed the filters, with devices that are free there.
///
/// What it answers may depend on the node, on what is free of it, on the task and on the demand, and on
/// nothing else: answers are kept until one of those changes.
pub(super) trait Score: Debug + Send + Sync {
    /// What it costs if the task takes these devices of the node; the least is chosen.
    fn cost(&mut self, ask: &Ask<'_>, gpus: &[GpuPlace]) -> f64;

    /// The mix of what is asked for changed. False when that changes no answer.
    fn demand(&mut self, _demand: &Demand) -> bool {
        false
    }

    /// Whether it wants to be told the mix of what is asked for.
    fn learns(&self) -> bool {
        false
    }

    /// Which of several devices of the same cost is taken.
    fn devices(&self) -> Devices {
        Devices::Tightest
    }

    /// A copy.
    fn boxed(&self) -> Box<dyn Score>;
}

/// Which of several devices of one node that cost the same is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Devices {
    /// The first.
    First,
    /// One that is drawn.
    Drawn,
    /// The one with least left.
    Tightest,
}

/// The score of a strategy.
pub(super) fn of(strategy: Strategy) -> Box<dyn Score> {
    match strategy {
        Strategy::Balanced => Box::new(balanced::Balanced::default()),
        Strategy::Random => Box::new(published::Random),
        Strategy::DotProduct => Box::new(published::DotProduct),
        Strategy::GpuClustering => Box::new(published::GpuClustering),
        Strategy::GpuPacking => Box::new(published::GpuPacking),
        Strategy::BestFit => Box::new(published::BestFit),
        Strategy::FragmentationGradientDescent => Box::new(published::GradientDescent::default()),
        Strategy::Spread => Box::new(published::Spread),
    }
}
