//! Which one shortage keeps a gang from running: the filters are gone through in their order, and the
//! first that leaves no node is the reason; then what is free, from the narrowest to the widest.

use std::collections::BTreeMap;

use super::group::Rooms;
use super::shape::Shape;
use super::shortage::{Filtered, Shortage};
use super::{PlaceRequest, devices, filter, group};
use crate::model::{Amount, Cluster, Free, Gang, GpuRequest, Isolation, Node, Offer, Scope, Share};

/// A handful of what nodes say explains it; a thousand nodes would make the reason a page.
const SHOWN: usize = 3;

/// The reason. The gang must have been found not to fit.
pub(super) fn of(cluster: &Cluster, request: &PlaceRequest<'_>) -> Shortage {
    let nodes: Vec<u32> = (0..).take(cluster.nodes().len()).collect();
    match filters(cluster, request, nodes) {
        Err(shortage) => shortage,
        Ok(nodes) => match never(cluster, request, &nodes) {
            Some(shortage) => shortage,
            None => now(cluster, request, &nodes),
        },
    }
}

/// Nodes that may run it, whatever runs there now.
fn filters(cluster: &Cluster, request: &PlaceRequest<'_>, mut nodes: Vec<u32>) -> Result<Vec<u32>, Shortage> {
    let node = |index: &u32| &cluster.nodes()[*index as usize];
    let gang = request.gang;
    if nodes.is_empty() {
        return Err(Shortage::NoNodes);
    }
    nodes.retain(|index| (request.admits)(node(index)));
    if nodes.is_empty() {
        return Err(Shortage::NotInPool { pool: gang.pool.clone() });
    }
    let before = nodes.clone();
    nodes.retain(|index| node(index).classes.contains(&gang.class));
    if nodes.is_empty() {
        let problems = problems(before.iter().map(node), |node| &node.class_problems);
        return Err(Shortage::NoNodeForClass { class: gang.class, problems });
    }
    for constraint in &gang.constraints {
        nodes.retain(|index| constraint.holds(&node(index).name, &node(index).labels));
        if nodes.is_empty() {
            return Err(Shortage::NoNodeForConstraint { constraint: constraint.clone() });
        }
    }
    let before = nodes.clone();
    nodes.retain(|index| filter::tolerated(node(index), &gang.tolerations));
    if nodes.is_empty() {
        let taint = before.iter().flat_map(|index| &node(index).taints).next().cloned();
        return Err(Shortage::Tainted { nodes: before.len(), taint: taint.unwrap_or_default() });
    }
    if let Some(gpus) = &gang.task.gpus {
        let before = nodes.clone();
        nodes.retain(|index| accepted(node(index), gpus) >= gpus.count);
        if nodes.is_empty() {
            return Err(no_gpus(cluster, gpus, &before));
        }
    }
    let before = nodes.clone();
    nodes.retain(|index| node(index).offer == Offer::Open);
    if nodes.is_empty() {
        let (what, reason) = closed(node(&before[0]));
        let (first, nodes) = (node(&before[0]).name.clone(), before.len());
        return Err(Shortage::Closed { nodes, what, first, reason });
    }
    Ok(nodes)
}

fn closed(node: &Node) -> (Filtered, String) {
    match &node.offer {
        Offer::Open => (Filtered::Cordoned, String::new()),
        Offer::Cordoned { reason } => (Filtered::Cordoned, reason.clone()),
        Offer::Draining { reason } => (Filtered::Draining, reason.clone()),
        Offer::Suspected { reason } => (Filtered::Suspected, reason.clone()),
    }
}

/// Devices of a node that a request accepts.
fn accepted(node: &Node, request: &GpuRequest) -> u32 {
    let accepted = node.gpus.iter().filter(|gpu| request.accepts(gpu)).count();
    u32::try_from(accepted).unwrap_or(u32::MAX)
}

/// Why no node has the devices, free or not.
fn no_gpus(cluster: &Cluster, request: &GpuRequest, nodes: &[u32]) -> Shortage {
    let nodes = || nodes.iter().map(|index| &cluster.nodes()[*index as usize]);
    let any_model = GpuRequest { models: Vec::new(), ..request.clone() };
    let any_memory = GpuRequest { memory_bytes: 0, ..request.clone() };
    let has = |request: &GpuRequest| nodes().any(|node| accepted(node, request) >= request.count);
    if !request.models.is_empty() && has(&any_model) {
        let mut there: Vec<String> =
            nodes().flat_map(|node| &node.gpus).map(|gpu| gpu.model.clone()).collect();
        there.sort_unstable();
        there.dedup();
        let enough = nodes().any(|node| accepted(node, request) > 0);
        if !enough {
            return Shortage::NoGpuModel { models: request.models.clone(), there };
        }
    }
    if request.memory_bytes > 0 && has(&any_memory) {
        let most = nodes().flat_map(|node| &node.gpus).map(|gpu| gpu.memory_bytes).max().unwrap_or(0);
        return Shortage::NoGpuMemory { needed: request.memory_bytes, most };
    }
    match &request.share {
        Share::Profile(profile) => Shortage::NoGpuProfile { profile: profile.clone() },
        Share::Whole | Share::Milli(_) => {
            let most = nodes().map(|node| accepted(node, request)).max().unwrap_or(0);
            let problems = problems(nodes(), |node| &node.gpu_problems);
            Shortage::NoNodeForGpus { needed: request.count, most, problems }
        }
    }
}

/// What nodes say, a handful.
fn problems<'a>(
    nodes: impl Iterator<Item = &'a Node>,
    of: impl Fn(&'a Node) -> &'a Vec<String>,
) -> Vec<String> {
    let said = nodes.flat_map(|node| of(node).iter().map(move |problem| format!("{}: {problem}", node.name)));
    said.take(SHOWN).collect()
}

/// Whether it does not fit even when nothing else runs.
fn never(cluster: &Cluster, request: &PlaceRequest<'_>, nodes: &[u32]) -> Option<Shortage> {
    let gang = request.gang;
    let shape = Shape::of(gang, false);
    if gang.scope == Scope::Any && enough(cluster, request, nodes, &shape) {
        return None;
    }
    let empty: Vec<Free> = cluster.nodes().iter().map(Free::all).collect();
    let rooms = rooms(cluster.nodes(), &empty, &shape, nodes, gang);
    let holds: u64 = rooms.iter().map(|(_, room)| u64::from(*room)).sum();
    if holds < request.tasks.into() {
        let holds = u32::try_from(holds).unwrap_or(u32::MAX);
        return Some(Shortage::LargerThanCluster { tasks: request.tasks, task: gang.task.clone(), holds });
    }
    let most = largest(cluster.nodes(), &empty, &rooms, &shape, gang.scope)?;
    (most.holds < u64::from(request.tasks)).then(|| Shortage::LargerThanGroup {
        tasks: request.tasks,
        task: gang.task.clone(),
        scope: gang.scope,
        holds: most.holds,
    })
}

/// Whether empty nodes hold all tasks: a few nodes often do, and the others need no look.
fn enough(cluster: &Cluster, request: &PlaceRequest<'_>, nodes: &[u32], shape: &Shape) -> bool {
    let mut missing = u64::from(request.tasks);
    nodes.iter().any(|&index| {
        let node = &cluster.nodes()[index as usize];
        let empty = Free::all(node);
        if empty.admits(&request.gang.tenant, request.gang.isolation) {
            missing = missing.saturating_sub(group::room(node, &empty, shape, None).into());
        }
        missing == 0
    })
}

/// Nodes with how many tasks each holds.
fn rooms(nodes: &[Node], free: &[Free], shape: &Shape, among: &[u32], gang: &Gang) -> Rooms {
    let rooms = among.iter().map(|&index| (index, index as usize));
    rooms
        .filter(|(_, at)| free[*at].admits(&gang.tenant, gang.isolation))
        .map(|(index, at)| (index, group::room(&nodes[at], &free[at], shape, None)))
        .filter(|(_, room)| *room > 0)
        .collect()
}

/// A group that holds most.
struct Most {
    holds: u64,
    /// A node of it.
    node: String,
}

fn largest(nodes: &[Node], free: &[Free], rooms: &Rooms, shape: &Shape, scope: Scope) -> Option<Most> {
    if scope == Scope::Any {
        return None;
    }
    let groups = group::groups(nodes, free, rooms, shape, scope);
    let most = groups.iter().max_by_key(|group| group.holds);
    Some(most.map_or(Most { holds: 0, node: String::new() }, |group| {
        let first = group.nodes.first().map(|(index, _)| nodes[*index as usize].name.clone());
        Most { holds: group.holds, node: first.unwrap_or_default() }
    }))
}

/// What is missing now.
fn now(cluster: &Cluster, request: &PlaceRequest<'_>, nodes: &[u32]) -> Shortage {
    let gang = request.gang;
    let node = |index: &u32| &cluster.nodes()[*index as usize];
    let free = |index: &u32| &cluster.free()[*index as usize];
    let hit = |index: &u32| request.span.and_then(|span| span.hits(node(index)));
    let there: Vec<u32> = nodes.iter().copied().filter(|index| hit(index).is_none()).collect();
    if there.is_empty() {
        let window = nodes.iter().filter_map(hit).max_by_key(|window| window.until_ms);
        let reason = window.map_or_else(String::new, |window| window.reason.clone());
        return Shortage::Maintenance { nodes: nodes.len(), reason };
    }
    let shape = Shape::of(gang, true);
    let alone: Vec<u32> =
        there.iter().copied().filter(|index| free(index).admits(&gang.tenant, gang.isolation)).collect();
    // Isolation is the reason if there is room without it.
    let shared = Gang { isolation: Isolation::Shared, ..gang.clone() };
    let isolated = alone.len() < there.len() || cluster.is_isolated() || gang.isolation == Isolation::Switch;
    let with = rooms(cluster.nodes(), cluster.free(), &shape, &there, gang);
    if isolated {
        let without = unshared(cluster, &there, &shared);
        if without >= u64::from(request.tasks) {
            let fit = with.iter().map(|(_, room)| u64::from(*room)).sum::<u64>();
            if fit < u64::from(request.tasks) {
                let fit = u32::try_from(fit).unwrap_or(u32::MAX);
                return Shortage::Isolated { isolation: gang.isolation, tasks: request.tasks, fit };
            }
        }
    }
    amounts(cluster, request, &there).unwrap_or_else(|| {
        let fit: u64 = with.iter().map(|(_, room)| u64::from(*room)).sum();
        if fit >= request.tasks.into()
            && let Some(most) = largest(cluster.nodes(), cluster.free(), &with, &shape, gang.scope)
        {
            return Shortage::Group {
                tasks: request.tasks,
                task: Box::new(gang.task.clone()),
                scope: gang.scope,
                holds: most.holds,
                node: most.node,
            };
        }
        let fit = u32::try_from(fit).unwrap_or(u32::MAX);
        Shortage::Fragmented { tasks: request.tasks, task: gang.task.clone(), fit }
    })
}

/// How many tasks fit if nobody minded who is beside whom.
fn unshared(cluster: &Cluster, nodes: &[u32], gang: &Gang) -> u64 {
    let shape = Shape::of(gang, false);
    let nodes = nodes.iter().map(|index| {
        let (node, free) = (&cluster.nodes()[*index as usize], &cluster.free()[*index as usize]);
        let free = Free { alone: Vec::new(), switches: Vec::new(), ..free.clone() };
        u64::from(free.amount.holds(&shape.taken).min(devices::holds(node, &free, &shape, None)))
    });
    nodes.sum()
}

/// What there is too little of in sum.
fn amounts(cluster: &Cluster, request: &PlaceRequest<'_>, nodes: &[u32]) -> Option<Shortage> {
    let gang = request.gang;
    let free =
        || nodes.iter().map(|index| (&cluster.nodes()[*index as usize], &cluster.free()[*index as usize]));
    let tasks = u64::from(request.tasks);
    let taken = gang.taken();
    if let Some(gpus) = &gang.task.gpus {
        let shape = Shape::of(gang, true);
        if gang.scope == Scope::Switch && gpus.share == Share::Whole {
            let needed = u32::try_from(tasks).unwrap_or(u32::MAX).saturating_mul(gpus.count);
            let most = switch_with_most(cluster, nodes, gpus);
            if let Some((most, node)) = most.filter(|(most, _)| *most < needed) {
                return Some(Shortage::GpusOnOneSwitch { needed, most, node });
            }
        }
        let most = free().map(|(node, free)| usable(node, free, gpus)).max().unwrap_or(0);
        if most < gpus.count {
            return Some(match &gpus.share {
                Share::Profile(profile) => Shortage::NoInstance { profile: profile.clone() },
                _ => Shortage::GpusOnOneNode { needed: gpus.count, most },
            });
        }
        if gpus.share == Share::Whole {
            let (needed, have) = (
                tasks * u64::from(gpus.count),
                free().map(|(node, free)| u64::from(usable(node, free, gpus))).sum(),
            );
            if have < needed {
                return Some(Shortage::Gpus { needed, free: have });
            }
        } else {
            let fit: u64 =
                free().map(|(node, free)| u64::from(devices::holds(node, free, &shape, None))).sum();
            if fit < tasks {
                let fit = u32::try_from(fit).unwrap_or(u32::MAX);
                return Some(Shortage::Fragmented { tasks: request.tasks, task: gang.task.clone(), fit });
            }
        }
    }
    let sum = free().fold(Amount::default(), |sum, (_, free)| sum.plus(&free.amount));
    let needed = taken.cpu_milli.saturating_mul(tasks);
    if sum.cpu_milli < needed {
        return Some(Shortage::Cpus { needed, free: sum.cpu_milli });
    }
    let needed = taken.memory_bytes.saturating_mul(tasks);
    if sum.memory_bytes < needed {
        return Some(Shortage::Memory { needed, free: sum.memory_bytes });
    }
    let needed = taken.hugepage_bytes.saturating_mul(tasks);
    if sum.hugepage_bytes < needed {
        return Some(Shortage::Hugepages { needed, free: sum.hugepage_bytes });
    }
    None
}

/// Devices of a node that a task could have now.
fn usable(node: &Node, free: &Free, request: &GpuRequest) -> u32 {
    let devices = node.gpus.iter().zip(&free.gpus);
    let usable = devices
        .filter(|(gpu, free)| request.accepts(gpu) && gpu.part(**free, &request.share).is_some())
        .count();
    u32::try_from(usable).unwrap_or(u32::MAX)
}

/// Most free devices below one switch, and the node.
fn switch_with_most(cluster: &Cluster, nodes: &[u32], request: &GpuRequest) -> Option<(u32, String)> {
    let mut best: Option<(u32, String)> = None;
    for index in nodes {
        let (node, free) = (&cluster.nodes()[*index as usize], &cluster.free()[*index as usize]);
        let mut switches: BTreeMap<Option<u8>, u32> = BTreeMap::new();
        for (gpu, free) in node.gpus.iter().zip(&free.gpus) {
            if request.accepts(gpu) && gpu.part(*free, &request.share).is_some() {
                *switches.entry(gpu.switch).or_default() += 1;
            }
        }
        let most = switches.into_values().max().unwrap_or(0);
        if best.as_ref().is_none_or(|(known, _)| most > *known) {
            best = Some((most, node.name.clone()));
        }
    }
    best
}
