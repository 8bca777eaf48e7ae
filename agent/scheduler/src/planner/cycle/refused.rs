//! Gangs that found no room: those like them are not tried, and are told the same.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cycle, Outcome, Words, admits};
use crate::model::{Node, Share as GpuShare};
use crate::placement::Shortage;
use crate::planner::known::{Hardness, Item};

/// Looks at nodes that shapes may cost which find no room in a cycle, each one at all nodes; but so many
/// shapes may fail in any case. The rest is left for the cycles that follow.
const MOST_NODE_LOOKS: usize = 640_000;
const LEAST_FAILURES: usize = 64;
/// With more nodes than this a reason that is known is not looked for in each cycle, unless the nodes
/// themselves are other ones: that takes a look at all of them.
const MANY_NODES: usize = 1024;
/// So long it is taken for true then, milliseconds.
const LOOK_AGAIN_MS: u64 = 5_000;
/// Known reasons that are looked for again in a cycle, with many nodes and with few.
const MOST_LOOKS: usize = 2;
const MOST_LOOKS_AT_FEW: usize = 64;

/// Shapes that found no room in this cycle.
#[derive(Clone, Debug, Default)]
pub(in crate::planner) struct Refused {
    /// By number.
    shapes: Vec<RefusedShape>,
    /// By family.
    families: BTreeMap<u32, Vec<(Hardness, u64)>>,
    /// How many were tried, and how many may be.
    count: usize,
    most: usize,
    /// Some shape was left for later that was not tried in this round.
    left: bool,
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
    /// There are so many shapes, and nodes.
    pub fn new(shapes: usize, nodes: usize) -> Self {
        let most = (MOST_NODE_LOOKS / nodes.max(1)).max(LEAST_FAILURES);
        Self { shapes: vec![RefusedShape::default(); shapes], most, ..Self::default() }
    }

    /// No more shapes are tried that are known to fail.
    fn is_spent(&self) -> bool {
        self.count >= self.most
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
        self.leave_for_later(waiter.shape)
    }

    /// Where more shapes fail than may be tried in a cycle, the first half of the tries goes to those whose
    /// turn it is, and the rest to one after the other of all that follow: so in a few cycles, a *round*,
    /// every shape is tried.
    fn leave_for_later(&mut self, shape: u32) -> Option<Outcome> {
        if self.refused.count < self.refused.most / 2 {
            return None;
        }
        let tried_before = self.shapes.is_tried(shape);
        let now = !self.refused.shapes[shape as usize].tried.is_empty();
        if !self.refused.is_spent() && (now || !tried_before) {
            return None;
        }
        self.refused.left |= !tried_before;
        Some(Outcome::Unseen)
    }

    /// At the end of a cycle: a round is over when nothing was left for later.
    pub(super) fn end_round(&mut self) {
        if !self.refused.left {
            self.shapes.round += 1;
        }
    }

    /// No more reasons that are known are looked for again in this cycle.
    fn looked_enough(&self) -> bool {
        let many = self.cluster.nodes().len() > MANY_NODES;
        self.looks >= if many { MOST_LOOKS } else { MOST_LOOKS_AT_FEW }
    }

    /// The words that are said of a shape without a look at nodes: as long as they hold, and when no more
    /// looks are to be had in this cycle.
    fn known_words(&self, shape: u32) -> Option<&Arc<Shortage>> {
        let known = self.shapes.list[shape as usize].words.as_ref()?;
        let spent = self.refused.is_spent() || self.looked_enough();
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
        self.shapes.tried(item.shape);
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
        if let Some(known) = &self.shapes.list[item.shape as usize].words {
            let lately = known.nodes == nodes && self.now < known.looked_ms.saturating_add(LOOK_AGAIN_MS);
            // With few nodes, half of the looks go to those whose turn it is, and the rest round all that follow.
            let in_turn = !many && self.looks < MOST_LOOKS_AT_FEW / 2;
            if lately && !in_turn || self.looked_enough() {
                return Arc::clone(&known.words);
            }
            self.looks += 1;
        }
        let (pools, now, gang) = (self.pools, self.now, &*item.gang);
        let admits = |node: &Node| admits(pools, pool, node, now, until);
        self.rooms.show(self.cluster, until, Some(&gang.id));
        let shortage = self.placers[pool].reason(self.cluster, gang, gang.tasks.min, &admits);
        let known = &mut self.shapes.list[item.shape as usize].words;
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
