//! Slots while the guest runs: plugging in, asking for a removal, pulling out.
//!
//! The order for an orderly removal: [`PciRoot::request_unplug`]; the guest's driver lets go and the guest
//! turns the slot off, which writes to [`PciRoot::release_event`]; [`PciRoot::unplug`] takes the functions out. A
//! guest that does not answer keeps the device until [`PciRoot::surprise_remove`].

use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::PciAddress;
use super::placement::pack::{Free, Item};
use super::placement::{BarName, BridgeWindows, Which};
use super::root::{
    BusIndex, NamedDevice, PciError, PciRoot, SharedPciDevice, check_functions, devfn, port_lock,
};
use super::slot::Slot;
use crate::config::MemorySize;

/// Where a slot is.
pub(super) struct SlotPlace {
    /// The port's bus, and its place there.
    pub(super) bus: BusIndex,
    pub(super) at: u8,
    /// The bus below the port.
    pub(super) below: BusIndex,
    pub(super) numa_node: Option<u32>,
    /// The port's windows as first programmed.
    pub(super) windows: BridgeWindows,
}

/// A slot, as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Its number, by which the guest knows it too (`/sys/bus/pci/slots`). The numbers begin at 1, in the order
    /// of the ports in the tree.
    pub number: u16,
    /// The guest's NUMA node that it is near, if the guest has nodes.
    pub numa_node: Option<u32>,
    /// Whether something is in it.
    pub occupied: bool,
    /// Whether the guest let go of it after it was asked to.
    pub released: bool,
    /// Where function 0 is or would be, unless the guest made the slot unreachable.
    pub address: Option<PciAddress>,
}

/// A slot that would not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// No such slot.
    #[error("the machine has no PCI slot {0}")]
    Unknown(u16),
    /// Something is in it.
    #[error("PCI slot {0} is occupied")]
    Occupied(u16),
    /// Nothing is in it.
    #[error("PCI slot {0} is empty")]
    Empty(u16),
    /// The guest still uses the device.
    #[error("the guest has not released the device in PCI slot {0} yet")]
    InUse(u16),
    /// A BAR that is larger than the slot's spare room.
    #[error("{what} needs {size}, PCI slot {slot} has {room} for it")]
    NoRoom {
        /// The BAR.
        what: BarName,
        /// Its size.
        size: MemorySize,
        /// The slot.
        slot: u16,
        /// The window in which it has to fit beside the others.
        room: MemorySize,
    },
    /// Function numbers that make no device.
    #[error(transparent)]
    Device(#[from] PciError),
}

impl PciRoot {
    /// All slots, those of devices that were there from the start included.
    pub fn slots(&self) -> Vec<SlotState> {
        self.slots.iter().filter_map(|(number, place)| self.slot_state(*number, place)).collect()
    }

    fn slot_state(&self, number: u16, place: &SlotPlace) -> Option<SlotState> {
        let bridge = self.buses[place.bus].get(&place.at)?.bridge.as_ref()?;
        let port = port_lock(&bridge.port);
        let slot = port.slot()?;
        let bus = bridge.numbers.secondary;
        let address = PciAddress { bus, device: 0, function: 0 };
        Some(SlotState {
            number,
            numa_node: place.numa_node,
            occupied: slot.occupied(),
            released: slot.released(),
            address: (self.route(bus) == Some(place.below)).then_some(address),
        })
    }

    /// Written to when the guest lets go of a slot that it was asked for; [`slots`](Self::slots) says which.
    ///
    /// # Errors
    /// When the host has no file descriptor left.
    pub fn release_event(&self) -> io::Result<EventFd> {
        self.release.try_clone()
    }

    /// Puts a device into an empty slot: its functions by number, 0 among them. Its BARs are programmed, memory
    /// decoding is off, and the guest is told.
    ///
    /// # Errors
    /// When there is no such slot, it is taken, or has too little address space; nothing has changed then.
    pub fn plug(&mut self, slot: u16, functions: Vec<(u8, NamedDevice)>) -> Result<(), SlotError> {
        let place = self.slots.get(&slot).ok_or(SlotError::Unknown(slot))?;
        let below = place.below;
        if !self.buses[below].is_empty() {
            return Err(SlotError::Occupied(slot));
        }
        check_functions(&functions)?;
        let bases = fit(slot, &place.windows, &functions)?;
        for ((number, named), bases) in functions.into_iter().zip(bases) {
            self.put(below, devfn(0, number), named.device, &bases);
        }
        self.with_slot(slot, Slot::insert)
    }

    /// The first empty slot with room for a device's functions. Not every one has: the windows of a slot that had a
    /// device from the start are as large as that device's BARs. `None` where no slot is empty.
    ///
    /// # Errors
    /// What does not fit into the last of the empty slots.
    pub fn slot_for(&self, functions: &[(u8, NamedDevice)]) -> Result<Option<u16>, SlotError> {
        let mut failure = None;
        for (number, place) in self.slots.iter().filter(|(_, place)| self.buses[place.below].is_empty()) {
            match fit(*number, &place.windows, functions) {
                Ok(_) => return Ok(Some(*number)),
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    /// Asks the guest to let go of what is in a slot. Asking again is harmless.
    ///
    /// # Errors
    /// When there is no such slot, or nothing in it.
    pub fn request_unplug(&mut self, slot: u16) -> Result<(), SlotError> {
        self.occupant(slot)?;
        self.with_slot(slot, Slot::request_removal)?;
        self.tell_release(slot);
        Ok(())
    }

    /// Takes out what the guest has let go of.
    ///
    /// # Errors
    /// When there is no such slot, nothing in it, or the guest still uses it.
    pub fn unplug(&mut self, slot: u16) -> Result<Vec<SharedPciDevice>, SlotError> {
        if !self.occupant(slot)?.released {
            return Err(SlotError::InUse(slot));
        }
        self.pull(slot)
    }

    /// Takes out what is in a slot, whatever the guest does with it; the guest is told afterwards.
    ///
    /// # Errors
    /// When there is no such slot, or nothing in it.
    pub fn surprise_remove(&mut self, slot: u16) -> Result<Vec<SharedPciDevice>, SlotError> {
        self.occupant(slot)?;
        self.pull(slot)
    }

    fn pull(&mut self, slot: u16) -> Result<Vec<SharedPciDevice>, SlotError> {
        let below = self.slots.get(&slot).ok_or(SlotError::Unknown(slot))?.below;
        let devices = self.clear(below);
        self.with_slot(slot, Slot::remove)?;
        Ok(devices)
    }

    fn occupant(&self, slot: u16) -> Result<SlotState, SlotError> {
        let place = self.slots.get(&slot).ok_or(SlotError::Unknown(slot))?;
        let state = self.slot_state(slot, place).ok_or(SlotError::Unknown(slot))?;
        if state.occupied { Ok(state) } else { Err(SlotError::Empty(slot)) }
    }

    fn with_slot(&self, slot: u16, act: impl FnOnce(&mut Slot)) -> Result<(), SlotError> {
        let unknown = SlotError::Unknown(slot);
        let place = self.slots.get(&slot).ok_or(unknown.clone())?;
        let function = self.buses[place.bus].get(&place.at).ok_or(unknown.clone())?;
        let bridge = function.bridge.as_ref().ok_or(unknown)?;
        port_lock(&bridge.port).with_slot(act);
        Ok(())
    }

    /// Tells the host when the guest has let go; telling it twice costs it a look.
    pub(super) fn tell_release(&self, slot: u16) {
        let place = self.slots.get(&slot);
        if place.and_then(|place| self.slot_state(slot, place)).is_some_and(|state| state.released) {
            // Non-blocking: fails only when 2^64 - 2 signals are pending already.
            let _ = self.release.write(1);
        }
    }
}

/// Addresses in a slot's windows for the BARs of each function.
fn fit(
    slot: u16,
    windows: &BridgeWindows,
    functions: &[(u8, NamedDevice)],
) -> Result<Vec<Vec<u64>>, SlotError> {
    let demands: Vec<_> = functions.iter().map(|(_, named)| named.demand()).collect();
    let mut bases: Vec<Vec<u64>> = demands.iter().map(|demand| vec![0; demand.bars.len()]).collect();
    for (which, window) in [(Which::Low, &windows.low), (Which::High, &windows.high)] {
        let mut items = Vec::new();
        for (function, demand) in demands.iter().enumerate() {
            let item = |(bar, size)| Item { size, align: size, content: (function, bar) };
            items.extend(demand.rooms(which).map(item));
        }
        items.sort_by_key(Item::order);
        let mut free = Free::new(std::slice::from_ref(window));
        for item in items {
            let (function, bar) = item.content;
            let size = item.size;
            let placed = free.take(item).ok_or_else(|| SlotError::NoRoom {
                what: BarName::Bar {
                    index: demands[function].bars[bar].index,
                    id: demands[function].id.clone(),
                },
                size: MemorySize::from_bytes(size),
                slot,
                room: MemorySize::from_bytes(window.end - window.start),
            })?;
            bases[function][bar] = placed.range().start;
        }
    }
    Ok(bases)
}
