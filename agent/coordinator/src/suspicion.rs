//! Nodes that refuse again and again: they get no more work for a while, and say why.
//!
//! A node may be healthy by all it reports and still start nothing: a disk that is full, a device that
//! only fails when it is used. What it takes costs each gang a start. So a node where the starts of
//! several jobs failed in a short time is suspected; one job alone may be to blame itself. After a
//! rest it is tried again, and one more refusal is enough to be suspected anew, for twice as long.
//!
//! Kept in memory: it is observation, and made anew by observing. A restart of the coordinator gives
//! each node another chance.

use std::collections::{BTreeSet, VecDeque};

/// Refusals within this time count together; milliseconds.
const WINDOW_MS: u64 = 10 * 60 * 1000;
/// How many make a node suspected, if they are not all of one job.
const REFUSALS: usize = 3;
/// How long it rests the first time, and at most; milliseconds.
const REST_MS: u64 = 5 * 60 * 1000;
const REST_MS_MAX: u64 = 60 * 60 * 1000;

/// What a node refused, newest last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    recent: VecDeque<Refusal>,
    suspected: Option<Suspicion>,
    /// How long it rests when it is suspected next; 0 before the first time.
    rest_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    at_ms: u64,
    job: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspicion {
    until_ms: u64,
    reason: String,
}

impl Refusals {
    /// It did not start a task of this job, or did not take what was planned; whether it is suspected
    /// because of it now and was not before.
    pub fn refused(&mut self, job: &str, why: &str, now_ms: u64) -> bool {
        self.expire(now_ms);
        if self.suspected.is_some() {
            return false;
        }
        self.recent.push_back(Refusal { at_ms: now_ms, job: job.to_owned() });
        let jobs: BTreeSet<&str> = self.recent.iter().map(|refusal| refusal.job.as_str()).collect();
        // Tried again after a rest, it has used up its credit.
        let enough = self.rest_ms > 0 || (self.recent.len() >= REFUSALS && jobs.len() > 1);
        if !enough {
            return false;
        }
        let count = self.recent.len();
        let reason = format!(
            "refused {count} task{} in a short time, the last one: {why}",
            if count == 1 { "" } else { "s" }
        );
        let rest_ms = self.rest_ms.max(REST_MS);
        self.suspected = Some(Suspicion { until_ms: now_ms.saturating_add(rest_ms), reason });
        self.rest_ms = (rest_ms * 2).min(REST_MS_MAX);
        self.recent.clear();
        true
    }

    /// It started a task: what it refused before is forgiven.
    pub fn started(&mut self) {
        if self.suspected.is_none() {
            *self = Self::default();
        }
    }

    /// Why it is suspected now.
    pub fn suspected(&self, now_ms: u64) -> Option<&str> {
        let suspicion = self.suspected.as_ref().filter(|suspicion| suspicion.until_ms > now_ms)?;
        Some(&suspicion.reason)
    }

    /// Whether its rest ended, which is told once.
    pub fn recover(&mut self, now_ms: u64) -> bool {
        let was = self.suspected.is_some();
        self.expire(now_ms);
        was && self.suspected.is_none()
    }

    /// Until when.
    pub fn until_ms(&self) -> Option<u64> {
        self.suspected.as_ref().map(|suspicion| suspicion.until_ms)
    }

    fn expire(&mut self, now_ms: u64) {
        self.recent.retain(|refusal| refusal.at_ms.saturating_add(WINDOW_MS) > now_ms);
        if self.suspected.as_ref().is_some_and(|suspicion| suspicion.until_ms <= now_ms) {
            self.suspected = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_job_does_not_cost_a_node_its_name_but_several_do() {
        let mut refusals = Refusals::default();
        for at in 0..10 {
            assert!(!refusals.refused("bad", "no such file", at));
        }
        assert!(refusals.refused("good", "the disk is full", 10));
        let reason = refusals.suspected(11).expect("suspected");
        assert!(reason.contains("11 tasks") && reason.contains("the disk is full"), "{reason}");
        assert!(!refusals.refused("good", "again", 12), "it is suspected already");
    }

    #[test]
    fn refusals_long_ago_are_forgotten_and_a_start_forgives() {
        let mut refusals = Refusals::default();
        assert!(!refusals.refused("a", "x", 0) && !refusals.refused("b", "x", 1));
        assert!(!refusals.refused("c", "x", WINDOW_MS + 2), "the first two are too old");
        assert!(!refusals.refused("d", "x", WINDOW_MS + 3));
        refusals.started();
        assert!(!refusals.refused("e", "x", WINDOW_MS + 4));
    }

    #[test]
    fn it_is_tried_again_and_rests_longer_if_it_refuses_still() {
        let mut refusals = Refusals::default();
        for (job, at) in [("a", 0), ("b", 1), ("c", 2)] {
            refusals.refused(job, "x", at);
        }
        let until = refusals.until_ms().expect("suspected");
        assert!(refusals.suspected(until - 1).is_some() && refusals.suspected(until).is_none());
        assert!(refusals.refused("d", "y", until), "one more is enough");
        assert_eq!(refusals.until_ms(), Some(until + 2 * REST_MS));
        let until = until + 2 * REST_MS;
        assert!(refusals.suspected(until).is_none());
        assert!(refusals.recover(until) && !refusals.recover(until), "told once");
        refusals.started();
        assert!(!refusals.refused("e", "z", until + 1), "after a start it is as any other");
    }
}
