//! A pool's fleet: what its provider was asked for, made, and has not taken back. It is in the store, so
//! that nothing that somebody pays for is forgotten.
//!
//! A request is written down before the program is run, and nodes are in the fleet from the moment
//! that they are named until the program has said that they are gone. All changes are functions of the
//! record and the time; whoever makes one commits it by compare-and-swap.

use std::collections::BTreeMap;

use lathe_api::provider::{ProvidedState, ProviderAsked};
use serde::{Deserialize, Serialize};

/// Requests that are remembered, so that nodes that a list names can be told from others' nodes.
const MAX_REQUESTS: usize = 64;
/// After a first failure a provider is asked again after this, then after twice as long each time.
const BACKOFF_MIN_MS: u64 = 1_000;
const BACKOFF_MAX_MS: u64 = 600_000;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fleet {
    /// The provider that it is of.
    pub provider: String,
    /// What it was asked for and has not answered for sure.
    pub asked: Option<ProviderAsked>,
    /// Its nodes, by name.
    pub nodes: BTreeMap<String, Provided>,
    /// The latest requests, oldest first, and when each was made.
    pub requests: Vec<(String, u64)>,
    /// When nodes were last asked for or chosen to be given back.
    pub changed_ms: u64,
    /// Why its last answer was none.
    pub failure: Option<Failure>,
}

/// A node of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provided {
    /// The request that it was made for; empty if the provider never said.
    pub request: String,
    /// How far it is.
    pub state: ProvidedState,
    /// Since when.
    pub since_ms: u64,
}

/// What did not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Nodes were not made.
    Grow,
    /// Nodes were made and did not join.
    Join,
    /// Nodes were not taken back.
    Release,
    /// It did not say what it has.
    List,
}

/// Failures in a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What did not work.
    pub fault: Fault,
    /// The last one, one line.
    pub reason: String,
    /// How many.
    pub times: u32,
    /// When the last one was.
    pub at_ms: u64,
    /// When it is asked again.
    pub again_ms: u64,
}

impl Fleet {
    /// One that has nothing yet.
    pub fn of(provider: &str) -> Self {
        Self { provider: provider.to_owned(), ..Self::default() }
    }

    /// Whether nothing of it is anybody's concern.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.asked.is_none()
    }

    /// How many nodes there are or may be: those of an unanswered request count.
    pub fn size(&self) -> u32 {
        let asked =
            self.asked.as_ref().map_or(0, |asked| asked.count.saturating_sub(self.made_for(&asked.request)));
        u32::try_from(self.nodes.len()).unwrap_or(u32::MAX).saturating_add(asked)
    }

    /// How many of its nodes were made for a request.
    pub fn made_for(&self, request: &str) -> u32 {
        let made = self.nodes.values().filter(|node| node.request == request).count();
        u32::try_from(made).unwrap_or(u32::MAX)
    }

    /// Its nodes in a state, by name.
    pub fn in_state(&self, state: ProvidedState) -> impl Iterator<Item = &String> {
        self.nodes.iter().filter(move |(_, node)| node.state == state).map(|(name, _)| name)
    }

    /// When a request was made, if it is one of the latest.
    pub fn requested_ms(&self, request: &str) -> Option<u64> {
        self.requests.iter().rev().find(|(known, _)| known == request).map(|(_, at_ms)| *at_ms)
    }

    /// Nodes are being asked for.
    pub fn ask(&mut self, request: String, count: u32, why: String, now_ms: u64) {
        if self.requests.len() >= MAX_REQUESTS {
            self.requests.remove(0);
        }
        self.requests.push((request.clone(), now_ms));
        self.asked = Some(ProviderAsked { request, count, why, at_ms: now_ms });
        self.changed_ms = now_ms;
    }

    /// The request is answered, or nobody needs it any more.
    pub fn answered(&mut self) {
        self.asked = None;
    }

    /// A node was named; false if it was known.
    pub fn add(&mut self, name: &str, request: &str, now_ms: u64) -> bool {
        if self.nodes.contains_key(name) {
            return false;
        }
        let node = Provided { request: request.to_owned(), state: ProvidedState::Coming, since_ms: now_ms };
        self.nodes.insert(name.to_owned(), node);
        true
    }

    /// A node of it is something else from now on.
    pub fn set(&mut self, name: &str, state: ProvidedState, now_ms: u64) {
        if let Some(node) = self.nodes.get_mut(name).filter(|node| node.state != state) {
            (node.state, node.since_ms) = (state, now_ms);
        }
    }

    /// The provider gave no answer, or less than it was asked for.
    pub fn fail(&mut self, fault: Fault, reason: String, now_ms: u64) {
        let times = self.failure.as_ref().map_or(0, |failure| failure.times).saturating_add(1);
        let wait_ms = BACKOFF_MIN_MS.saturating_mul(1_u64.checked_shl(times - 1).unwrap_or(u64::MAX));
        let again_ms = now_ms.saturating_add(wait_ms.min(BACKOFF_MAX_MS));
        self.failure = Some(Failure { fault, reason, times, at_ms: now_ms, again_ms });
    }

    /// What did not work works.
    pub fn mend(&mut self, fault: Fault) {
        self.failure.take_if(|failure| failure.fault == fault);
    }

    /// Whether it is too early to ask again after a failure. A clock that was set back does not make it
    /// longer.
    pub fn backs_off(&self, now_ms: u64) -> bool {
        self.failure.as_ref().is_some_and(|failure| (failure.at_ms..failure.again_ms).contains(&now_ms))
    }

    /// Until when it is left in peace after what was last asked of it; none if that is over.
    pub fn cooldown_until_ms(&self, cooldown_ms: u64, now_ms: u64) -> Option<u64> {
        let until = self.changed_ms.saturating_add(cooldown_ms);
        (self.changed_ms..until).contains(&now_ms).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_waited_for_longer_each_time_and_never_for_ever() {
        let mut fleet = Fleet::of("cloud");
        let mut waits = Vec::new();
        for _ in 0..80 {
            fleet.fail(Fault::Grow, "no".to_owned(), 1000);
            let failure = fleet.failure.as_ref().expect("one");
            waits.push(failure.again_ms - 1000);
            assert!(fleet.backs_off(1000) && fleet.backs_off(failure.again_ms - 1));
            assert!(!fleet.backs_off(failure.again_ms));
            assert!(!fleet.backs_off(999), "a clock that was set back");
        }
        assert_eq!(waits[..4], [1000, 2000, 4000, 8000]);
        assert!(waits.is_sorted() && waits[79] == BACKOFF_MAX_MS);
    }

    #[test]
    fn what_was_asked_for_counts_until_it_is_answered() {
        let mut fleet = Fleet::of("cloud");
        assert!(fleet.is_empty() && fleet.size() == 0);
        fleet.ask("r1".to_owned(), 3, "w".to_owned(), 10);
        assert_eq!((fleet.size(), fleet.requested_ms("r1"), fleet.requested_ms("r0")), (3, Some(10), None));
        assert!(fleet.add("n1", "r1", 20) && !fleet.add("n1", "r1", 30));
        assert_eq!(fleet.size(), 3, "one of the three is named");
        fleet.answered();
        assert_eq!(fleet.size(), 1);
        assert_eq!(fleet.cooldown_until_ms(100, 109), Some(110));
        assert_eq!((fleet.cooldown_until_ms(100, 110), fleet.cooldown_until_ms(100, 9)), (None, None));
        for number in 0..200 {
            fleet.ask(format!("more{number}"), 1, String::new(), 10);
        }
        assert_eq!((fleet.requests.len(), fleet.requested_ms("more199")), (MAX_REQUESTS, Some(10)));
    }
}
