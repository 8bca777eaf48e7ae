//! How much is in flight, and how much was on average.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Counts what comes and goes, and integrates the count over time: what was there between two looks
/// counts as long as it was there.
#[derive(Debug)]
pub struct Meter(Mutex<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    count: u32,
    /// Up to when `integral` is.
    at: Instant,
    /// Count times microseconds since `from`.
    integral: u128,
    from: Instant,
}

impl Meter {
    /// Nothing is in flight.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(State { count: 0, at: now, integral: 0, from: now }))
    }

    /// One more.
    pub fn add(&self, now: Instant) {
        let mut state = self.state();
        state.advance(now);
        state.count = state.count.saturating_add(1);
    }

    /// One less.
    pub fn remove(&self, now: Instant) {
        let mut state = self.state();
        state.advance(now);
        state.count = state.count.saturating_sub(1);
    }

    /// Now.
    pub fn count(&self) -> u32 {
        self.state().count
    }

    /// Thousandths of what was in flight on average since this was last asked.
    pub fn take_mean_milli(&self, now: Instant) -> u64 {
        let mut state = self.state();
        state.advance(now);
        let span = now.saturating_duration_since(state.from).as_micros();
        let mean = match span {
            0 => u128::from(state.count) * 1000,
            span => (state.integral * 1000).div_ceil(span),
        };
        state.integral = 0;
        state.from = now;
        u64::try_from(mean).unwrap_or(u64::MAX)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole whatever panicked while holding it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn advance(&mut self, now: Instant) {
        self.integral += u128::from(self.count) * now.saturating_duration_since(self.at).as_micros();
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_mean_is_over_time_and_not_over_looks() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let meter = Meter::new(start);
        meter.add(at(500));
        meter.add(at(750));
        assert_eq!(meter.count(), 2);
        meter.remove(at(1000));
        // One for half a second, another for a quarter, of two seconds: the first is still there.
        meter.remove(at(1000));
        assert_eq!(meter.take_mean_milli(at(2000)), 375);
        assert_eq!(meter.take_mean_milli(at(3000)), 0);
        meter.add(at(3000));
        assert_eq!(meter.take_mean_milli(at(4000)), 1000);
        assert_eq!(meter.take_mean_milli(at(4000)), 1000, "no time passed");
        meter.remove(at(3000));
        meter.remove(at(3000));
        assert_eq!(meter.count(), 0);
    }
}
