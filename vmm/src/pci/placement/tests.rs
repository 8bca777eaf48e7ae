use proptest::prelude::*;

use super::*;
use crate::pci::express::PortTraits;
use crate::pci::tree::{HostBridge, Switch};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn bar(index: u8, size: u64) -> Bar {
    Bar { index, size, wide: true, prefetchable: true }
}

fn small(index: u8, size: u64) -> Bar {
    Bar { index, size, wide: false, prefetchable: false }
}

fn port(below: Below<Demand>) -> Port<Demand> {
    Port { traits: PortTraits::default(), below }
}

fn device(id: &str, bars: Vec<Bar>) -> Port<Demand> {
    port(Below::Device(vec![(0, Demand { id: id.into(), bars })]))
}

fn one_bridge(root_ports: Vec<Port<Demand>>) -> Tree<Demand> {
    Tree { host_bridges: vec![HostBridge { numa_node: None, root_ports }] }
}

fn windows(high: Range<u64>) -> Windows {
    Windows { low: 0xc000_0000..0xe000_0000, high }
}

fn place_in(tree: &Tree<Demand>, high: Range<u64>) -> Result<Layout, PlacementError> {
    let windows = windows(high);
    place(tree, &windows, &Space::new(&windows, None))
}

#[test]
fn two_large_gpus_fit_where_the_small_bars_go_before_and_after_the_large_ones() {
    let gpu = |id| device(id, vec![bar(0, 16 * MIB), bar(2, 128 * GIB), bar(4, 32 * MIB)]);
    // 39 bits: what many client CPUs and their IOMMUs have.
    let layout = place_in(&one_bridge(vec![gpu("gpu0"), gpu("gpu1")]), 5 * GIB..512 * GIB).unwrap();
    assert_eq!(layout.functions[0][1], 128 * GIB);
    assert_eq!(layout.functions[1][1], 256 * GIB);
}

#[test]
fn what_does_not_fit_is_named_with_its_size_and_the_space() {
    let gpu = device("gpu0", vec![bar(0, 128 * GIB), small(1, 16 * MIB)]);
    let message = |tree: &Tree<Demand>, high| place_in(tree, high).unwrap_err().to_string();
    assert_eq!(
        message(&one_bridge(vec![gpu.clone()]), 5 * GIB..64 * GIB),
        "BAR 0 of gpu0 needs 128 GiB, the addresses that this host's IOMMU and CPU share above guest memory \
         begin at 0x140000000 and end at 0x1000000000"
    );
    assert!(message(&one_bridge(vec![gpu]), 5 * GIB..5 * GIB).ends_with("above guest memory are none"));
    let slot = one_bridge(vec![port(Below::Empty)]);
    assert!(message(&slot, 5 * GIB..5 * GIB).starts_with("each hotplug slot needs 1 GiB, "));
    let rom = one_bridge(vec![device("nic0", vec![small(ROM_BAR, GIB)])]);
    assert_eq!(
        message(&rom, 5 * GIB..64 * GIB),
        "the expansion ROM of nic0 needs 1 GiB below 4 GiB, where 512 MiB are for the 32-bit BARs of all devices"
    );
    let switch = Switch {
        traits: PortTraits::default(),
        ports: (0..33).map(|_| device("nvme", vec![small(0, 16 << 10)])).collect(),
    };
    let message = message(&one_bridge(vec![port(Below::Switch(switch))]), 5 * GIB..64 * GIB);
    assert_eq!(message, "33 devices below one switch, at most 32: pass fewer devices through");
}

#[test]
fn slots_get_room_for_the_largest_gpu_or_what_there_is() {
    let slots = |count| one_bridge((0..count).map(|_| port(Below::Empty)).collect());
    assert_eq!(place_in(&slots(2), GIB << 10..3 << 40).unwrap().spare, 256 * GIB);
    assert_eq!(place_in(&slots(16), GIB << 10..3 << 40).unwrap().spare, 64 * GIB);
    assert_eq!(place_in(&slots(16), 5 * GIB..64 * GIB).unwrap().spare, 2 * GIB);
    let windows = windows(GIB << 10..3 << 40);
    let space = Space { slot_bar: 512 * GIB, ..Space::new(&windows, None) };
    assert_eq!(place(&slots(1), &windows, &space).unwrap().spare, 512 * GIB);
}

#[test]
fn more_than_sixteen_root_ports_share_device_numbers() {
    let ports = (0..20).map(|_| device("nvme", vec![small(0, 16 << 10)])).collect();
    let layout = place_in(&one_bridge(ports), 5 * GIB..64 * GIB).unwrap();
    let places: Vec<_> = layout.ports.iter().map(|port| (port.device, port.function)).collect();
    assert_eq!(places[..3], [(16, 0), (16, 1), (17, 0)]);
    assert_eq!(layout.host_bridges[0].port_devices, (16..26).collect::<Vec<u8>>());
}

#[test]
fn only_what_the_iommu_translates_is_given_out() {
    let windows = windows(5 * GIB..512 * GIB);
    // As a host's reserved regions cut an aperture.
    let allowed = [200 * GIB..300 * GIB, 0..0xc800_0000, 0xd000_0000..6 * GIB];
    let space = Space::new(&windows, Some(&allowed));
    assert_eq!(space.low, [0xc000_0000..0xc800_0000, 0xd000_0000..0xe000_0000]);
    assert_eq!(space.high, [5 * GIB..6 * GIB, 200 * GIB..300 * GIB]);
    let gpu = device("gpu0", vec![bar(0, 64 * GIB), small(2, 256 * MIB)]);
    let error = place(&one_bridge(vec![gpu]), &windows, &space).unwrap_err();
    assert!(error.to_string().contains("are 0x140000000..0x180000000 0x3200000000..0x4b00000000"), "{error}");
    let gpu = device("gpu0", vec![bar(0, 32 * GIB), small(2, 256 * MIB)]);
    let layout = place(&one_bridge(vec![gpu]), &windows, &space).unwrap();
    assert_eq!(layout.functions[0], [224 * GIB, 0xd000_0000]);
}

fn any_bars() -> impl Strategy<Value = Vec<Bar>> {
    let one = (4_u32..36, any::<bool>()).prop_map(|(shift, wide)| match wide {
        true => bar(0, 1 << shift),
        false => small(0, 1 << shift.min(24)),
    });
    proptest::collection::vec(one, 0..4).prop_map(|mut bars| {
        for (index, bar) in bars.iter_mut().enumerate() {
            bar.index = index as u8 * 2;
        }
        bars
    })
}

fn any_port() -> impl Strategy<Value = Port<Demand>> {
    let functions = proptest::collection::vec(any_bars(), 1..4).prop_map(|functions| {
        let demand = |bars| Demand { id: "device".into(), bars };
        Below::Device((0..8).zip(functions.into_iter().map(demand)).collect())
    });
    let leaf = prop_oneof![1 => Just(port(Below::Empty)), 4 => functions.prop_map(port)];
    leaf.prop_recursive(2, 12, 3, |inner| {
        proptest::collection::vec(inner, 1..4)
            .prop_map(|ports| port(Below::Switch(Switch { traits: PortTraits::default(), ports })))
    })
}

fn any_tree() -> impl Strategy<Value = Tree<Demand>> {
    let bridge = proptest::collection::vec(any_port(), 0..4)
        .prop_map(|root_ports| HostBridge { numa_node: None, root_ports });
    proptest::collection::vec(bridge, 1..4).prop_map(|host_bridges| Tree { host_bridges })
}

/// Checks everything below some ports; returns what they take of either space on the bus they are on.
fn check_ports(
    ports: &[Port<Demand>],
    bus: u8,
    places: &mut std::slice::Iter<PortPlace>,
    functions: &mut std::slice::Iter<Vec<u64>>,
) -> Vec<Range<u64>> {
    let mut taken = Vec::new();
    for port in ports {
        let place = places.next().unwrap();
        assert_eq!(place.primary, bus);
        let bar = place.bar.unwrap();
        taken.push(bar..bar + PAGE);
        let windows = [&place.windows.low, &place.windows.high];
        if !matches!(port.below, Below::Switch(_)) {
            assert!(windows.iter().all(|window| window.end - window.start >= SLOT_WINDOW));
        }
        let inside = match &port.below {
            Below::Empty => {
                assert!(place.windows.low.end - place.windows.low.start >= SPARE_LOW);
                assert!(place.windows.high.end - place.windows.high.start >= GIB);
                Vec::new()
            }
            Below::Device(devices) => devices
                .iter()
                .flat_map(|(_, demand)| demand.bars.iter().zip(functions.next().unwrap()))
                .map(|(bar, base)| {
                    assert!(base.is_multiple_of(bar.size.max(PAGE)));
                    let window = if bar.prefetchable { &place.windows.high } else { &place.windows.low };
                    assert!(window.start <= *base && base + bar.size <= window.end);
                    *base..base + bar.size.max(PAGE)
                })
                .collect(),
            Below::Switch(switch) => {
                let upstream = places.next().unwrap();
                assert_eq!((upstream.primary, upstream.bar), (place.secondary, None));
                assert_eq!(upstream.windows, place.windows);
                assert_eq!(upstream.subordinate, place.subordinate);
                check_ports(&switch.ports, upstream.secondary, places, functions)
            }
        };
        for range in &inside {
            let within = |window: &&&Range<u64>| window.start <= range.start && range.end <= window.end;
            assert!(windows.iter().any(|window| within(&window)), "{range:x?} is in no window");
        }
        disjoint(inside);
        for window in windows {
            assert!(window.start.is_multiple_of(WINDOW_UNIT) && window.end.is_multiple_of(WINDOW_UNIT));
            taken.extend((!window.is_empty()).then(|| window.clone()));
        }
    }
    taken
}

fn disjoint(mut ranges: Vec<Range<u64>>) {
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{:x?} and {:x?} overlap", pair[0], pair[1]);
    }
}

proptest! {
    #[test]
    fn every_bar_is_aligned_alone_and_in_the_windows_above_it(
        tree in any_tree(),
        start in 5_u64..64,
        bits in 37_u32..48,
        hole in 0_u64..100,
    ) {
        let windows = windows(start * GIB..1 << bits);
        let allowed = [0..(start + hole) * GIB, (start + hole + 7) * GIB..u64::MAX];
        let space = Space::new(&windows, Some(&allowed));
        let layout = place(&tree, &windows, &space);
        prop_assume!(layout.is_ok());
        if let Ok(layout) = layout {
            let (mut places, mut functions) = (layout.ports.iter(), layout.functions.iter());
            let mut taken = Vec::new();
            let mut shares = Vec::new();
            for (bridge, place) in tree.host_bridges.iter().zip(&layout.host_bridges) {
                let roots = check_ports(&bridge.root_ports, place.buses.0, &mut places, &mut functions);
                let own: Vec<_> = place.low.iter().chain(&place.high).cloned().collect();
                for range in &roots {
                    let within = |own: &Range<u64>| own.start <= range.start && range.end <= own.end;
                    prop_assert!(own.iter().any(within));
                    let free: Vec<_> = space.low.iter().chain(&space.high).collect();
                    prop_assert!(free.into_iter().any(within), "{:x?} is not translated", range);
                }
                taken.extend(roots);
                shares.extend(own);
            }
            prop_assert!(places.next().is_none() && functions.next().is_none());
            disjoint(taken);
            disjoint(shares);
            let buses: Vec<_> = layout.host_bridges.iter().map(|place| place.buses).collect();
            prop_assert_eq!((buses[0].0, buses[buses.len() - 1].1), (0, 255));
            prop_assert!(buses.windows(2).all(|pair| pair[0].1.checked_add(1) == Some(pair[1].0)));
        }
    }

    #[test]
    fn bars_of_one_size_leave_no_gap(count in 1_usize..16, shift in 21_u32..34) {
        let size = 1_u64 << shift;
        let tree = one_bridge((0..count).map(|_| device("gpu", vec![bar(0, size)])).collect());
        let start = 64 * GIB;
        let layout = place_in(&tree, start..start + count as u64 * size).unwrap();
        prop_assert_eq!(layout.functions.len(), count);
    }
}
