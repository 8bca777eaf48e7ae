//! What waits and what runs, kept from cycle to cycle: nearly all of it is what it was a cycle ago.
//!
//! Both are walked beside what is given, which is in the same order but for what came and went. A gang
//! that is the same object as before is known at a glance, without a look at the gang itself: a hundred
//! thousand of those are spread over the whole memory, and each would be waited for.

use std::sync::Arc;

use super::accounts::used_by;
use super::known::Item;
use crate::model::{Cluster, Gang, Isolation, Running};
use crate::policy::Share;

/// A gang that waits, with what a cycle looks at of most gangs.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub item: Arc<Item>,
    /// Where the gang is, which nothing else can be while the item holds it.
    address: usize,
    /// Of its ID.
    pub print: u64,
    pub submitted_ms: u64,
    pub pool: Option<u32>,
    pub tenant: u32,
    pub priority: i32,
    pub shape: u32,
    /// Whether it keeps other tenants away.
    isolated: bool,
    /// Whether nobody said how long it will run.
    guessed: bool,
}

impl Waiter {
    fn new(item: Arc<Item>) -> Self {
        let gang = &item.gang;
        Self {
            address: address(gang),
            print: item.print,
            submitted_ms: gang.submitted_ms,
            pool: item.pool.and_then(|pool| u32::try_from(pool).ok()),
            tenant: item.tenant,
            priority: gang.priority,
            shape: item.shape,
            isolated: gang.isolation != Isolation::Shared,
            guessed: gang.estimate_ms.is_none(),
            item,
        }
    }
}

/// A gang that runs.
#[derive(Clone, Debug)]
pub(super) struct Runner {
    pub item: Arc<Item>,
    address: usize,
    /// With the number of tasks, what tells this run of the gang from another.
    started_ms: u64,
    tasks: usize,
    /// What it uses.
    pub used: Share,
    /// Nodes that it is on, in the order of its ranks, without repetition of neighbours.
    pub nodes: Arc<[u32]>,
    isolated: bool,
}

impl Runner {
    fn new(item: Arc<Item>, running: &Running) -> Self {
        let mut nodes: Vec<u32> = running.tasks.iter().map(|place| place.node).collect();
        nodes.dedup();
        Self {
            address: address(&running.gang),
            started_ms: running.started_ms,
            tasks: running.tasks.len(),
            used: used_by(&item, &running.tasks),
            nodes: nodes.into(),
            isolated: running.gang.isolation != Isolation::Shared,
            item,
        }
    }

    fn is(&self, running: &Running) -> bool {
        self.address == address(&running.gang)
            && self.started_ms == running.started_ms
            && self.tasks == running.tasks.len()
    }
}

fn address(gang: &Arc<Gang>) -> usize {
    Arc::as_ptr(gang) as usize
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Lists {
    /// In the order of what was given.
    pub waiters: Vec<Waiter>,
    /// In the order of the cluster's.
    pub runners: Vec<Runner>,
}

impl Lists {
    /// Brings both up to date; `item` says what is known of a gang.
    pub fn sync(
        &mut self,
        pending: &[Arc<Gang>],
        cluster: &Cluster,
        mut item: impl FnMut(&Arc<Gang>) -> Arc<Item>,
    ) {
        let old = std::mem::take(&mut self.waiters);
        self.waiters = follow(
            old,
            pending.len(),
            pending.iter(),
            |waiter, gang| waiter.address == address(gang),
            |gang| Waiter::new(item(gang)),
        );
        let old = std::mem::take(&mut self.runners);
        self.runners = follow(
            old,
            cluster.running().len(),
            cluster.running().values(),
            |runner, running| runner.is(running),
            |running| Runner::new(item(&running.gang), running),
        );
    }

    /// Whether any gang keeps other tenants away.
    pub fn isolated(&self) -> bool {
        self.waiters.iter().any(|one| one.isolated) || self.runners.iter().any(|one| one.isolated)
    }

    /// Whether it has to be guessed how long any gang that waits will run.
    pub fn guesses(&self) -> bool {
        self.waiters.iter().any(|one| one.guessed)
    }

    pub fn clear(&mut self) {
        self.waiters.clear();
        self.runners.clear();
    }
}

/// How far ahead one that is not next is looked for: so many may have gone at once between two that stay.
const AHEAD: usize = 64;
/// How often it is looked for to the end: when many went at once.
const TO_THE_END: u32 = 8;

/// The list for `now`: those of the old one where they are the same, new ones where not.
fn follow<T, U>(
    old: Vec<T>,
    len: usize,
    now: impl Iterator<Item = U>,
    same: impl Fn(&T, &U) -> bool,
    mut make: impl FnMut(U) -> T,
) -> Vec<T>
where
    U: Copy,
{
    let mut list = Vec::with_capacity(len);
    let mut old = old.into_iter();
    let mut searches = TO_THE_END;
    for one in now {
        let left = old.as_slice();
        let mut ahead = left.iter().take(AHEAD).position(|known| same(known, &one));
        if ahead.is_none() && searches > 0 && left.len() > AHEAD {
            searches -= 1;
            ahead = left.iter().position(|known| same(known, &one));
        }
        match ahead.and_then(|gone| old.nth(gone)) {
            Some(known) => list.push(known),
            None => list.push(make(one)),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_kept_whatever_comes_and_goes() {
        let kept = |old: &[u32], now: &[u32]| {
            let mut made = Vec::new();
            let old = old.iter().map(|one| (*one, true)).collect();
            let list = follow(
                old,
                now.len(),
                now.iter(),
                |known, one| known.0 == **one,
                |one| {
                    made.push(*one);
                    (*one, false)
                },
            );
            assert_eq!(list.iter().map(|one| one.0).collect::<Vec<_>>(), now);
            made
        };
        assert!(kept(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5]).is_empty());
        assert_eq!(kept(&[1, 2, 3, 4, 5], &[2, 5, 6]), [6]);
        assert_eq!(kept(&[1, 2, 3], &[0, 1, 9, 2, 3]), [0, 9]);
        assert_eq!(kept(&[], &[1]), [1]);
        // Another order is only slower.
        assert_eq!(kept(&[1, 2, 3], &[3, 2, 1]), [2, 1]);
        let long: Vec<u32> = (0..1000).collect();
        assert_eq!(kept(&long, &[5, 998, 2000]), [2000]);
    }
}
