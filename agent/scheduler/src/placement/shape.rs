//! What two gangs must have in common for the same costs to hold for both, and the costs themselves, by
//! node.

use super::Among;
use crate::model::{Amount, Cluster, Constraint, Fold, Gang, Input, Isolation, Preference, TaskRequest};
use lathe_api::job::IsolationClass;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) class: IsolationClass,
    pub(super) task: TaskRequest,
    pub(super) taken: Amount,
    pub(super) constraints: Vec<Constraint>,
    pub(super) tolerations: Vec<(String, Option<String>)>,
    pub(super) preferences: Vec<Preference>,
    pub(super) inputs: Vec<Input>,
    pub(super) isolation: Isolation,
    /// Only where it matters who the gang belongs to.
    pub(super) tenant: Option<String>,
    /// How long it runs, where that matters: the logarithm of the seconds.
    pub(super) duration: Option<u8>,
}

/// How long a gang is taken to run if nobody says: an hour.
const DURATION_S: u64 = 3600;

impl Shape {
    /// Of a gang. `isolated`: something that runs does not share its node or switch with all.
    pub(super) fn of(gang: &Gang, isolated: bool) -> Self {
        Self {
            class: gang.class,
            task: gang.task.clone(),
            taken: gang.taken(),
            constraints: gang.constraints.clone(),
            tolerations: gang.tolerations.clone(),
            preferences: gang.preferences.clone(),
            inputs: gang.inputs.clone(),
            isolation: gang.isolation,
            tenant: tenant(gang, isolated).map(str::to_owned),
            duration: duration(gang),
        }
    }

    /// A hash of what [`Self::of`] makes of a gang, without making it.
    pub(super) fn key(gang: &Gang, isolated: bool) -> u64 {
        let request = (gang.class, &gang.task, &gang.constraints, &gang.tolerations, &gang.preferences);
        Fold::of(&(request, &gang.inputs, gang.isolation, tenant(gang, isolated), duration(gang)))
    }

    /// Whether it is the shape of this gang.
    pub(super) fn is_of(&self, gang: &Gang, isolated: bool) -> bool {
        self.class == gang.class
            && self.task == gang.task
            && self.constraints == gang.constraints
            && self.tolerations == gang.tolerations
            && self.preferences == gang.preferences
            && self.inputs == gang.inputs
            && self.isolation == gang.isolation
            && self.tenant.as_deref() == tenant(gang, isolated)
            && self.duration == duration(gang)
    }

    /// How long such a gang runs, seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.duration.map_or(DURATION_S as f64, |bits| f64::from(2.0_f32).powi(i32::from(bits)))
    }
}

fn tenant(gang: &Gang, isolated: bool) -> Option<&str> {
    let matters = isolated || matches!(gang.isolation, Isolation::Node | Isolation::Switch);
    matters.then_some(gang.tenant.as_str())
}

/// Time matters beside the time that inputs take to come.
fn duration(gang: &Gang) -> Option<u8> {
    if gang.inputs.is_empty() {
        return None;
    }
    let seconds = gang.estimate_ms.map_or(DURATION_S, |estimate| estimate / 1000).max(1);
    u8::try_from(seconds.ilog2()).ok()
}

/// Nodes that are looked at together, so that the compiler has vectors for them.
const LANES: usize = 16;

/// The least of some costs; infinite if there is none.
pub(super) fn least(costs: &[f64]) -> f64 {
    let mut lanes = [f64::INFINITY; LANES];
    let blocks = costs.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for (least, cost) in lanes.iter_mut().zip(block) {
            *least = if *cost < *least { *cost } else { *least };
        }
    }
    lanes.iter().chain(rest).copied().fold(f64::INFINITY, f64::min)
}

/// What a shape costs on each node.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) shape: Shape,
    /// By node; infinite where it does not fit now.
    pub(super) costs: Vec<f64>,
    /// By node: its state when the cost was computed.
    prints: Vec<u64>,
    /// By node: what it was when the fixed part was computed, and that part; infinite where it may
    /// never run.
    fixed: Vec<(u64, f64)>,
    /// When it was last used, to forget those that are not.
    pub(super) used: u64,
}

impl Table {
    pub(super) fn new(shape: Shape) -> Self {
        Self { shape, costs: Vec::new(), prints: Vec::new(), fixed: Vec::new(), used: 0 }
    }

    /// Forgets the costs, but not the fixed parts.
    pub(super) fn forget(&mut self) {
        self.prints.fill(0);
    }

    /// Brings the costs of nodes that changed up to date. `fixed` says what does not depend on what is
    /// free of a node, none where the shape may not run; `cost` what does, none where it does not fit.
    pub(super) fn refresh(
        &mut self,
        cluster: &Cluster,
        among: Among<'_>,
        mut fixed: impl FnMut(&Shape, u32) -> Option<f64>,
        mut cost: impl FnMut(&Shape, u32) -> Option<f64>,
    ) {
        let prints = cluster.fingerprints();
        if self.costs.len() != prints.len() {
            self.costs = vec![f64::INFINITY; prints.len()];
            self.prints = vec![0; prints.len()];
            self.fixed = vec![(0, f64::INFINITY); prints.len()];
        }
        let Self { shape, costs, prints: known, fixed: bases, .. } = self;
        let mut renew = |at: usize| {
            let Ok(index) = u32::try_from(at) else { return };
            let node_print = cluster.node_fingerprints()[at];
            if bases[at].0 != node_print {
                bases[at] = (node_print, fixed(shape, index).unwrap_or(f64::INFINITY));
            }
            let base = bases[at].1;
            let cost = if base < f64::INFINITY { cost(shape, index) } else { None };
            costs[at] = cost.map_or(f64::INFINITY, |cost| base + cost);
        };
        match among {
            // Nearly all are as they were: those are compared several at a time.
            Among::All => {
                for (block, (known, prints)) in known.chunks_mut(LANES).zip(prints.chunks(LANES)).enumerate()
                {
                    if known.iter().zip(prints).fold(0, |differ, (known, print)| differ | (known ^ print))
                        == 0
                    {
                        continue;
                    }
                    for (at, (known, print)) in known.iter_mut().zip(prints).enumerate() {
                        if *known != *print {
                            *known = *print;
                            renew(block * LANES + at);
                        }
                    }
                }
            }
            Among::Nodes(nodes) => {
                for at in nodes.iter().map(|index| *index as usize) {
                    if known[at] != prints[at] {
                        known[at] = prints[at];
                        renew(at);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_cost_is_found_wherever_it_is() {
        assert_eq!(least(&[]), f64::INFINITY);
        for length in 1..4 * LANES {
            for at in 0..length {
                let mut costs = vec![f64::INFINITY; length];
                costs[at / 2] = -1.0;
                costs[at] = -2.0;
                assert_eq!(least(&costs), -2.0, "{at} of {length}");
            }
        }
    }

    #[test]
    fn gangs_of_one_shape_have_one_key_whatever_else_they_are() {
        let gang = |id: &str, tenant: &str| Gang {
            id: id.to_owned(),
            tenant: tenant.to_owned(),
            submitted_ms: id.len() as u64,
            ..Gang::default()
        };
        assert_eq!(Shape::key(&gang("a", "t"), false), Shape::key(&gang("bb", "u"), false));
        assert_ne!(Shape::key(&gang("a", "t"), true), Shape::key(&gang("a", "u"), true));
        let shape = Shape::of(&gang("a", "t"), false);
        assert!(shape.is_of(&gang("c", "v"), false) && !shape.is_of(&gang("c", "v"), true));
        let other = Gang { isolation: Isolation::Cores, ..gang("a", "t") };
        assert!(!shape.is_of(&other, false));
    }
}
