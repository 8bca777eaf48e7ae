//! The root complex: which function is where, configuration accesses, and where BARs answer.
//!
//! Guests reach configuration space through ECAM (PCIe 6.0 §7.2.2) and, where the machine offers
//! it, through the [older ports](super::config_ports). An access goes down from a host bridge through the ports
//! whose bus numbers, as the guest last wrote them, contain its bus. The walk follows the ports as they are
//! built, so numbers that overlap or run in circles make functions unreachable, and nothing else.
//!
//! After each write the function's BARs are compared with the MMIO bus, and moved there. A BAR that the guest points
//! outside the windows, or at another device, answers nowhere until it is pointed elsewhere.

mod build;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use build::Builder;
use nix::errno::Errno;
use vm_allocator::{AddressAllocator, AllocPolicy};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{Bar, CONVENTIONAL_SIZE, ConfigError, ConfigSpace, Identity};
use super::express::ExpressType;
use super::hotplug::SlotPlace;
use super::intx::{intx_gsi, swizzle};
use super::placement::{self, Demand, HostBridgePlace, Layout, PAGE, PlacementError, PortPlace, Space};
use super::port::{BusNumbers, Port};
use super::slot::Slot;
use super::tree::Tree;
use super::{PciAddress, PciDevice};
use crate::bus::{Bus, BusDevice};
use crate::hypervisor::Hypervisor;

/// Bytes of ECAM a bus.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;

/// Device numbers on a bus.
const DEVICES: u8 = 32;
/// Bytes of ECAM a function.
const FUNCTION_SIZE: u64 = 4096;
/// The header type register, and its bit that says that the device has more functions.
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;

/// A host bridge has no registers that matter; the IDs are those QEMU gives a generic PCIe
/// host bridge, which no operating system has quirks for.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Guest physical addresses for BARs, as the ACPI tables announce them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above 4 GiB; empty where the guest's addresses end earlier.
    pub high: Range<u64>,
}

impl Windows {
    pub(super) fn contain(&self, base: u64, size: u64) -> bool {
        let inside = |window: &Range<u64>| {
            base >= window.start && base.checked_add(size).is_some_and(|end| end <= window.end)
        };
        inside(&self.low) || inside(&self.high)
    }
}

/// A function that could not be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// All device numbers are taken.
    #[error("the PCI bus is full: it takes 31 devices and ports beside the host bridge")]
    BusFull,
    /// The windows are full.
    #[error("no address is left for a BAR of {0:#x} bytes")]
    NoAddress(u64),
    /// The windows are not ranges.
    #[error("the PCI window {start:#x}..{end:#x} is not a range")]
    BadWindow {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// A configuration space that is wrong in itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What is below the ports does not fit.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A device without function 0, or with one twice.
    #[error("{0}: the functions of a device have different numbers from 0 to 7, function 0 among them")]
    Functions(String),
    /// The host has no file descriptor left.
    #[error("an eventfd for PCI slots: {0}")]
    Event(Errno),
}

/// A function shared between the root complex and the MMIO bus.
pub type SharedPciDevice = Arc<Mutex<dyn PciDevice>>;

/// A function to be put below a port.
#[derive(Clone)]
pub struct NamedDevice {
    /// The device's ID in the machine description, for messages.
    pub id: String,
    /// The function.
    pub device: SharedPciDevice,
}

impl NamedDevice {
    pub(super) fn demand(&self) -> Demand {
        Demand { id: self.id.clone(), bars: lock(&self.device).config().bars().to_vec() }
    }
}

/// A host bridge, as ACPI tables describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootBridge {
    /// The guest's NUMA node that it is near, if the guest has nodes.
    pub numa_node: Option<u32>,
    /// Its buses and addresses.
    pub place: HostBridgePlace,
}

/// A BAR and the address at which it answers, if it does.
type Placement = (Bar, Option<u64>);

/// A bus that is there, whatever number it has at the moment.
pub(super) type BusIndex = usize;

pub(super) struct Function {
    pub(super) device: SharedPciDevice,
    placements: Vec<Placement>,
    /// The function is a port.
    pub(super) bridge: Option<Bridge>,
}

/// What the root complex keeps of a port.
pub(super) struct Bridge {
    pub(super) port: Arc<Mutex<Port>>,
    pub(super) below: BusIndex,
    pub(super) numbers: BusNumbers,
}

/// The functions on a bus, by device and function number as in [`devfn`].
pub(super) type BusFunctions = BTreeMap<u8, Function>;

/// Device and function number in one byte.
pub(super) fn devfn(device: u8, function: u8) -> u8 {
    device << 3 | function & 7
}

/// The root complex.
pub struct PciRoot {
    /// The host bridges' buses first, in their order.
    pub(super) buses: Vec<BusFunctions>,
    bridges: Vec<RootBridge>,
    pub(super) slots: BTreeMap<u16, SlotPlace>,
    pub(super) release: EventFd,
    windows: Windows,
    low: Option<AddressAllocator>,
    high: Option<AddressAllocator>,
    mmio: Arc<Bus>,
}

/// What a root complex is built from.
pub struct Parts {
    /// Addresses for BARs.
    pub windows: Windows,
    /// Those of them that devices below ports may have: see [`Space::new`].
    pub space: Space,
    /// What hangs below the ports.
    pub tree: Tree<NamedDevice>,
    /// For the ports' interrupts.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where BARs appear.
    pub mmio: Arc<Bus>,
}

impl PciRoot {
    /// A root complex with nothing but its host bridge at 00:00.0. BARs appear on `mmio`.
    ///
    /// # Errors
    /// When a window ends before it starts.
    pub fn new(windows: Windows, mmio: Arc<Bus>) -> Result<Self, PciError> {
        let tree = Tree::<Demand>::default();
        let space = Space::new(&windows, None);
        let layout = placement::place(&tree, &windows, &space)?;
        Self::with_bridges(windows, mmio, &layout, vec![None])
    }

    /// A root complex with everything in `parts` in place: bus numbers, windows and BARs are programmed, and the
    /// devices that were there from the start are in slots that are on.
    ///
    /// # Errors
    /// When something does not fit.
    pub fn build(parts: Parts) -> Result<Self, PciError> {
        let Parts { windows, space, tree, hypervisor, mmio } = parts;
        let demands = tree.clone().try_map(|named| Ok::<_, PciError>(named.demand()))?;
        let layout = placement::place(&demands, &windows, &space)?;
        let nodes = tree.host_bridges.iter().map(|bridge| bridge.numa_node).collect();
        let mut root = Self::with_bridges(windows, mmio, &layout, nodes)?;
        root.reserve(&layout)?;
        let (mut ports, mut functions) = (layout.ports.into_iter(), layout.functions.into_iter());
        let mut builder =
            Builder { root: &mut root, ports: &mut ports, functions: &mut functions, hypervisor };
        for (index, bridge) in tree.host_bridges.into_iter().enumerate() {
            for port in bridge.root_ports {
                builder.port(index, ExpressType::RootPort, port, bridge.numa_node)?;
            }
        }
        Ok(root)
    }

    fn with_bridges(
        windows: Windows,
        mmio: Arc<Bus>,
        layout: &Layout,
        nodes: Vec<Option<u32>>,
    ) -> Result<Self, PciError> {
        let (low, high) = (allocator(&windows.low)?, allocator(&windows.high)?);
        let release = EventFd::new(EFD_NONBLOCK)
            .map_err(|error| PciError::Event(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
        let places = layout.host_bridges.iter().cloned();
        let bridges = nodes.into_iter().zip(places).map(|(numa_node, place)| RootBridge { numa_node, place });
        let bridges: Vec<_> = bridges.collect();
        let buses = bridges.iter().map(|_| BusFunctions::new()).collect();
        let mut root = Self { buses, bridges, slots: BTreeMap::new(), release, windows, low, high, mmio };
        for bus in 0..root.bridges.len() {
            root.put(bus, devfn(0, 0), Arc::new(Mutex::new(HostBridge::new())), &[]);
        }
        Ok(root)
    }

    /// Takes what the ports have out of what is left for devices on bus 0.
    fn reserve(&mut self, layout: &Layout) -> Result<(), PciError> {
        let roots: Vec<u8> = layout.host_bridges.iter().map(|bridge| bridge.buses.0).collect();
        for port in layout.ports.iter().filter(|port| roots.contains(&port.primary)) {
            let own = port.bar.map(|base| base..base + PAGE);
            for range in [Some(port.windows.low.clone()), own].into_iter().flatten() {
                take(self.low.as_mut(), &range)?;
            }
            take(self.high.as_mut(), &port.windows.high)?;
        }
        Ok(())
    }

    /// Adds an integrated endpoint on bus 0, at the next free device number, and programs its BARs.
    /// Memory decoding stays off: a driver turns it on in the command register.
    ///
    /// # Errors
    /// When the bus or the windows are full.
    pub fn add(&mut self, device: SharedPciDevice) -> Result<PciAddress, PciError> {
        let number = (1..DEVICES)
            .find(|device| !self.buses[0].contains_key(&devfn(*device, 0)))
            .ok_or(PciError::BusFull)?;
        let bars = lock(&device).config().bars().to_vec();
        let bases = bars.iter().map(|bar| self.allocate(bar)).collect::<Result<Vec<_>, _>>()?;
        self.put(0, devfn(number, 0), device, &bases);
        Ok(PciAddress { bus: 0, device: number, function: 0 })
    }

    /// The functions present and reachable, for tables and listings.
    pub fn addresses(&self) -> impl Iterator<Item = PciAddress> + '_ {
        let all = (0..=u8::MAX).filter_map(|bus| Some((bus, self.route(bus)?)));
        all.flat_map(|(bus, index)| {
            let functions = self.buses[index].keys();
            functions.map(move |at| PciAddress { bus, device: at >> 3, function: at & 7 })
        })
    }

    /// The GSI at which `pin` (1 to 4) of a function arrives, turned at each bridge on the way up. `None` for a
    /// function that is not there, or no pin.
    pub fn pin_gsi(&self, device: &SharedPciDevice, pin: u8) -> Option<u32> {
        (0..self.bridges.len())
            .find_map(|bus| self.pin_below(bus, device, pin))
            .and_then(|(at, pin)| intx_gsi(at, pin))
    }

    /// The device number on `bus` that a pin comes from, and the pin as that device has it.
    fn pin_below(&self, bus: BusIndex, device: &SharedPciDevice, pin: u8) -> Option<(u8, u8)> {
        self.buses[bus].iter().find_map(|(at, function)| {
            if Arc::ptr_eq(&function.device, device) {
                return Some((at >> 3, pin));
            }
            let below = function.bridge.as_ref()?.below;
            let (number, pin) = self.pin_below(below, device, pin)?;
            Some((at >> 3, swizzle(number, pin)))
        })
    }

    /// The slot that a function is in, by its number.
    pub fn slot_of(&self, device: &SharedPciDevice) -> Option<u16> {
        let holds = |place: &SlotPlace| {
            self.buses[place.below].values().any(|function| Arc::ptr_eq(&function.device, device))
        };
        self.slots.iter().find(|(_, place)| holds(place)).map(|(number, _)| *number)
    }

    /// The host bridges, for ACPI tables. The first one's share includes all that is no other's.
    pub fn host_bridges(&self) -> &[RootBridge] {
        &self.bridges
    }

    /// Puts a function on a bus, with its BARs at `bases`.
    pub(super) fn put(&mut self, bus: BusIndex, at: u8, device: SharedPciDevice, bases: &[u64]) {
        let mut locked = lock(&device);
        let bars = locked.config().bars().to_vec();
        for (bar, base) in bars.iter().zip(bases) {
            locked.config().set_bar_address(bar, *base);
        }
        drop(locked);
        let placements = bars.into_iter().map(|bar| (bar, None)).collect();
        self.buses[bus].insert(at, Function { device, placements, bridge: None });
    }

    /// Takes the functions off a bus; their BARs answer nowhere any more.
    pub(super) fn clear(&mut self, bus: BusIndex) -> Vec<SharedPciDevice> {
        let functions = std::mem::take(&mut self.buses[bus]);
        let remove = |(_, function): (u8, Function)| {
            let mut device = lock(&function.device);
            device.leave();
            for (bar, base) in function.placements {
                if let Some(base) = base {
                    self.mmio.remove(base);
                    device.bar_moved(bar.index, None);
                }
            }
            drop(device);
            function.device
        };
        functions.into_iter().map(remove).collect()
    }

    /// Wide BARs go above 4 GiB while there is room, which leaves the scarce low window to the others.
    fn allocate(&mut self, bar: &Bar) -> Result<u64, PciError> {
        let high = if bar.wide { self.high.as_mut() } else { None };
        let size = bar.size.max(PAGE);
        [high, self.low.as_mut()]
            .into_iter()
            .flatten()
            .find_map(|window| window.allocate(size, size, AllocPolicy::FirstMatch).ok())
            .map(|range| range.start())
            .ok_or(PciError::NoAddress(bar.size))
    }

    /// The bus that the guest means by a number. Each step goes one bus down, so it ends.
    pub(super) fn route(&self, bus: u8) -> Option<BusIndex> {
        let contains = |bridge: &RootBridge| (bridge.place.buses.0..=bridge.place.buses.1).contains(&bus);
        let mut index = self.bridges.iter().position(contains)?;
        let mut number = self.bridges[index].place.buses.0;
        while number != bus {
            let bridges = self.buses[index].values().filter_map(|function| function.bridge.as_ref());
            let next = bridges.into_iter().find(|bridge| bridge.numbers.contain(bus))?;
            (index, number) = (next.below, next.numbers.secondary);
        }
        Some(index)
    }

    /// A guest reads `data.len()` bytes at `offset` of a function; absent functions read as ones.
    pub(super) fn read_config(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        let Some(bus) = self.route(address.bus).map(|index| &self.buses[index]) else { return };
        let Some(function) = bus.get(&devfn(address.device, address.function)) else { return };
        lock(&function.device).read_config(offset, data);
        if let Some(header) = HEADER_TYPE.checked_sub(offset.into()).and_then(|index| data.get_mut(index)) {
            let first = devfn(address.device, 0);
            let several = bus.range(first..=first | 7).count() > 1;
            *header = *header & !MULTI_FUNCTION | if several { MULTI_FUNCTION } else { 0 };
        }
    }

    pub(super) fn write_config(&mut self, address: PciAddress, offset: u16, data: &[u8]) {
        let Some(index) = self.route(address.bus) else { return };
        let at = devfn(address.device, address.function);
        let Some(function) = self.buses[index].get_mut(&at) else { return };
        let mut device = lock(&function.device);
        device.write_config(offset, data);
        // Also a write elsewhere may move BARs: a reset asked for in a capability takes them away.
        place(&self.mmio, &self.windows, &function.device, &mut *device, &mut function.placements);
        drop(device);
        if let Some(bridge) = &mut function.bridge {
            let mut port = port_lock(&bridge.port);
            bridge.numbers = port.bus_numbers();
            let (reset, below) = (port.take_reset(), bridge.below);
            let slot = port.slot().map(Slot::number);
            drop(port);
            if reset {
                self.reset_bus(below);
            }
            if let Some(slot) = slot {
                self.tell_release(slot);
            }
        }
    }

    /// Resets everything on a bus and below.
    fn reset_bus(&mut self, bus: BusIndex) {
        let mut below = Vec::new();
        for function in self.buses[bus].values_mut() {
            let mut device = lock(&function.device);
            device.bus_reset();
            place(&self.mmio, &self.windows, &function.device, &mut *device, &mut function.placements);
            drop(device);
            if let Some(bridge) = &mut function.bridge {
                bridge.numbers = port_lock(&bridge.port).bus_numbers();
                below.push(bridge.below);
            }
        }
        below.into_iter().for_each(|bus| self.reset_bus(bus));
    }
}

/// Function numbers that a guest finds: it looks for the others only where function 0 is.
pub(super) fn check_functions(functions: &[(u8, NamedDevice)]) -> Result<(), PciError> {
    let mut numbers: Vec<u8> = functions.iter().map(|(number, _)| *number).collect();
    numbers.sort_unstable();
    let fine = numbers.first() == Some(&0)
        && numbers.iter().all(|number| *number < 8)
        && numbers.windows(2).all(|pair| pair[0] != pair[1]);
    let name = || functions.first().map_or_else(|| "a device".to_owned(), |(_, named)| named.id.clone());
    if fine { Ok(()) } else { Err(PciError::Functions(name())) }
}

fn take(window: Option<&mut AddressAllocator>, range: &Range<u64>) -> Result<(), PciError> {
    let size = range.end - range.start;
    match window {
        Some(window) if size > 0 => window
            .allocate(size, PAGE, AllocPolicy::ExactMatch(range.start))
            .map(drop)
            .map_err(|_| PciError::NoAddress(size)),
        _ => Ok(()),
    }
}

/// Moves a function's BARs on the bus to where its configuration space has them.
fn place(
    mmio: &Bus,
    windows: &Windows,
    shared: &SharedPciDevice,
    device: &mut dyn PciDevice,
    placements: &mut [Placement],
) {
    for (bar, placed) in placements {
        let wanted = device.config().decoded_address(bar).filter(|base| windows.contain(*base, bar.size));
        if *placed == wanted {
            continue;
        }
        if let Some(base) = placed.take() {
            mmio.remove(base);
            device.bar_moved(bar.index, None);
        }
        let Some(base) = wanted else { continue };
        let range = Arc::new(Mutex::new(BarRange { device: Arc::clone(shared), bar: bar.index }));
        if mmio.insert(base, bar.size, range).is_ok() {
            *placed = Some(base);
            device.bar_moved(bar.index, Some(base));
        }
    }
}

fn allocator(window: &Range<u64>) -> Result<Option<AddressAllocator>, PciError> {
    if window.is_empty() {
        return Ok(None);
    }
    AddressAllocator::new(window.start, window.end - window.start)
        .map(Some)
        .map_err(|_| PciError::BadWindow { start: window.start, end: window.end })
}

pub(super) fn lock<'a>(device: &'a SharedPciDevice) -> MutexGuard<'a, dyn PciDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn port_lock(port: &Mutex<Port>) -> MutexGuard<'_, Port> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

/// ECAM: 4 KiB a function, 1 MiB a bus. Put it on the MMIO bus over [`ECAM_BUS_SIZE`] bytes a bus.
impl BusDevice for PciRoot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset % FUNCTION_SIZE + data.len() as u64 <= FUNCTION_SIZE {
            self.read_config(PciAddress::from_ecam(offset), (offset % FUNCTION_SIZE) as u16, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset % FUNCTION_SIZE + data.len() as u64 <= FUNCTION_SIZE {
            self.write_config(PciAddress::from_ecam(offset), (offset % FUNCTION_SIZE) as u16, data);
        }
    }
}

/// A BAR on the MMIO bus.
struct BarRange {
    device: SharedPciDevice,
    bar: u8,
}

impl BusDevice for BarRange {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read_bar(self.bar, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.device).write_bar(self.bar, offset, data);
    }
}

struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    fn new() -> Self {
        Self { config: ConfigSpace::endpoint(&HOST_BRIDGE, CONVENTIONAL_SIZE) }
    }
}

impl PciDevice for HostBridge {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_bar(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn bar_moved(&mut self, _bar: u8, _address: Option<u64>) {}
}

#[cfg(test)]
mod tests;
