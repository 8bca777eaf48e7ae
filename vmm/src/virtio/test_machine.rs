//! A machine for tests: a root complex, guest memory, a hypervisor that remembers, and a driver
//! that reaches its device by configuration space and BAR accesses alone, as a guest does.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::VirtioDevice;
use super::test_driver::{Buffer, DriverQueue, PATIENCE, guest_memory};
use super::transport::{VirtioPci, layout};
use crate::bus::Bus;
use crate::hypervisor::{Hypervisor, MsiMessage, MsiVector};
use crate::pci::root::{ECAM_BUS_SIZE, PciRoot, Windows};

pub const ECAM: u64 = 0xe000_0000;
pub const LOW_WINDOW: std::ops::Range<u64> = 0xc000_0000..0xd000_0000;
pub const HIGH_WINDOW: std::ops::Range<u64> = 0x40_0000_0000..0x50_0000_0000;
pub const MEMORY: usize = 8 << 20;

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;
pub const VERSION_1: u64 = 1 << 32;

/// Where a queue's rings and the drivers' buffers begin.
const RINGS: u64 = 0x1_0000;
pub const BUFFERS: u64 = 0x10_0000;

#[derive(Debug)]
pub struct FakeVector {
    event: EventFd,
    pub route: Mutex<Option<MsiMessage>>,
}

impl MsiVector for FakeVector {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        *self.route.lock().unwrap() = Some(message);
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        *self.route.lock().unwrap() = None;
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

/// A hypervisor without a machine.
#[derive(Default)]
pub struct FakeHypervisor {
    pub vectors: Mutex<Vec<Arc<FakeVector>>>,
    ioevents: Mutex<HashMap<u64, EventFd>>,
}

impl FakeHypervisor {
    /// The vectors whose message carries `data`.
    pub fn vector(&self, data: u32) -> Option<Arc<FakeVector>> {
        let vectors = self.vectors.lock().unwrap();
        let carries =
            |vector: &&Arc<FakeVector>| vector.route.lock().unwrap().is_some_and(|m| m.data == data);
        vectors.iter().find(carries).cloned()
    }

    pub fn ioevents(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = self.ioevents.lock().unwrap().keys().copied().collect();
        addresses.sort_unstable();
        addresses
    }
}

impl Hypervisor for FakeHypervisor {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector =
            Arc::new(FakeVector { event: EventFd::new(libc::EFD_NONBLOCK)?, route: Mutex::default() });
        self.vectors.lock().unwrap().push(Arc::clone(&vector));
        Ok(vector)
    }

    fn add_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let old = self.ioevents.lock().unwrap().insert(address, event.try_clone()?);
        assert!(old.is_none(), "two ioeventfds at {address:#x}");
        Ok(())
    }

    fn remove_ioevent(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        assert!(self.ioevents.lock().unwrap().remove(&address).is_some(), "no ioeventfd at {address:#x}");
        Ok(())
    }
}

/// A machine with one virtio device at 00:01.0.
pub struct TestMachine {
    pub hypervisor: Arc<FakeHypervisor>,
    pub device: Arc<Mutex<VirtioPci>>,
    pub memory: GuestMemoryMmap,
    bus: Arc<Bus>,
    /// Structures of §4.1.4 by type: offset in the BAR, length.
    structures: BTreeMap<u8, (u64, u64)>,
    /// The configuration access window, and the MSI-X capability.
    pub window: u16,
    pub msix: u16,
}

impl TestMachine {
    /// Puts the device on the bus and finds its structures.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let (memory, _) = guest_memory(MEMORY);
        let hypervisor = Arc::new(FakeHypervisor::default());
        let bus = Arc::new(Bus::new());
        let ram = GuestMemoryAtomic::new(memory.clone());
        let device = VirtioPci::new(Box::new(device), ram, hypervisor.clone()).unwrap();
        let device = Arc::new(Mutex::new(device));
        let windows = Windows { low: LOW_WINDOW, high: HIGH_WINDOW };
        let mut root = PciRoot::new(windows, Arc::clone(&bus)).unwrap();
        let address = root.add(device.clone()).unwrap();
        assert_eq!(address.to_string(), "00:01.0");
        bus.insert(ECAM, ECAM_BUS_SIZE, Arc::new(Mutex::new(root))).unwrap();
        let structures = BTreeMap::new();
        let mut machine = Self { hypervisor, device, memory, bus, structures, window: 0, msix: 0 };
        machine.find_structures();
        machine
    }

    fn find_structures(&mut self) {
        let mut at = self.config(0x34, 1) as u16;
        while at != 0 {
            match self.config(at, 1) {
                0x09 => {
                    let kind = self.config(at + 3, 1) as u8;
                    let place = (u64::from(self.config(at + 8, 4)), u64::from(self.config(at + 12, 4)));
                    self.structures.insert(kind, place);
                    if kind == layout::CAP_PCI {
                        self.window = at;
                    }
                }
                0x11 => self.msix = at,
                id => panic!("capability {id:#x}"),
            }
            at = self.config(at + 1, 1) as u16;
        }
    }

    /// Reads 00:01.0's configuration space.
    pub fn config(&self, offset: u16, size: usize) -> u32 {
        let mut data = [0; 4];
        self.bus.read(ECAM + (1 << 15) + u64::from(offset), &mut data[..size]);
        u32::from_le_bytes(data)
    }

    pub fn set_config(&self, offset: u16, data: &[u8]) {
        self.bus.write(ECAM + (1 << 15) + u64::from(offset), data);
    }

    /// Where BAR 0's registers point.
    pub fn bar(&self) -> u64 {
        u64::from(self.config(0x10, 4) & !0xf) | u64::from(self.config(0x14, 4)) << 32
    }

    /// Memory decoding on, bus mastering on.
    pub fn enable(&self) {
        self.set_config(4, &[6, 0]);
    }

    /// Reads from the BAR.
    pub fn read(&self, offset: u64, size: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.read(self.bar() + offset, &mut data[..size]), "the BAR does not answer");
        u64::from_le_bytes(data)
    }

    /// Writes to the BAR, or signals an ioeventfd as the kernel would.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let address = self.bar() + offset;
        if let Some(event) = self.hypervisor.ioevents.lock().unwrap().get(&address) {
            return event.write(1).unwrap();
        }
        assert!(self.bus.write(address, data), "the BAR does not answer");
    }

    /// An offset in the BAR of a structure.
    pub fn structure(&self, kind: u8) -> u64 {
        self.structures[&kind].0
    }

    pub fn common(&self, offset: u64, size: usize) -> u64 {
        self.read(self.structure(layout::CAP_COMMON) + offset, size)
    }

    pub fn set_common(&self, offset: u64, data: &[u8]) {
        self.write(self.structure(layout::CAP_COMMON) + offset, data);
    }

    pub fn status(&self) -> u8 {
        self.common(0x14, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.set_common(0x14, &[status]);
    }

    pub fn device_features(&self) -> u64 {
        let half = |select: u32| {
            self.set_common(0, &select.to_le_bytes());
            self.common(4, 4)
        };
        half(0) | half(1) << 32
    }

    /// Acknowledges the device and offers it `features`; returns whether they were accepted.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for select in 0..2u32 {
            self.set_common(8, &select.to_le_bytes());
            self.set_common(0xc, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Makes MSI-X entry `index` carry `data`, unmasked, and turns MSI-X on.
    pub fn program_vector(&self, index: u16, data: u32) {
        let entry = layout::MSIX_TABLE + u64::from(index) * 16;
        self.write(entry, &0xfee0_0000u32.to_le_bytes());
        self.write(entry + 4, &0u32.to_le_bytes());
        self.write(entry + 8, &data.to_le_bytes());
        self.write(entry + 12, &0u32.to_le_bytes());
        self.set_config(self.msix + 2, &[0, 0x80]);
    }

    /// Writes a queue's rings to the common configuration and enables it.
    pub fn set_up_queue(&self, index: u16, size: u16, rings: [u64; 3], vector: u16) {
        self.set_common(0x16, &index.to_le_bytes());
        self.set_common(0x18, &size.to_le_bytes());
        self.set_common(0x1a, &vector.to_le_bytes());
        for (offset, ring) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
            self.set_common(offset, &(ring as u32).to_le_bytes());
            self.set_common(offset + 4, &((ring >> 32) as u32).to_le_bytes());
        }
        self.set_common(0x1c, &[1, 0]);
    }

    /// Initialises the device from scratch, with all its features and queues; queue `n`
    /// interrupts by vector `n` with data `0x40 + n`.
    pub fn start(&self) -> Vec<TestQueue<'_>> {
        self.enable();
        self.start_with(self.device_features())
    }

    pub fn start_with(&self, features: u64) -> Vec<TestQueue<'_>> {
        self.enable();
        self.set_status(0);
        assert!(self.negotiate(features), "the device refused {features:#x}");
        let count = self.common(0x12, 2) as u16;
        let queues: Vec<_> = (0..count).map(|index| self.prepare(index)).collect();
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }

    fn prepare(&self, index: u16) -> TestQueue<'_> {
        use virtio_queue::QueueT;
        self.set_common(0x16, &index.to_le_bytes());
        let size = self.common(0x18, 2) as u16;
        // Rings that an earlier driver used hold its indices: the next one starts from zeros.
        let base = RINGS + u64::from(index) * 0x8000;
        vm_memory::Bytes::write_slice(&self.memory, &[0; 0x8000], vm_memory::GuestAddress(base)).unwrap();
        let driver = DriverQueue::new(&self.memory, index, size, base);
        let queue = driver.activate().queue;
        self.program_vector(index, 0x40 + u32::from(index));
        let rings = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        self.set_up_queue(index, size, rings, index);
        TestQueue { machine: self, driver, index }
    }
}

/// A queue that a driver of this machine uses.
pub struct TestQueue<'m> {
    machine: &'m TestMachine,
    pub driver: DriverQueue,
    index: u16,
}

impl TestQueue<'_> {
    /// Notifies the device as a guest does.
    pub fn notify(&self) {
        let offset =
            self.machine.structure(layout::CAP_NOTIFY) + u64::from(self.index) * layout::NOTIFY_MULTIPLIER;
        self.machine.write(offset, &self.index.to_le_bytes());
    }

    /// Adds a chain and notifies.
    pub fn send(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.driver.add(buffers).unwrap();
        self.notify();
        head
    }

    /// Waits, by interrupts, for the next used chain: its head, and the bytes written.
    pub fn wait(&mut self) -> (u16, u32) {
        let vector = self.machine.hypervisor.vector(0x40 + u32::from(self.index)).expect("no such vector");
        loop {
            if let Some(used) = self.driver.used() {
                return used;
            }
            assert!(signalled(vector.eventfd(), true), "no interrupt came");
            let _ = vector.eventfd().read();
        }
    }
}

/// Whether an eventfd was written to; waits for it if asked to.
pub fn signalled(event: &EventFd, wait: bool) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = if wait { PATIENCE.as_millis() as i32 } else { 0 };
    // SAFETY: one initialised pollfd that lives through the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, timeout) };
    ready == 1
}

/// A buffer the device reads.
pub fn readable(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: false }
}

/// A buffer the device writes.
pub fn writable(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: true }
}
