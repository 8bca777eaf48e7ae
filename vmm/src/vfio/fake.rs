//! A function made of bytes, and a hypervisor that only notes what it is asked for.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use vfio_ioctls::VfioDevice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::function::{FunctionParts, HostFunction, InterruptCounts, InterruptKind, Region};
use super::host::HostDevice;
use super::ioctls::Affected;
use super::iommu::Iommu;
use super::reset::Resettable;
use crate::bus::lock;
use crate::hypervisor::{Hypervisor, LevelInterrupt, MsiMessage, MsiVector, PassthroughHypervisor};

/// What happened to the function.
#[derive(Default)]
pub struct Log {
    /// Configuration writes: offset and bytes.
    pub config: Vec<(u16, Vec<u8>)>,
    /// Writes to regions.
    pub regions: Vec<(u8, u64, Vec<u8>)>,
    /// Interrupts: kind, first, and which of them have an eventfd.
    pub connected: Vec<(InterruptKind, u16, Vec<bool>)>,
    /// Kinds turned off.
    pub disconnected: Vec<InterruptKind>,
    /// Resets of it alone, failed ones too.
    pub resets: usize,
    /// Resets of its bus, failed ones too.
    pub bus_resets: usize,
}

/// What comes of a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FakeReset {
    #[default]
    Works,
    /// There is no such reset.
    Missing,
    /// The kernel says no, or gave up.
    Fails,
    /// The kernel says yes, and the function answers no more.
    Kills,
}

/// A function whose registers are bytes.
pub struct FakeFunction {
    pub config: Mutex<Vec<u8>>,
    pub log: Mutex<Log>,
    /// Of it alone, and of its bus.
    pub resets: Mutex<[FakeReset; 2]>,
    /// What a reset of its bus would reset: VFIO's flags, and the functions.
    pub on_its_bus: (u32, Vec<Affected>),
}

impl FakeFunction {
    pub fn new(config: Vec<u8>) -> Arc<Self> {
        let itself = Affected { group: 7, domain: 0, bus: 1, devfn: 0 };
        Arc::new(Self::beside(config, vec![itself]))
    }

    /// One that shares its bus.
    pub fn beside(config: Vec<u8>, functions: Vec<Affected>) -> Self {
        let (log, resets) = (Mutex::default(), Mutex::default());
        Self { config: Mutex::new(config), log, resets, on_its_bus: (0, functions) }
    }

    fn do_reset(&self, index: usize) -> io::Result<()> {
        match lock(&self.resets)[index] {
            FakeReset::Works => Ok(()),
            FakeReset::Missing | FakeReset::Fails => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
            FakeReset::Kills => {
                lock(&self.config).fill(0xff);
                Ok(())
            }
        }
    }

    /// An endpoint with power management, MSI of 4 maskable vectors, Express with FLR, MSI-X of 8 vectors in BAR
    /// 0, VPD; AER, then SR-IOV, then a serial number.
    pub fn endpoint() -> Arc<Self> {
        let mut config = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0xde, 0x10, 0x30, 0x23]);
        put(6, &[0x10, 0]);
        put(8, &[0xa1, 0, 2, 3]);
        put(0x10, &[0x0c, 0, 0, 0]);
        put(0x18, &[0x00, 0, 0, 0]);
        put(0x1c, &[0x01, 0, 0, 0]);
        put(0x34, &[0x40]);
        put(0x3d, &[1]);
        put(0x40, &[0x01, 0x50, 0xc3, 0xff, 0, 0]);
        put(0x50, &[0x05, 0x70, 0x84, 0x01]);
        put(0x70, &[0x10, 0xb0, 2, 0, 0, 0x80, 0, 0x10]);
        put(0xb0, &[0x11, 0xc0, 7, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        put(0xc0, &[0x03, 0x00]);
        put(0x100, &0x1401_0010_u32.to_le_bytes());
        put(0x140, &0x2002_0001_u32.to_le_bytes());
        put(0x200, &0x0001_0003_u32.to_le_bytes());
        Self::new(config)
    }

    pub fn parts() -> FunctionParts {
        let region = |index, size, mappable| Region { index, size, mappable };
        FunctionParts {
            config_size: 4096,
            regions: vec![
                region(0, 1 << 16, std::iter::once(0..1 << 16).collect()),
                region(2, 64, vec![]),
                region(3, 32, vec![]),
                region(6, 1 << 16, vec![]),
            ],
            interrupts: InterruptCounts { intx: true, msi: 4, msix: 8, msix_grows: true },
        }
    }
}

impl HostFunction for FakeFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let config = lock(&self.config);
        if let Some(bytes) = config.get(usize::from(offset)..usize::from(offset) + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        lock(&self.log).config.push((offset, data.to_vec()));
        if let Some(bytes) = lock(&self.config).get_mut(usize::from(offset)..usize::from(offset) + data.len())
        {
            bytes.copy_from_slice(data);
        }
    }

    fn read_region(&self, region: u8, offset: u64, data: &mut [u8]) {
        data.fill(region.wrapping_add(offset as u8));
    }

    fn write_region(&self, region: u8, offset: u64, data: &[u8]) {
        lock(&self.log).regions.push((region, offset, data.to_vec()));
    }

    fn connect(&self, kind: InterruptKind, first: u16, events: &[Option<&EventFd>]) -> io::Result<()> {
        let present = events.iter().map(Option::is_some).collect();
        lock(&self.log).connected.push((kind, first, present));
        Ok(())
    }

    fn unmask_by(&self, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&self, kind: InterruptKind) -> io::Result<()> {
        lock(&self.log).disconnected.push(kind);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        lock(&self.log).resets += 1;
        self.do_reset(0)
    }
}

impl Resettable for FakeFunction {
    fn can_reset(&self) -> bool {
        lock(&self.resets)[0] != FakeReset::Missing
    }

    fn reset_function(&self) -> io::Result<()> {
        self.reset()
    }

    fn on_its_bus(&self) -> io::Result<(u32, Vec<Affected>)> {
        if lock(&self.resets)[1] == FakeReset::Missing {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(self.on_its_bus.clone())
    }

    fn reset_bus(&self, _groups: &[RawFd]) -> io::Result<()> {
        lock(&self.log).bus_resets += 1;
        self.do_reset(1)
    }
}

/// An address space without devices.
pub struct FakeIommu;

impl Iommu for FakeIommu {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn open(&self, _device: &HostDevice) -> Result<VfioDevice, vfio_ioctls::VfioError> {
        Err(vfio_ioctls::VfioError::GroupViable)
    }

    unsafe fn map(&self, _iova: u64, _host: NonNull<u8>, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, _iova: u64, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn apertures(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn mappings_left(&self) -> Option<u32> {
        None
    }

    fn group_files(&self, _groups: &[u32]) -> Vec<RawFd> {
        Vec::new()
    }
}

/// Notes what it is asked for.
#[derive(Default)]
pub struct FakeHypervisor {
    /// Messages as last routed, by vector; `None` while masked.
    pub routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
    /// Slots: guest address and size.
    pub slots: Mutex<BTreeMap<u32, (u64, u64)>>,
}

struct FakeVector {
    event: EventFd,
    index: usize,
    routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
}

impl MsiVector for FakeVector {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        lock(&self.routes)[self.index] = Some(message);
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        lock(&self.routes)[self.index] = None;
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

struct FakeLine([EventFd; 2]);

impl LevelInterrupt for FakeLine {
    fn trigger(&self) -> &EventFd {
        &self.0[0]
    }

    fn resample(&self) -> &EventFd {
        &self.0[1]
    }
}

impl Hypervisor for FakeHypervisor {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut routes = lock(&self.routes);
        routes.push(None);
        let index = routes.len() - 1;
        Ok(Arc::new(FakeVector {
            event: EventFd::new(EFD_NONBLOCK)?,
            index,
            routes: Arc::clone(&self.routes),
        }))
    }

    fn add_ioevent(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn remove_ioevent(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl PassthroughHypervisor for FakeHypervisor {
    fn level_interrupt(&self, _gsi: u32) -> io::Result<Arc<dyn LevelInterrupt>> {
        Ok(Arc::new(FakeLine([EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?])))
    }

    unsafe fn add_memory_slot(&self, guest: u64, _host: NonNull<u8>, size: u64) -> io::Result<u32> {
        let mut slots = lock(&self.slots);
        let slot = slots.keys().last().map_or(0, |last| last + 1);
        slots.insert(slot, (guest, size));
        Ok(slot)
    }

    fn remove_memory_slot(&self, slot: u32) -> io::Result<()> {
        lock(&self.slots).remove(&slot).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
