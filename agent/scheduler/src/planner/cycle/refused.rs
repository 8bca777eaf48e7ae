//! Gangs that found no room: those like them are not tried, and are told the same.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cycle, Outcome, Words, admits};
use crate::model::{Node, Share as GpuShare};
use crate::placement::Shortage;
use crate::planner::known::{Hardness, Item};

/// Shapes that may fail in a cycle before the rest of the queues is left for the next: each costs a
/// look at all nodes.
const MOST_FAILURES: usize = 64;
/// With more nodes than this a reason that is known is not looked for in each cycle, unless the nodes
/// themselves are other ones: that takes a look at all of them.
const MANY_NODES: usize = 1024;
/// So long it is taken for true then, milliseconds.
const LOOK_AGAIN_MS: u64 = 5_000;
/// Known reasons that are looked for again in a cycle.
const MOST_LOOKS: usize = 2;

/// Shapes that found no room in this cycle.
#[derive(Clone, Debug, Default)]
pub(in crate::planner) struct Refused {
    /// By number.
    shapes: Vec<RefusedShape>,
    /// By family.
    families: BTreeMap<u32, Vec<(Hardness, u64)>>,
    count: usize,
}

#[derive(Clone, Debug, Default)]
struct RefusedShape {
    /// The class ([`Rooms::class`](crate::planner::room::Rooms::class)) of each gang that was tried, and what
    /// came of it. Gangs that end later find no room either.
    tried: Vec<(u64, Outcome)>,
    /// The same of one that is easier to place: this one was not tried.
    easier: Option<(u64, Outcome)>,
}

impl Refused {
    /// There are so many shapes.
    pub fn new(shapes: usize) -> Self {
        Self { shapes: vec![RefusedShape::default(); shapes], ..Self::default() }
    }

    fn add(&mut self, item: &Item, class: u64, outcome: Outcome) {
        self.count += 1;
        self.shapes[item.shape as usize].tried.push((class, outcome));
        self.families.entry(item.family).or_default().push((item.size, class));
    }

    /// What came of one of the same shape that ended no later.
    fn same(&self, shape: u32, class: impl Fn() -> u64) -> Option<&Outcome> {
        let RefusedShape { tried, easier } = &self.shapes[shape as usize];
        let mut known = tried.iter().chain(easier);
        // Everything ends after nothing: the class of this one need not be known then.
        known.find(|(failed, _)| *failed == 0 || class() >= *failed).map(|(_, outcome)| outcome)
    }

    /// The class of one of the same family that is easier to place and ended no later.
    fn easier(&self, item: &Item, class: u64) -> Option<u64> {
        let failed = self.families.get(&item.family)?;
        let found = failed.iter().find(|(size, of)| item.size.at_least(size) && class >= *of)?;
        Some(found.1)
    }
}

impl Cycle<'_> {
    /// What comes of a gang that need not be tried, as far as its shape says so.
    pub(super) fn refuse_at_sight(&mut self, index: usize) -> Option<Outcome> {
        let waiter = &self.waiters[index];
        let class = LazyCell::new(|| {
            let item = &waiter.item;
            // Who needs no estimate is not asked for one: there is nothing to end before.
            let until = || {
                let estimate = self.estimator.estimate(&item.similar, item.gang.estimate_ms);
                self.now.saturating_add(estimate.mean_ms)
            };
            self.rooms.class_of(until)
        });
        if let Some(outcome) = self.refused.same(waiter.shape, || *class) {
            return Some(outcome.clone());
        }
        if let Some(failed) = self.refused.easier(&waiter.item, *class)
            // For its own words it is tried, unless they are known.
            && let Some(words) = self.known_words(waiter.shape)
        {
            let outcome = Outcome::Shortage(Arc::clone(words));
            self.refused.shapes[waiter.shape as usize].easier = Some((failed, outcome.clone()));
            return Some(outcome);
        }
        if self.too_few(&waiter.item)
            && let Some(words) = self.known_words(waiter.shape)
        {
            return Some(Outcome::Shortage(Arc::clone(words)));
        }
        (self.refused.count >= MOST_FAILURES).then_some(Outcome::Unseen)
    }

    /// The words that are said of a shape without a look at nodes: as long as they hold, and when no more
    /// looks are to be had in this cycle.
    fn known_words(&self, shape: u32) -> Option<&Arc<Shortage>> {
        let known = self.shapes.0[shape as usize].words.as_ref()?;
        let many = self.cluster.nodes().len() > MANY_NODES;
        let spent = self.refused.count >= MOST_FAILURES || many && self.looks >= MOST_LOOKS;
        (spent || known.hold(self.now, self.cluster.nodes_fingerprint())).then_some(&known.words)
    }

    /// Whether too few nodes have as many GPUs that nobody uses as the gang's tasks need, whatever else
    /// they need: a look at a few numbers, where a trial looks at all nodes.
    fn too_few(&self, item: &Item) -> bool {
        let Some(request) = item.gang.task.gpus.as_ref().filter(|gpus| gpus.share == GpuShare::Whole) else {
            return false;
        };
        let each = (request.count as usize).max(1);
        let fit: u64 = self.whole.iter().zip(0..).map(|(nodes, gpus)| nodes * (gpus / each) as u64).sum();
        fit < u64::from(item.gang.tasks.min)
    }

    /// There is no room; is it there but for reservations?
    pub(super) fn fail(&mut self, item: &Arc<Item>, pool: usize, until: u64) -> Outcome {
        let class = self.rooms.class(until);
        let outcome = match self.behind(item, pool, until) {
            Some(holder) => Outcome::Behind(holder),
            None => Outcome::Shortage(self.words(item, pool, until)),
        };
        self.refused.add(item, class, outcome.clone());
        outcome
    }

    /// The gang for which room is held that would have been enough for this one.
    fn behind(&mut self, item: &Item, pool: usize, until: u64) -> Option<Arc<str>> {
        let holder: Arc<str> = self.rooms.holder().filter(|holder| *holder != item.gang.id)?.into();
        self.rooms.hide(self.cluster);
        let (pools, now, gang) = (self.pools, self.now, &*item.gang);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        let places = self.placers[pool].seek(self.cluster, gang, gang.tasks.min, &admits)?;
        places.iter().for_each(|place| self.cluster.give(gang, place));
        Some(holder)
    }

    /// Why there is no room, in the words that were used for the shape before, if they still do.
    fn words(&mut self, item: &Item, pool: usize, until: u64) -> Arc<Shortage> {
        let nodes = self.cluster.nodes_fingerprint();
        let many = self.cluster.nodes().len() > MANY_NODES;
        let known = &self.shapes.0[item.shape as usize].words;
        if let Some(known) = known.as_ref().filter(|_| many) {
            let lately = known.nodes == nodes && self.now < known.looked_ms.saturating_add(LOOK_AGAIN_MS);
            if lately || self.looks >= MOST_LOOKS {
                return Arc::clone(&known.words);
            }
            self.looks += 1;
        }
        let (pools, now, gang) = (self.pools, self.now, &*item.gang);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        self.rooms.show(self.cluster, until, Some(&gang.id));
        let shortage = self.placers[pool].reason(self.cluster, gang, gang.tasks.min, &admits);
        let known = &mut self.shapes.0[item.shape as usize].words;
        let same = known.take().filter(|known| {
            std::mem::discriminant(&*known.words) == std::mem::discriminant(&shortage)
                && known.hold(now, nodes)
        });
        let (words, since_ms) =
            same.map_or_else(|| (Arc::new(shortage), now), |known| (known.words, known.since_ms));
        *known = Some(Words { words: Arc::clone(&words), since_ms, looked_ms: now, nodes });
        words
    }
}
