//! Puts one gang on nodes, or says what is missing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::plan::Reason;
use super::snapshot::{Capacity, Gang, Node};

/// Why the gang cannot be placed even on empty nodes; none if it can.
pub(crate) fn impossible(nodes: &[Node], gang: &Gang) -> Option<Reason> {
    if nodes.is_empty() {
        return Some(Reason::NoNodes);
    }
    if !nodes.iter().any(|node| node.classes.contains(&gang.class)) {
        return Some(Reason::NoNodeForClass {
            class: gang.class,
            problems: some_problems(nodes, |node| &node.class_problems),
        });
    }
    let most = most_gpus(nodes, &totals(nodes), gang);
    if most < gang.task.gpus {
        let problems = some_problems(nodes, |node| &node.gpu_problems);
        return Some(Reason::NoNodeForGpus { needed: gang.task.gpus, most, problems });
    }
    let holds = fitting(nodes, &totals(nodes), gang);
    (holds < gang.tasks).then_some(Reason::LargerThanCluster { tasks: gang.tasks, task: gang.task, holds })
}

/// A handful of what nodes say explains it; a thousand nodes would make the reason a page.
fn some_problems(nodes: &[Node], of: impl Fn(&Node) -> &Vec<String>) -> Vec<String> {
    const SHOWN: usize = 3;
    let problems =
        nodes.iter().flat_map(|node| of(node).iter().map(move |problem| format!("{}: {problem}", node.name)));
    problems.take(SHOWN).collect()
}

/// The node of each rank, or none if the whole gang does not fit.
///
/// Tasks are spread: each goes where the gang has fewest tasks, then, if it needs no GPU, where fewest
/// are free that others could use, then where most CPUs are free, then by name. As the tasks are equal, this finds room whenever there is any. Ranks are then numbered
/// node by node, because neighbours in rank talk most.
pub(crate) fn gang(nodes: &[Node], free: &[Capacity], gang: &Gang) -> Option<Vec<usize>> {
    if fitting(nodes, free, gang) < gang.tasks {
        return None;
    }
    let mut left = free.to_vec();
    let mut counts = vec![0_u32; nodes.len()];
    let spared = |left: Capacity| if gang.task.gpus == 0 { left.gpus } else { 0 };
    let rank = |node: usize, count: u32, left: Capacity| {
        (count, spared(left), Reverse(left.cpus), &nodes[node].name, node)
    };
    let mut queue: BinaryHeap<_> = (0..nodes.len())
        .filter(|&node| nodes[node].classes.contains(&gang.class) && left[node].holds(gang.task) > 0)
        .map(|node| Reverse(rank(node, 0, left[node])))
        .collect();
    for _ in 0..gang.tasks {
        let Reverse((_, _, _, _, node)) = queue.pop()?;
        counts[node] += 1;
        left[node].take(gang.task);
        if left[node].holds(gang.task) > 0 {
            queue.push(Reverse(rank(node, counts[node], left[node])));
        }
    }
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by_key(|&node| &nodes[node].name);
    Some(order.into_iter().flat_map(|node| std::iter::repeat_n(node, counts[node] as usize)).collect())
}

/// What a gang that fits on empty nodes lacks now.
pub(crate) fn shortage(nodes: &[Node], free: &[Capacity], gang: &Gang) -> Reason {
    let eligible = || {
        let of_class = |(node, _): &(&Node, &Capacity)| node.classes.contains(&gang.class);
        nodes.iter().zip(free).filter(of_class).map(|(_, free)| free)
    };
    let tasks = u64::from(gang.tasks);
    let most = most_gpus(nodes, free, gang);
    if most < gang.task.gpus {
        return Reason::GpusOnOneNode { needed: gang.task.gpus, most };
    }
    let needed = tasks * u64::from(gang.task.gpus);
    let have = eligible().map(|free| u64::from(free.gpus)).sum::<u64>();
    if have < needed {
        return Reason::Gpus { needed, free: have };
    }
    let (needed, have) =
        (tasks * u64::from(gang.task.cpus), eligible().map(|free| u64::from(free.cpus)).sum::<u64>());
    if have < needed {
        return Reason::Cpus { needed, free: have };
    }
    let needed = tasks.saturating_mul(gang.task.memory_bytes);
    let have = eligible().fold(0_u64, |sum, free| sum.saturating_add(free.memory_bytes));
    if have < needed {
        return Reason::Memory { needed, free: have };
    }
    Reason::Fragmented { tasks: gang.tasks, task: gang.task, fit: fitting(nodes, free, gang) }
}

/// GPUs of the node of the gang's class that has most.
fn most_gpus(nodes: &[Node], capacities: &[Capacity], gang: &Gang) -> u32 {
    let of_class = nodes.iter().zip(capacities).filter(|(node, _)| node.classes.contains(&gang.class));
    of_class.map(|(_, capacity)| capacity.gpus).max().unwrap_or(0)
}

fn totals(nodes: &[Node]) -> Vec<Capacity> {
    nodes.iter().map(|node| node.total).collect()
}

/// How many tasks of the gang fit on nodes of its class.
fn fitting(nodes: &[Node], free: &[Capacity], gang: &Gang) -> u32 {
    nodes
        .iter()
        .zip(free)
        .filter(|(node, _)| node.classes.contains(&gang.class))
        .fold(0, |sum, (_, free)| sum.saturating_add(free.holds(gang.task)))
}
