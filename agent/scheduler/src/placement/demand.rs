//! The mix of what is asked for, which fragmentation is measured against.

use std::collections::HashMap;

use crate::model::{Amount, Share, TaskRequest};

/// Typical tasks cover this part of what was asked for (as in the paper's artefact).
const COVERED: f64 = 0.95;

/// Most typical tasks: more of them cost time and say little.
const MOST_TYPICAL: usize = 256;

/// A kind of task, and how much of the demand it is.
#[derive(Clone, Debug, PartialEq)]
struct Typical {
    task: TaskRequest,
    /// Its part of all tasks.
    weight: f64,
}

/// The mix of what is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    /// All kinds of tasks with their parts, the commonest first.
    all: Vec<Typical>,
    /// How many of them are typical.
    typical: usize,
    /// The part of all tasks that those are.
    covered: f64,
}

impl Demand {
    /// From tasks and how often each was asked for.
    pub fn of<'a>(tasks: impl IntoIterator<Item = (&'a TaskRequest, f64)>) -> Self {
        let mut counts: HashMap<&TaskRequest, f64> = HashMap::new();
        for (task, count) in tasks {
            *counts.entry(task).or_default() += count;
        }
        // Sums of floats depend on their order, which a hash map's is not.
        let mut values: Vec<f64> = counts.values().copied().collect();
        values.sort_by(f64::total_cmp);
        let total: f64 = values.iter().sum();
        let counts = counts.into_iter().filter(|(_, count)| *count > 0.0);
        let mut all: Vec<Typical> =
            counts.map(|(task, count)| Typical { task: task.clone(), weight: count / total }).collect();
        // The same order on every run: ties by the request itself.
        all.sort_by(|one, two| {
            two.weight.total_cmp(&one.weight).then_with(|| order(&two.task).cmp(&order(&one.task)))
        });
        let (mut typical, mut covered) = (0, 0.0);
        while typical < all.len().min(MOST_TYPICAL) && covered < COVERED - 1e-9 {
            covered += all[typical].weight;
            typical += 1;
        }
        Self { all, typical, covered }
    }

    /// The commonest kinds of tasks, which cover 95 %, with weights that add up to 1.
    pub fn typical(&self) -> impl Iterator<Item = (&TaskRequest, f64)> {
        self.all[..self.typical].iter().map(|one| (&one.task, one.weight / self.covered))
    }

    /// Without memory, hugepages and addresses, as the published measure has it; kinds that are the
    /// same then are one.
    #[must_use]
    pub fn processors_alone(&self) -> Self {
        let strip = |one: &Typical| TaskRequest {
            amount: Amount { cpu_milli: one.task.amount.cpu_milli, ..Amount::default() },
            gpus: one.task.gpus.clone(),
        };
        let tasks: Vec<(TaskRequest, f64)> = self.all.iter().map(|one| (strip(one), one.weight)).collect();
        Self::of(tasks.iter().map(|(task, weight)| (task, *weight)))
    }
}

/// An order of requests that does not depend on addresses or hashes.
fn order(task: &TaskRequest) -> (Amount, u32, u64, &[String], u64, &str) {
    let Some(gpus) = &task.gpus else { return (task.amount, 0, 0, &[], 0, "") };
    let (milli, profile) = match &gpus.share {
        Share::Whole => (1000, ""),
        Share::Milli(milli) => (u64::from(*milli), ""),
        Share::Profile(name) => (0, name.as_str()),
    };
    (task.amount, gpus.count, milli, &gpus.models, gpus.memory_bytes, profile)
}

/// Learns the mix from what comes: tasks count when they are placed, and once more where they are not
/// (the first time), so that what does not fit is not forgotten. Old tasks fade.
#[derive(Clone, Debug, Default)]
pub(super) struct Learner {
    counts: HashMap<TaskRequest, f64>,
    total: f64,
    /// When the typical tasks were last taken from the counts.
    taken: f64,
}

/// With so many tasks seen, old ones count half.
const MEMORY: f64 = 20_000.0;

/// The mix is looked at again when the tasks grew by this part.
const GROWN: f64 = 1.25;

impl Learner {
    /// Counts tasks; true when the mix should be taken again.
    pub(super) fn see(&mut self, task: &TaskRequest, tasks: f64) -> bool {
        match self.counts.get_mut(task) {
            Some(count) => *count += tasks,
            None => {
                self.counts.insert(task.clone(), tasks);
            }
        }
        self.total += tasks;
        if self.total > MEMORY {
            self.counts.retain(|_, count| {
                *count /= 2.0;
                *count >= 0.25
            });
            self.total /= 2.0;
            self.taken /= 2.0;
        }
        self.total >= 8.0 && self.total > self.taken * GROWN
    }

    /// The mix now.
    pub(super) fn demand(&mut self) -> Demand {
        self.taken = self.total;
        Demand::of(self.counts.iter().map(|(task, count)| (task, *count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GpuRequest;

    fn task(cpu_milli: u64, gpus: u32) -> TaskRequest {
        let gpus = (gpus > 0).then(|| GpuRequest::whole(gpus));
        TaskRequest { amount: Amount { cpu_milli, ..Amount::default() }, gpus }
    }

    #[test]
    fn typical_tasks_cover_nearly_all_and_add_up() {
        let (common, rare) = (task(1000, 1), task(2000, 8));
        let demand = Demand::of([(&common, 96.0), (&rare, 4.0)]);
        assert_eq!(demand.typical().collect::<Vec<_>>(), [(&common, 1.0)]);
        let demand = Demand::of([(&common, 90.0), (&rare, 10.0)]);
        assert_eq!(demand.typical().count(), 2);
        assert!((demand.typical().map(|(_, weight)| weight).sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_mix_follows_what_comes() {
        let mut learner = Learner::default();
        let mut demand = Demand::default();
        for at in 0..1_000_u32 {
            if learner.see(&task(u64::from(1000 + at % 2), 1), 1.0) {
                demand = learner.demand();
            }
        }
        assert_eq!(demand.typical().count(), 2);
        for _ in 0..60_000 {
            if learner.see(&task(7000, 2), 1.0) {
                demand = learner.demand();
            }
        }
        assert_eq!(demand.typical().next().unwrap().0, &task(7000, 2));
    }
}
