//! Root ports and the ports of switches: bridges without a bus behind them that anyone could see on a wire.
//!
//! A port forwards nothing itself. The root complex reads its bus numbers to find the function that a
//! configuration access means, and places BARs wherever the guest points them, whatever the windows of the bridges
//! above say: a window that is too narrow hides no device from the one who programmed it.

use std::sync::Arc;

use super::PciDevice;
use super::config::{Bar, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, ConfigError, ConfigSpace, Identity};
use super::express::{ExpressType, LINK_STATUS, PortTraits, SLOT_CONTROL, SLOT_STATUS, link_status};
use super::msix::Msix;
use super::placement::PortPlace;
use super::slot::Slot;
use crate::hypervisor::Hypervisor;

/// The IDs of QEMU's generic root port, which no operating system has quirks for.
const ROOT_PORT: Identity = bridge_identity(0x1b36, 0x000c);
/// Texas Instruments' XIO3130, a switch that needs no driver of its own.
const UPSTREAM_PORT: Identity = bridge_identity(0x104c, 0x8232);
/// See [`UPSTREAM_PORT`].
const DOWNSTREAM_PORT: Identity = bridge_identity(0x104c, 0x8233);

const fn bridge_identity(vendor: u16, device: u16) -> Identity {
    Identity { vendor, device, revision: 0, class: 0x06_04_00, subsystem_vendor: 0, subsystem: 0 }
}

/// Access control services (PCIe 6.0 §7.7.11).
const CAP_ACS: u16 = 0x0d;
/// Source validation, translation blocking, peer-to-peer request and completion redirect, upstream forwarding.
/// All start off: then peers behind a switch reach each other directly.
const ACS_SERVICES: u16 = 0x1f;

const PRIMARY_BUS: u16 = 0x18;
/// The subordinate bus number follows.
const SECONDARY_BUS: usize = 0x19;
const MEMORY_WINDOW: u16 = 0x20;
const PREFETCHABLE_WINDOW: u16 = 0x24;
const PREFETCHABLE_UPPER: u16 = 0x28;
const BRIDGE_CONTROL: usize = 0x3e;
const SECONDARY_BUS_RESET: u16 = 1 << 6;

/// The port's own BAR: the MSI-X table and, in its second half, the pending bits.
const BAR: Bar = Bar { index: 0, size: 4096, wide: false, prefetchable: false };
const MSIX_PENDING: u64 = 0x800;
/// All events of a port share its vector, whose number the Express capability has as zero.
const VECTOR: u16 = 0;

/// The buses below a port, as the guest numbered them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusNumbers {
    /// The bus right below.
    pub secondary: u8,
    /// The last bus below.
    pub subordinate: u8,
}

impl BusNumbers {
    /// Whether a configuration access to `bus` goes through the port. Bus 0 is never below one.
    pub fn contain(self, bus: u8) -> bool {
        self.secondary != 0 && (self.secondary..=self.subordinate).contains(&bus)
    }
}

struct Vectors {
    msix: Msix,
    capability: u16,
    /// The interrupt of the slot's events has been sent.
    asserted: bool,
}

/// A port.
pub struct Port {
    kind: ExpressType,
    traits: PortTraits,
    config: ConfigSpace,
    express: u16,
    vectors: Option<Vectors>,
    slot: Option<Slot>,
    in_reset: bool,
    reset_asked: bool,
}

impl Port {
    /// A port with power-on registers. Root ports and downstream ports have an interrupt; those with a slot need it.
    ///
    /// # Errors
    /// None that a guest or a description could cause.
    pub fn new(
        kind: ExpressType,
        traits: PortTraits,
        slot: Option<Slot>,
        hypervisor: &Arc<dyn Hypervisor>,
    ) -> Result<Self, ConfigError> {
        let identity = match kind {
            ExpressType::UpstreamPort => UPSTREAM_PORT,
            ExpressType::DownstreamPort => DOWNSTREAM_PORT,
            _ => ROOT_PORT,
        };
        let mut config = ConfigSpace::bridge(&identity);
        let express = config.add_port_express(kind, &traits, slot.as_ref())?;
        let mut vectors = None;
        if kind != ExpressType::UpstreamPort {
            config.add_bar(BAR)?;
            let msix = Msix::new(Arc::clone(hypervisor), 1);
            let capability = msix.add_capability(&mut config, BAR.index, 0, MSIX_PENDING as u32)?;
            vectors = Some(Vectors { msix, capability, asserted: false });
            let services = ACS_SERVICES.to_le_bytes();
            let body = [services[0], services[1], 0, 0];
            config.add_extended_capability(CAP_ACS, 1, &body, &[0, 0, services[0], services[1]])?;
        }
        Ok(Self { kind, traits, config, express, vectors, slot, in_reset: false, reset_asked: false })
    }

    /// Programs bus numbers, windows and the BAR as firmware would, for guests that do not enumerate.
    pub fn program(&mut self, place: &PortPlace) {
        self.config.write(PRIMARY_BUS, &[place.primary, place.secondary, place.subordinate]);
        let bounds = |window: &std::ops::Range<u64>| match window.is_empty() {
            // Closed: the base lies above the limit.
            true => (0xfff0_0000, 0),
            false => (window.start, window.end - 1),
        };
        let half = |address: u64| ((address >> 16) as u16 & 0xfff0).to_le_bytes();
        let mut set = |register: u16, (base, limit): (u64, u64)| {
            self.config.write(register, &half(base));
            self.config.write(register + 2, &half(limit));
        };
        let high = bounds(&place.windows.high);
        set(MEMORY_WINDOW, bounds(&place.windows.low));
        set(PREFETCHABLE_WINDOW, high);
        self.config.write(PREFETCHABLE_UPPER, &((high.0 >> 32) as u32).to_le_bytes());
        self.config.write(PREFETCHABLE_UPPER + 4, &((high.1 >> 32) as u32).to_le_bytes());
        if let Some(address) = place.bar {
            self.config.set_bar_address(&BAR, address);
        }
        self.config.write(COMMAND as u16, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    }

    /// The buses below, as numbered now.
    pub fn bus_numbers(&self) -> BusNumbers {
        let [secondary, subordinate] = self.config.u16(SECONDARY_BUS).to_le_bytes();
        BusNumbers { secondary, subordinate }
    }

    /// The slot, if the port has one.
    pub fn slot(&self) -> Option<&Slot> {
        self.slot.as_ref()
    }

    /// Does something to the slot from the host's side, and tells the guest.
    pub fn with_slot<T>(&mut self, act: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let result = self.slot.as_mut().map(act);
        self.publish();
        result
    }

    /// Says once that the guest began a reset of what is below, which the root complex has to pass on.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset_asked)
    }

    /// Brings the registers and the interrupt in line with the slot.
    fn publish(&mut self) {
        let Some(slot) = &self.slot else { return };
        let link = link_status(self.kind, &self.traits, slot.occupied());
        let at = |register: u16| usize::from(self.express + register);
        self.config.set(at(LINK_STATUS), &link.to_le_bytes());
        self.config.set(at(SLOT_CONTROL), &slot.control().to_le_bytes());
        self.config.set(at(SLOT_STATUS), &slot.status().to_le_bytes());
        if let Some(vectors) = &mut self.vectors {
            // While MSI-X is off nothing is sent, and the event waits.
            let wanted = slot.interrupt();
            vectors.asserted = wanted && (vectors.asserted || vectors.msix.trigger(VECTOR));
        }
    }

    /// The bytes of a write that fall on the slot registers, each register with the mask of what was written.
    fn write_slot(&mut self, offset: u16, data: &[u8]) {
        let Some(slot) = &mut self.slot else { return };
        let first = self.express + SLOT_CONTROL;
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        for (register, byte) in (offset..=u16::MAX).zip(data) {
            let index = usize::from(register.wrapping_sub(first));
            if let (Some(target), Some(bits)) = (value.get_mut(index), mask.get_mut(index)) {
                (*target, *bits) = (*byte, 0xff);
            }
        }
        let [control_low, control_high, status_low, status_high] = value;
        // Events first: one that the same write causes must not be lost.
        slot.clear_events(u16::from_le_bytes([status_low, status_high]));
        slot.write_control(
            u16::from_le_bytes([control_low, control_high]),
            u16::from_le_bytes([mask[0], mask[1]]),
        );
    }
}

impl PciDevice for Port {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some(vectors) = &self.vectors {
            vectors.msix.config_written(&self.config, vectors.capability);
        }
        self.write_slot(offset, data);
        self.publish();
        let in_reset = self.config.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0;
        self.reset_asked |= in_reset && !self.in_reset;
        self.in_reset = in_reset;
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(vectors) = &self.vectors else { return };
        match offset.checked_sub(MSIX_PENDING) {
            Some(offset) => vectors.msix.read_pending(offset, data),
            None => vectors.msix.read_table(offset, data),
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let Some(vectors) = &self.vectors else { return };
        if offset < MSIX_PENDING {
            vectors.msix.write_table(offset, data);
        }
    }

    fn bar_moved(&mut self, _bar: u8, _address: Option<u64>) {}

    /// A reset from above takes all that the guest programmed, bus numbers included (PCIe 6.0 §6.6.1).
    fn bus_reset(&mut self) {
        self.config.clear_writable();
        if let Some(vectors) = &mut self.vectors {
            vectors.msix.reset(&self.config, vectors.capability);
            vectors.asserted = false;
        }
        if let Some(slot) = &mut self.slot {
            slot.reset();
        }
        self.in_reset = false;
        self.reset_asked = false;
        self.publish();
    }
}
