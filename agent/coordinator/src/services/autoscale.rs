//! How many replicas a service needs. Pure: samples of what was in flight in, a number and a reason out.
//!
//! What is in flight, divided by the target of a replica, is what is needed. Three things keep that from
//! flapping: samples are averaged over [`SMOOTH_MS`]; what deviates from the target by less than
//! [`TOLERANCE_PERCENT`] is left as it is; and replicas are given up only when none of the samples of
//! the last `down_after_ms` asked for them. More replicas are asked for at once.

use std::collections::VecDeque;

/// Samples are this far apart at least.
const SAMPLE_MS: u64 = 1_000;
/// Over how long samples are averaged: a burst that is over before a replica could start costs little.
const SMOOTH_MS: u64 = 6_000;
/// Silence after which what was observed before says nothing about now.
const GAP_MS: u64 = 15_000;
/// Deviation from the target that is left as it is, percent.
const TOLERANCE_PERCENT: u64 = 10;

/// What a service asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Fewest replicas.
    pub min: u32,
    /// Most replicas; not below `min`.
    pub max: u32,
    /// What should be in flight at a replica, thousandths; not 0.
    pub target_milli: u64,
    /// For how long there must be too many.
    pub down_after_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    at_ms: u64,
    milli: u64,
}

/// What was in flight in the last time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    samples: VecDeque<Sample>,
    /// Since when there is no gap.
    since_ms: u64,
}

impl Window {
    /// Adds what is in flight now, in thousandths. Forgets what is older than `keep_ms` and not needed
    /// for averages.
    pub fn push(&mut self, now_ms: u64, milli: u64, keep_ms: u64) {
        match self.samples.back_mut() {
            Some(last) if (last.at_ms..last.at_ms.saturating_add(SAMPLE_MS)).contains(&now_ms) => {
                last.milli = last.milli.max(milli);
                return;
            }
            Some(last) if (last.at_ms..=last.at_ms.saturating_add(GAP_MS)).contains(&now_ms) => {}
            // Also when the clock was set back.
            _ => {
                self.samples.clear();
                self.since_ms = now_ms;
            }
        }
        self.samples.push_back(Sample { at_ms: now_ms, milli });
        let oldest = now_ms.saturating_sub(keep_ms.saturating_add(SMOOTH_MS));
        while self.samples.front().is_some_and(|sample| sample.at_ms < oldest) {
            self.samples.pop_front();
        }
    }

    /// The averages that end within the last `span_ms`, oldest first.
    fn averages(&self, now_ms: u64, span_ms: u64) -> impl Iterator<Item = u64> {
        let from = now_ms.saturating_sub(span_ms);
        self.samples.iter().enumerate().filter(move |(_, sample)| sample.at_ms >= from).map(|(at, last)| {
            let recent = self.samples.range(..=at).rev();
            let recent = recent.take_while(|sample| last.at_ms - sample.at_ms < SMOOTH_MS);
            let (sum, count) =
                recent.fold((0_u64, 0_u64), |(sum, n), s| (sum.saturating_add(s.milli), n + 1));
            // Rounded up: one that waits among many empty samples is not nothing.
            sum.div_ceil(count.max(1))
        })
    }
}

/// How many replicas there should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The number, within the bounds.
    pub replicas: u32,
    /// Why it is not the present one. One line; empty if it is.
    pub why: String,
}

/// How many replicas are needed when there are `current` now.
pub fn decide(policy: &Policy, window: &Window, current: u32, now_ms: u64) -> Decision {
    let bounds =
        |count: u64| u32::try_from(count).unwrap_or(u32::MAX).clamp(policy.min, policy.max.max(policy.min));
    let peak = window.averages(now_ms, policy.down_after_ms).max();
    let covered = now_ms.saturating_sub(window.since_ms) >= policy.down_after_ms;
    let Some(peak) = peak else { return within(policy, current, bounds(u64::from(current))) };
    let needed = needed(policy, peak, current);
    // What happened before this process looked may have asked for those that are there.
    let kept = if covered { needed } else { needed.max(u64::from(current)) };
    let replicas = bounds(kept);
    if replicas == bounds(u64::from(current)) {
        return within(policy, current, replicas);
    }
    let (load, target) = (shown(peak), shown(policy.target_milli));
    let why = match replicas > current {
        true => format!("{load} in flight for {current} replicas, {target} wanted at each"),
        false => {
            let seconds = policy.down_after_ms / 1000;
            format!("at most {load} in flight for {seconds} s, {target} wanted at each of {current} replicas")
        }
    };
    Decision { replicas, why }
}

/// A number that only the bounds may have changed.
fn within(policy: &Policy, current: u32, replicas: u32) -> Decision {
    let why = match replicas == current {
        true => String::new(),
        false => format!("between min = {} and max = {}", policy.min, policy.max),
    };
    Decision { replicas, why }
}

/// What an average asks for, before the bounds.
fn needed(policy: &Policy, milli: u64, current: u32) -> u64 {
    let target = policy.target_milli.max(1);
    let wanted = u128::from(target) * u128::from(current) * 100;
    let there = u128::from(milli) * 100;
    let slack = wanted / 100 * u128::from(TOLERANCE_PERCENT);
    if current > 0 && there >= wanted.saturating_sub(slack) && there <= wanted + slack {
        return u64::from(current);
    }
    milli.div_ceil(target)
}

/// Thousandths for people.
fn shown(milli: u64) -> String {
    format!("{}.{}", milli / 1000, milli % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy { min: 1, max: 8, target_milli: 10_000, down_after_ms: 60_000 };

    fn window(loads: &[u64], policy: &Policy) -> (Window, u64) {
        let mut window = Window::default();
        let mut now = 1_000_000;
        for load in loads {
            now += SAMPLE_MS;
            window.push(now, *load, policy.down_after_ms);
        }
        (window, now)
    }

    #[test]
    fn more_is_asked_for_at_once_and_less_after_a_while() {
        let mut loads = vec![10_000; 60];
        loads.extend([45_000; 6]);
        let (window_up, now) = window(&loads, &POLICY);
        let up = decide(&POLICY, &window_up, 1, now);
        assert_eq!((up.replicas, up.why.as_str()), (5, "45.0 in flight for 1 replicas, 10.0 wanted at each"));
        loads.extend([10_000; 30]);
        let (early, now) = window(&loads, &POLICY);
        assert_eq!(decide(&POLICY, &early, 5, now).replicas, 5, "45 were in flight half a minute ago");
        loads.extend([10_000; 40]);
        let (late, now) = window(&loads, &POLICY);
        let down = decide(&POLICY, &late, 5, now);
        assert_eq!(down.replicas, 1);
        assert!(down.why.starts_with("at most 10.0 in flight for 60 s"), "{}", down.why);
    }

    #[test]
    fn the_first_that_waits_starts_a_replica_and_silence_stops_the_last() {
        let policy = Policy { min: 0, ..POLICY };
        let mut loads = vec![0; 30];
        let (idle, now) = window(&loads, &policy);
        assert_eq!(decide(&policy, &idle, 0, now).replicas, 0);
        loads.push(1_000);
        let (one, now) = window(&loads, &policy);
        assert_eq!(decide(&policy, &one, 0, now).replicas, 1);
        loads.extend([0; 61]);
        let (quiet, now) = window(&loads, &policy);
        assert_eq!(decide(&policy, &quiet, 1, now).replicas, 1, "its average still has it");
        loads.extend([0; 7]);
        let (silent, now) = window(&loads, &policy);
        assert_eq!(decide(&policy, &silent, 1, now).replicas, 0);
    }

    #[test]
    fn nothing_is_given_up_on_the_ground_of_what_was_not_seen() {
        let (short, now) = window(&[0; 20], &POLICY);
        assert_eq!(decide(&POLICY, &short, 6, now).replicas, 6, "20 s are not 60");
        assert_eq!(decide(&POLICY, &Window::default(), 6, 5).replicas, 6);
        let (mut gap, now) = window(&[0; 70], &POLICY);
        gap.push(now + 2 * GAP_MS, 0, POLICY.down_after_ms);
        assert_eq!(decide(&POLICY, &gap, 6, now + 2 * GAP_MS).replicas, 6);
    }

    #[test]
    fn bounds_hold_without_any_sample_and_say_so() {
        let over = decide(&POLICY, &Window::default(), 20, 5);
        assert_eq!((over.replicas, over.why.as_str()), (8, "between min = 1 and max = 8"));
        assert_eq!(decide(&POLICY, &Window::default(), 0, 5).replicas, 1);
    }

    prop_compose! {
        fn policies()(min in 0_u32..20, more in 0_u32..200, target_milli in 1_u64..100_000,
                      down_after_ms in 1_000_u64..120_000) -> Policy {
            Policy { min, max: (min + more).max(1), target_milli, down_after_ms }
        }
    }

    proptest! {
        #[test]
        fn any_input_gives_a_number_within_the_bounds(
            policy in policies(), current in any::<u32>(),
            samples in prop::collection::vec((any::<u64>(), any::<u64>()), 0..40), now in any::<u64>(),
        ) {
            let mut window = Window::default();
            // Clocks are set, also backwards.
            for (at, milli) in samples {
                window.push(at, milli, policy.down_after_ms);
            }
            let decision = decide(&policy, &window, current, now);
            prop_assert!((policy.min..=policy.max).contains(&decision.replicas));
            prop_assert_eq!(decision.why.is_empty(), decision.replicas == current);
            prop_assert!(!decision.why.contains('\n'));
        }

        #[test]
        fn more_in_flight_never_means_fewer_replicas(
            policy in policies(), current in 0_u32..250,
            loads in prop::collection::vec((0_u64..5_000_000, 0_u64..5_000_000), 1..150),
        ) {
            let less: Vec<u64> = loads.iter().map(|(one, other)| *one.min(other)).collect();
            let more: Vec<u64> = loads.iter().map(|(one, other)| *one.max(other)).collect();
            let ((less, now), (more, _)) = (window(&less, &policy), window(&more, &policy));
            let (less, more) = (decide(&policy, &less, current, now), decide(&policy, &more, current, now));
            prop_assert!(less.replicas <= more.replicas);
        }

        #[test]
        fn a_constant_load_is_answered_once(
            policy in policies(), current in 0_u32..250, load in 0_u64..5_000_000,
        ) {
            let (window, now) = window(&[load; 140], &policy);
            let first = decide(&policy, &window, current, now).replicas;
            let second = decide(&policy, &window, first, now);
            prop_assert_eq!((second.replicas, second.why.as_str()), (first, ""));
            // And it is enough, within the tolerance, unless it is the most there may be.
            let capacity = u128::from(first) * u128::from(policy.target_milli) * 11;
            prop_assert!(first == policy.max || capacity >= u128::from(load) * 10);
        }
    }
}
