//! A guest that enumerates, resets, unplugs, and lies.

use proptest::prelude::*;

use super::*;
use crate::hypervisor::MsiVector;
use crate::pci::config::{ConfigError, EXPRESS_SIZE};
use crate::pci::express::PortTraits;
use crate::pci::hotplug::SlotError;
use crate::pci::tree::{Below, HostBridge as TreeBridge, Port as TreePort, Switch};
use crate::virtio::test_machine::FakeHypervisor;

const GIB: u64 = 1 << 30;
const ECAM: u64 = 0xe000_0000;
const SECONDARY: u16 = 0x19;
const SUBORDINATE: u16 = 0x1a;
const BRIDGE_CONTROL: u16 = 0x3e;

/// A function that remembers what was done to it.
struct Tester {
    config: ConfigSpace,
    moves: Vec<(u8, Option<u64>)>,
    resets: usize,
    /// How many moves there were when it was about to go.
    left_after: Option<usize>,
}

impl Tester {
    fn new(bars: &[(u8, u64, bool)]) -> Result<Self, ConfigError> {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 0,
            class: 0xff_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = ConfigSpace::endpoint(&identity, EXPRESS_SIZE);
        config.add_express(ExpressType::Endpoint)?;
        for &(index, size, high) in bars {
            config.add_bar(Bar { index, size, wide: high, prefetchable: high })?;
        }
        Ok(Self { config, moves: Vec::new(), resets: 0, left_after: None })
    }
}

impl PciDevice for Tester {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_bar(&mut self, bar: u8, _: u64, data: &mut [u8]) {
        data.fill(bar);
    }

    fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}

    fn bar_moved(&mut self, bar: u8, address: Option<u64>) {
        self.moves.push((bar, address));
    }

    fn bus_reset(&mut self) {
        self.config.clear_writable();
        self.resets += 1;
    }

    fn leave(&mut self) {
        self.left_after = Some(self.moves.len());
    }
}

fn tester(bars: &[(u8, u64, bool)]) -> Arc<Mutex<Tester>> {
    Arc::new(Mutex::new(Tester::new(bars).unwrap()))
}

fn named(device: &Arc<Mutex<Tester>>) -> NamedDevice {
    NamedDevice { id: "gpu0".into(), device: Arc::clone(device) as SharedPciDevice }
}

fn port(below: Below<NamedDevice>) -> TreePort<NamedDevice> {
    TreePort { traits: PortTraits::EMPTY_SLOT, below }
}

struct Guest {
    root: Arc<Mutex<PciRoot>>,
    mmio: Arc<Bus>,
    hypervisor: Arc<FakeHypervisor>,
    /// Functions 0 and 1 at 01:00, 04:00.0 below a switch at 02, slots 1 and 2; slot 3 empty at 06.
    device: [Arc<Mutex<Tester>>; 3],
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.mmio.clear();
    }
}

impl Guest {
    /// Host bridge 00: a device of two functions, a switch with a device. Host bridge 05: an empty slot.
    fn new() -> Self {
        let device = [
            tester(&[(0, GIB, true), (2, 1 << 20, false)]),
            tester(&[(0, 64, false)]),
            tester(&[(0, 1 << 20, true)]),
        ];
        let two = Below::Device(vec![(0, named(&device[0])), (1, named(&device[1]))]);
        let behind = port(Below::Device(vec![(0, named(&device[2]))]));
        let switch = Below::Switch(Switch { traits: PortTraits::default(), ports: vec![behind] });
        let bridge = |numa_node, root_ports| TreeBridge { numa_node: Some(numa_node), root_ports };
        let host_bridges =
            vec![bridge(0, vec![port(two), port(switch)]), bridge(1, vec![port(Below::Empty)])];
        let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 5 * GIB..512 * GIB };
        let (mmio, fake) = (Arc::new(Bus::new()), Arc::new(FakeHypervisor::default()));
        let root = PciRoot::build(Parts {
            space: Space::new(&windows, None),
            windows,
            tree: Tree { host_bridges },
            hypervisor: Arc::clone(&fake) as Arc<dyn Hypervisor>,
            mmio: Arc::clone(&mmio),
        });
        let root = Arc::new(Mutex::new(root.unwrap()));
        mmio.insert(ECAM, 256 << 20, Arc::clone(&root) as crate::bus::SharedDevice).unwrap();
        Self { root, mmio, hypervisor: fake, device }
    }

    fn root(&self) -> MutexGuard<'_, PciRoot> {
        self.root.lock().unwrap()
    }

    /// Interrupts since the last call.
    fn interrupts(&self) -> u64 {
        let vectors = self.hypervisor.vectors.lock().unwrap();
        vectors.iter().map(|vector| vector.eventfd().read().unwrap_or(0)).sum()
    }

    fn at(place: (u8, u8, u8), register: u16) -> u64 {
        let (bus, device, function) = place;
        ECAM + (u64::from(bus) << 20) + (u64::from(devfn(device, function)) << 12) + u64::from(register)
    }

    fn read32(&self, place: (u8, u8, u8), register: u16) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(Self::at(place, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, place: (u8, u8, u8), register: u16, data: &[u8]) {
        self.mmio.write(Self::at(place, register), data);
    }

    /// Everything an enumeration finds, depth first, believing the bus numbers that are programmed.
    fn enumerate(&self, bus: u8, found: &mut Vec<(u8, u8, u8)>) {
        for device in 0..32 {
            for function in 0..8 {
                let place = (bus, device, function);
                if self.read32(place, 0) == u32::MAX {
                    continue;
                }
                found.push(place);
                if self.read32(place, 0x0c) >> 16 & 0x7f == 1 {
                    let secondary = (self.read32(place, 0x18) >> 8) as u8;
                    self.enumerate(secondary, found);
                }
            }
        }
    }

    /// Turns on what pciehp turns on, with MSI-X, for the port at a place.
    fn enable_hotplug(&self, place: (u8, u8, u8)) {
        let bar = u64::from(self.read32(place, 0x10) & !0xf);
        self.mmio.write(bar + 12, &[0; 4]);
        let mut capability = self.read32(place, 0x34) as u16 & 0xff;
        while capability != 0 {
            let header = self.read32(place, capability);
            match header & 0xff {
                0x10 => self.write(place, capability + 0x18, &0x1021_u16.to_le_bytes()),
                0x11 => self.write(place, capability + 2, &[0, 0x80]),
                _ => {}
            }
            capability = (header >> 8) as u16 & 0xff;
        }
    }
}

/// The Express capability's place in every port: the first after the header.
const EXPRESS: u16 = 0x40;
const SLOT_CONTROL: u16 = EXPRESS + 0x18;
const SLOT_STATUS: u16 = EXPRESS + 0x1a;

const FOUND: [(u8, u8, u8); 11] = [
    (0, 0, 0),
    (0, 16, 0),
    (1, 0, 0),
    (1, 0, 1),
    (0, 17, 0),
    (2, 0, 0),
    (3, 0, 0),
    (4, 0, 0),
    (5, 0, 0),
    (5, 16, 0),
    // Nothing in the slot.
    (6, 0, 0),
];

#[test]
fn a_guest_that_never_enumerates_finds_everything_programmed() {
    let guest = Guest::new();
    let mut found = Vec::new();
    guest.enumerate(0, &mut found);
    guest.enumerate(5, &mut found);
    assert_eq!(found, FOUND[..10]);
    let listed: Vec<_> = guest.root().addresses().map(|at| (at.bus, at.device, at.function)).collect();
    let mut sorted = found;
    sorted.sort_unstable();
    assert_eq!(listed, sorted);
    assert_eq!(guest.read32((1, 0, 1), 0x0c) >> 23 & 1, 1, "one of several functions");
    assert_eq!(guest.read32((4, 0, 0), 0x0c) >> 23 & 1, 0);

    guest.write((1, 0, 0), 4, &[2, 0]);
    let bar =
        u64::from(guest.read32((1, 0, 0), 0x10) & !0xf) | u64::from(guest.read32((1, 0, 0), 0x14)) << 32;
    let window = guest.read32((0, 16, 0), 0x24);
    let limit = u64::from(guest.read32((0, 16, 0), 0x2c)) << 32 | u64::from(window & 0xfff0_0000) | 0xf_ffff;
    let base = u64::from(guest.read32((0, 16, 0), 0x28)) << 32 | u64::from(window << 16 & 0xfff0_0000);
    assert!(base <= bar && bar + GIB - 1 <= limit, "{base:#x}..={limit:#x} does not hold {bar:#x}");
    let mut data = [0xee];
    assert!(guest.mmio.read(bar + GIB - 1, &mut data));
    assert_eq!(data, [0]);
    assert_eq!(lock(&named(&guest.device[0]).device).config().u16(0), 0x1234);
    assert!(guest.device[0].lock().unwrap().moves.contains(&(0, Some(bar))));
}

#[test]
fn buses_follow_the_numbers_that_the_guest_gives_them() {
    let guest = Guest::new();
    // The switch to 0x40 to 0x42, from the outside in.
    guest.write((0, 17, 0), SUBORDINATE, &[0x42]);
    guest.write((0, 17, 0), SECONDARY, &[0x04]);
    assert_eq!(guest.read32((4, 0, 0), 0), 0x8232_104c, "the upstream port");
    assert_eq!(guest.read32((5, 16, 0), 0), 0x000c_1b36, "host bridge 05 keeps its buses");
    for (port, numbers) in [((0, 17, 0), [2, 4]), ((2, 0, 0), [3, 4]), ((3, 0, 0), [4, 4])] {
        guest.write(port, SECONDARY, &numbers);
    }
    assert_eq!(guest.read32((4, 0, 0), 0), 0x5678_1234);
    // Numbers that run in circles or overlap hide functions, and no more.
    guest.write((0, 16, 0), SECONDARY, &[0, 255]);
    assert_eq!(guest.read32((1, 0, 0), 0), u32::MAX);
    guest.write((0, 16, 0), SECONDARY, &[2, 2]);
    assert_eq!(guest.read32((2, 0, 0), 0), 0x5678_1234, "the first port that claims a bus has it");
}

#[test]
fn a_secondary_bus_reset_reaches_everything_below_once() {
    let guest = Guest::new();
    guest.write((4, 0, 0), 4, &[2, 0]);
    guest.write((0, 17, 0), BRIDGE_CONTROL, &[0x40, 0]);
    guest.write((0, 17, 0), BRIDGE_CONTROL, &[0x40, 0]);
    let resets = || guest.device.each_ref().map(|device| device.lock().unwrap().resets);
    assert_eq!(resets(), [0, 0, 1]);
    let moves = guest.device[2].lock().unwrap().moves.clone();
    assert!(matches!(moves[..], [(0, Some(_)), (0, None)]), "the BAR answers nowhere: {moves:?}");
    assert_eq!(guest.read32((4, 0, 0), 0), u32::MAX, "the switch forgot its bus numbers");
    assert_eq!(guest.read32((2, 0, 0), 0x18), 0);
    guest.write((0, 17, 0), BRIDGE_CONTROL, &[0, 0]);
    guest.write((0, 16, 0), BRIDGE_CONTROL, &[0x40, 0]);
    assert_eq!(resets(), [1, 1, 1]);
}

#[test]
fn a_device_is_plugged_asked_for_released_and_taken_out() {
    let guest = Guest::new();
    guest.enable_hotplug((5, 16, 0));
    let gpu = tester(&[(0, 64 * GIB, true), (2, 32 << 20, true), (4, 1 << 20, false)]);
    for _ in 0..3 {
        guest.root().plug(3, vec![(0, named(&gpu))]).unwrap();
        assert_eq!(guest.root().slots()[2].address.unwrap().to_string(), "06:00.0");
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.read32((6, 0, 0), 0), 0x5678_1234);
        assert_eq!(guest.read32((5, 16, 0), SLOT_STATUS - 2) >> 16, 0x0148);
        guest.write((5, 16, 0), SLOT_STATUS, &0x0108_u16.to_le_bytes());
        // On; then asked for; then off.
        guest.write((5, 16, 0), SLOT_CONTROL, &0x1121_u16.to_le_bytes());
        guest.write((6, 0, 0), 4, &[2, 0]);
        assert_eq!(guest.root().unplug(3).err(), Some(SlotError::InUse(3)));
        guest.root().request_unplug(3).unwrap();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.read32((5, 16, 0), SLOT_STATUS - 2) >> 16, 0x0041);
        let released = guest.root().release_event().unwrap();
        assert!(released.read().is_err(), "not yet");
        guest.write((5, 16, 0), SLOT_STATUS, &[1]);
        guest.write((5, 16, 0), SLOT_CONTROL, &0x1221_u16.to_le_bytes());
        guest.write((6, 0, 0), 4, &[0, 0]);
        guest.write((5, 16, 0), SLOT_CONTROL, &0x1321_u16.to_le_bytes());
        assert_eq!(released.read().ok(), Some(1));
        assert!(guest.root().slots()[2].released);
        assert_eq!(guest.root().unplug(3).unwrap().len(), 1);
        assert_eq!(Arc::strong_count(&gpu), 1, "someone still holds the device");
        assert_eq!(guest.read32((6, 0, 0), 0), u32::MAX);
        guest.write((5, 16, 0), SLOT_STATUS, &0x0109_u16.to_le_bytes());
        guest.interrupts();
    }
}

#[test]
fn a_device_that_vanishes_leaves_nothing_behind() {
    let guest = Guest::new();
    guest.write((1, 0, 0), 4, &[2, 0]);
    let slot = guest.root().slots()[0].clone();
    assert!(slot.occupied && slot.number == 1 && slot.numa_node == Some(0));
    assert_eq!(guest.root().surprise_remove(1).unwrap().len(), 2);
    assert_eq!(guest.read32((1, 0, 0), 0), u32::MAX);
    let (moves, left_after) = {
        let device = guest.device[0].lock().unwrap();
        (device.moves.clone(), device.left_after.unwrap())
    };
    assert_eq!(moves.iter().filter(|(_, address)| address.is_none()).count(), 2);
    let (_, gone) = moves.split_at(left_after);
    assert_eq!(gone.len(), 2, "its DMA ends before the guest can find it gone: {moves:?}");
    assert_eq!(guest.root().surprise_remove(1).err(), Some(SlotError::Empty(1)));
    assert_eq!(guest.read32((0, 16, 0), EXPRESS + 0x10) >> 16, 0, "the link is down");
    // Its place is free for another of its kind.
    guest.root().plug(1, vec![(0, named(&guest.device[0])), (1, named(&guest.device[1]))]).unwrap();
}

#[test]
fn what_cannot_be_plugged_is_refused_by_name() {
    let guest = Guest::new();
    let refuse = |slot, functions| guest.root().plug(slot, functions).unwrap_err().to_string();
    let small = || named(&tester(&[(0, 4096, false)]));
    assert_eq!(refuse(9, vec![(0, small())]), "the machine has no PCI slot 9");
    assert_eq!(refuse(1, vec![(0, small())]), "PCI slot 1 is occupied");
    assert!(refuse(3, vec![(1, small())]).contains("function 0 among them"));
    assert!(refuse(3, vec![(0, small()), (0, small())]).starts_with("gpu0: "));
    let huge = named(&tester(&[(2, 512 * GIB, true)]));
    let text = refuse(3, vec![(0, huge)]);
    assert!(text.starts_with("BAR 2 of gpu0 needs 512 GiB, PCI slot 3 has "), "{text}");
    let text = refuse(3, vec![(0, named(&tester(&[(1, 16 << 20, false)])))]);
    assert_eq!(text, "BAR 1 of gpu0 needs 16 MiB, PCI slot 3 has 2 MiB for it");
    assert_eq!(guest.root().request_unplug(3), Err(SlotError::Empty(3)));
    assert!(!guest.root().slots()[2].occupied, "a refusal changed the slot");
}

#[test]
fn a_device_gets_the_first_slot_that_it_fits() {
    let guest = Guest::new();
    let (small, large) = (tester(&[(0, 1 << 20, true)]), tester(&[(0, 64 * GIB, true)]));
    let slot_for = |device: &Arc<Mutex<Tester>>| guest.root().slot_for(&[(0, named(device))]);
    assert_eq!((slot_for(&small), slot_for(&large)), (Ok(Some(3)), Ok(Some(3))));
    // What was in slot 2 had a BAR of 1 MiB.
    guest.root().surprise_remove(2).unwrap();
    assert_eq!((slot_for(&small), slot_for(&large)), (Ok(Some(2)), Ok(Some(3))));
    guest.root().plug(3, vec![(0, named(&large))]).unwrap();
    let error = slot_for(&large).unwrap_err().to_string();
    assert_eq!(error, "BAR 0 of gpu0 needs 64 GiB, PCI slot 2 has 2 MiB for it");
    guest.root().plug(2, vec![(0, named(&small))]).unwrap();
    assert_eq!(slot_for(&small), Ok(None));
}

#[test]
fn devices_on_bus_0_do_not_meet_the_windows_of_ports() {
    let guest = Guest::new();
    for number in 1..=20 {
        let device = tester(&[(0, 4 * GIB, true), (2, 1 << 20, false)]);
        let at = guest.root().add(Arc::clone(&device) as SharedPciDevice).unwrap();
        let expected = if number < 16 { number } else { number + 2 };
        assert_eq!((at.bus, at.device), (0, expected), "ports keep 16 and 17");
        let mut device = device.lock().unwrap();
        let high = Bar { index: 0, size: 4 * GIB, wide: true, prefetchable: true };
        let base = device.config().bar_address(&high);
        let root = guest.root();
        for place in root.slots.values() {
            let window = &place.windows.high;
            assert!(base + high.size <= window.start || base >= window.end);
        }
    }
}

proptest! {
    #[test]
    fn a_hostile_guest_hurts_itself_alone(
        writes in proptest::collection::vec(
            (0_usize..FOUND.len(), 0_u16..0x140, proptest::collection::vec(any::<u8>(), 1..=8)),
            0..128,
        ),
        plugs in proptest::collection::vec(any::<bool>(), 0..4),
    ) {
        let guest = Guest::new();
        let gpu = tester(&[(0, 1 << 20, true)]);
        let mut plugs = plugs.into_iter();
        for (index, (place, register, data)) in writes.iter().enumerate() {
            guest.write(FOUND[*place], *register, data);
            if index % 32 == 0 && let Some(plug) = plugs.next() {
                let mut root = guest.root();
                let occupied = root.slots()[2].occupied;
                if plug {
                    prop_assert_eq!(root.plug(3, vec![(0, named(&gpu))]).is_ok(), !occupied);
                } else {
                    prop_assert_eq!(root.surprise_remove(3).is_ok(), occupied);
                }
            }
        }
        // All buses can be given back their numbers, whatever happened to them.
        let numbers = [((0, 16, 0), [1, 1]), ((0, 17, 0), [2, 4]), ((2, 0, 0), [3, 4]), ((3, 0, 0), [4, 4])];
        for (port, numbers) in numbers.into_iter().chain([((5, 16, 0), [6, 6])]) {
            guest.write(port, SECONDARY, &numbers);
        }
        for place in &FOUND[..10] {
            prop_assert_ne!(guest.read32(*place, 0), u32::MAX, "{:?}", place);
        }
    }
}
