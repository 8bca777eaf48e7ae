//! Counters of this process. Gauges of the cluster are computed from the store when asked for.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, amount: u64) {
        // Only read to be shown: no other memory depends on it.
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Responses below 400.
    pub responses_ok: Counter,
    /// Responses 400 to 499.
    pub responses_refused: Counter,
    /// Responses from 500.
    pub responses_failed: Counter,
    /// Connections that failed before a request: TLS, certificates of other clusters.
    pub handshakes_failed: Counter,
    /// Reports of agents.
    pub reports: Counter,
    /// Lines of output stored.
    pub log_lines: Counter,
    /// Reconciliations.
    pub reconciliations: Counter,
    /// Time spent in them, microseconds.
    pub reconcile_us: Counter,
    /// Placements refused at commit because something had changed.
    pub placement_conflicts: Counter,
}
