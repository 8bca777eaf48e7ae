//! Building the ports and what is below them.

use std::sync::{Arc, Mutex};

use super::{
    Bridge, BusFunctions, BusIndex, NamedDevice, PciError, PciRoot, PortPlace, SharedPciDevice,
    check_functions, devfn, lock,
};
use crate::hypervisor::Hypervisor;
use crate::pci::express::ExpressType;
use crate::pci::hotplug::SlotPlace;
use crate::pci::port::Port;
use crate::pci::slot::{SLOT_NUMBER_MAX, Slot};
use crate::pci::tree::{self, Below};

/// Builds what hangs below the ports, in the order in which it was placed.
pub(super) struct Builder<'a> {
    pub(super) root: &'a mut PciRoot,
    pub(super) ports: &'a mut dyn Iterator<Item = PortPlace>,
    pub(super) functions: &'a mut dyn Iterator<Item = Vec<u64>>,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
}

impl Builder<'_> {
    /// A port and all below it.
    pub(super) fn port(
        &mut self,
        bus: BusIndex,
        kind: ExpressType,
        port: tree::Port<NamedDevice>,
        numa_node: Option<u32>,
    ) -> Result<(), PciError> {
        let Some(place) = self.ports.next() else { return Ok(()) };
        let occupied = matches!(port.below, Below::Device(_));
        let number = (!matches!(port.below, Below::Switch(_))).then(|| self.root.slots.len() as u16 + 1);
        let slot = number.map(|number| Slot::new(number.min(SLOT_NUMBER_MAX), occupied));
        let function = Port::new(kind, port.traits, slot, &self.hypervisor)?;
        let below = self.insert(bus, function, &place);
        if let Some(number) = number {
            let at = devfn(place.device, place.function);
            let windows = place.windows.clone();
            self.root.slots.insert(number, SlotPlace { bus, at, below, numa_node, windows });
        }
        match port.below {
            Below::Empty => {}
            Below::Device(functions) => {
                check_functions(&functions)?;
                for (number, named) in functions {
                    let bases = self.functions.next().unwrap_or_default();
                    self.root.put(below, devfn(0, number), named.device, &bases);
                }
            }
            Below::Switch(switch) => {
                let Some(place) = self.ports.next() else { return Ok(()) };
                let upstream = Port::new(ExpressType::UpstreamPort, switch.traits, None, &self.hypervisor)?;
                let inner = self.insert(below, upstream, &place);
                for port in switch.ports {
                    self.port(inner, ExpressType::DownstreamPort, port, numa_node)?;
                }
            }
        }
        Ok(())
    }

    /// Puts a programmed port on a bus; returns the bus below it.
    fn insert(&mut self, bus: BusIndex, mut port: Port, place: &PortPlace) -> BusIndex {
        port.program(place);
        let numbers = port.bus_numbers();
        let port = Arc::new(Mutex::new(port));
        let below = self.root.buses.len();
        self.root.buses.push(BusFunctions::new());
        let at = devfn(place.device, place.function);
        let bases: Vec<u64> = place.bar.into_iter().collect();
        self.root.put(bus, at, Arc::clone(&port) as SharedPciDevice, &bases);
        if let Some(function) = self.root.buses[bus].get_mut(&at) {
            function.bridge = Some(Bridge { port, below, numbers });
            // Firmware leaves a port's memory decoding on.
            let mut device = lock(&function.device);
            let (mmio, windows) = (&self.root.mmio, &self.root.windows);
            super::place(mmio, windows, &function.device, &mut *device, &mut function.placements);
        }
        below
    }
}
