//! Which of the free devices a sandbox gets: those that are closest to each other.
//!
//! Devices that work together exchange data, and how fast they can is decided by the lowest bridge that
//! all of them are below. So the devices are seen as a tree (NUMA node, root port, switch ports), and a
//! sandbox gets what fits below the deepest point; where several fit, the one that leaves the least over,
//! so that larger groups stay whole for those who need them; then the lowest address.

use std::collections::BTreeMap;

use lathe_api::HostPciAddress;

/// A device that may be given away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its function.
    pub address: HostPciAddress,
    /// Its NUMA node, if known.
    pub numa_node: Option<u32>,
    /// Bridges above it, the one at the root first.
    pub path: Vec<HostPciAddress>,
}

/// A branch of the tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Branch {
    Numa(Option<u32>),
    Bridge(HostPciAddress),
    /// The device itself is at this level.
    Here,
}

impl Candidate {
    fn branch(&self, level: usize) -> Branch {
        match level.checked_sub(1) {
            None => Branch::Numa(self.numa_node),
            Some(index) => self.path.get(index).map_or(Branch::Here, |bridge| Branch::Bridge(*bridge)),
        }
    }
}

/// `count` of the candidates, ordered by address; `None` if there are not so many.
pub fn choose(candidates: &[Candidate], count: usize) -> Option<Vec<HostPciAddress>> {
    let all: Vec<&Candidate> = candidates.iter().collect();
    if all.len() < count {
        return None;
    }
    let mut chosen = pick(all, 0, count);
    chosen.sort_unstable();
    Some(chosen)
}

/// `count` of at least as many devices that are one down to `level`.
fn pick(mut set: Vec<&Candidate>, level: usize, mut count: usize) -> Vec<HostPciAddress> {
    let mut chosen = Vec::new();
    while count > 0 {
        let parts = partition(&set, level);
        if set.len() == count || is_leaf(&parts) {
            set.sort_unstable_by_key(|candidate| candidate.address);
            chosen.extend(set.iter().take(count).map(|candidate| candidate.address));
            return chosen;
        }
        let lowest = |part: &[&Candidate]| part.iter().map(|c| c.address).min();
        let large = parts.values().filter(|part| part.len() >= count);
        let fitting = large
            .min_by_key(|part| (std::cmp::Reverse(depth(part, level + 1, count)), part.len(), lowest(part)));
        if let Some(part) = fitting {
            chosen.extend(pick(part.clone(), level + 1, count));
            return chosen;
        }
        // No part is large enough: the largest as a whole, and the rest from the others.
        let Some(part) = parts.values().min_by_key(|part| (std::cmp::Reverse(part.len()), lowest(part)))
        else {
            return chosen;
        };
        count -= part.len();
        chosen.extend(part.iter().map(|candidate| candidate.address));
        set.retain(|candidate| !chosen.contains(&candidate.address));
    }
    chosen
}

/// How deep one finds a branch that still has `count` devices.
fn depth(set: &[&Candidate], level: usize, count: usize) -> usize {
    let parts = partition(set, level);
    if is_leaf(&parts) {
        return level;
    }
    let large = parts.values().filter(|part| part.len() >= count);
    large.map(|part| depth(part, level + 1, count)).max().unwrap_or(level)
}

fn partition<'a>(set: &[&'a Candidate], level: usize) -> BTreeMap<Branch, Vec<&'a Candidate>> {
    let mut parts: BTreeMap<Branch, Vec<&Candidate>> = BTreeMap::new();
    for candidate in set {
        parts.entry(candidate.branch(level)).or_default().push(candidate);
    }
    parts
}

fn is_leaf(parts: &BTreeMap<Branch, Vec<&Candidate>>) -> bool {
    parts.keys().all(|branch| *branch == Branch::Here)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(bus: u8, device: u8) -> HostPciAddress {
        format!("0000:{bus:02x}:{device:02x}.0").parse().unwrap()
    }

    /// An 8-GPU board: two sockets, two switches each, two GPUs a switch.
    fn board() -> Vec<Candidate> {
        let gpu = |index: u8| Candidate {
            address: address(0x10 * (index + 1), 0),
            numa_node: Some(u32::from(index / 4)),
            path: vec![address(0, index / 2 + 1), address(index / 2 + 1, index % 2)],
        };
        (0..8).map(gpu).collect()
    }

    fn buses(candidates: &[Candidate], count: usize) -> Vec<u8> {
        choose(candidates, count).unwrap().iter().map(|a| a.bus() >> 4).collect()
    }

    #[test]
    fn closest_devices_are_chosen_and_large_groups_kept_whole() {
        let mut free = board();
        assert_eq!(buses(&free, 1), [1]);
        assert_eq!(buses(&free, 2), [1, 2]);
        assert_eq!(buses(&free, 4), [1, 2, 3, 4]);
        assert_eq!(buses(&free, 8).len(), 8);
        assert_eq!(choose(&free, 9), None);
        // One of the first switch is gone: a pair comes whole from the next, a single from the broken one.
        free.remove(0);
        assert_eq!(buses(&free, 2), [3, 4]);
        assert_eq!(buses(&free, 1), [2]);
        assert_eq!(buses(&free, 4), [5, 6, 7, 8]);
        assert_eq!(buses(&free, 3), [2, 3, 4]);
    }

    fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0..2_u32, 0..3_u8, 0..3_u8, 0..3_usize);
        proptest::collection::vec(one, 0..12).prop_map(|all| {
            let candidates = all.into_iter().enumerate().map(|(index, (numa, port, switch, depth))| {
                // A tree: a bridge has one parent, a root port one NUMA node.
                let root = address(0, port + 8 * numa as u8);
                let below = address(1 + port + 8 * numa as u8, switch);
                Candidate {
                    address: address(0x80 + index as u8, 0),
                    numa_node: Some(numa),
                    path: [root, below][..depth].to_vec(),
                }
            });
            candidates.collect()
        })
    }

    proptest! {
        #[test]
        fn what_fits_together_is_not_torn_apart(candidates in any_candidates(), count in 0..14_usize) {
            let Some(chosen) = choose(&candidates, count) else {
                prop_assert!(candidates.len() < count);
                return Ok(());
            };
            prop_assert_eq!(chosen.len(), count);
            let of = |address: &HostPciAddress| candidates.iter().find(|c| c.address == *address).unwrap();
            let got: Vec<&Candidate> = chosen.iter().map(of).collect();
            prop_assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "distinct and ordered");
            for level in 0..3 {
                let fits = |c: &Candidate| {
                    let same = |o: &&Candidate| (0..=level).all(|l| o.branch(l) == c.branch(l));
                    c.branch(level) != Branch::Here && candidates.iter().filter(same).count() >= count
                };
                if count > 0 && candidates.iter().any(fits) {
                    let first = got[0].branch(level);
                    prop_assert!(got.iter().all(|c| c.branch(level) == first), "{:?}", got);
                }
            }
            // The order in which the host lists its devices plays no role.
            let mut reversed = candidates.clone();
            reversed.reverse();
            prop_assert_eq!(choose(&reversed, count), Some(chosen));
        }
    }
}
