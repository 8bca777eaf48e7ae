//! Shares of tenants, and the queue that evens them out.
//!
//! A tenant's share is the largest of its shares of a pool's CPUs, memory and GPUs (dominant resource
//! fairness: Ghodsi et al., NSDI'11), by its weight. What counts is what it has now and what it had
//! before, which fades with a half-life (as in Slurm's fair-share factor): a tenant that was idle
//! catches up, but not for ever. Tenants with a parent share that parent's share.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Entry, Order};
use crate::policy::Share;

/// Shares of CPUs, memory and GPUs, each of all that a pool has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fractions(pub [f64; 3]);

impl Fractions {
    /// What a share is of a whole; none of what the whole has not.
    pub fn of(share: &Share, whole: &Share) -> Self {
        let part = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let memory = |share: &Share| share.amount.memory_bytes.saturating_add(share.amount.hugepage_bytes);
        Self([
            part(share.amount.cpu_milli, whole.amount.cpu_milli),
            part(memory(share), memory(whole)),
            part(share.gpu_milli, whole.gpu_milli),
        ])
    }

    /// The sum.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] + other.0[at]))
    }

    /// The largest.
    pub fn dominant(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }
}

/// A number's bits, ordered as the numbers are.
pub fn ordered(number: f64) -> u64 {
    let bits = number.to_bits();
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

/// What tenants had in pools, fading. Keys are whatever pairs of indices the caller counts by.
#[derive(Clone, Debug)]
pub struct Ledger {
    half_life_ms: u64,
    at_ms: Option<u64>,
    had: HashMap<(u32, u32), Fractions>,
    have: HashMap<(u32, u32), Fractions>,
}

impl Ledger {
    /// Empty.
    pub fn new(half_life_ms: u64) -> Self {
        Self { half_life_ms: half_life_ms.max(1), at_ms: None, had: HashMap::new(), have: HashMap::new() }
    }

    /// Time goes on to `now_ms`, while everybody had what [`Ledger::set`] said.
    pub fn advance(&mut self, now_ms: u64) {
        let past = now_ms.saturating_sub(self.at_ms.unwrap_or(now_ms));
        self.at_ms = Some(self.at_ms.unwrap_or(now_ms).max(now_ms));
        if past == 0 {
            return;
        }
        let keep = (-(past as f64) / self.half_life_ms as f64).exp2();
        for had in self.had.values_mut() {
            had.0 = had.0.map(|part| part * keep);
        }
        for (key, have) in &self.have {
            let had = self.had.entry(*key).or_default();
            *had = had.plus(&Fractions(have.0.map(|part| part * (1.0 - keep))));
        }
        // What is less than a millionth of the pool decides nothing any more.
        self.had.retain(|_, had| had.dominant() > 1e-6);
    }

    /// What everybody has from now on.
    pub fn set(&mut self, have: impl IntoIterator<Item = ((u32, u32), Fractions)>) {
        self.have.clear();
        self.have.extend(have);
    }

    /// All that counts of what was had, and the time that it was counted to.
    pub fn all(&self) -> (u64, impl Iterator<Item = ((u32, u32), Fractions)>) {
        (self.at_ms.unwrap_or_default(), self.had.iter().map(|(key, had)| (*key, *had)))
    }

    /// Goes on from what [`Ledger::all`] said.
    pub fn restore(&mut self, at_ms: u64, had: impl IntoIterator<Item = ((u32, u32), Fractions)>) {
        (self.at_ms, self.had) = (Some(at_ms), had.into_iter().collect());
    }

    /// What it had, on average over time that fades.
    pub fn had(&self, key: (u32, u32)) -> Fractions {
        self.had.get(&key).copied().unwrap_or_default()
    }
}

/// What the queue knows of a tenant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// What it has and had; of a parent, with all below it.
    pub used: Fractions,
    /// Its weight beside its siblings.
    pub weight: f64,
}

/// A queue that goes on with the tenant that had least by its weight: at each level of the tree of
/// tenants, of that level's. Within a tenant: by priority, then by time of arrival.
#[derive(Clone, Debug)]
pub struct FairQueue {
    /// The first is the root.
    nodes: Vec<Node>,
    last: Vec<usize>,
}

#[derive(Clone, Debug)]
struct Node {
    standing: Standing,
    /// By what they had by weight; only those that have gangs.
    children: BTreeSet<(u64, usize)>,
    /// The next is the last.
    gangs: Vec<usize>,
}

impl Node {
    fn new(standing: Standing) -> Self {
        Self { standing, children: BTreeSet::new(), gangs: Vec::new() }
    }

    fn key(&self) -> u64 {
        ordered(self.standing.used.dominant() / self.standing.weight.max(1e-9))
    }
}

impl FairQueue {
    /// `line` says a tenant's ancestors, itself first; `standing` is asked once for each.
    pub fn new(
        mut entries: Vec<Entry>,
        line: impl Fn(u32) -> Vec<u32>,
        standing: impl Fn(u32) -> Standing,
    ) -> Self {
        entries.sort_unstable_by_key(|entry| {
            (entry.tenant, entry.priority, std::cmp::Reverse((entry.submitted_ms, entry.gang)))
        });
        let root = Standing { used: Fractions::default(), weight: 1.0 };
        let mut queue = Self { nodes: vec![Node::new(root)], last: Vec::new() };
        let mut groups: BTreeMap<u32, usize> = BTreeMap::new();
        let mut parents = vec![0];
        for of_tenant in entries.chunk_by(|one, other| one.tenant == other.tenant) {
            let line = line(of_tenant[0].tenant);
            let mut above = 0;
            for &tenant in line.iter().rev() {
                above = *groups.entry(tenant).or_insert_with(|| {
                    queue.nodes.push(Node::new(standing(tenant)));
                    parents.push(above);
                    queue.nodes.len() - 1
                });
            }
            queue.nodes[above].gangs.extend(of_tenant.iter().map(|entry| entry.gang));
        }
        for (node, &parent) in parents.iter().enumerate().skip(1) {
            let key = queue.nodes[node].key();
            queue.nodes[parent].children.insert((key, node));
        }
        queue
    }
}

impl Order for FairQueue {
    fn next(&mut self) -> Option<usize> {
        self.last.clear();
        let mut at = 0;
        loop {
            self.last.push(at);
            // A group's own gangs go before those of its members.
            if let Some(gang) = self.nodes[at].gangs.pop() {
                self.forget_empty();
                return Some(gang);
            }
            at = self.nodes[at].children.first()?.1;
        }
    }

    fn started(&mut self, fractions: &Fractions) {
        for pair in (1..self.last.len()).rev() {
            let (above, node) = (self.last[pair - 1], self.last[pair]);
            let old = self.nodes[node].key();
            self.nodes[node].standing.used = self.nodes[node].standing.used.plus(fractions);
            let new = self.nodes[node].key();
            if self.nodes[above].children.remove(&(old, node)) {
                self.nodes[above].children.insert((new, node));
            }
        }
    }
}

impl FairQueue {
    fn forget_empty(&mut self) {
        for pair in (1..self.last.len()).rev() {
            let (above, node) = (self.last[pair - 1], self.last[pair]);
            if !self.nodes[node].gangs.is_empty() || !self.nodes[node].children.is_empty() {
                return;
            }
            let key = self.nodes[node].key();
            self.nodes[above].children.remove(&(key, node));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(gang: usize, tenant: u32) -> Entry {
        Entry { gang, submitted_ms: gang as u64, waited_ms: 0, estimate_ms: 1, priority: 0, tenant }
    }

    #[test]
    fn tenants_get_their_weights_at_each_level_of_the_tree() {
        // Tenants 1 and 2 are below 0; 3 is beside 0 with three times the weight.
        let line = |tenant| if tenant == 3 { vec![3] } else { vec![tenant, 0] };
        let standing =
            |tenant| Standing { used: Fractions::default(), weight: if tenant == 3 { 3.0 } else { 1.0 } };
        let entries = (0..300).map(|gang| entry(gang, gang as u32 / 100 + 1)).collect();
        let mut queue = FairQueue::new(entries, line, standing);
        let mut counts = [0; 4];
        for _ in 0..80 {
            let gang = queue.next().unwrap();
            counts[gang / 100 + 1] += 1;
            queue.started(&Fractions([0.01, 0.0, 0.0]));
        }
        assert_eq!(counts, [0, 10, 10, 60]);
    }

    #[test]
    fn what_was_had_fades_by_its_half_life() {
        let mut ledger = Ledger::new(1000);
        ledger.advance(0);
        ledger.set([((0, 1), Fractions([0.5, 0.0, 0.25]))]);
        ledger.advance(1000);
        assert!((ledger.had((0, 1)).0[0] - 0.25).abs() < 1e-12);
        ledger.set([]);
        ledger.advance(2000);
        assert!((ledger.had((0, 1)).dominant() - 0.125).abs() < 1e-12);
        ledger.advance(60_000);
        assert_eq!(ledger.had((0, 1)), Fractions::default());
    }

    #[test]
    fn a_queue_empties_whatever_starts() {
        let standing = |_| Standing { used: Fractions::default(), weight: 1.0 };
        let mut queue =
            FairQueue::new((0..9).map(|gang| entry(gang, gang as u32 % 3)).collect(), |t| vec![t], standing);
        let mut seen: Vec<usize> = std::iter::from_fn(|| queue.next()).collect();
        assert_eq!(seen[..3], [0, 3, 6]);
        seen.sort_unstable();
        assert_eq!(seen, (0..9).collect::<Vec<_>>());
    }
}
