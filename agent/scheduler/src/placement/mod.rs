//! Where one gang goes: filters, then a score.

mod shortage;

pub use shortage::Shortage;

use crate::model::{Cluster, Gang, GpuPlace, Node, Offer, TaskPlace};
use crate::policy::Strategy;

/// Places gangs; keeps what it computed of nodes that did not change.
#[derive(Clone, Debug)]
pub struct Placer {
    strategy: Strategy,
}

impl Placer {
    /// For one strategy; `seed` decides what is left to chance.
    pub fn new(strategy: Strategy, _seed: u64) -> Self {
        Self { strategy }
    }

    /// The strategy.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Takes room for `tasks` tasks of the gang on nodes that `admits` lets through, all or none, and
    /// says where they are, by rank; ranks of one node are consecutive.
    ///
    /// # Errors
    /// What is missing; nothing changes then.
    pub fn place(
        &mut self,
        cluster: &mut Cluster,
        gang: &Gang,
        tasks: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Result<Vec<TaskPlace>, Shortage> {
        let mut places: Vec<TaskPlace> = Vec::new();
        for index in 0..cluster.nodes().len() {
            while (places.len() as u32) < tasks
                && eligible(&cluster.nodes()[index], gang)
                && admits(&cluster.nodes()[index])
                && let Some(place) = fit(cluster, index, gang)
                && cluster.take(gang, &place).is_ok()
            {
                places.push(place);
            }
        }
        if places.len() as u32 == tasks {
            return Ok(places);
        }
        for place in &places {
            cluster.give(gang, place);
        }
        let fit = places.len() as u32;
        Err(Shortage::Fragmented { tasks, task: gang.task.clone(), fit })
    }
}

/// Whether a node may run the gang, whatever is free of it.
pub fn eligible(node: &Node, gang: &Gang) -> bool {
    node.offer == Offer::Open
        && node.classes.contains(&gang.class)
        && gang.tolerates(&node.taints)
        && gang.constraints.iter().all(|constraint| constraint.holds(&node.name, &node.labels))
}

fn fit(cluster: &Cluster, index: usize, gang: &Gang) -> Option<TaskPlace> {
    let (node, free) = (&cluster.nodes()[index], &cluster.free()[index]);
    if !free.amount.fits(&gang.task.amount) {
        return None;
    }
    let mut gpus = Vec::new();
    if let Some(request) = &gang.task.gpus {
        let parts = node.gpus.iter().zip(&free.gpus).enumerate().filter_map(|(at, (gpu, free))| {
            let part = request.accepts(gpu).then(|| gpu.part(*free, &request.share))??;
            Some(GpuPlace { index: u8::try_from(at).ok()?, part })
        });
        gpus.extend(parts.take(request.count as usize));
        if gpus.len() < request.count as usize {
            return None;
        }
    }
    Some(TaskPlace { node: u32::try_from(index).ok()?, gpus, numa: None })
}
