//! Passed-through functions: a device whose configuration space says anything, and a guest that does anything to a
//! device.
//!
//! Whatever they do, the kernel is asked only for what it allows: one kind of interrupt at a time, vectors that exist;
//! nothing is written to the device's own BARs and identity; and memory slots never overlap, nor outlive the device.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lathe_vmm::bus::Bus;
use lathe_vmm::hypervisor::{Hypervisor, LevelInterrupt, MsiVector, PassthroughHypervisor};
use lathe_vmm::pci::capabilities;
use lathe_vmm::pci::root::{ECAM_BUS_SIZE, PciRoot, SharedPciDevice, Windows};
use lathe_vmm::vfio::config::VirtualConfig;
use lathe_vmm::vfio::device::VfioPci;
use lathe_vmm::vfio::function::{FunctionParts, HostFunction, InterruptCounts, InterruptKind, Region};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::virtio::Vector;

const ECAM: u64 = 0xe000_0000;
/// Where 00:01.0 has its configuration space.
const FUNCTION: u64 = ECAM + (1 << 15);
const MSI_VECTORS: u16 = 4;
const MSIX_VECTORS: u16 = 8;
const BAR_SIZE: u64 = 1 << 16;
/// Steps of one program: more only take longer.
const MAX_STEPS: usize = 256;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A function of bytes that insists on what the kernel insists on.
struct Function {
    config: Vec<u8>,
    on: Mutex<Option<InterruptKind>>,
}

impl Function {
    fn count(kind: InterruptKind) -> u16 {
        match kind {
            InterruptKind::Intx => 1,
            InterruptKind::Msi => MSI_VECTORS,
            InterruptKind::Msix => MSIX_VECTORS,
        }
    }
}

impl HostFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        if let Some(bytes) = self.config.get(start..start + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let end = usize::from(offset) + data.len();
        assert!(end <= self.config.len(), "a write past the end");
        // The command and status registers, and capabilities: not the identity, the BARs or the ROM.
        assert!(offset >= 0x40 || (offset >= 4 && end <= 8), "{offset:#x} was written");
        if offset == 4 {
            assert_eq!(data[0] & 3, if data.len() > 1 && data[0] & 2 != 0 { 2 } else { data[0] & 2 });
        }
    }

    fn read_region(&self, _region: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn write_region(&self, region: u8, offset: u64, data: &[u8]) {
        assert!(region < 6, "the ROM was written");
        assert!(offset + data.len() as u64 <= BAR_SIZE);
    }

    fn connect(&self, kind: InterruptKind, first: u16, events: &[Option<&EventFd>]) -> io::Result<()> {
        let mut on = lock(&self.on);
        assert!(on.is_none() || *on == Some(kind), "{kind:?} beside {on:?}");
        assert!(usize::from(first) + events.len() <= usize::from(Self::count(kind)));
        *on = Some(kind);
        Ok(())
    }

    fn unmask_by(&self, _event: &EventFd) -> io::Result<()> {
        assert_eq!(*lock(&self.on), Some(InterruptKind::Intx));
        Ok(())
    }

    fn disconnect(&self, kind: InterruptKind) -> io::Result<()> {
        assert_eq!(lock(&self.on).take(), Some(kind), "{kind:?} was not on");
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        assert_eq!(*lock(&self.on), None, "a reset with interrupts on");
        Ok(())
    }
}

/// Keeps the guest's memory slots apart.
#[derive(Default)]
struct Slots {
    slots: Mutex<BTreeMap<u64, (u64, u32)>>,
    next: Mutex<u32>,
}

struct Line([EventFd; 2]);

impl LevelInterrupt for Line {
    fn trigger(&self) -> &EventFd {
        &self.0[0]
    }

    fn resample(&self) -> &EventFd {
        &self.0[1]
    }
}

impl Hypervisor for Slots {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        Ok(Arc::new(Vector(EventFd::new(EFD_NONBLOCK)?)))
    }

    fn add_ioevent(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn remove_ioevent(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl PassthroughHypervisor for Slots {
    fn level_interrupt(&self, _gsi: u32) -> io::Result<Arc<dyn LevelInterrupt>> {
        Ok(Arc::new(Line([EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?])))
    }

    unsafe fn add_memory_slot(&self, guest: u64, _host: NonNull<u8>, size: u64) -> io::Result<u32> {
        let mut slots = lock(&self.slots);
        let overlaps =
            slots.range(..guest + size).next_back().is_some_and(|(at, (size, _))| at + size > guest);
        assert!(!overlaps && guest.is_multiple_of(4096) && size.is_multiple_of(4096), "a slot at {guest:#x}");
        let mut next = lock(&self.next);
        *next += 1;
        slots.insert(guest, (size, *next));
        Ok(*next)
    }

    fn remove_memory_slot(&self, slot: u32) -> io::Result<()> {
        let mut slots = lock(&self.slots);
        let before = slots.len();
        slots.retain(|_, (_, number)| *number != slot);
        assert_eq!(slots.len() + 1, before, "slot {slot} was not there");
        Ok(())
    }
}

fn parts() -> FunctionParts {
    let region =
        |index, size| Region { index, size, mappable: std::iter::once(0..size / 4096 * 4096).collect() };
    FunctionParts {
        config_size: 4096,
        regions: vec![region(0, BAR_SIZE), region(2, 64), region(3, 4096), region(6, 2048)],
        interrupts: InterruptCounts { intx: true, msi: MSI_VECTORS, msix: MSIX_VECTORS, msix_grows: true },
    }
}

/// A well-behaved endpoint: MSI, Express with function-level reset, MSI-X in BAR 0.
fn endpoint() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x34, 0x12, 1, 0]);
    put(6, &[0x10, 0]);
    put(0x10, &[0x0c]);
    put(0x34, &[0x40]);
    put(0x3d, &[1]);
    put(0x40, &[0x05, 0x60, 0x84, 0x01]);
    put(0x60, &[0x10, 0xa0, 2, 0, 0, 0, 0, 0x10]);
    put(0xa0, &[0x11, 0xb0, 7, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    put(0xb0, &[0x01, 0, 3, 0]);
    config
}

struct Machine {
    bus: Arc<Bus>,
    slots: Arc<Slots>,
}

impl Machine {
    fn new(config: Vec<u8>) -> Option<Self> {
        let slots = Arc::new(Slots::default());
        let function = Arc::new(Function { config, on: Mutex::new(None) });
        let mut device = VfioPci::new(function, parts(), Arc::clone(&slots) as _).ok()?;
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BAR_SIZE).expect("its length");
        device.map_bars(file.as_fd(), |_| 0).expect("mappings");
        device.wire_pin(16);
        let bus = Arc::new(Bus::new());
        let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 0x1_0000_0000..0x2_0000_0000 };
        let mut root = PciRoot::new(windows, Arc::clone(&bus)).expect("a root complex");
        root.add(Arc::new(Mutex::new(device)) as SharedPciDevice).ok()?;
        bus.insert(ECAM, ECAM_BUS_SIZE, Arc::new(Mutex::new(root))).expect("ECAM");
        Some(Self { bus, slots })
    }

    fn step(&self, input: &mut Input) -> Option<()> {
        let kind = input.u8()?;
        let len = 1 << (kind >> 4 & 3);
        match kind % 4 {
            0 => drop(self.bus.write(FUNCTION + (input.number(1) & 0xff), input.bytes(len))),
            1 => drop(self.bus.write(FUNCTION + (input.number(2) & 0xfff), input.bytes(len))),
            2 => drop(self.bus.read(FUNCTION + (input.number(2) & 0xfff), &mut [0; 8][..len])),
            _ => {
                // Where BAR 0 answers now, if it does.
                let mut base = [0; 8];
                self.bus.read(FUNCTION + 0x10, &mut base);
                let base = u64::from_le_bytes(base) & !0xf;
                let address = base.wrapping_add(input.number(2) & 0xffff);
                if kind & 8 == 0 {
                    self.bus.write(address, input.bytes(len));
                } else {
                    self.bus.read(address, &mut [0; 8][..len]);
                }
            }
        }
        Some(())
    }

    fn run(self, mut input: Input) {
        for _ in 0..MAX_STEPS {
            if self.step(&mut input).is_none() {
                break;
            }
        }
        // The root complex is on the bus that it moves BARs on: the device goes with it.
        self.bus.clear();
        assert!(lock(&self.slots.slots).is_empty(), "slots outlive the device");
    }
}

/// A device's configuration space is the input's first 4 KiB; the guest's program is the rest.
pub fn hostile_device(bytes: &[u8]) {
    let mut input = Input(bytes);
    let patches = usize::from(input.u8().unwrap_or(0));
    let mut config = endpoint();
    for _ in 0..patches {
        let at = input.number(2) as usize % config.len();
        config[at] = input.number(1) as u8;
    }
    if let Some(machine) = Machine::new(config) {
        machine.run(input);
    }
}

/// The input is the guest's program.
pub fn hostile_guest(bytes: &[u8]) {
    if let Some(machine) = Machine::new(endpoint()) {
        machine.run(Input(bytes));
    }
}

/// The input is a device's configuration space: what is found in it is in it, and the guest's view ends.
pub fn device_capabilities(bytes: &[u8]) {
    for capability in capabilities::conventional(bytes) {
        assert!((0x40..0x100).contains(&capability.offset));
    }
    for capability in capabilities::extended(bytes) {
        assert!(usize::from(capability.offset) + 4 <= bytes.len());
    }
    let mut config = bytes.to_vec();
    config.resize(4096, 0);
    let function = Function { config, on: Mutex::new(None) };
    let mut view = VirtualConfig::new(&function, 4096, &[]).expect("a view without BARs");
    let inserted = view.insert_vendor_capability(&function, &[8, b'P', b'2', b'P', 0, 0]);
    let mut seen = vec![0; 4096];
    for (index, chunk) in seen.chunks_exact_mut(4).enumerate() {
        view.read(&function, (index * 4) as u16, chunk);
    }
    let list = capabilities::conventional(&seen);
    assert!(inserted.is_none_or(|at| list.first().is_some_and(|first| first.offset == at)));
    // What reaches the host's own decisions is hidden whatever the device claims.
    for capability in capabilities::extended(&seen) {
        assert!(matches!(capability.id, 0 | 1 | 3 | 0x0b | 0x23), "{capability:?}");
    }
}
