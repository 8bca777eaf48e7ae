//! A guest's kernel that does what it likes to root ports, a switch and hot-plug slots, while the host plugs
//! devices in and pulls them out.
//!
//! The bytes are a program. Whatever it does, the buses below the ports can be numbered again and everything found,
//! what the host plugs in is there, and what it takes out is nobody's any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lathe_vmm::bus::Bus;
use lathe_vmm::hypervisor::Hypervisor;
use lathe_vmm::pci::PciDevice;
use lathe_vmm::pci::config::{Bar, ConfigSpace, EXPRESS_SIZE, Identity, ROM_BAR};
use lathe_vmm::pci::express::PortTraits;
use lathe_vmm::pci::placement::Space;
use lathe_vmm::pci::root::{ECAM_BUS_SIZE, NamedDevice, Parts, PciRoot, SharedPciDevice, Windows};
use lathe_vmm::pci::tree::{Below, HostBridge, Port, Switch, Tree};

use crate::input::Input;
use crate::virtio::Recorder;

const ECAM: u64 = 0xe000_0000;
/// The ports, each with the bus numbers that it has at first: a device, a switch with a device and a slot, a slot.
const PORTS: [([u8; 2], [u8; 2]); 6] = [
    ([0, 16 << 3], [1, 1]),
    ([0, 17 << 3], [2, 5]),
    ([2, 0], [3, 5]),
    ([3, 0], [4, 4]),
    ([3, 1 << 3], [5, 5]),
    ([6, 16 << 3], [7, 7]),
];
/// Functions below them.
const FUNCTIONS: [[u8; 2]; 4] = [[1, 0], [1, 1], [4, 0], [5, 0]];
const SLOTS: u16 = 4;

/// A function whose registers are memory; it must never hear of an address twice.
struct Endpoint {
    config: ConfigSpace,
    placed: [Option<u64>; 7],
}

impl Endpoint {
    fn shared() -> Arc<Mutex<Self>> {
        let identity = Identity {
            vendor: 0x1234,
            device: 1,
            revision: 0,
            class: 0xff_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = ConfigSpace::endpoint(&identity, EXPRESS_SIZE);
        for (index, size, wide) in [(0, 1 << 30, true), (2, 16, false), (ROM_BAR, 2048, false)] {
            config.add_bar(Bar { index, size, wide, prefetchable: wide }).expect("a BAR");
        }
        Arc::new(Mutex::new(Self { config, placed: [None; 7] }))
    }
}

impl PciDevice for Endpoint {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_bar(&mut self, bar: u8, _: u64, data: &mut [u8]) {
        data.fill(bar);
    }

    fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}

    fn bar_moved(&mut self, bar: u8, address: Option<u64>) {
        let placed = &mut self.placed[usize::from(bar)];
        assert_ne!(placed.is_some(), address.is_some(), "BAR {bar} from {placed:x?} to {address:x?}");
        *placed = address;
    }

    fn bus_reset(&mut self) {
        self.config.clear_writable();
    }
}

struct Machine {
    bus: Arc<Bus>,
    root: Arc<Mutex<PciRoot>>,
    /// Takes turns with slots.
    spare: Arc<Mutex<Endpoint>>,
}

impl Machine {
    fn new() -> Self {
        let named = || NamedDevice { id: "device".into(), device: Endpoint::shared() as SharedPciDevice };
        let port = |below| Port { traits: PortTraits::default(), below };
        let device = port(Below::Device(vec![(0, named()), (1, named())]));
        let ports = vec![port(Below::Device(vec![(0, named())])), Port::empty()];
        let switch = port(Below::Switch(Switch { traits: PortTraits::default(), ports }));
        let first = HostBridge { numa_node: Some(0), root_ports: vec![device, switch] };
        let second = HostBridge { numa_node: Some(1), root_ports: vec![Port::empty()] };
        let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 0x40_0000_0000..0x80_0000_0000 };
        let bus = Arc::new(Bus::new());
        let root = PciRoot::build(Parts {
            space: Space::new(&windows, None),
            windows,
            tree: Tree { host_bridges: vec![first, second] },
            hypervisor: Arc::new(Recorder::default()) as Arc<dyn Hypervisor>,
            mmio: Arc::clone(&bus),
        });
        let root = Arc::new(Mutex::new(root.expect("a root complex")));
        bus.insert(ECAM, 256 * ECAM_BUS_SIZE, root.clone()).expect("ECAM");
        Self { bus, root, spare: Endpoint::shared() }
    }

    fn root(&self) -> MutexGuard<'_, PciRoot> {
        self.root.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address([bus, devfn]: [u8; 2], register: u64) -> u64 {
        ECAM + (u64::from(bus) << 20) + (u64::from(devfn) << 12) + register
    }

    fn step(&self, input: &mut Input) -> Option<()> {
        let kind = input.u8()?;
        match kind % 8 {
            // Known functions, at the numbers that they have at first; mostly in the registers that matter.
            0..=2 => {
                let at = input.number(1) as usize % (PORTS.len() + FUNCTIONS.len());
                let place = PORTS.iter().map(|(place, _)| *place).chain(FUNCTIONS).nth(at)?;
                let register = input.number(2) & if kind & 8 == 0 { 0xff } else { 0xfff };
                self.bus.write(Self::address(place, register), input.bytes(1 << (kind >> 4 & 3)));
            }
            // Anything, anywhere.
            3 => {
                let offset = input.number(4) & 0xfff_ffff;
                self.bus.write(ECAM + offset, input.bytes(1 << (kind >> 4 & 3)));
            }
            4 => {
                let offset = input.number(4) & 0xfff_ffff;
                self.bus.read(ECAM + offset, &mut [0; 8][..1 << (kind >> 4 & 3)]);
            }
            5 => {
                let address = 0xc000_0000 + (input.number(4) & 0x1fff_ffff);
                self.bus.write(address, input.bytes(1 << (kind >> 4 & 3)));
            }
            6 => {
                let slot = input.number(1) as u16 % (SLOTS + 2);
                let free = Arc::strong_count(&self.spare) == 1;
                let device =
                    NamedDevice { id: "spare".into(), device: self.spare.clone() as SharedPciDevice };
                if free {
                    let plugged = self.root().plug(slot, vec![(0, device)]).is_ok();
                    assert!(!plugged || self.root().slots()[usize::from(slot) - 1].occupied);
                }
            }
            _ => {
                let slot = input.number(1) as u16 % (SLOTS + 2);
                let taken = match kind >> 4 & 3 {
                    0 => self.root().request_unplug(slot).map(|()| Vec::new()),
                    1 => self.root().unplug(slot),
                    _ => self.root().surprise_remove(slot),
                };
                drop(taken);
            }
        }
        Some(())
    }

    /// Gives all buses their first numbers again; then every port and every occupied slot can be found.
    fn find_everything(&self) {
        let mut identity = [0; 4];
        for (place, [secondary, subordinate]) in PORTS {
            self.bus.write(Self::address(place, 0x19), &[secondary, subordinate]);
            self.bus.read(Self::address(place, 0), &mut identity);
            assert_ne!(identity, [0xff; 4], "the port {place:x?} is lost");
        }
        let slots = self.root().slots();
        for slot in slots {
            let at = slot.address.expect("a slot that can be reached");
            self.bus.read(Self::address([at.bus, 0], 0), &mut identity);
            assert_eq!(identity != [0xff; 4], slot.occupied, "slot {}", slot.number);
        }
    }
}

impl Drop for Machine {
    /// The root complex is on the bus that it moves BARs on: neither would go without this.
    fn drop(&mut self) {
        self.bus.clear();
    }
}

/// Configuration space of ports and what is below them, and hot-plug.
pub fn pci_ports(bytes: &[u8]) {
    let machine = Machine::new();
    let mut input = Input(bytes);
    while machine.step(&mut input).is_some() {}
    machine.find_everything();
    for slot in 1..=SLOTS {
        let occupied = machine.root().slots()[usize::from(slot) - 1].occupied;
        assert_eq!(machine.root().surprise_remove(slot).is_ok(), occupied);
    }
    assert_eq!(Arc::strong_count(&machine.spare), 1, "someone holds a device that was taken out");
    let spare = machine.spare.lock().unwrap_or_else(PoisonError::into_inner);
    assert_eq!(spare.placed, [None; 7], "a device that was taken out answers");
}
