//! Gangs that must stay, or would like to stay, within a part of the tree: switch, node, leaf, rack.
//!
//! How many tasks each node holds is counted first, so that a group is tried only if it has room. Of the
//! groups of each level the tightest few are tried, each in two ways: on the fewest nodes, and on those
//! that cost least; the gang goes where fragmentation and links together cost least.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::shape::Shape;
use super::{Among, PlaceRequest, Placer, Undo, devices, locality};
use crate::model::{Cluster, Communication, Free, Node, Scope, TaskPlace};
use crate::policy::Strategy;

/// Groups of a level that are tried: more cost time, and the tightest are the best for what comes.
const TRIES: usize = 3;

/// Whether tasks can be placed one by one, without a look at groups.
pub(super) fn is_single(request: &PlaceRequest<'_>) -> bool {
    let gang = request.gang;
    match request.tasks {
        0 | 1 => gang.scope != Scope::Switch || gang.task.gpus.is_none(),
        _ => gang.scope == Scope::Any && gang.communication == Communication::None,
    }
}

/// Nodes that hold some tasks, with how many.
pub(super) type Rooms = Vec<(u32, u32)>;

/// Part of the tree.
pub(super) struct Group {
    pub(super) nodes: Rooms,
    /// Only devices below this one.
    pub(super) switch: Option<Option<u8>>,
    pub(super) holds: u64,
}

/// How many tasks of the gang a node holds, by amounts and devices, with this free.
pub(super) fn room(node: &Node, free: &Free, shape: &Shape, switch: Option<Option<u8>>) -> u32 {
    free.amount.holds(&shape.taken).min(devices::holds(node, free, shape, switch))
}

/// Groups of one level, of the nodes that have room.
pub(super) fn groups(
    nodes: &[Node],
    free: &[Free],
    rooms: &Rooms,
    shape: &Shape,
    level: Scope,
) -> Vec<Group> {
    let node = |index: u32| &nodes[index as usize];
    let sum = |nodes: &Rooms| nodes.iter().map(|(_, room)| u64::from(*room)).sum();
    let by = |of: &dyn Fn(&Node) -> Option<&String>| {
        let mut groups: BTreeMap<&String, Rooms> = BTreeMap::new();
        for &(index, room) in rooms {
            if let Some(name) = of(node(index)) {
                groups.entry(name).or_default().push((index, room));
            }
        }
        groups.into_values().map(|nodes| Group { holds: sum(&nodes), nodes, switch: None }).collect()
    };
    match level {
        Scope::Switch if shape.task.gpus.is_some() => {
            let mut groups = Vec::new();
            for &(index, _) in rooms {
                let mut switches: Vec<Option<u8>> = node(index).gpus.iter().map(|gpu| gpu.switch).collect();
                switches.sort_unstable();
                switches.dedup();
                for switch in switches {
                    let room = room(node(index), &free[index as usize], shape, Some(switch));
                    if room > 0 {
                        let (nodes, switch) = (vec![(index, room)], Some(switch));
                        groups.push(Group { nodes, switch, holds: room.into() });
                    }
                }
            }
            groups
        }
        Scope::Switch | Scope::Node => {
            let group = |&(index, room): &(u32, u32)| Group {
                nodes: vec![(index, room)],
                switch: None,
                holds: room.into(),
            };
            rooms.iter().map(group).collect()
        }
        Scope::Leaf => by(&|node| node.leaf.as_ref()),
        Scope::Rack => by(&|node| node.rack.as_ref()),
        Scope::Any => vec![Group { holds: sum(rooms), nodes: rooms.clone(), switch: None }],
    }
}

impl Placer {
    /// Places a gang as one group; none, and nothing changed, if no group has room.
    pub(super) fn place_group(
        &mut self,
        cluster: &mut Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
    ) -> Option<Vec<TaskPlace>> {
        self.refresh(cluster, table, Among::All);
        let rooms = self.rooms(cluster, table, request);
        let mut best: Option<(f64, Vec<TaskPlace>)> = None;
        for level in levels(request) {
            let shape = &self.tables[table].shape;
            let mut groups = groups(cluster.nodes(), cluster.free(), &rooms, shape, level);
            groups.retain(|group| group.holds >= request.tasks.into());
            groups.sort_by_key(|group| (group.holds, self.least(table, &group.nodes)));
            groups.truncate(TRIES);
            for group in &groups {
                for nodes in [few_nodes(cluster, group, request), sorted(&group.nodes)] {
                    let Some((cost, places)) = self.try_group(cluster, table, request, &nodes, group) else {
                        continue;
                    };
                    if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                        best = Some((cost, places));
                    }
                    if group.nodes.len() == 1 {
                        break;
                    }
                }
            }
        }
        let (_, places) = best?;
        let mut undo = Undo::default();
        for place in &places {
            undo.before(cluster, place.node);
            // The room was there a moment ago; all goes back if it is not, as a part is worth nothing.
            if cluster.take(request.gang, place).is_err() {
                undo.all(cluster);
                return None;
            }
        }
        Some(places)
    }

    /// Nodes that hold tasks of the gang and may be used.
    pub(super) fn rooms(&self, cluster: &Cluster, table: usize, request: &PlaceRequest<'_>) -> Rooms {
        let mut rooms = Rooms::new();
        let shape = &self.tables[table].shape;
        for (index, &cost) in (0_u32..).zip(&self.tables[table].costs) {
            if cost < f64::INFINITY && self.allowed(cluster, table, request, index, None) {
                let at = index as usize;
                let room = room(&cluster.nodes()[at], &cluster.free()[at], shape, None);
                let room = room.min(request.tasks);
                if room > 0 {
                    rooms.push((index, room));
                }
            }
        }
        rooms
    }

    /// What the cheapest node of a group costs, as bits that sort like the number.
    fn least(&self, table: usize, nodes: &Rooms) -> u64 {
        let costs = nodes.iter().map(|(index, _)| self.tables[table].costs[*index as usize]);
        let least = costs.fold(f64::INFINITY, f64::min);
        let bits = least.to_bits();
        if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
    }

    /// Places the gang there, says what it costs, and takes it away again.
    fn try_group(
        &mut self,
        cluster: &mut Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
        nodes: &[u32],
        group: &Group,
    ) -> Option<(f64, Vec<TaskPlace>)> {
        let among = Among::Nodes(nodes);
        let (places, spent) = self.place_tasks(cluster, table, request, among, group.switch, true)?;
        let links = locality::links_cost(cluster, request.gang, &places);
        // A published strategy ranks in its own unit: links come first there.
        let cost = if self.strategy == Strategy::Balanced { spent + links } else { links + 1e-6 * spent };
        Some((cost, places))
    }
}

/// Levels whose groups are tried, the narrowest first. A gang that does not talk gains nothing by being
/// together more closely than it must.
fn levels(request: &PlaceRequest<'_>) -> Vec<Scope> {
    let widest = request.gang.scope;
    if request.gang.communication == Communication::None {
        return vec![widest];
    }
    let levels = [Scope::Node, Scope::Leaf, Scope::Rack, Scope::Any];
    let narrower = levels.into_iter().filter(|level| *level < widest);
    narrower.chain([widest]).collect()
}

fn sorted(rooms: &Rooms) -> Vec<u32> {
    let mut nodes: Vec<u32> = rooms.iter().map(|(node, _)| *node).collect();
    nodes.sort_unstable();
    nodes
}

/// The fewest nodes of the group, from the fewest racks and leaves, that hold the gang; the last of them
/// the tightest that is enough.
fn few_nodes(cluster: &Cluster, group: &Group, request: &PlaceRequest<'_>) -> Vec<u32> {
    let node = |index: u32| &cluster.nodes()[index as usize];
    let mut by_rack: BTreeMap<Option<&String>, u64> = BTreeMap::new();
    let mut by_leaf: BTreeMap<Option<&String>, u64> = BTreeMap::new();
    for &(index, room) in &group.nodes {
        *by_rack.entry(node(index).rack.as_ref()).or_default() += u64::from(room);
        *by_leaf.entry(node(index).leaf.as_ref()).or_default() += u64::from(room);
    }
    let mut order: Vec<(u32, u32)> = group.nodes.clone();
    order.sort_by_key(|&(index, room)| {
        let (rack, leaf) = (node(index).rack.as_ref(), node(index).leaf.as_ref());
        (Reverse(by_rack[&rack]), rack, Reverse(by_leaf[&leaf]), leaf, Reverse(room), index)
    });
    let mut missing = u64::from(request.tasks);
    let mut chosen = Vec::new();
    while let Some(&(index, room)) = order.first().filter(|_| missing > 0) {
        let last = u64::from(room) >= missing;
        let enough = |&&(_, room): &&(u32, u32)| u64::from(room) >= missing;
        let near = |&&(other, _): &&(u32, u32)| node(other).leaf == node(index).leaf;
        let tightest = order.iter().filter(enough).filter(near).min_by_key(|(_, room)| *room);
        let (index, room) = tightest.copied().filter(|_| last).unwrap_or((index, room));
        chosen.push(index);
        missing = missing.saturating_sub(room.into());
        order.retain(|(other, _)| *other != index);
    }
    chosen.sort_unstable();
    chosen
}
