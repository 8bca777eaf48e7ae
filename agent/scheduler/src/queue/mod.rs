//! Which gang goes next: the policies of [`crate::policy::Queue`], behind one trait.
//!
//! - [`estimate`]: how long a gang will run, learnt from those before it.
//! - [`survival`]: what is known of a duration that is not over.
//! - [`fair`]: shares of tenants, and the queue that evens them out.
//!
//! A queue is filled anew each cycle: what it orders by (waiting times, estimates, shares) changes
//! with time, and sorting a hundred thousand gangs takes a few milliseconds.

pub mod estimate;
pub mod fair;
mod survival;

use crate::policy::Queue;

/// What a policy looks at of a gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How the caller knows the gang.
    pub gang: usize,
    /// When it came, milliseconds; gangs of the same time are in the order of `gang`.
    pub submitted_ms: u64,
    /// How long it has waited, milliseconds.
    pub waited_ms: u64,
    /// How long it will run, milliseconds.
    pub estimate_ms: u64,
    /// Higher first, where the policy looks at it.
    pub priority: i32,
    /// Index of its tenant.
    pub tenant: u32,
}

/// A queue in the order of a policy.
///
/// The caller takes gangs out one by one, and says of each that it starts, before it takes the next:
/// a policy may choose the next by what started.
pub trait Order {
    /// The next gang, which leaves the queue whether it starts or not.
    fn next(&mut self) -> Option<usize>;

    /// The gang that came out last starts: this much of the pool ([`fair::Fractions`]) is its
    /// tenant's from now on.
    fn started(&mut self, _fractions: &fair::Fractions) {}
}

/// A queue in the order of keys that do not change within a cycle; smallest first.
#[derive(Clone, Debug, Default)]
pub struct Sorted {
    /// The next is the last.
    gangs: Vec<(u64, u64, usize)>,
}

impl Sorted {
    /// Sorted by a key, then by time of arrival.
    pub fn new(entries: impl IntoIterator<Item = Entry>, key: impl Fn(&Entry) -> f64) -> Self {
        let mut gangs: Vec<_> = entries
            .into_iter()
            .map(|entry| (fair::ordered(key(&entry)), entry.submitted_ms, entry.gang))
            .collect();
        gangs.sort_unstable_by(|one, other| other.cmp(one));
        Self { gangs }
    }

    /// In the order of a policy; none if that is fair share, whose keys change.
    pub fn by(policy: Queue, entries: impl IntoIterator<Item = Entry>) -> Option<Self> {
        Some(match policy {
            Queue::FirstComeFirstServed => Self::new(entries, |_| 0.0),
            Queue::ShortestJobFirst => Self::new(entries, |entry| entry.estimate_ms as f64),
            Queue::HighestResponseRatioNext => Self::new(entries, |entry| -response_ratio(entry)),
            Queue::Priority => Self::new(entries, |entry| -f64::from(entry.priority)),
            Queue::FairShare => return None,
        })
    }
}

impl Order for Sorted {
    fn next(&mut self) -> Option<usize> {
        self.gangs.pop().map(|(_, _, gang)| gang)
    }
}

/// Waiting and running time by running time (Brinch Hansen, 1971): short gangs go first, and long ones
/// come up while they wait.
fn response_ratio(entry: &Entry) -> f64 {
    // A gang of no length at all would have an endless ratio from its first millisecond on.
    let run = entry.estimate_ms.max(1000) as f64;
    (entry.waited_ms as f64 + run) / run
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(policy: Queue) -> Vec<usize> {
        let entry = |gang, submitted_ms, estimate_ms, priority| Entry {
            gang,
            submitted_ms,
            waited_ms: 100_000 - submitted_ms,
            estimate_ms,
            priority,
            tenant: 0,
        };
        let entries = [
            entry(0, 0, 900_000, 0),
            entry(1, 40_000, 30_000, 0),
            entry(2, 90_000, 20_000, 0),
            entry(3, 90_000, 950_000, 7),
        ];
        let mut queue = Sorted::by(policy, entries).unwrap();
        std::iter::from_fn(|| queue.next()).collect()
    }

    #[test]
    fn each_policy_has_its_order() {
        assert_eq!(order(Queue::FirstComeFirstServed), [0, 1, 2, 3]);
        assert_eq!(order(Queue::ShortestJobFirst), [2, 1, 0, 3]);
        assert_eq!(order(Queue::HighestResponseRatioNext), [1, 2, 0, 3]);
        assert_eq!(order(Queue::Priority), [3, 0, 1, 2]);
    }
}
