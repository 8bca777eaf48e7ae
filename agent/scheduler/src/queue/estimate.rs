//! How long gangs run, learnt from those that ended and from those that run still.
//!
//! Durations of jobs spread over orders of magnitude, so that logarithms are what is modelled: that of
//! a gang is a sum of effects, of its number of GPUs, its kind, both, both of its tenant, and of the
//! *burst* that it came in, and of what nobody knows. Each effect is thought to be small until gangs
//! say otherwise (random effects; shrinkage, as in empirical Bayes methods: Efron and Morris, 1975), so
//! that one odd gang of a new kind decides nothing, and what a kind is known to do is not asked again
//! for each number of GPUs.
//!
//! A burst are gangs of one tenant and size that come within minutes of each other: the runs of one
//! sweep or script. How much longer or shorter than their kinds the first of a burst ran, the others
//! probably will, too.
//!
//! Gangs that run still count as far as they have outlived what was expected: without them the past
//! would be made of short gangs alone, and a burst of long ones would be known last.
//!
//! What is not known of a gang makes its expected duration longer: the mean of a log-normal
//! distribution is above its median by half the variance, and effects that nobody has seen add theirs.
//!
//! Users' estimates are corrected by what theirs were worth so far, tenant by tenant: who always asks
//! for twice what he needs is believed half. A gang that outlives its estimate is estimated again
//! among those that lived as long.

use std::collections::{HashMap, VecDeque};

use super::survival;
use crate::model::Gang;

/// Durations that are remembered of gangs of one tenant, kind and number of GPUs: the last ones. A
/// kind that ends every second leaves the others their place.
const REMEMBERED: usize = 64;
/// Durations that are remembered in all: each cycle looks at them.
const MOST_REMEMBERED: usize = 4096;
/// Running gangs that a cycle learns from.
const MOST_RUNNING: usize = 1024;
/// Sweeps over all effects when they are fitted; they begin where the last fit ended.
const SWEEPS: usize = 2;
/// As many gangs of a group as what the broader group says counts for, for users' estimates: it is
/// rarely needed.
const RATIO_SHRINKAGE: f64 = 4.0;
/// What the first gang ever is thought to run: an hour.
const PRIOR_MS: f64 = 3_600_000.0;
/// Variances of effects before any gang ended, in the order of [`Similar::effects`]: sizes and kinds
/// differ by orders of magnitude, and the rest by less.
const EFFECT_VARIANCES: [f64; EFFECTS] = [4.0, 3.0, 3.0, 0.3, 0.3, 0.5];
const EFFECTS: usize = 6;
/// The variance of what no effect explains, before any gang ended; it counts for so many gangs.
const PRIOR_VARIANCE: f64 = 1.0;
const PRIOR_COUNT: f64 = 4.0;
/// More variance than this makes no estimate longer: a mean that is 20 times the median.
const MOST_VARIANCE: f64 = 6.0;
/// Gangs that have not come this near to their expected end, in standard deviations, say nothing.
const SAYS_SOMETHING: f64 = -2.0;
/// Gangs of a burst come no further from each other, milliseconds.
const BURST_GAP_MS: u64 = 600_000;
/// Bursts of a tenant and size that are remembered.
const BURSTS: usize = 64;
/// Groups that are remembered: kinds are users' words, which do not end.
const MOST_GROUPS: usize = 200_000;

/// See the module.
#[derive(Clone, Debug)]
pub struct Estimator {
    groups: Vec<Group>,
    index: HashMap<Key, u32>,
    /// By tenant and GPUs.
    bursts: HashMap<(String, u64), VecDeque<Burst>>,
    /// Gangs that ended; the oldest is replaced when there are [`MOST_REMEMBERED`].
    ended: Vec<Observation>,
    oldest: usize,
    /// Gangs that run, since [`Estimator::begin`].
    running: Vec<Observation>,
    /// Of what no effect explains.
    variance: f64,
    /// Whether anything ended since effects were fitted.
    stale: bool,
}

impl Default for Estimator {
    fn default() -> Self {
        Self {
            groups: Vec::new(),
            index: HashMap::new(),
            bursts: HashMap::new(),
            ended: Vec::new(),
            oldest: 0,
            running: Vec::new(),
            variance: PRIOR_VARIANCE,
            stale: false,
        }
    }
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

/// What gangs that have something in common say.
#[derive(Clone, Debug, Default)]
struct Group {
    /// By how much their logarithm is larger for it: an effect, or the mean of users' ratios.
    effect: f64,
    /// Gangs that say so.
    count: f64,
    /// Of gangs that ended in it, where it is the narrowest: their places among all.
    ended: VecDeque<u32>,
    /// Sums, while effects are fitted.
    sum: f64,
}

/// The logarithm of a duration, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Observation {
    effects: [u32; EFFECTS],
    log: f64,
    /// 1 if it ended, less if it runs still.
    weight: f64,
    /// What no effect explains of it.
    rest: f64,
}

/// Gangs that came together.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first_ms: u64,
    last_ms: u64,
    group: u32,
}

/// The groups of a gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Similar {
    /// All, GPUs, kind, kind and GPUs, those of its tenant, burst.
    effects: [u32; EFFECTS],
    ratios: [u32; 2],
}

/// Where the narrowest group that outlives its gangs is among the effects.
const NARROWEST: usize = 4;

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
            effects: [
                self.group(Key::All),
                self.group(Key::Gpus(gpus)),
                self.group(Key::Kind(kind.clone())),
                self.group(Key::KindGpus(kind.clone(), gpus)),
                self.group(Key::TenantKindGpus(tenant.clone(), kind.clone(), gpus)),
                self.burst(tenant, gpus, gang.submitted_ms),
            ],
            ratios: [
                self.group(Key::Ratio(tenant.clone())),
                self.group(Key::RatioKind(tenant.clone(), kind.clone())),
            ],
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
            return burst.group;
        }
        if bursts.len() >= BURSTS {
            bursts.pop_front();
        }
        bursts.push_back(Burst { first_ms: at_ms, last_ms: at_ms, group: next });
        self.groups.push(Group::default());
        next
    }

    fn group(&mut self, key: Key) -> u32 {
        *self.index.entry(key).or_insert_with(|| {
            self.groups.push(Group::default());
            u32::try_from(self.groups.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// A cycle begins: [`Estimator::runs`] says anew what runs, then [`Estimator::fit`] learns from it.
    pub fn begin(&mut self) {
        self.running.clear();
    }

    /// A gang runs still, after so long.
    pub fn runs(&mut self, similar: &Similar, ran_ms: u64) {
        if self.running.len() >= MOST_RUNNING {
            return;
        }
        let (mean, deviation) = (self.mean(similar), self.variance.sqrt());
        let z = (logarithm(ran_ms) - mean) / deviation;
        if z > SAYS_SOMETHING {
            let (weight, above) = survival::censored(z);
            let log = mean + deviation * above;
            self.running.push(Observation { effects: similar.effects, log, weight, rest: 0.0 });
        }
    }

    /// Fits all effects to what ended and what runs. They hold until the next time.
    pub fn fit(&mut self) {
        if !self.stale && self.running.is_empty() {
            return;
        }
        self.stale = false;
        let Self { groups, ended, running, .. } = self;
        let all = || ended.iter().chain(running.iter());
        // Of groups in which none of these is, nothing new is known.
        for &group in all().flat_map(|seen| &seen.effects) {
            groups[group as usize].count = 0.0;
        }
        for seen in all() {
            seen.effects.iter().for_each(|&group| groups[group as usize].count += seen.weight);
        }
        let mut seen: Vec<&mut Observation> = ended.iter_mut().chain(running).collect();
        for one in &mut seen {
            one.rest = one.log - PRIOR_MS.ln() - sum(groups, &one.effects);
        }
        for _ in 0..SWEEPS {
            for (effect, own) in EFFECT_VARIANCES.iter().enumerate() {
                fit_one(groups, &mut seen, effect, self.variance / own);
            }
        }
        let squares: f64 = ended.iter().map(|seen| seen.rest * seen.rest).sum();
        self.variance = (PRIOR_COUNT * PRIOR_VARIANCE + squares) / (PRIOR_COUNT + ended.len() as f64);
    }

    /// Mean of a gang's logarithm.
    fn mean(&self, similar: &Similar) -> f64 {
        PRIOR_MS.ln() + sum(&self.groups, &similar.effects)
    }

    /// Its variance: of what no effect explains, and of what is not known of each effect.
    fn variance(&self, similar: &Similar) -> f64 {
        let unknown =
            similar.effects.iter().zip(EFFECT_VARIANCES).map(|(&group, own)| {
                self.variance / (self.groups[group as usize].count + self.variance / own)
            });
        self.variance + unknown.sum::<f64>()
    }

    /// Forgets what it knows least of when it knows too many groups; true if so.
    pub fn prune(&mut self) -> bool {
        if self.groups.len() <= MOST_GROUPS {
            return false;
        }
        self.fit();
        self.bursts.clear();
        self.running.clear();
        // Groups that gangs ended in are worth keeping, and broad ones are few.
        let mut keys: Vec<(Key, u32)> = self.index.drain().collect();
        keys.retain(|(_, group)| self.groups[*group as usize].count > 0.0);
        keys.sort_unstable_by_key(|(key, group)| {
            let broad = !matches!(key, Key::TenantKindGpus(..) | Key::RatioKind(..) | Key::KindGpus(..));
            std::cmp::Reverse((broad, *group))
        });
        keys.truncate(MOST_GROUPS / 2);
        let mut moved: HashMap<u32, u32> = HashMap::new();
        let mut groups = Vec::with_capacity(keys.len());
        // Bursts have no key, but what ended in them is explained by them.
        let bursts = self.ended.iter().map(|seen| seen.effects[EFFECTS - 1]);
        for group in keys.iter().map(|(_, group)| *group).chain(bursts) {
            moved.entry(group).or_insert_with(|| {
                groups.push(std::mem::take(&mut self.groups[group as usize]));
                u32::try_from(groups.len() - 1).unwrap_or(u32::MAX)
            });
        }
        self.groups = groups;
        self.index = keys.into_iter().map(|(key, group)| (key, moved[&group])).collect();
        self.move_ended(&moved);
        true
    }

    /// Groups have other numbers; what ended in those that are gone is forgotten.
    fn move_ended(&mut self, moved: &HashMap<u32, u32>) {
        // The oldest first, as it is after that.
        self.ended.rotate_left(self.oldest);
        self.oldest = 0;
        self.groups.iter_mut().for_each(|group| group.ended.clear());
        self.ended.retain_mut(|seen| {
            let known = seen.effects.iter().all(|group| moved.contains_key(group));
            if known {
                seen.effects = seen.effects.map(|group| moved[&group]);
            }
            known
        });
        for (seen, place) in self.ended.iter().zip(0..) {
            self.groups[seen.effects[NARROWEST] as usize].ended.push_back(place);
        }
    }

    /// A gang ended after running so long.
    pub fn ended(&mut self, gang: &Gang, ran_ms: u64) {
        let similar = self.similar(gang);
        let log = logarithm(ran_ms);
        self.remember(Observation { effects: similar.effects, log, weight: 1.0, rest: 0.0 });
        if let Some(estimate) = gang.estimate_ms {
            let ratio = log - logarithm(estimate);
            for group in similar.ratios {
                let group = &mut self.groups[group as usize];
                // The last ones count most.
                group.count = (group.count + 1.0).min(REMEMBERED as f64);
                group.effect += (ratio - group.effect) / group.count;
            }
        }
    }

    fn remember(&mut self, seen: Observation) {
        self.stale = true;
        let narrowest = seen.effects[NARROWEST] as usize;
        let place = if self.groups[narrowest].ended.len() >= REMEMBERED {
            self.groups[narrowest].ended.pop_front()
        } else if self.ended.len() >= MOST_REMEMBERED {
            let place = self.oldest;
            self.oldest = (self.oldest + 1) % MOST_REMEMBERED;
            let before = self.ended[place].effects[NARROWEST] as usize;
            let place = u32::try_from(place).unwrap_or(u32::MAX);
            self.groups[before].ended.retain(|&other| other != place);
            Some(place)
        } else {
            None
        };
        let place = place.unwrap_or_else(|| {
            self.ended.push(seen);
            u32::try_from(self.ended.len() - 1).unwrap_or(u32::MAX)
        });
        self.ended[place as usize] = seen;
        self.groups[narrowest].ended.push_back(place);
    }

    /// How long a gang will run, of which the user says this.
    pub fn estimate(&self, similar: &Similar, user_ms: Option<u64>) -> Estimate {
        if let Some(user) = user_ms {
            let ratio = self.ratio(&similar.ratios);
            // Estimates that were right so far stay what they are, to the millisecond.
            let mean = if ratio.abs() < 1e-3 { user } else { (user as f64 * ratio.exp()) as u64 };
            return Estimate { mean_ms: mean.max(1), known: true };
        }
        // The mean of a log-normal distribution, for what is minimized is a sum.
        let log = self.mean(similar) + self.variance(similar).min(MOST_VARIANCE) / 2.0;
        Estimate { mean_ms: (log.exp() as u64).max(1), known: !self.ended.is_empty() }
    }

    /// The logarithm of what users' estimates are worth, from the broader group to the narrower.
    fn ratio(&self, groups: &[u32]) -> f64 {
        groups.iter().fold(0.0, |mean, &group| {
            let group = &self.groups[group as usize];
            mean + group.count / (group.count + RATIO_SHRINKAGE) * (group.effect - mean)
        })
    }

    /// How much longer a gang will run that ran so long and should have ended: as long as half of
    /// those that lived as long.
    pub fn remaining_ms(&self, similar: &Similar, ran_ms: u64) -> u64 {
        let (mean, deviation) = (self.mean(similar), self.variance(similar).sqrt());
        let median = survival::median_above((logarithm(ran_ms) - mean) / deviation);
        let all = (mean + deviation * median).exp();
        ((all - ran_ms as f64) as u64).max(1000)
    }
}

fn logarithm(ms: u64) -> f64 {
    (ms.max(1) as f64).ln()
}

fn sum(groups: &[Group], effects: &[u32; EFFECTS]) -> f64 {
    effects.iter().map(|&group| groups[group as usize].effect).sum()
}

/// Fits the groups of one effect to what the others leave unexplained.
fn fit_one(groups: &mut [Group], seen: &mut [&mut Observation], effect: usize, shrinkage: f64) {
    for one in &*seen {
        groups[one.effects[effect] as usize].sum = 0.0;
    }
    for one in &*seen {
        let group = &mut groups[one.effects[effect] as usize];
        group.sum += one.weight * (one.rest + group.effect);
    }
    for one in &mut *seen {
        let group = &groups[one.effects[effect] as usize];
        one.rest += group.effect - group.sum / (group.count + shrinkage);
    }
    for one in &*seen {
        let group = &mut groups[one.effects[effect] as usize];
        group.effect = group.sum / (group.count + shrinkage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    fn gang(kind: &str, tenant: &str, estimate_ms: Option<u64>) -> Gang {
        Gang { kind: kind.to_owned(), tenant: tenant.to_owned(), estimate_ms, ..Gang::default() }
    }

    /// Far enough from each other that they are no burst.
    fn at(hours: u64, gang: Gang) -> Gang {
        Gang { submitted_ms: hours * HOUR, ..gang }
    }

    fn mean(estimator: &mut Estimator, gang: &Gang) -> u64 {
        let similar = estimator.similar(gang);
        estimator.fit();
        estimator.estimate(&similar, gang.estimate_ms).mean_ms
    }

    #[test]
    fn gangs_of_a_kind_are_told_apart_after_a_few() {
        let mut estimator = Estimator::default();
        for hours in 1..9 {
            estimator.ended(&at(2 * hours, gang("short", "a", None)), 60_000);
            estimator.ended(&at(2 * hours + 1, gang("long", "a", None)), 36_000_000);
        }
        let mut mean = |kind, tenant| mean(&mut estimator, &gang(kind, tenant, None));
        assert!((50_000..180_000).contains(&mean("short", "a")), "{}", mean("short", "a"));
        assert!((20_000_000..60_000_000).contains(&mean("long", "b")), "{}", mean("long", "b"));
        assert!((120_000..20_000_000).contains(&mean("new", "b")), "{}", mean("new", "b"));
    }

    /// What a burst says of its gangs is what their kinds do not.
    #[test]
    fn unlike_kinds_that_come_together_are_told_apart() {
        let mut estimator = Estimator::default();
        for hours in 1..9 {
            estimator.ended(&at(hours, gang("short", "a", None)), 60_000);
            estimator.ended(&at(hours, gang("long", "a", None)), 36_000_000);
        }
        // One ended in a new burst; the other is of the same.
        estimator.ended(&at(20, gang("short", "a", None)), 60_000);
        let mut mean = |kind| mean(&mut estimator, &at(20, gang(kind, "a", None)));
        assert!((50_000..150_000).contains(&mean("short")), "{}", mean("short"));
        assert!((20_000_000..60_000_000).contains(&mean("long")), "{}", mean("long"));
    }

    #[test]
    fn a_kind_is_known_with_another_number_of_gpus() {
        let mut estimator = Estimator::default();
        for hours in 1..20 {
            estimator.ended(&at(2 * hours, gang("short", "a", None)), 60_000);
            estimator.ended(&at(2 * hours + 1, gang("long", "a", None)), 36_000_000);
        }
        let large = |kind| {
            let tasks = crate::model::Size::exactly(16);
            let task = crate::model::TaskRequest {
                gpus: Some(crate::model::GpuRequest::whole(1)),
                ..crate::model::TaskRequest::default()
            };
            Gang { tasks, task, ..gang(kind, "b", None) }
        };
        let (short, long) = (mean(&mut estimator, &large("short")), mean(&mut estimator, &large("long")));
        assert!(long > 20 * short, "{long} and {short}");
    }

    #[test]
    fn the_others_of_a_burst_run_as_long_as_the_first() {
        let burst = |ran_ms| {
            let mut estimator = Estimator::default();
            for hours in 1..20 {
                // Runs of this kind differ by much.
                let ran = if hours % 2 == 0 { 200_000 } else { 20_000_000 };
                estimator.ended(&at(hours, gang("x", "a", None)), ran);
            }
            let sweep = at(50, gang("x", "a", None));
            (0..4).for_each(|_| estimator.ended(&sweep, ran_ms));
            mean(&mut estimator, &sweep)
        };
        let (short, long) = (burst(200_000), burst(20_000_000));
        assert!(long > 10 * short, "{long} and {short}");
    }

    #[test]
    fn what_runs_still_says_that_others_run_longer() {
        let mut estimator = Estimator::default();
        for hours in 1..9 {
            estimator.ended(&at(hours, gang("x", "a", None)), 60_000);
        }
        let sweep = at(50, gang("x", "a", None));
        let before = mean(&mut estimator, &sweep);
        let similar = estimator.similar(&sweep);
        estimator.begin();
        (0..4).for_each(|_| estimator.runs(&similar, 30));
        assert!(mean(&mut estimator, &sweep).abs_diff(before) < before / 10, "they have only begun");
        let mut after = before;
        for _ in 0..8 {
            estimator.begin();
            (0..4).for_each(|_| estimator.runs(&similar, HOUR));
            after = mean(&mut estimator, &sweep);
        }
        assert!(after > 10 * before, "{before} before, {after} after");
    }

    #[test]
    fn users_are_believed_as_far_as_they_were_right() {
        let mut estimator = Estimator::default();
        for _ in 0..32 {
            estimator.ended(&gang("train", "boaster", Some(10_000_000)), 1_000_000);
            estimator.ended(&gang("train", "honest", Some(1_000_000)), 1_000_000);
        }
        let mut mean = |tenant| mean(&mut estimator, &gang("train", tenant, Some(7_000_000)));
        assert_eq!(mean("honest"), 7_000_000);
        assert_eq!(mean("new"), 7_000_000);
        assert!((600_000..1_100_000).contains(&mean("boaster")), "{}", mean("boaster"));
    }

    #[test]
    fn what_outlives_its_estimate_is_compared_with_what_lives_as_long() {
        let mut estimator = Estimator::default();
        for (ran, hours) in [1_000, 2_000, 100_000, 200_000, 300_000].into_iter().zip(1..) {
            estimator.ended(&at(hours, gang("x", "a", None)), ran);
        }
        let similar = estimator.similar(&gang("x", "a", None));
        estimator.fit();
        let left = [50_000, 200_000, 1_000_000].map(|ran| estimator.remaining_ms(&similar, ran));
        assert!((30_000..250_000).contains(&left[0]), "{left:?}");
        assert!(left.is_sorted(), "who has lived longer lives longer: {left:?}");
        assert!((200_000..2_000_000).contains(&left[2]), "{left:?}");
        // However far beyond all that is known.
        assert!(estimator.remaining_ms(&similar, u64::MAX / 2) >= 1000);
    }

    #[test]
    fn a_kind_that_ends_all_the_time_leaves_the_others_their_place() {
        let mut estimator = Estimator::default();
        for hours in 0..4 {
            estimator.ended(&at(hours, gang("rare", "a", None)), 36_000_000);
        }
        for number in 0..3 * MOST_REMEMBERED as u64 {
            estimator.ended(&at(number, gang("often", "a", None)), 60_000);
        }
        assert_eq!(estimator.ended.len(), 4 + REMEMBERED);
        assert!(mean(&mut estimator, &gang("rare", "a", None)) > 10_000_000);
        // With many kinds, the oldest go, and what is kept of each is what is remembered of it.
        for number in 0..3 * MOST_REMEMBERED {
            estimator.ended(&gang(&(number % 1000).to_string(), "a", None), 1_000);
        }
        assert_eq!(estimator.ended.len(), MOST_REMEMBERED);
        for (place, seen) in estimator.ended.iter().enumerate() {
            let narrowest = &estimator.groups[seen.effects[NARROWEST] as usize].ended;
            assert_eq!(narrowest.iter().filter(|&&other| other as usize == place).count(), 1);
        }
    }

    #[test]
    fn words_without_end_do_not_fill_the_memory() {
        let mut estimator = Estimator::default();
        estimator.ended(&gang("kept", "a", None), 5_000);
        let expected = mean(&mut estimator, &gang("kept", "a", None));
        for number in 0..MOST_GROUPS {
            estimator.similar(&gang(&number.to_string(), "a", None));
            if estimator.prune() {
                break;
            }
        }
        assert!(estimator.groups.len() < 100);
        let similar = estimator.similar(&gang("kept", "a", None));
        let counts =
            similar.effects[..NARROWEST + 1].iter().map(|&group| estimator.groups[group as usize].count);
        assert!(counts.min_by(f64::total_cmp) >= Some(1.0), "what ended counts as before");
        // Bursts begin anew.
        let after = mean(&mut estimator, &gang("kept", "a", None));
        assert!(after.abs_diff(expected) < expected, "{expected} before, {after} after");
        for _ in 0..2 * REMEMBERED {
            estimator.ended(&gang("kept", "a", None), 5_000);
        }
        assert_eq!(estimator.ended.len(), REMEMBERED);
    }
}
