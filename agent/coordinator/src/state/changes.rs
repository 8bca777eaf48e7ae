//! What changed of a set lately, so that who was told the whole set once is told only the rest.

use std::collections::{BTreeSet, VecDeque};

use crate::store::Revision;

/// Changes that are remembered at least: below that, telling the whole set again is cheap anyway.
const REMEMBERED: usize = 256;

/// Members of a set that came, went or changed, by commit; the latest of them.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    log: VecDeque<(Revision, String)>,
    /// The last commit that changed anything, and the last of which something was forgotten.
    last: Revision,
    forgotten: Revision,
}

impl Changes {
    /// Of a set as it was at a commit: what was before is not known.
    pub fn from(revision: Revision) -> Self {
        Self { log: VecDeque::new(), last: revision, forgotten: revision }
    }

    /// A member changed in this commit. The set has `size` of them: a log that is longer than twice that
    /// says no less than the set itself.
    pub fn add(&mut self, revision: Revision, member: &str, size: usize) {
        self.last = revision;
        self.log.push_back((revision, member.to_owned()));
        while self.log.len() > REMEMBERED.max(2 * size) {
            let Some((forgotten, _)) = self.log.pop_front() else { return };
            self.forgotten = forgotten;
        }
    }

    /// The commit that last changed anything.
    pub fn last(&self) -> Revision {
        self.last
    }

    /// Members that changed after a commit; none if that is longer ago than what is remembered.
    pub fn since(&self, revision: Revision) -> Option<BTreeSet<&str>> {
        if revision < self.forgotten {
            return None;
        }
        let after = self.log.partition_point(|(at, _)| *at <= revision);
        Some(self.log.range(after..).map(|(_, member)| member.as_str()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_told_too_long_ago_is_told_all() {
        let mut changes = Changes::from(10);
        assert_eq!((changes.since(9), changes.since(10)), (None, Some(BTreeSet::new())));
        changes.add(12, "a", 1);
        changes.add(12, "b", 1);
        changes.add(14, "a", 1);
        assert_eq!(changes.last(), 14);
        assert_eq!(changes.since(11), Some(BTreeSet::from(["a", "b"])));
        assert_eq!(changes.since(12), Some(BTreeSet::from(["a"])));
        for revision in 15..15 + REMEMBERED as u64 {
            changes.add(revision, "c", 1);
        }
        assert_eq!(changes.since(13), None, "a part of what came after was forgotten");
        assert_eq!(changes.since(14), Some(BTreeSet::from(["c"])));
    }
}
