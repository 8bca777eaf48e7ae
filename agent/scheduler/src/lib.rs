//! Pure planning: a snapshot of the nodes, the pending gangs in order and a policy go in; a plan
//! with a place for whole gangs, or one reason for each gang that waits, comes out.
//!
//! - [`snapshot`]: what goes in.
//! - [`plan`]: what comes out, reasons included.
//! - `place`: puts one gang on nodes.
//!
//! No I/O, no clock, no randomness: the same input gives the same plan, so the coordinator, tests
//! and simulations all mean the same thing by it. The plan is optimistic: whoever commits it checks
//! each node again, because the snapshot may be out of date.
//!
//! # First come, first served
//! Gangs are placed strictly in their order. The first that does not fit *now* keeps its place at
//! the head: later gangs do not overtake it, however small, so nothing starves; they wait "behind"
//! it. A gang that could not be placed even on empty nodes does not hold the others up: it waits
//! with that as its reason, until nodes are added.

#![forbid(unsafe_code)]

mod place;
pub mod plan;
pub mod snapshot;

pub use plan::{Placement, Plan, Reason, Waiting};
pub use snapshot::{Capacity, Gang, Node, Policy};

/// Plans `gangs`, given in the policy's order of arrival, on `nodes`.
pub fn plan(nodes: &[Node], gangs: &[Gang], policy: Policy) -> Plan {
    match policy {
        Policy::FirstComeFirstServed => first_come_first_served(nodes, gangs),
    }
}

fn first_come_first_served(nodes: &[Node], gangs: &[Gang]) -> Plan {
    let mut plan = Plan::default();
    let mut free: Vec<Capacity> = nodes.iter().map(|node| node.free).collect();
    let mut head: Option<&Gang> = None;
    for gang in gangs {
        let reason = match place::impossible(nodes, gang) {
            Some(reason) => reason,
            None => match head {
                Some(head) => Reason::Behind { gang: head.id.clone() },
                None => match place::gang(nodes, &free, gang) {
                    Some(ranks) => {
                        for &node in &ranks {
                            free[node].take(gang.task);
                        }
                        let ranks = ranks.into_iter().map(|node| nodes[node].name.clone()).collect();
                        plan.placements.push(Placement { gang: gang.id.clone(), nodes: ranks });
                        continue;
                    }
                    None => {
                        head = Some(gang);
                        place::shortage(nodes, &free, gang)
                    }
                },
            },
        };
        plan.waiting.push(Waiting { gang: gang.id.clone(), reason });
    }
    plan
}
