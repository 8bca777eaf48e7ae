//! A guest's kernel that does what it likes to one virtio device on the PCI bus.
//!
//! The bytes are a program: each step writes or reads configuration space, the BAR or guest memory, or
//! does a piece of what a driver does in order, so that random steps also meet a device that
//! works. The machine is the VMM's own (root complex, transport, device with its worker); only KVM is not
//! there.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lathe_vmm::bus::Bus;
use lathe_vmm::config::{DiskConfig, DiskFormat, DiskIo};
use lathe_vmm::hypervisor::{Hypervisor, MsiMessage, MsiVector};
use lathe_vmm::pci::root::{ECAM_BUS_SIZE, PciRoot, Windows};
use lathe_vmm::virtio::block::Block;
use lathe_vmm::virtio::console::Console;
use lathe_vmm::virtio::device::{GuestRam, VirtioDevice};
use lathe_vmm::virtio::rng::Rng;
use lathe_vmm::virtio::transport::{VirtioPci, layout};
use lathe_vmm::virtio::vsock::{Vsock, VsockListener};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

const ECAM: u64 = 0xe000_0000;
/// Where 00:01.0 has its configuration space.
const FUNCTION: u64 = ECAM + (1 << 15);
const MEMORY: usize = 1 << 20;
/// Descriptors of each queue.
const SIZE: u16 = 16;
/// Steps of one program: more only take longer.
const MAX_STEPS: usize = 256;

/// Where the rings of a queue lie: descriptors, available, used.
fn rings(queue: u16) -> [u64; 3] {
    let base = 0x1000 * (1 + u64::from(queue));
    [base, base + 0x100, base + 0x200]
}

/// A vector whose routes are believed.
pub(crate) struct Vector(pub(crate) EventFd);

impl MsiVector for Vector {
    fn route(&self, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

/// A hypervisor that remembers where notifications go.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<HashMap<u64, EventFd>>);

impl Recorder {
    fn ioevents(&self) -> std::sync::MutexGuard<'_, HashMap<u64, EventFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hypervisor for Recorder {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        Ok(Arc::new(Vector(EventFd::new(EFD_NONBLOCK)?)))
    }

    fn add_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let old = self.ioevents().insert(address, event.try_clone()?);
        assert!(old.is_none(), "two ioeventfds at {address:#x}");
        Ok(())
    }

    fn remove_ioevent(&self, address: u64, _: &EventFd) -> io::Result<()> {
        assert!(self.ioevents().remove(&address).is_some(), "no ioeventfd at {address:#x}");
        Ok(())
    }
}

struct Machine {
    bus: Arc<Bus>,
    memory: GuestMemoryMmap,
    hypervisor: Arc<Recorder>,
    function: Arc<Mutex<VirtioPci>>,
    /// Entries that were made available in each queue.
    available: [u16; 4],
}

impl Machine {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
        let hypervisor = Arc::new(Recorder::default());
        let bus = Arc::new(Bus::new());
        let ram = GuestRam::new(memory.clone());
        let function = VirtioPci::new(device, ram, hypervisor.clone()).expect("a transport");
        let function = Arc::new(Mutex::new(function));
        let windows = Windows { low: 0xc000_0000..0xd000_0000, high: 0x40_0000_0000..0x50_0000_0000 };
        let mut root = PciRoot::new(windows, Arc::clone(&bus)).expect("a root complex");
        root.add(function.clone()).expect("a function");
        bus.insert(ECAM, ECAM_BUS_SIZE, Arc::new(Mutex::new(root))).expect("ECAM");
        Self { bus, memory, hypervisor, function, available: [0; 4] }
    }

    /// Where BAR 0's registers point, whether or not it answers there.
    fn bar(&self) -> u64 {
        let mut registers = [0; 8];
        let (low, high) = registers.split_at_mut(4);
        self.bus.read(FUNCTION + 0x10, low);
        self.bus.read(FUNCTION + 0x14, high);
        u64::from_le_bytes(registers) & !0xf
    }

    /// A guest's write: to an ioeventfd if the kernel would signal one, to the device otherwise.
    fn write(&self, address: u64, data: &[u8]) {
        let event = self.hypervisor.ioevents().get(&address).and_then(|event| event.try_clone().ok());
        match event {
            Some(event) => event.write(1).expect("an eventfd"),
            None => drop(self.bus.write(address, data)),
        }
    }

    fn common(&self, offset: u64, data: &[u8]) {
        self.write(self.bar().wrapping_add(layout::COMMON + offset), data);
    }

    /// What a driver does up to DRIVER_OK, with the features of `mask`.
    fn start(&mut self, mask: u64) {
        self.write(FUNCTION + 4, &[6, 0]);
        for status in [0_u8, 1, 3] {
            self.common(0x14, &[status]);
        }
        let features = mask | 1 << 32;
        for select in 0..2_u32 {
            self.common(0x8, &select.to_le_bytes());
            self.common(0xc, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.common(0x14, &[11]);
        for queue in 0..4_u16 {
            self.common(0x16, &queue.to_le_bytes());
            self.common(0x18, &SIZE.to_le_bytes());
            self.common(0x1a, &queue.to_le_bytes());
            for (offset, ring) in [0x20, 0x28, 0x30].into_iter().zip(rings(queue)) {
                self.common(offset, &(ring as u32).to_le_bytes());
                self.common(offset + 4, &[0; 4]);
            }
            self.common(0x1c, &[1, 0]);
        }
        self.common(0x14, &[15]);
        self.available = [0; 4];
    }

    fn descriptor(&self, input: &mut Input) {
        let place = input.number(1);
        let [table, ..] = rings(place as u16 >> 4 & 3);
        let at = GuestAddress(table + (place & 0xf) * 16);
        let mut descriptor = [0; 16];
        // Buffers mostly lie in memory, sometimes anywhere.
        let address = input.number(3);
        let address = if address >> 23 == 0 { address & 0xf_ffff } else { address << 41 };
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&(input.number(3) as u32).to_le_bytes());
        descriptor[12..14].copy_from_slice(&(input.number(1) as u16 & 7).to_le_bytes());
        descriptor[14..].copy_from_slice(&(input.number(1) as u16).to_le_bytes());
        self.memory.write_slice(&descriptor, at).expect("rings are in memory");
    }

    fn make_available(&mut self, input: &mut Input) {
        let place = input.number(1) as u16;
        let queue = place >> 4 & 3;
        let [_, available, _] = rings(queue);
        let count = &mut self.available[usize::from(queue)];
        let slot = available + 4 + 2 * u64::from(*count % SIZE);
        *count = count.wrapping_add(1);
        let index = *count;
        self.memory.write_obj(place & 0xf, GuestAddress(slot)).expect("rings are in memory");
        self.memory.write_obj(index, GuestAddress(available + 2)).expect("rings are in memory");
        self.notify(queue);
    }

    fn notify(&self, queue: u16) {
        let offset = layout::NOTIFY + u64::from(queue) * layout::NOTIFY_MULTIPLIER;
        self.write(self.bar().wrapping_add(offset), &queue.to_le_bytes());
    }

    /// Gives the device time for what it was asked for: until all is used, or for a moment, because a broken
    /// queue never is. Then it has to stop and go on, as for a pause of the machine.
    fn settle(&self) {
        for _ in 0..20 {
            if (0..4).all(|queue| self.used(queue) == self.available[usize::from(queue)]) {
                break;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.pause();
        function.resume();
    }

    /// The index in a queue's used ring.
    fn used(&self, queue: u16) -> u16 {
        let [.., used] = rings(queue);
        self.memory.read_obj(GuestAddress(used + 2)).expect("rings are in memory")
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        match input.u8()? % 10 {
            0 => {
                let offset = input.number(2) & 0x1fff;
                let len = 1 << (input.number(1) & 3);
                self.write(ECAM + (offset & 0xfff) + (offset >> 12 << 15), input.bytes(len));
            }
            1 => {
                let offset = input.number(2) & 0xfff;
                self.bus.read(FUNCTION + offset, &mut [0; 8][..1 + (offset as usize & 7)]);
            }
            2 => {
                let offset = input.number(2) & (layout::BAR_SIZE - 1);
                let len = 1 << (input.number(1) & 3);
                self.write(self.bar().wrapping_add(offset), input.bytes(len));
            }
            3 => {
                let offset = input.number(2) & (layout::BAR_SIZE - 1);
                let mut data = [0; 8];
                self.bus.read(self.bar().wrapping_add(offset), &mut data[..1 + (offset as usize & 7)]);
            }
            4 => {
                let (address, len) = (input.number(3) & 0xf_ffff, input.number(1) as usize);
                let data = input.bytes(len.min(MEMORY - address as usize));
                self.memory.write_slice(data, GuestAddress(address)).expect("bounded by memory");
            }
            5 => self.start(input.number(8)),
            6 => self.descriptor(input),
            7 => self.make_available(input),
            8 => self.notify(input.number(1) as u16),
            _ => self.settle(),
        }
        Some(())
    }

    fn run(mut self, bytes: &[u8]) {
        let mut input = Input(bytes);
        for _ in 0..MAX_STEPS {
            if self.step(&mut input).is_none() {
                break;
            }
        }
        self.settle();
        self.function.lock().unwrap_or_else(PoisonError::into_inner).reset();
        assert!(self.hypervisor.ioevents().is_empty(), "a reset device listens for notifications");
    }
}

impl Drop for Machine {
    /// The root complex is on the bus that it moves BARs on: neither would go without this.
    fn drop(&mut self) {
        self.bus.clear();
    }
}

/// The entropy device.
pub fn rng(bytes: &[u8]) {
    Machine::new(Box::new(Rng::new())).run(bytes);
}

/// The console.
pub fn console(bytes: &[u8]) {
    Machine::new(Box::new(Console::new(io::sink(), None))).run(bytes);
}

/// The block device, on 64 KiB; the first byte chooses the engine and whether it is read-only.
pub fn block(bytes: &[u8]) {
    let (choice, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a disk");
    file.as_file().set_len(64 << 10).expect("a disk");
    let disk = DiskConfig {
        id: "fuzz".into(),
        path: file.path().into(),
        format: DiskFormat::Raw,
        read_only: choice & 1 != 0,
        io: if choice & 2 != 0 { DiskIo::Sync } else { DiskIo::Auto },
    };
    Machine::new(Box::new(Block::new(&disk).expect("the disk"))).run(rest);
    let length = file.as_file().metadata().expect("the disk").len();
    assert_eq!(length, 64 << 10, "a guest changed its disk's size");
}

/// The socket device; something listens at port 1, and nobody reads.
pub fn vsock(bytes: &[u8]) {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = directory.path().join("v");
    let _peer = UnixListener::bind(directory.path().join("v_1")).expect("a listener");
    let listener = VsockListener::bind(&path).expect("the device's socket");
    Machine::new(Box::new(Vsock::new(3, listener))).run(bytes);
}

/// Configuration space, BAR programming, the MSI-X table and walks of capabilities alone: every step is one
/// of these, and the function must stay where it can be found.
pub fn pci_config(bytes: &[u8]) {
    let machine = Machine::new(Box::new(Rng::new()));
    let mut input = Input(bytes);
    while let Some(kind) = input.u8() {
        match kind % 3 {
            0 => {
                let offset = input.number(2) & 0xfff;
                machine.write(FUNCTION + offset, input.bytes(1 << (kind >> 2 & 3)));
            }
            1 => {
                let address = machine.bar().wrapping_add(layout::MSIX_TABLE + (input.number(2) & 0x1fff));
                machine.write(address, input.bytes(1 << (kind >> 2 & 3)));
            }
            _ => walk_capabilities(&machine),
        }
    }
    let mut identity = [0; 4];
    machine.bus.read(FUNCTION, &mut identity);
    assert_eq!(u32::from_le_bytes(identity), 0x1044_1af4, "a guest changed what the function is");
}

/// As a guest finds them; they end, and each is in the space.
fn walk_capabilities(machine: &Machine) {
    let mut at = [0];
    machine.bus.read(FUNCTION + 0x34, &mut at);
    let mut seen = 0;
    while at[0] != 0 {
        assert!(at[0] >= 0x40 && at[0].is_multiple_of(4), "a capability at {:#x}", at[0]);
        seen += 1;
        assert!(seen < 48, "the list of capabilities has no end");
        machine.bus.read(FUNCTION + u64::from(at[0]) + 1, &mut at);
    }
    assert!(seen > 0, "a guest removed the capabilities");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Or else the targets would fuzz devices that never run.
    #[test]
    fn a_started_device_runs_and_uses_what_is_made_available() {
        let mut machine = Machine::new(Box::new(Rng::new()));
        machine.start(0);
        assert!(machine.function.lock().unwrap().is_running());
        let buffer = [0x00, 0x00, 0x00, 0x08, 0x40, 0x00, 0x00, 0x02, 0x00];
        machine.descriptor(&mut Input(&buffer));
        machine.make_available(&mut Input(&[0]));
        // Its thread may be slow; a device that never uses the buffer hangs here, and the test is ended.
        while machine.used(0) == 0 {
            machine.settle();
        }
        let mut random = [0; 64];
        machine.memory.read_slice(&mut random, GuestAddress(0x8_0000)).unwrap();
        assert_ne!(random, [0; 64]);
    }
}
