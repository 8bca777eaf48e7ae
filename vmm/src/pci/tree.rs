//! What hangs below what: host bridges, root ports, switches, devices, empty slots.
//!
//! The same shape carries what each step needs of a device: its index for the planner
//! ([`super::topology`]), its BARs for [`super::placement`], the device itself for the root complex. Ports
//! and functions are counted depth first: a port before what is below it, a switch's upstream port before
//! its downstream ports.

use super::express::PortTraits;

/// The whole machine below its CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree<D> {
    /// At least one; the first has bus 0 and also the devices that are not in the tree.
    pub host_bridges: Vec<HostBridge<D>>,
}

/// A host bridge: a range of buses and a part of the address space, near one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBridge<D> {
    /// The guest's NUMA node, if the guest has nodes.
    pub numa_node: Option<u32>,
    /// Its root ports.
    pub root_ports: Vec<Port<D>>,
}

/// A port away from the root: a root port, or a switch's downstream port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port<D> {
    /// What software reads of its link.
    pub traits: PortTraits,
    /// What is below it.
    pub below: Below<D>,
}

/// What is below a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Below<D> {
    /// Nothing yet: a slot with spare address space.
    Empty,
    /// The functions of one device, each with its function number, 0 to 7; function 0 is among them. They
    /// are in a slot, and can be unplugged and replaced.
    Device(Vec<(u8, D)>),
    /// A switch, which stays.
    Switch(Switch<D>),
}

/// A switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch<D> {
    /// What software reads of its upstream port.
    pub traits: PortTraits,
    /// Its downstream ports.
    pub ports: Vec<Port<D>>,
}

impl<D> Default for Tree<D> {
    /// One host bridge with nothing below it.
    fn default() -> Self {
        Self { host_bridges: vec![HostBridge { numa_node: None, root_ports: Vec::new() }] }
    }
}

impl<D> Tree<D> {
    /// The same tree with `change`d devices.
    ///
    /// # Errors
    /// The first that `change` returns.
    pub fn try_map<T, E>(self, mut change: impl FnMut(D) -> Result<T, E>) -> Result<Tree<T>, E> {
        let mut host_bridges = Vec::with_capacity(self.host_bridges.len());
        for bridge in self.host_bridges {
            let root_ports = map_ports(bridge.root_ports, &mut change)?;
            host_bridges.push(HostBridge { numa_node: bridge.numa_node, root_ports });
        }
        Ok(Tree { host_bridges })
    }

    /// The functions, in order.
    pub fn functions(&self) -> Vec<&D> {
        let mut functions = Vec::new();
        for bridge in &self.host_bridges {
            bridge.root_ports.iter().for_each(|port| port.collect(&mut functions));
        }
        functions
    }
}

fn map_ports<D, T, E>(
    ports: Vec<Port<D>>,
    change: &mut impl FnMut(D) -> Result<T, E>,
) -> Result<Vec<Port<T>>, E> {
    ports.into_iter().map(|port| port.try_map(change)).collect()
}

impl<D> Port<D> {
    /// An empty slot.
    pub fn empty() -> Self {
        Self { traits: PortTraits::EMPTY_SLOT, below: Below::Empty }
    }

    fn try_map<T, E>(self, change: &mut impl FnMut(D) -> Result<T, E>) -> Result<Port<T>, E> {
        let below = match self.below {
            Below::Empty => Below::Empty,
            Below::Device(functions) => {
                let changed = functions.into_iter().map(|(number, device)| Ok((number, change(device)?)));
                Below::Device(changed.collect::<Result<_, E>>()?)
            }
            Below::Switch(switch) => {
                Below::Switch(Switch { traits: switch.traits, ports: map_ports(switch.ports, change)? })
            }
        };
        Ok(Port { traits: self.traits, below })
    }

    fn collect<'a>(&'a self, functions: &mut Vec<&'a D>) {
        match &self.below {
            Below::Empty => {}
            Below::Device(devices) => functions.extend(devices.iter().map(|(_, device)| device)),
            Below::Switch(switch) => switch.ports.iter().for_each(|port| port.collect(functions)),
        }
    }
}
