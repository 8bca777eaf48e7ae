//! The mix of what is asked for, which fragmentation is measured against.

use std::collections::HashMap;

use crate::model::{Amount, Share, TaskRequest};

/// Typical tasks cover this part of what was asked for (as in the paper's artefact).
const COVERED: f64 = 0.95;

/// Most typical tasks: more of them cost time and say little.
const MOST_TYPICAL: usize = 256;

/// A kind of task, and how much of the demand it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Typical {
    /// What each asks for.
    pub task: TaskRequest,
    /// Its part of all tasks, so that all typical ones together are 1.
    pub weight: f64,
}

/// Typical tasks, the commonest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    /// See the type.
    pub typical: Vec<Typical>,
}

impl Demand {
    /// From tasks and how often each was asked for: the commonest that cover 95 %.
    pub fn of<'a>(tasks: impl IntoIterator<Item = (&'a TaskRequest, f64)>) -> Self {
        let mut counts: HashMap<&TaskRequest, f64> = HashMap::new();
        for (task, count) in tasks {
            *counts.entry(task).or_default() += count;
        }
        let total: f64 = counts.values().sum();
        let mut counts: Vec<(&TaskRequest, f64)> =
            counts.into_iter().filter(|(_, count)| *count > 0.0).collect();
        // The same order on every run: ties by the request itself.
        counts.sort_by(|(one, first), (two, second)| {
            second.total_cmp(first).then_with(|| order(two).cmp(&order(one)))
        });
        let mut covered = 0.0;
        let mut typical = Vec::new();
        for (task, count) in counts {
            if covered >= COVERED * total || typical.len() >= MOST_TYPICAL {
                break;
            }
            covered += count;
            typical.push(Typical { task: task.clone(), weight: count });
        }
        for one in &mut typical {
            one.weight /= covered;
        }
        Self { typical }
    }

    /// Without memory, hugepages and addresses, as the published measure has it; kinds that are the
    /// same then are one.
    #[must_use]
    pub fn processors_alone(&self) -> Self {
        let strip = |task: &TaskRequest| TaskRequest {
            amount: Amount { cpu_milli: task.amount.cpu_milli, ..Amount::default() },
            gpus: task.gpus.clone(),
        };
        let tasks: Vec<(TaskRequest, f64)> =
            self.typical.iter().map(|one| (strip(&one.task), one.weight)).collect();
        let mut counts: Vec<Typical> = Vec::new();
        for (task, weight) in tasks {
            match counts.iter_mut().find(|one| one.task == task) {
                Some(one) => one.weight += weight,
                None => counts.push(Typical { task, weight }),
            }
        }
        Self { typical: counts }
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
        assert_eq!(demand.typical, [Typical { task: common.clone(), weight: 1.0 }]);
        let demand = Demand::of([(&common, 90.0), (&rare, 10.0)]);
        assert_eq!(demand.typical.len(), 2);
        assert!((demand.typical.iter().map(|one| one.weight).sum::<f64>() - 1.0).abs() < 1e-12);
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
        assert_eq!(demand.typical.len(), 2);
        for _ in 0..60_000 {
            if learner.see(&task(7000, 2), 1.0) {
                demand = learner.demand();
            }
        }
        assert_eq!(demand.typical[0].task, task(7000, 2));
    }
}
