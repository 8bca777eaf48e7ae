//! Where everything goes: bus numbers, bridge windows and BARs, from a tree of devices and the free addresses.
//!
//! Pure: the same input gives the same addresses. Prefetchable 64-bit BARs go into the 64-bit space, all others
//! below 4 GiB, because a bridge forwards only prefetchable addresses above that (PCIe 6.0 §7.5.1.3.9). A
//! window holds what is below its bridge, largest first, at multiples of 1 MiB; a BAR is aligned to its size, and
//! has at least a page of its own, so that it can be mapped into the guest without its neighbour.
//!
//! A window whose largest BAR nearly fills the space may not fit when that BAR comes first and the small ones
//! after it: a 128 GiB and a 32 MiB BAR need 128 GiB + 32 MiB from a multiple of 128 GiB on. So a window is
//! also tried upside down, the small ones first, the largest last, ending at a multiple of its size.

pub(super) mod pack;

use std::fmt;
use std::ops::Range;

use super::config::{Bar, ROM_BAR};
use super::root::Windows;
use super::tree::{Below, Port, Tree};
use crate::config::MemorySize;
use crate::ranges::without;
use pack::{Block, Free, Item, Placed};

/// Bridge windows begin and end at multiples of this (PCIe 6.0 §7.5.1.3.8).
pub const WINDOW_UNIT: u64 = 1 << 20;
/// A BAR's least alignment here, and the size of a port's own BAR.
pub const PAGE: u64 = 4096;
/// Spare room below 4 GiB for a device that is plugged in.
const SPARE_LOW: u64 = 2 << 20;
/// The least that a slot has of either window, occupied or not: Linux looks for this much for each window that a
/// hot-plug port lacks, and complains where the ports above have none left.
const SLOT_WINDOW: u64 = 2 << 20;
/// Spare room above for its largest BAR: today's largest GPUs have one of 256 GiB. Halved until all slots fit,
/// but not below the smaller number.
const SPARE_HIGH: Range<u64> = 1 << 30..256 << 30;
/// Spare room for the other 64-bit BARs of such a device.
const SPARE_BESIDE: u64 = 1 << 30;
/// Root ports have device numbers from here up, so that devices beside them keep theirs whether or not
/// there are ports.
const FIRST_PORT_DEVICE: u8 = 16;
/// Device numbers for root ports; more of them share numbers as functions of one device.
const PORT_DEVICES: usize = 16;

/// A function to place: its name in messages, and its BARs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The device's ID in the machine description.
    pub id: String,
    /// Its BARs, the expansion ROM's included.
    pub bars: Vec<Bar>,
}

impl Demand {
    /// The BARs that belong into one of the spaces: which of `bars`, and the room it takes.
    pub(super) fn rooms(&self, which: Which) -> impl Iterator<Item = (usize, u64)> + '_ {
        let bars = self.bars.iter().enumerate().filter(move |(_, bar)| Which::of(bar) == which);
        bars.map(|(index, bar)| (index, bar.size.max(PAGE)))
    }
}

/// Free addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Below 4 GiB, in order.
    pub low: Vec<Range<u64>>,
    /// Above, in order.
    pub high: Vec<Range<u64>>,
    /// The largest BAR above 4 GiB that empty slots are to have room for, a power of two. They get less where
    /// there is less, 1 GiB at least; [`Layout::spare`] says what it came to.
    pub slot_bar: u64,
}

impl Space {
    /// What of `windows` lies in `allowed`: the ranges that the IOMMU translates. `None`: all of it.
    pub fn new(windows: &Windows, allowed: Option<&[Range<u64>]>) -> Self {
        let all = 0..u64::MAX;
        let mut sorted = allowed.unwrap_or(std::slice::from_ref(&all)).to_vec();
        sorted.sort_by_key(|range| range.start);
        let within = |window: &Range<u64>| {
            let cut = |range: &Range<u64>| range.start.max(window.start)..range.end.min(window.end);
            sorted.iter().map(cut).filter(|range| !range.is_empty()).collect()
        };
        Self { low: within(&windows.low), high: within(&windows.high), slot_bar: SPARE_HIGH.end }
    }
}

/// A bridge's two windows; an empty one is closed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BridgeWindows {
    /// The 32-bit, non-prefetchable one.
    pub low: Range<u64>,
    /// The 64-bit prefetchable one.
    pub high: Range<u64>,
}

/// A port's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlace {
    /// The bus it is on.
    pub primary: u8,
    /// Its device number there.
    pub device: u8,
    /// Its function number.
    pub function: u8,
    /// The bus below it.
    pub secondary: u8,
    /// The last bus below it.
    pub subordinate: u8,
    /// Its windows.
    pub windows: BridgeWindows,
    /// Where its own BAR is; upstream ports have none.
    pub bar: Option<u64>,
}

/// A host bridge's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBridgePlace {
    /// Its buses, first and last.
    pub buses: (u8, u8),
    /// Addresses below 4 GiB that are its own.
    pub low: Vec<Range<u64>>,
    /// Addresses above.
    pub high: Vec<Range<u64>>,
    /// Device numbers of its root ports.
    pub port_devices: Vec<u8>,
}

/// Where everything goes; ports and functions in the order of [`Tree`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The host bridges.
    pub host_bridges: Vec<HostBridgePlace>,
    /// The ports.
    pub ports: Vec<PortPlace>,
    /// Addresses of each function's BARs, in their order.
    pub functions: Vec<Vec<u64>>,
    /// Spare room above 4 GiB of each empty slot.
    pub spare: u64,
}

/// A tree that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The 64-bit space.
    #[error(
        "{what} needs {size}, the addresses that this host's IOMMU and CPU share above guest memory \
         {}", SpaceText(.space)
    )]
    High {
        /// The largest BAR of what does not fit.
        what: BarName,
        /// Its size.
        size: MemorySize,
        /// All of the space.
        space: Vec<Range<u64>>,
    },
    /// The 32-bit space.
    #[error("{what} needs {size} below 4 GiB, where {total} are for the 32-bit BARs of all devices")]
    Low {
        /// The largest BAR of what does not fit.
        what: BarName,
        /// Its size.
        size: MemorySize,
        /// All of the space.
        total: MemorySize,
    },
    /// There are 256 buses.
    #[error("the devices and slots need {0} PCI buses, there are 256: pass fewer devices through")]
    Buses(usize),
    /// Device numbers of a switch.
    #[error("{0} devices below one switch, at most 32: pass fewer devices through")]
    SwitchPorts(usize),
    /// Device numbers of a host bridge.
    #[error("{0} root ports on one host bridge, at most 128: pass fewer devices through")]
    RootPorts(usize),
}

/// Whose room is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BarName {
    /// A BAR of a device.
    Bar {
        /// Its index.
        index: u8,
        /// The device's ID.
        id: String,
    },
    /// A port's own registers.
    Port,
    /// The spare room of an empty slot.
    Slot,
}

impl fmt::Display for BarName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar { index: ROM_BAR, id } => write!(f, "the expansion ROM of {id}"),
            Self::Bar { index, id } => write!(f, "BAR {index} of {id}"),
            Self::Port => f.write_str("a PCI port"),
            Self::Slot => f.write_str("each hotplug slot"),
        }
    }
}

struct SpaceText<'a>(&'a [Range<u64>]);

impl fmt::Display for SpaceText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("are none"),
            [range] => write!(f, "begin at {:#x} and end at {:#x}", range.start, range.end),
            ranges => {
                f.write_str("are")?;
                ranges.iter().try_for_each(|range| write!(f, " {:#x}..{:#x}", range.start, range.end))
            }
        }
    }
}

/// Which of the two spaces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// Below 4 GiB.
    Low,
    /// Above.
    High,
}

impl Which {
    /// The space that a BAR belongs to.
    pub(super) fn of(bar: &Bar) -> Self {
        if bar.wide && bar.prefetchable { Self::High } else { Self::Low }
    }
}

/// What an item stands for.
#[derive(Clone, Debug)]
enum Content {
    Bar { function: usize, bar: usize },
    PortBar(usize),
    Window { port: usize, items: Vec<Placed<Content>> },
    Spare,
}

/// Places `tree` in `space`. All of `windows` that no other host bridge has is the first one's.
///
/// # Errors
/// What does not fit, and where.
pub fn place(tree: &Tree<Demand>, windows: &Windows, space: &Space) -> Result<Layout, PlacementError> {
    let mut layout = number_buses(tree)?;
    let low = place_all(tree, &layout, Which::Low, &space.low, SPARE_LOW).map_err(|failure| {
        let (what, size) = failure;
        let total = space.low.iter().map(|range| range.end - range.start).sum();
        PlacementError::Low { what, size: MemorySize::from_bytes(size), total: MemorySize::from_bytes(total) }
    })?;
    let mut spare = space.slot_bar.clamp(SPARE_HIGH.start, 1 << 62).next_power_of_two();
    let high = loop {
        match place_all(tree, &layout, Which::High, &space.high, spare) {
            Ok(high) => break high,
            // Without slots less spare room changes nothing, and costs little.
            Err(_) if spare > SPARE_HIGH.start => spare /= 2,
            Err((what, size)) => {
                let space = space.high.clone();
                return Err(PlacementError::High { what, size: MemorySize::from_bytes(size), space });
            }
        }
    };
    layout.spare = spare;
    for (root, place) in &low {
        layout.take(*root, Which::Low, place);
    }
    for (root, place) in &high {
        layout.take(*root, Which::High, place);
    }
    layout.share(windows);
    Ok(layout)
}

/// Items of all host bridges, each with its bridge, where they lie in the space.
type Roots = Vec<(usize, Placed<Content>)>;

fn place_all(
    tree: &Tree<Demand>,
    layout: &Layout,
    which: Which,
    space: &[Range<u64>],
    spare: u64,
) -> Result<Roots, (BarName, u64)> {
    // A machine without addresses above 4 GiB does without those windows.
    let least = if space.is_empty() { 0 } else { SLOT_WINDOW };
    let mut walk = Walk { which, spare, least, port: 0, function: 0, layout };
    let mut items = Vec::new();
    for (index, bridge) in tree.host_bridges.iter().enumerate() {
        for port in &bridge.root_ports {
            items.extend(walk.port(port).into_iter().map(|item| (index, item)));
        }
    }
    let mut free = Free::new(space);
    items.sort_by_key(|(_, item)| item.order());
    let mut roots = Vec::with_capacity(items.len());
    for (index, item) in items {
        let (name, size) = largest(&item, tree);
        roots.push((index, free.take(item).ok_or((name, size))?));
    }
    Ok(roots)
}

/// The largest thing in an item, for messages.
fn largest(item: &Item<Content>, tree: &Tree<Demand>) -> (BarName, u64) {
    match &item.content {
        Content::PortBar(_) => (BarName::Port, item.size),
        Content::Spare => (BarName::Slot, item.size),
        Content::Bar { function, bar } => match tree.functions().get(*function) {
            Some(demand) => {
                (BarName::Bar { index: demand.bars[*bar].index, id: demand.id.clone() }, item.size)
            }
            None => (BarName::Port, item.size),
        },
        Content::Window { items, .. } => {
            let names = items.iter().map(|placed| largest(&placed.item, tree));
            names.max_by_key(|(_, size)| *size).unwrap_or((BarName::Port, item.size))
        }
    }
}

/// Goes through the tree in its order, making items for one of the spaces.
struct Walk<'a> {
    which: Which,
    spare: u64,
    /// What a slot's window has at least.
    least: u64,
    port: usize,
    function: usize,
    layout: &'a Layout,
}

impl Walk<'_> {
    /// A port's own BAR, and its window.
    fn port(&mut self, port: &Port<Demand>) -> Vec<Item<Content>> {
        let index = self.port;
        self.port += 1;
        debug_assert!(index < self.layout.ports.len());
        let inside = match &port.below {
            Below::Empty => self.spare_items(),
            Below::Device(functions) => {
                functions.iter().flat_map(|(_, demand)| self.function(demand)).collect()
            }
            Below::Switch(switch) => {
                let upstream = self.port;
                self.port += 1;
                let inside: Vec<_> = switch.ports.iter().flat_map(|port| self.port(port)).collect();
                window(upstream, inside, 0).into_iter().collect()
            }
        };
        let own = Item { size: PAGE, align: PAGE, content: Content::PortBar(index) };
        let own = (self.which == Which::Low).then_some(own);
        let least = if matches!(port.below, Below::Switch(_)) { 0 } else { self.least };
        own.into_iter().chain(window(index, inside, least)).collect()
    }

    fn spare_items(&self) -> Vec<Item<Content>> {
        let spare = |size| Item { size, align: size, content: Content::Spare };
        let beside = self.which == Which::High && self.spare > SPARE_BESIDE;
        let mut items = vec![spare(self.spare)];
        items.extend(beside.then(|| spare(SPARE_BESIDE)));
        items
    }

    fn function(&mut self, demand: &Demand) -> Vec<Item<Content>> {
        let function = self.function;
        self.function += 1;
        let item = |(bar, size)| Item { size, align: size, content: Content::Bar { function, bar } };
        demand.rooms(self.which).map(item).collect()
    }
}

/// A window of `least` bytes or more around `inside`; none around nothing if it need not be.
fn window(port: usize, inside: Vec<Item<Content>>, least: u64) -> Option<Item<Content>> {
    let empty = Block { items: Vec::new(), size: 0, align: WINDOW_UNIT };
    let Block { items, size, align } = Block::pack(inside).unwrap_or(empty);
    let size = size.max(least).next_multiple_of(WINDOW_UNIT);
    let content = Content::Window { port, items };
    (size > 0).then(|| Item { size, align: align.max(WINDOW_UNIT), content })
}

impl Layout {
    /// Notes where an item and all in it came to lie.
    fn take(&mut self, root: usize, which: Which, placed: &Placed<Content>) {
        let range = placed.range();
        let share = &mut self.host_bridges[root];
        match which {
            Which::Low => share.low.push(range),
            Which::High => share.high.push(range),
        }
        self.note(which, placed);
    }

    fn note(&mut self, which: Which, placed: &Placed<Content>) {
        let range = placed.range();
        match &placed.item.content {
            Content::Bar { function, bar } => self.functions[*function][*bar] = range.start,
            Content::PortBar(port) => self.ports[*port].bar = Some(range.start),
            Content::Spare => {}
            Content::Window { port, items } => {
                let windows = &mut self.ports[*port].windows;
                match which {
                    Which::Low => windows.low = range,
                    Which::High => windows.high = range,
                }
                for item in items {
                    self.note(which, &item.within(placed));
                }
            }
        }
    }

    /// Gives the first host bridge all that is not another's, in few pieces.
    fn share(&mut self, windows: &Windows) {
        for bridge in &mut self.host_bridges {
            bridge.low = merge(std::mem::take(&mut bridge.low));
            bridge.high = merge(std::mem::take(&mut bridge.high));
        }
        let [first, others @ ..] = self.host_bridges.as_mut_slice() else { return };
        let taken = |of: fn(&HostBridgePlace) -> &[Range<u64>]| others.iter().flat_map(of).cloned().collect();
        let (low, high): (Vec<_>, Vec<_>) = (taken(|bridge| &bridge.low), taken(|bridge| &bridge.high));
        (first.low, first.high) = (without(windows.low.clone(), &low), without(windows.high.clone(), &high));
    }
}

/// Sorted, with neighbours joined.
fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Gives every port its place on its bus, and the buses below it their numbers.
fn number_buses(tree: &Tree<Demand>) -> Result<Layout, PlacementError> {
    let mut numbering = Numbering { next: 0, ports: Vec::new() };
    let mut host_bridges = Vec::with_capacity(tree.host_bridges.len());
    for bridge in &tree.host_bridges {
        let bus = numbering.bus();
        let count = bridge.root_ports.len();
        let together = count.div_ceil(PORT_DEVICES).max(1);
        if together > 8 {
            return Err(PlacementError::RootPorts(count));
        }
        let mut port_devices = Vec::new();
        for (index, port) in bridge.root_ports.iter().enumerate() {
            let device = FIRST_PORT_DEVICE + (index / together) as u8;
            numbering.port(port, bus, device, (index % together) as u8)?;
            port_devices.push(device);
        }
        port_devices.dedup();
        host_bridges.push((bus, port_devices));
    }
    if numbering.next > 256 {
        return Err(PlacementError::Buses(numbering.next));
    }
    let ends: Vec<usize> = host_bridges.iter().skip(1).map(|(bus, _)| bus - 1).chain([255]).collect();
    let share = |((bus, port_devices), end): ((usize, Vec<u8>), usize)| HostBridgePlace {
        buses: (bus as u8, end as u8),
        low: Vec::new(),
        high: Vec::new(),
        port_devices,
    };
    let host_bridges = host_bridges.into_iter().zip(ends).map(share).collect();
    let functions = tree.functions().iter().map(|demand| vec![0; demand.bars.len()]).collect();
    Ok(Layout { host_bridges, ports: numbering.ports, functions, spare: 0 })
}

struct Numbering {
    /// May pass 255: then it is an error, found at the end.
    next: usize,
    ports: Vec<PortPlace>,
}

impl Numbering {
    fn bus(&mut self) -> usize {
        self.next += 1;
        self.next - 1
    }

    fn port<D>(
        &mut self,
        port: &Port<D>,
        primary: usize,
        device: u8,
        function: u8,
    ) -> Result<(), PlacementError> {
        let secondary = self.bus();
        let index = self.push(primary, secondary, device, function);
        if let Below::Switch(switch) = &port.below {
            let inner = self.bus();
            let upstream = self.push(secondary, inner, 0, 0);
            if switch.ports.len() > 32 {
                return Err(PlacementError::SwitchPorts(switch.ports.len()));
            }
            for (device, port) in switch.ports.iter().enumerate() {
                self.port(port, inner, device as u8, 0)?;
            }
            self.ports[upstream].subordinate = (self.next - 1) as u8;
        }
        self.ports[index].subordinate = (self.next - 1) as u8;
        Ok(())
    }

    fn push(&mut self, primary: usize, secondary: usize, device: u8, function: u8) -> usize {
        self.ports.push(PortPlace {
            primary: primary as u8,
            device,
            function,
            secondary: secondary as u8,
            subordinate: secondary as u8,
            windows: BridgeWindows::default(),
            bar: None,
        });
        self.ports.len() - 1
    }
}

#[cfg(test)]
mod tests;
