//! The planner before this one: goes when the coordinator uses [`crate::Planner`].

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
