//! The root complex: which function is where, configuration accesses, and where BARs answer.
//!
//! Guests reach configuration space through ECAM (PCIe 6.0 §7.2.2) and, where the machine offers
//! it, through ports 0xCF8 and 0xCFC (PCI 3.0 §3.2.2.3.2). After each write that may matter
//! the function's BARs are compared with the MMIO bus, and moved there. A BAR that the guest points outside the
//! windows, or at another device, answers nowhere until it is pointed elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_allocator::{AddressAllocator, AllocPolicy};

use super::config::{Bar, CONVENTIONAL_SIZE, ConfigError, ConfigSpace, Identity};
use super::{PciAddress, PciDevice};
use crate::bus::{Bus, BusDevice};

/// Bytes of ECAM a bus.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;
/// The first of the eight ports of [`ConfigPorts`].
pub const CONFIG_PORTS: u64 = 0xcf8;
/// How many ports [`ConfigPorts`] has.
pub const CONFIG_PORTS_SIZE: u64 = 8;

/// Device numbers on a bus.
const DEVICES: u8 = 32;
/// Bytes of ECAM a function.
const FUNCTION_SIZE: u64 = 4096;

/// A host bridge with nothing behind it but bus 0; the IDs are those QEMU gives a generic PCIe
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
    fn contain(&self, base: u64, size: u64) -> bool {
        let inside = |window: &Range<u64>| {
            base >= window.start && base.checked_add(size).is_some_and(|end| end <= window.end)
        };
        inside(&self.low) || inside(&self.high)
    }
}

/// A function that could not be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// All device numbers are taken.
    #[error("the PCI bus is full: it takes 31 devices beside the host bridge")]
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
}

/// A function shared between the root complex and the MMIO bus.
pub type SharedPciDevice = Arc<Mutex<dyn PciDevice>>;

/// A BAR and the address at which it answers, if it does.
type Placement = (Bar, Option<u64>);

struct Function {
    device: SharedPciDevice,
    placements: Vec<Placement>,
}

/// The root complex.
pub struct PciRoot {
    functions: BTreeMap<PciAddress, Function>,
    windows: Windows,
    low: Option<AddressAllocator>,
    high: Option<AddressAllocator>,
    mmio: Arc<Bus>,
}

impl PciRoot {
    /// A root complex with its host bridge at 00:00.0. BARs appear on `mmio`.
    ///
    /// # Errors
    /// When a window ends before it starts.
    pub fn new(windows: Windows, mmio: Arc<Bus>) -> Result<Self, PciError> {
        let low = allocator(&windows.low)?;
        let high = allocator(&windows.high)?;
        let mut root = Self { functions: BTreeMap::new(), windows, low, high, mmio };
        let bridge: SharedPciDevice = Arc::new(Mutex::new(HostBridge::new()));
        root.insert(PciAddress { bus: 0, device: 0, function: 0 }, bridge)?;
        Ok(root)
    }

    /// Adds an integrated endpoint on bus 0, at the next free device number, and programs its BARs.
    /// Memory decoding stays off: a driver turns it on in the command register.
    ///
    /// # Errors
    /// When the bus or the windows are full.
    pub fn add(&mut self, device: SharedPciDevice) -> Result<PciAddress, PciError> {
        let address = (1..DEVICES)
            .map(|device| PciAddress { bus: 0, device, function: 0 })
            .find(|address| !self.functions.contains_key(address))
            .ok_or(PciError::BusFull)?;
        self.insert(address, device)?;
        Ok(address)
    }

    /// The functions present, for tables and listings.
    pub fn addresses(&self) -> impl Iterator<Item = PciAddress> + '_ {
        self.functions.keys().copied()
    }

    fn insert(&mut self, address: PciAddress, device: SharedPciDevice) -> Result<(), PciError> {
        let mut placements = Vec::new();
        {
            let mut device = lock(&device);
            let bars = device.config().bars().to_vec();
            for bar in bars {
                let base = self.allocate(&bar)?;
                device.config().set_bar_address(&bar, base);
                placements.push((bar, None));
            }
        }
        self.functions.insert(address, Function { device, placements });
        Ok(())
    }

    /// Wide BARs go above 4 GiB while there is room, which leaves the scarce low window to the others.
    fn allocate(&mut self, bar: &Bar) -> Result<u64, PciError> {
        let high = if bar.wide { self.high.as_mut() } else { None };
        [high, self.low.as_mut()]
            .into_iter()
            .flatten()
            .find_map(|window| window.allocate(bar.size, bar.size, AllocPolicy::FirstMatch).ok())
            .map(|range| range.start())
            .ok_or(PciError::NoAddress(bar.size))
    }

    /// A guest reads `data.len()` bytes at `offset` of a function; absent functions read as ones.
    fn read_config(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        if let Some(function) = self.functions.get(&address) {
            lock(&function.device).read_config(offset, data);
        }
    }

    fn write_config(&mut self, address: PciAddress, offset: u16, data: &[u8]) {
        let Some(function) = self.functions.get_mut(&address) else { return };
        let mut device = lock(&function.device);
        device.write_config(offset, data);
        // Also a write elsewhere may move BARs: a reset asked for in a capability takes them away.
        place(&self.mmio, &self.windows, &function.device, &mut *device, &mut function.placements);
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

fn lock<'a>(device: &'a SharedPciDevice) -> MutexGuard<'a, dyn PciDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Ports 0xCF8 (address) and 0xCFC (data). An access costs a guest two exits where ECAM costs
/// one, so machines whose guests read the MCFG table do without.
pub struct ConfigPorts {
    root: Arc<Mutex<PciRoot>>,
    address: u32,
}

impl ConfigPorts {
    const ENABLE: u32 = 1 << 31;
    const DATA: u64 = 4;

    /// Ports onto `root`'s functions.
    pub fn new(root: Arc<Mutex<PciRoot>>) -> Self {
        Self { root, address: 0 }
    }

    /// The function and the register that an access to a data port means.
    fn target(&self, port: u64, len: usize) -> Option<(PciAddress, u16)> {
        let byte = port.checked_sub(Self::DATA)?;
        let offset = u64::from(self.address & 0xfc) + byte;
        let fits = byte + len as u64 <= 4 && offset as usize + len <= CONVENTIONAL_SIZE;
        let address = PciAddress::from_config_address(self.address);
        (self.address & Self::ENABLE != 0 && fits).then_some((address, offset as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (0, 4) = (offset, data.len()) {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
            root.read_config(address, register, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only a dword reaches the address register: 0xCF9 is a chipset's reset control.
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            let mut root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
            root.write_config(address, register, data);
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
