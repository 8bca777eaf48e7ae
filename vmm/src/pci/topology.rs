//! The guest's tree, planned from where its devices sit on the host.
//!
//! A root port where the host has one, a switch where the host has one, both only with the ports that lead to
//! something: libraries that move data between devices (NCCL) read distances from the tree, and some GPUs do not
//! start on the root complex itself. Functions of one device stay functions of one device. What has no port of
//! its own on the host (a device on the root complex, one behind a bridge to conventional PCI, a virtual
//! function, which shares its port with the physical one) gets a port of its own.

use super::express::PortTraits;
use super::sysfs::{HostFunction, HostPort, HostPortKind};
use super::tree::{Below, HostBridge, Port, Switch, Tree};
use crate::host_address::HostPciAddress;

/// Plans the tree for `functions`, whose indices it holds.
///
/// `host_nodes` has an entry for each of the guest's NUMA nodes: the host's node that it stands for. A device is near
/// the guest's node that stands for its own, else the first. Empty: the guest has no nodes. `hotplug_slots` empty
/// slots are dealt out to the nodes in turn.
pub fn plan(functions: &[HostFunction], host_nodes: &[Option<u32>], hotplug_slots: u8) -> Tree<usize> {
    let count = host_nodes.len().max(1);
    let mut nodes: Vec<Vec<Planned>> = (0..count).map(|_| Vec::new()).collect();
    for device in devices(functions) {
        let host_node = device.first(functions).and_then(|function| function.numa_node);
        let near = |node: &Option<u32>| host_node.is_some() && *node == host_node;
        let node = host_nodes.iter().position(near).unwrap_or(0);
        let path = device.first(functions).map_or(&[][..], express_path);
        insert(&mut nodes[node], path, device.functions);
    }
    for slot in 0..usize::from(hotplug_slots) {
        nodes[slot % count].push(Planned { traits: PortTraits::EMPTY_SLOT, below: PlannedBelow::Empty });
    }
    let bridges = nodes.into_iter().enumerate().filter(|(node, ports)| *node == 0 || !ports.is_empty());
    let host_bridges = bridges.map(|(node, ports)| HostBridge {
        numa_node: (!host_nodes.is_empty()).then_some(node as u32),
        root_ports: ports.into_iter().map(Planned::finish).collect(),
    });
    Tree { host_bridges: host_bridges.collect() }
}

/// A port that is being planned.
struct Planned {
    traits: PortTraits,
    below: PlannedBelow,
}

enum PlannedBelow {
    Empty,
    Device(Vec<(u8, usize)>),
    /// With the host's two ports that it stands for: the one above, and the upstream port.
    Switch {
        host: [HostPciAddress; 2],
        traits: PortTraits,
        ports: Vec<Planned>,
    },
}

impl Planned {
    fn finish(self) -> Port<usize> {
        let below = match self.below {
            PlannedBelow::Empty => Below::Empty,
            PlannedBelow::Device(functions) => Below::Device(functions),
            PlannedBelow::Switch { traits, ports, .. } => {
                Below::Switch(Switch { traits, ports: ports.into_iter().map(Self::finish).collect() })
            }
        };
        Port { traits: self.traits, below }
    }
}

/// Functions that are one device in the guest.
struct Device {
    functions: Vec<(u8, usize)>,
}

impl Device {
    fn first<'a>(&self, functions: &'a [HostFunction]) -> Option<&'a HostFunction> {
        functions.get(self.functions.first()?.1)
    }
}

/// Groups the functions into devices, in the order of their first functions.
fn devices(functions: &[HostFunction]) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::new();
    for (index, function) in functions.iter().enumerate() {
        let same = |device: &&mut Device| {
            let first = device.first(functions);
            function.physical_function.is_none()
                && first.is_some_and(|first| {
                    first.physical_function.is_none() && first.address.shares_device(function.address)
                })
        };
        // A virtual function's number says nothing of functions beside it.
        let number = function.physical_function.map_or(function.address.function(), |_| 0);
        match devices.iter_mut().find(same) {
            Some(device) => device.functions.push((number, index)),
            None => devices.push(Device { functions: vec![(number, index)] }),
        }
    }
    for device in &mut devices {
        device.functions.sort_unstable();
        // A guest looks for functions only where there is a function 0.
        if let Some((number, _)) = device.functions.first_mut() {
            *number = 0;
        }
    }
    devices
}

/// The ports above a function if they are what a guest can be shown: a root port, then switches.
fn express_path(function: &HostFunction) -> &[HostPort] {
    let expected = |index: usize| match index {
        0 => HostPortKind::Root,
        odd if odd % 2 == 1 => HostPortKind::Upstream,
        _ => HostPortKind::Downstream,
    };
    let path = &function.path;
    let whole = path.len() % 2 == 1;
    let known = path.iter().enumerate().all(|(index, port)| port.kind == expected(index));
    if whole && known { path } else { &[] }
}

/// Puts a device below `ports`, sharing the switches of its path that are there already.
fn insert(ports: &mut Vec<Planned>, path: &[HostPort], device: Vec<(u8, usize)>) {
    let [port, upstream, rest @ ..] = path else {
        // Below a port there is room for one device only: another there gets a port of its own.
        let traits = path.first().map_or_else(PortTraits::default, |port| port.traits);
        ports.push(Planned { traits, below: PlannedBelow::Device(device) });
        return;
    };
    let wanted = [port.address, upstream.address];
    for planned in ports.iter_mut() {
        if let PlannedBelow::Switch { host, ports, .. } = &mut planned.below
            && *host == wanted
        {
            return insert(ports, rest, device);
        }
    }
    let mut inner = Vec::new();
    insert(&mut inner, rest, device);
    let below = PlannedBelow::Switch { host: wanted, traits: upstream.traits, ports: inner };
    ports.push(Planned { traits: port.traits, below });
}

#[cfg(test)]
pub(super) mod tests;
