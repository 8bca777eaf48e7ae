//! What a simulation measured, in the units that papers use.

use serde::Serialize;

/// Runs shorter than this count as this long in slowdowns: otherwise jobs of a second decide the
/// mean (Feitelson et al., "Theory and Practice in Parallel Job Scheduling", JSSPP'97).
pub const SLOWDOWN_BOUND_S: f64 = 10.0;

/// Mean, percentiles and maximum of values; all 0 when there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Distribution {
    /// Of these values; percentiles between two of them are interpolated.
    pub fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |part| quantile(&values, part);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self { mean, p50: at(0.5), p95: at(0.95), p99: at(0.99), max: at(1.0) }
    }

    /// The mean of each figure over several runs.
    pub fn mean_of(runs: &[Self]) -> Self {
        let mean = |figure: fn(&Self) -> f64| mean(runs.iter().map(figure));
        Self {
            mean: mean(|run| run.mean),
            p50: mean(|run| run.p50),
            p95: mean(|run| run.p95),
            p99: mean(|run| run.p99),
            max: mean(|run| run.max),
        }
    }
}

/// Between two values, interpolated. `sorted` has some.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let rank = part * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    low + (high - low) * rank.fract()
}

/// The values at each percent from 0 to 100 of them; empty when there are none.
pub fn curve(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let percents = if values.is_empty() { 0..0 } else { 0..101_u8 };
    percents.map(|percent| quantile(&values, f64::from(percent) / 100.0)).collect()
}

/// The arithmetic mean; 0 of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}

/// Jain's index: 1 when all have the same, 1/n when one of n has all (Jain, Chiu and Hawe, DEC-TR-301,
/// 1984); 1 of nothing.
pub fn jain(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let squares: f64 = values.iter().map(|value| value * value).sum();
    if squares == 0.0 { 1.0 } else { sum * sum / (values.len() as f64 * squares) }
}

/// How many times longer a job took than it ran, with short runs counted as [`SLOWDOWN_BOUND_S`].
pub fn bounded_slowdown(completion_s: f64, run_s: f64) -> f64 {
    (completion_s / run_s.max(SLOWDOWN_BOUND_S)).max(1.0)
}

/// The cluster between two changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// From then on, milliseconds.
    pub from_ms: u64,
    /// GPUs that gangs have, thousandths.
    pub allocated_milli: u64,
    /// GPUs that are free but in pieces that typical gangs cannot use, thousandths.
    pub fragmented_milli: f64,
    /// Gangs that wait.
    pub waiting: usize,
}

/// The cluster over a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Its end, seconds since the first arrival.
    pub time_s: f64,
    /// Mean share of the GPUs that gangs had, percent.
    pub percent_gpu_allocated: f64,
    /// Mean share of the GPUs that were free in pieces too small, percent.
    pub percent_gpu_fragmented: f64,
    /// Mean number of gangs that waited.
    pub waiting: f64,
}

/// Means over `count` equal times from `start_ms` to `end_ms`, of a cluster with so many thousandths
/// of GPUs. `steps` are in the order of time.
pub fn resample(steps: &[Step], start_ms: u64, end_ms: u64, total_milli: u64, count: usize) -> Vec<Sample> {
    let span = end_ms.saturating_sub(start_ms) as f64;
    if steps.is_empty() || span <= 0.0 || total_milli == 0 || count == 0 {
        return Vec::new();
    }
    let width = span / count as f64;
    let mut sums = vec![[0.0_f64; 3]; count];
    for (at, step) in steps.iter().enumerate() {
        let until = steps.get(at + 1).map_or(end_ms, |next| next.from_ms).min(end_ms);
        let from = step.from_ms.saturating_sub(start_ms) as f64;
        let until = until.saturating_sub(start_ms) as f64;
        let first = ((from / width) as usize).min(count - 1);
        let last = ((until / width) as usize).min(count - 1);
        for (bin, sum) in sums.iter_mut().enumerate().take(last + 1).skip(first) {
            let overlap = until.min((bin + 1) as f64 * width) - from.max(bin as f64 * width);
            let values = [step.allocated_milli as f64, step.fragmented_milli, step.waiting as f64];
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value * overlap.max(0.0) / width;
            }
        }
    }
    let sample = |(bin, [allocated, fragmented, waiting]): (usize, [f64; 3])| Sample {
        time_s: (bin + 1) as f64 * width / 1000.0,
        percent_gpu_allocated: 100.0 * allocated / total_milli as f64,
        percent_gpu_fragmented: 100.0 * fragmented / total_milli as f64,
        waiting,
    };
    sums.into_iter().enumerate().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_textbook() {
        let of = Distribution::of(vec![4.0, 1.0, 3.0, 2.0, 5.0]);
        assert_eq!((of.mean, of.p50, of.max), (3.0, 3.0, 5.0));
        assert!((of.p95 - 4.8).abs() < 1e-12 && (of.p99 - 4.96).abs() < 1e-12, "{of:?}");
        assert_eq!(Distribution::of(vec![]), Distribution::default());
    }

    #[test]
    fn jain_is_one_when_equal_and_one_of_n_when_one_has_all() {
        assert_eq!(jain(&[3.0, 3.0, 3.0]), 1.0);
        assert_eq!(jain(&[5.0, 0.0, 0.0, 0.0]), 0.25);
        assert!((jain(&[1.0, 2.0, 3.0]) - 36.0 / 42.0).abs() < 1e-12);
    }

    #[test]
    fn short_jobs_do_not_decide_the_slowdown() {
        assert_eq!(bounded_slowdown(30.0, 15.0), 2.0);
        assert_eq!(bounded_slowdown(30.0, 0.1), 3.0);
        assert_eq!(bounded_slowdown(5.0, 1.0), 1.0);
    }

    #[test]
    fn samples_are_weighted_by_time() {
        let step = |from_ms, allocated_milli, waiting| Step {
            from_ms,
            allocated_milli,
            fragmented_milli: 0.0,
            waiting,
        };
        let steps = [step(1000, 0, 0), step(2000, 4000, 2), step(2500, 2000, 0)];
        let samples = resample(&steps, 1000, 3000, 4000, 2);
        assert_eq!((samples[0].time_s, samples[0].percent_gpu_allocated), (1.0, 0.0));
        assert_eq!((samples[1].percent_gpu_allocated, samples[1].waiting), (75.0, 1.0));
    }
}
