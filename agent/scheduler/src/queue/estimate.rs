//! How long gangs run, learnt from those that ended.
//!
//! Durations of jobs spread over orders of magnitude, so that logarithms are what is averaged. Gangs
//! are grouped from broad to narrow: all; of the same number of GPUs; of the same kind; of the same
//! kind and number; the same of one tenant. What few gangs of a group say is pulled towards what the
//! next broader group says (shrinkage, as in empirical Bayes methods: Efron and Morris, 1975), so that
//! one odd gang of a new kind decides nothing.
//!
//! Gangs of one tenant and size that come within minutes of each other are a *burst*: the runs of one
//! sweep or script. How much longer or shorter than expected the first of a burst ran, the others
//! probably will, too; and while they still run, that they do is known already.
//!
//! Users' estimates are corrected by what theirs were worth so far, tenant by tenant: who always asks
//! for twice what he needs is believed half. A gang that outlives its estimate is estimated again
//! among those that lived as long.

use std::collections::HashMap;

use crate::model::Gang;

/// Durations that a group remembers: the last ones.
const REMEMBERED: usize = 64;
/// As many gangs of a group as what the broader group says counts for.
const SHRINKAGE: f64 = 2.0;
/// The same for the correction of users' estimates: more, for it is rarely needed.
const RATIO_SHRINKAGE: f64 = 4.0;
/// What the first gang ever is thought to run: an hour.
const PRIOR_MS: f64 = 3_600_000.0;
/// The variance of its logarithm, about a factor of five up or down.
const PRIOR_VARIANCE: f64 = 2.5;
/// Gangs of a burst come no further from each other, milliseconds.
const BURST_GAP_MS: u64 = 600_000;
/// Bursts of a tenant and size that are remembered.
const BURSTS: usize = 64;
/// As many gangs of a burst as what is expected without it counts for.
const BURST_SHRINKAGE: f64 = 1.0;
/// Groups that are remembered: kinds are users' words, which do not end.
const MOST_GROUPS: usize = 200_000;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Estimator {
    groups: Vec<Group>,
    index: HashMap<Key, u32>,
    /// By tenant and GPUs.
    bursts: HashMap<(String, u64), Vec<Burst>>,
    /// By group of a burst: how many outlived what was expected, and the sum of the logarithms.
    outlived: HashMap<u32, (f64, f64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    All,
    Gpus(u64),
    Kind(String),
    KindGpus(String, u64),
    TenantKindGpus(String, String, u64),
    Ratio(String),
    RatioKind(String, String),
}

/// Logarithms of the last durations of a group.
#[derive(Clone, Debug, Default)]
struct Group {
    logs: Vec<f64>,
    next: usize,
    mean: f64,
    variance: f64,
}

impl Group {
    fn learn(&mut self, log: f64) {
        if self.logs.len() < REMEMBERED {
            self.logs.push(log);
        } else {
            self.logs[self.next] = log;
        }
        self.next = (self.next + 1) % REMEMBERED;
        let count = self.logs.len() as f64;
        self.mean = self.logs.iter().sum::<f64>() / count;
        self.variance = self.logs.iter().map(|log| (log - self.mean).powi(2)).sum::<f64>() / count;
    }
}

/// Gangs that came together.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first_ms: u64,
    last_ms: u64,
    /// How much longer its gangs ran than was expected without it.
    residuals: u32,
}

/// The groups of a gang, broad to narrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Similar {
    durations: [u32; 5],
    ratios: [u32; 2],
    burst: u32,
}

/// How long a gang will run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// On average, milliseconds; at least 1.
    pub mean_ms: u64,
    /// Whether anything is known: what its user said, or gangs like it.
    pub known: bool,
}

impl Estimator {
    /// The groups of a gang. They hold until [`Estimator::prune`] says otherwise.
    pub fn similar(&mut self, gang: &Gang) -> Similar {
        let gpus = u64::from(gang.task.gpu_count()) * u64::from(gang.tasks.max);
        let (kind, tenant) = (&gang.kind, &gang.tenant);
        Similar {
            durations: [
                self.group(Key::All),
                self.group(Key::Gpus(gpus)),
                self.group(Key::Kind(kind.clone())),
                self.group(Key::KindGpus(kind.clone(), gpus)),
                self.group(Key::TenantKindGpus(tenant.clone(), kind.clone(), gpus)),
            ],
            ratios: [
                self.group(Key::Ratio(tenant.clone())),
                self.group(Key::RatioKind(tenant.clone(), kind.clone())),
            ],
            burst: self.burst(tenant, gpus, gang.submitted_ms),
        }
    }

    fn burst(&mut self, tenant: &str, gpus: u64, at_ms: u64) -> u32 {
        let next = u32::try_from(self.groups.len()).unwrap_or(u32::MAX);
        let bursts = self.bursts.entry((tenant.to_owned(), gpus)).or_default();
        let near = |burst: &&mut Burst| {
            at_ms.saturating_add(BURST_GAP_MS) >= burst.first_ms
                && at_ms <= burst.last_ms.saturating_add(BURST_GAP_MS)
        };
        if let Some(burst) = bursts.iter_mut().rev().find(near) {
            (burst.first_ms, burst.last_ms) = (at_ms.min(burst.first_ms), at_ms.max(burst.last_ms));
            return burst.residuals;
        }
        if bursts.len() >= BURSTS {
            bursts.remove(0);
        }
        bursts.push(Burst { first_ms: at_ms, last_ms: at_ms, residuals: next });
        self.groups.push(Group::default());
        next
    }

    /// A cycle begins: [`Estimator::runs`] says anew what runs.
    pub fn begin(&mut self) {
        self.outlived.clear();
    }

    /// A gang runs still, after so long: that says something of its burst.
    pub fn runs(&mut self, similar: &Similar, ran_ms: u64) {
        let log = (ran_ms.max(1) as f64).ln();
        let (mean, variance) = self.expected(similar);
        if log > mean {
            // The end is later than now by as much as it is surprising.
            let residual = log - mean + variance.sqrt() / 2.0;
            let outlived = self.outlived.entry(similar.burst).or_default();
            *outlived = (outlived.0 + 1.0, outlived.1 + residual);
        }
    }

    /// Mean and variance of a gang's logarithm, whatever its burst.
    fn expected(&self, similar: &Similar) -> (f64, f64) {
        self.shrunk(&similar.durations, (PRIOR_MS.ln(), PRIOR_VARIANCE), SHRINKAGE)
    }

    /// The same, with what is known of its burst.
    fn expected_in_burst(&self, similar: &Similar) -> (f64, f64) {
        let (mean, variance) = self.expected(similar);
        let burst = &self.groups[similar.burst as usize];
        let (outlived, sum) = self.outlived.get(&similar.burst).copied().unwrap_or_default();
        let ended = burst.logs.len() as f64;
        let count = ended + outlived;
        if count == 0.0 {
            return (mean, variance);
        }
        let residual = (burst.mean * ended + sum) / count;
        let weight = count / (count + BURST_SHRINKAGE);
        let certain = ended / (ended + BURST_SHRINKAGE + 1.0);
        (mean + weight * residual, variance + certain * (burst.variance - variance))
    }

    fn group(&mut self, key: Key) -> u32 {
        *self.index.entry(key).or_insert_with(|| {
            self.groups.push(Group::default());
            u32::try_from(self.groups.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// Forgets all when it knows too many groups; true if so.
    pub fn prune(&mut self) -> bool {
        if self.groups.len() <= MOST_GROUPS {
            return false;
        }
        self.bursts.clear();
        // Groups that gangs ended in are worth keeping, and broad ones are few.
        let mut keys: Vec<(Key, u32)> = self.index.drain().collect();
        keys.retain(|(_, group)| !self.groups[*group as usize].logs.is_empty());
        keys.sort_unstable_by_key(|(key, group)| {
            let broad = !matches!(key, Key::TenantKindGpus(..) | Key::RatioKind(..) | Key::KindGpus(..));
            std::cmp::Reverse((broad, *group))
        });
        keys.truncate(MOST_GROUPS / 2);
        let groups = keys.iter().map(|(_, group)| std::mem::take(&mut self.groups[*group as usize]));
        self.groups = groups.collect();
        self.index = keys.into_iter().map(|(key, _)| key).zip(0..).collect();
        true
    }

    /// A gang ended after running so long.
    pub fn ended(&mut self, gang: &Gang, ran_ms: u64) {
        let similar = self.similar(gang);
        let log = (ran_ms.max(1) as f64).ln();
        let residual = log - self.expected(&similar).0;
        for group in similar.durations {
            self.groups[group as usize].learn(log);
        }
        self.groups[similar.burst as usize].learn(residual);
        if let Some(estimate) = gang.estimate_ms {
            let ratio = log - (estimate.max(1) as f64).ln();
            for group in similar.ratios {
                self.groups[group as usize].learn(ratio);
            }
        }
    }

    /// How long a gang will run, of which the user says this.
    pub fn estimate(&self, similar: &Similar, user_ms: Option<u64>) -> Estimate {
        if let Some(user) = user_ms {
            let ratio = self.shrunk(&similar.ratios, (0.0, 0.0), RATIO_SHRINKAGE).0;
            // Estimates that were right so far stay what they are, to the millisecond.
            let mean = if ratio.abs() < 1e-3 { user } else { (user as f64 * ratio.exp()) as u64 };
            return Estimate { mean_ms: mean.max(1), known: true };
        }
        let known = !self.groups[similar.durations[0] as usize].logs.is_empty();
        let (mean, variance) = self.expected_in_burst(similar);
        // The mean of a log-normal distribution, for what is minimized is a sum.
        let mean_ms = (mean + variance.min(2.0 * PRIOR_VARIANCE) / 2.0).exp();
        Estimate { mean_ms: (mean_ms as u64).max(1), known }
    }

    /// How much longer a gang will run that ran so long and should have ended.
    pub fn remaining_ms(&self, similar: &Similar, ran_ms: u64) -> u64 {
        let log = (ran_ms.max(1) as f64).ln();
        let longer = similar.durations.iter().rev().find_map(|group| {
            let logs = &self.groups[*group as usize].logs;
            let (sum, count) = logs
                .iter()
                .filter(|&&other| other > log)
                .fold((0.0, 0.0), |(sum, count), other| (sum + other.exp() - ran_ms as f64, count + 1.0));
            (count >= 3.0).then_some(sum / count)
        });
        // Nobody lived longer: what has lasted long lasts about as long again.
        let remaining = longer.unwrap_or(ran_ms as f64) as u64;
        remaining.max(1000)
    }

    /// Mean and variance of a gang's logarithm, from the broadest group to the narrowest.
    fn shrunk(&self, groups: &[u32], prior: (f64, f64), shrinkage: f64) -> (f64, f64) {
        groups.iter().fold(prior, |(mean, variance), &group| {
            let group = &self.groups[group as usize];
            let count = group.logs.len() as f64;
            let weight = count / (count + shrinkage);
            (mean + weight * (group.mean - mean), variance + weight * (group.variance - variance))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gang(kind: &str, tenant: &str, estimate_ms: Option<u64>) -> Gang {
        Gang { kind: kind.to_owned(), tenant: tenant.to_owned(), estimate_ms, ..Gang::default() }
    }

    #[test]
    fn gangs_of_a_kind_are_told_apart_after_a_few() {
        let mut estimator = Estimator::default();
        // Far from each other: what one burst says of its kinds is not what is tested here.
        let at = |hours: u64, gang: Gang| Gang { submitted_ms: hours * 3_600_000, ..gang };
        for hours in 1..9 {
            estimator.ended(&at(2 * hours, gang("short", "a", None)), 60_000);
            estimator.ended(&at(2 * hours + 1, gang("long", "a", None)), 36_000_000);
        }
        let mut mean = |kind, tenant| {
            let similar = estimator.similar(&gang(kind, tenant, None));
            estimator.estimate(&similar, None).mean_ms
        };
        assert!((50_000..120_000).contains(&mean("short", "a")), "{}", mean("short", "a"));
        assert!((20_000_000..40_000_000).contains(&mean("long", "b")), "{}", mean("long", "b"));
        assert!((120_000..20_000_000).contains(&mean("new", "b")), "{}", mean("new", "b"));
    }

    #[test]
    fn users_are_believed_as_far_as_they_were_right() {
        let mut estimator = Estimator::default();
        for _ in 0..32 {
            estimator.ended(&gang("train", "boaster", Some(10_000_000)), 1_000_000);
            estimator.ended(&gang("train", "honest", Some(1_000_000)), 1_000_000);
        }
        let mut mean = |tenant| {
            let similar = estimator.similar(&gang("train", tenant, None));
            estimator.estimate(&similar, Some(7_000_000)).mean_ms
        };
        assert_eq!(mean("honest"), 7_000_000);
        assert_eq!(mean("new"), 7_000_000);
        assert!((600_000..1_100_000).contains(&mean("boaster")), "{}", mean("boaster"));
    }

    #[test]
    fn what_outlives_its_estimate_is_compared_with_what_lived_as_long() {
        let mut estimator = Estimator::default();
        for ran in [1_000, 2_000, 100_000, 200_000, 300_000] {
            estimator.ended(&gang("x", "a", None), ran);
        }
        let similar = estimator.similar(&gang("x", "a", None));
        assert_eq!(estimator.remaining_ms(&similar, 50_000), 149_999);
        assert_eq!(estimator.remaining_ms(&similar, 1_000_000), 1_000_000);
    }

    #[test]
    fn words_without_end_do_not_fill_the_memory() {
        let mut estimator = Estimator::default();
        estimator.ended(&gang("kept", "a", None), 5_000);
        let before = estimator.similar(&gang("kept", "a", None));
        let expected = estimator.expected(&before);
        for number in 0..MOST_GROUPS {
            estimator.similar(&gang(&number.to_string(), "a", None));
            if estimator.prune() {
                break;
            }
        }
        assert!(estimator.groups.len() < 100);
        let after = estimator.similar(&gang("kept", "a", None));
        assert_eq!(estimator.expected(&after), expected);
    }
}
