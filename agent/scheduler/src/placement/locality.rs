//! Data, devices and links: what it costs to be far away. The scale is that of the module above.

use std::cmp::Ordering;

use super::devices;
use super::shape::Shape;
use crate::model::{Cluster, Communication, Gang, GpuPlace, Node, TaskPlace, TaskRequest};

/// How fast a node fetches if nobody knows: a gigabit a second.
const FETCH_MBPS: f64 = 1000.0;

/// A GPU, in the cost's unit.
const GPU: f64 = 1000.0;

/// What a task without GPUs counts as: it keeps others from some of a GPU's worth of CPUs.
const WITHOUT: f64 = GPU / 10.0;

/// A part of the time is lost for each level that devices of one task are apart.
const DEVICES_APART: f64 = 0.01;

/// A part of the time is lost for each level that the widest link of a ring climbs above the node.
const RING_LEVEL: f64 = 0.01;

/// A part of the time is lost for each hop of the average pair of an all-to-all.
const PAIR_HOP: f64 = 0.005;

/// GPUs that wait when a task waits, in thousandths.
fn kept(task: &TaskRequest) -> f64 {
    match task.gpu_count() {
        0 => WITHOUT,
        count => GPU * f64::from(count),
    }
}

/// What does not depend on what is free of the node: inputs that must come, and preferences.
pub(super) fn fixed_cost(node: &Node, shape: &Shape) -> f64 {
    let seconds = fetch_seconds(node, shape);
    let data = if seconds > 0.0 { kept(&shape.task) * seconds / (seconds + shape.seconds()) } else { 0.0 };
    let wishes: f64 = shape
        .preferences
        .iter()
        .filter(|preference| preference.constraint.holds(&node.name, &node.labels))
        .map(|preference| f64::from(preference.weight))
        .sum();
    data - wishes / 100.0 * GPU
}

/// How long the inputs that are not there take to come.
pub(super) fn fetch_seconds(node: &Node, shape: &Shape) -> f64 {
    let missing = shape.inputs.iter().map(|input| {
        let there = node.artefacts.get(&input.digest).copied().unwrap_or(0);
        input.bytes.saturating_sub(there)
    });
    let bytes: u64 = missing.fold(0, u64::saturating_add);
    let mbps = if node.fetch_mbps == 0 { FETCH_MBPS } else { f64::from(node.fetch_mbps) };
    bytes as f64 * 8.0 / (mbps * 1e6)
}

/// What it costs that devices of one task are not close.
pub(super) fn devices_cost(node: &Node, gpus: &[GpuPlace]) -> f64 {
    if gpus.len() < 2 {
        return 0.0;
    }
    DEVICES_APART * f64::from(devices::distance(node, gpus)) * GPU * gpus.len() as f64
}

/// How far two nodes are apart: 0 the same, 1 one leaf, 2 one rack, 3 further. What hangs on no known
/// leaf or rack is far from all.
pub(super) fn distance(one: &Node, two: &Node) -> u32 {
    let same = |one: &Option<String>, two: &Option<String>| one.is_some() && one == two;
    if one.name == two.name {
        0
    } else if same(&one.leaf, &two.leaf) {
        1
    } else if same(&one.rack, &two.rack) {
        2
    } else {
        3
    }
}

/// What the links between a gang's tasks cost. Ranks are in their order.
pub(super) fn links_cost(cluster: &Cluster, gang: &Gang, places: &[TaskPlace]) -> f64 {
    let node = |place: &TaskPlace| &cluster.nodes()[place.node as usize];
    let all = kept(&gang.task) * places.len() as f64;
    match gang.communication {
        Communication::None => 0.0,
        Communication::Ring => {
            let next = places.iter().cycle().skip(1);
            let hops = places.iter().zip(next).map(|(one, two)| distance(node(one), node(two)));
            // The slowest link sets the pace; how often it is crossed decides between equals.
            let (widest, sum) =
                hops.fold((0, 0_u64), |(widest, sum), hop| (widest.max(hop), sum + u64::from(hop)));
            all * (RING_LEVEL * f64::from(widest) + 1e-6 * sum as f64 / places.len() as f64)
        }
        Communication::AllToAll => {
            let nodes = tasks_by_node(places);
            let mut hops = 0.0;
            for (at, &(one, tasks)) in nodes.iter().enumerate() {
                for &(two, others) in &nodes[at + 1..] {
                    let pairs = f64::from(tasks) * f64::from(others);
                    let nodes = cluster.nodes();
                    hops += pairs * f64::from(distance(&nodes[one as usize], &nodes[two as usize]));
                }
            }
            let pairs = places.len() as f64 * (places.len() as f64 - 1.0) / 2.0;
            if pairs > 0.0 { all * PAIR_HOP * hops / pairs } else { 0.0 }
        }
    }
}

/// Nodes in the order of the ranks, with how many tasks are on each.
fn tasks_by_node(places: &[TaskPlace]) -> Vec<(u32, u32)> {
    let mut nodes: Vec<(u32, u32)> = Vec::new();
    for place in places {
        match nodes.last_mut().filter(|(node, _)| *node == place.node) {
            Some((_, tasks)) => *tasks += 1,
            None => nodes.push((place.node, 1)),
        }
    }
    nodes
}

/// Orders ranks so that those of one node are consecutive, nodes of one leaf, and leaves of one rack: a
/// walk of the tree, which no ring over the same nodes crosses less often than.
pub(super) fn order_ranks(cluster: &Cluster, places: &mut [TaskPlace]) {
    let node = |place: &TaskPlace| &cluster.nodes()[place.node as usize];
    places.sort_by(|one, two| match one.node == two.node {
        true => Ordering::Equal,
        false => {
            let key = |node: &'_ Node| (node.rack.clone(), node.leaf.clone());
            let (first, second) = (node(one), node(two));
            key(first).cmp(&key(second)).then_with(|| first.name.cmp(&second.name))
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{GpuRequest, Input};

    fn node(name: &str, leaf: &str, rack: &str) -> Node {
        Node {
            name: name.to_owned(),
            leaf: Some(leaf.to_owned()),
            rack: Some(rack.to_owned()),
            ..Node::default()
        }
    }

    fn at(node: u32) -> TaskPlace {
        TaskPlace { node, gpus: Vec::new(), numa: None }
    }

    #[test]
    fn inputs_that_are_there_need_not_come() {
        let gang = Gang {
            inputs: vec![Input { digest: "d".to_owned(), bytes: 9_000_000_000 }],
            task: TaskRequest { gpus: Some(GpuRequest::whole(2)), ..TaskRequest::default() },
            estimate_ms: Some(3_600_000),
            ..Gang::default()
        };
        let shape = Shape::of(&gang, false);
        let mut there = node("n", "l", "r");
        there.fetch_mbps = 8000;
        assert_eq!(fetch_seconds(&there, &shape), 9.0);
        let cost = fixed_cost(&there, &shape);
        assert!(cost > 0.0 && cost < 10.0, "{cost}");
        there.artefacts.insert("d".to_owned(), 9_000_000_000);
        assert_eq!(fixed_cost(&there, &shape), 0.0);
    }

    #[test]
    fn rings_cost_their_widest_link_and_ranks_walk_the_tree() {
        let cluster = Cluster::new(vec![
            node("a", "1", "x"),
            node("b", "2", "x"),
            node("c", "1", "x"),
            node("d", "3", "y"),
        ]);
        let gang = |communication| Gang { communication, ..Gang::default() };
        let mut places = vec![at(0), at(1), at(2), at(0)];
        order_ranks(&cluster, &mut places);
        let nodes: Vec<u32> = places.iter().map(|place| place.node).collect();
        assert_eq!(nodes, [0, 0, 2, 1]);
        let ring = |places: &[TaskPlace]| links_cost(&cluster, &gang(Communication::Ring), places);
        assert_eq!(ring(&[at(0), at(0)]), 0.0);
        assert!(ring(&[at(0), at(2)]) < ring(&[at(0), at(1)]));
        assert!(ring(&[at(0), at(1)]) < ring(&[at(0), at(3)]));
        assert!(ring(&places) < ring(&[at(0), at(1), at(0), at(2)]));
        let all = |places: &[TaskPlace]| links_cost(&cluster, &gang(Communication::AllToAll), places);
        assert!(all(&[at(0), at(0), at(0), at(1)]) < all(&[at(0), at(0), at(1), at(1)]));
    }
}
