//! Six hosts, and the tree that `lspci -tv` shows in their guests.

use super::*;
use crate::pci::config::{Bar, ROM_BAR};
use crate::pci::placement::{Demand, Layout, PortPlace, Space, place};
use crate::pci::root::Windows;

const GIB: u64 = 1 << 30;

/// A function of class "other" with the ports above it.
pub(crate) fn function(address: &str, path: Vec<HostPort>) -> HostFunction {
    HostFunction {
        address: address.parse().unwrap(),
        vendor: 0x1234,
        device: 0x1111,
        class: 0xff_00_00,
        numa_node: None,
        physical_function: None,
        path,
    }
}

/// A root port, then switches, by their addresses without the domain.
pub(crate) fn ports(addresses: &str) -> Vec<HostPort> {
    let kind = |index: usize| match index {
        0 => HostPortKind::Root,
        odd if odd % 2 == 1 => HostPortKind::Upstream,
        _ => HostPortKind::Downstream,
    };
    let port = |(index, address): (usize, &str)| HostPort {
        address: format!("0000:{address}").parse().unwrap(),
        kind: kind(index),
        traits: PortTraits::default(),
    };
    addresses.split_whitespace().enumerate().map(port).collect()
}

fn on_node(mut function: HostFunction, node: u32) -> HostFunction {
    function.numa_node = Some(node);
    function
}

/// An H100's BARs.
fn gpu_bars() -> Vec<Bar> {
    let bar = |index, size, prefetchable| Bar { index, size, wide: true, prefetchable };
    vec![bar(0, 16 << 20, true), bar(2, 128 * GIB, true), bar(4, 32 << 20, true)]
}

fn named(tree: Tree<usize>, names: &[&str]) -> Tree<Demand> {
    let demand = |index: usize| {
        let id = names[index].to_owned();
        let bars = match names[index] {
            gpu if gpu.starts_with("gpu") => gpu_bars(),
            nvme if nvme.starts_with("nvme") => {
                vec![Bar { index: 0, size: 16 << 10, wide: true, prefetchable: false }]
            }
            nic if nic.starts_with("nic") => vec![
                Bar { index: 0, size: 32 << 20, wide: true, prefetchable: true },
                Bar { index: ROM_BAR, size: 1 << 20, wide: false, prefetchable: false },
            ],
            _ => vec![Bar { index: 0, size: 4096, wide: false, prefetchable: false }],
        };
        Ok::<_, ()>(Demand { id, bars })
    };
    tree.try_map(demand).unwrap()
}

fn lay_out(tree: &Tree<Demand>) -> Layout {
    let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 0x1_8000_0000..1 << 42 };
    place(tree, &windows, &Space::new(&windows, None)).unwrap()
}

/// A line of the tree for what is on a bus, and below it.
struct Row {
    text: String,
    below: Option<(String, Vec<Row>)>,
}

fn rows(tree_ports: &[Port<Demand>], places: &mut impl Iterator<Item = PortPlace>) -> Vec<Row> {
    let row = |port: &Port<Demand>| {
        let place = places.next().unwrap();
        let inside = match &port.below {
            Below::Empty => Vec::new(),
            Below::Device(functions) => functions
                .iter()
                .map(|(number, demand)| Row { text: format!("00.{number}  {}", demand.id), below: None })
                .collect(),
            Below::Switch(switch) => {
                let upstream = places.next().unwrap();
                let inside = rows(&switch.ports, &mut *places);
                vec![Row { text: "00.0".into(), below: Some((buses(&upstream), inside)) }]
            }
        };
        let text = format!("{:02x}.{}", place.device, place.function);
        Row { text, below: Some((buses(&place), inside)) }
    };
    tree_ports.iter().map(row).collect::<Vec<_>>()
}

fn buses(place: &PortPlace) -> String {
    match (place.secondary, place.subordinate) {
        (first, last) if first == last => format!("[{first:02x}]"),
        (first, last) => format!("[{first:02x}-{last:02x}]"),
    }
}

/// Draws as `lspci -t` does.
fn draw(lines: &mut Vec<String>, prefix: &str, rows: &[Row]) {
    for (index, row) in rows.iter().enumerate() {
        let last = index + 1 == rows.len();
        let branch = match (rows.len(), last) {
            (1, _) => "--",
            (_, true) => "\\-",
            (_, false) => "+-",
        };
        let lead = if index == 0 { lines.pop().unwrap() } else { prefix.to_owned() };
        let mut line = format!("{lead}{branch}{}", row.text);
        let Some((buses, inside)) = &row.below else {
            lines.push(line);
            continue;
        };
        line = format!("{line}-{buses}--");
        let bar = if last { "  " } else { "| " };
        let indent = format!("{prefix}{bar}{}", " ".repeat(row.text.len() + buses.len() + 3));
        lines.push(line);
        draw(lines, &indent, inside);
    }
}

fn guest_tree(functions: &[HostFunction], names: &[&str], nodes: &[Option<u32>], slots: u8) -> String {
    let tree = named(plan(functions, nodes, slots), names);
    let layout = lay_out(&tree);
    let mut places = layout.ports.iter().cloned();
    let mut text = String::new();
    for (bridge, place) in tree.host_bridges.iter().zip(&layout.host_bridges) {
        let mut below = vec![Row { text: "00.0  host bridge".into(), below: None }];
        below.extend(rows(&bridge.root_ports, &mut places));
        let head = format!("-[0000:{:02x}]-", place.buses.0);
        let mut lines = vec![head.clone()];
        draw(&mut lines, &" ".repeat(head.len()), &below);
        let node = bridge.numa_node.map_or_else(|| "no node".to_owned(), |node| format!("node {node}"));
        text += &format!("{node}, buses {:02x}-{:02x}\n", place.buses.0, place.buses.1);
        text += &lines.iter().map(|line| format!("{}\n", line.trim_end())).collect::<String>();
    }
    text
}

#[test]
fn one_gpu_on_a_root_port() {
    let functions = [function("0000:65:00.0", ports("64:00.0"))];
    insta::assert_snapshot!(guest_tree(&functions, &["gpu0"], &[], 0));
}

#[test]
fn two_gpus_under_one_switch() {
    let functions = [
        function("0000:67:00.0", ports("64:00.0 65:00.0 66:00.0")),
        function("0000:68:00.0", ports("64:00.0 65:00.0 66:01.0")),
    ];
    insta::assert_snapshot!(guest_tree(&functions, &["gpu0", "gpu1"], &[], 0));
}

/// Two sockets, two switches each, two GPUs and a network adapter below each switch.
fn eight_gpu_board() -> (Vec<HostFunction>, Vec<String>) {
    let (mut functions, mut names) = (Vec::new(), Vec::new());
    for switch in 0..4_u8 {
        let bus = 0x20 + switch * 0x30;
        for gpu in 0..2_u8 {
            let path = format!("{:02x}:01.0 {:02x}:00.0 {:02x}:{gpu:02x}.0", bus, bus + 1, bus + 2);
            let address = format!("0000:{:02x}:00.0", bus + 3 + gpu);
            functions.push(on_node(function(&address, ports(&path)), u32::from(switch / 2)));
            names.push(format!("gpu{}", switch * 2 + gpu));
        }
    }
    (functions, names)
}

#[test]
fn eight_gpus_on_two_sockets_with_four_switches() {
    let (functions, names) = eight_gpu_board();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    insta::assert_snapshot!(guest_tree(&functions, &names, &[Some(0), Some(1)], 0));
}

#[test]
fn a_gpu_with_its_audio_function() {
    let functions = [function("0000:01:00.1", ports("00:01.0")), function("0000:01:00.0", ports("00:01.0"))];
    insta::assert_snapshot!(guest_tree(&functions, &["audio0", "gpu0"], &[], 0));
}

#[test]
fn devices_on_the_root_complex_and_behind_a_conventional_bridge() {
    let mut conventional = ports("00:1c.0 03:00.0");
    conventional[1].kind = HostPortKind::Other;
    let functions = [function("0000:00:14.0", Vec::new()), function("0000:04:02.0", conventional)];
    insta::assert_snapshot!(guest_tree(&functions, &["usb0", "serial0"], &[], 0));
}

#[test]
fn a_nic_and_a_gpu_under_a_switch_an_nvme_elsewhere_and_hotplug_slots() {
    let functions = [
        function("0000:67:00.0", ports("64:00.0 65:00.0 66:00.0")),
        function("0000:68:00.0", ports("64:00.0 65:00.0 66:01.0")),
        function("0000:01:00.0", ports("00:03.1")),
    ];
    insta::assert_snapshot!(guest_tree(&functions, &["nic0", "gpu0", "nvme0"], &[], 2));
}

#[test]
fn virtual_functions_and_lone_functions_get_ports_and_function_0() {
    let mut virtual_functions = vec![
        function("0000:01:00.0", ports("00:03.1")),
        function("0000:01:10.2", ports("00:03.1")),
        function("0000:01:10.3", ports("00:03.1")),
        function("0000:02:00.1", ports("00:03.2")),
    ];
    for function in &mut virtual_functions[1..3] {
        function.physical_function = Some("0000:01:00.0".parse().unwrap());
    }
    let tree = plan(&virtual_functions, &[], 0);
    let below: Vec<_> = tree.host_bridges[0].root_ports.iter().map(|port| port.below.clone()).collect();
    assert_eq!(below, [0, 1, 2, 3].map(|index| Below::Device(vec![(0, index)])));
}

#[test]
fn addresses_of_the_eight_gpu_board() {
    let (functions, names) = eight_gpu_board();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let tree = named(plan(&functions, &[Some(0), Some(1)], 2), &names);
    let layout = lay_out(&tree);
    let mut text = String::new();
    for (bridge, place) in tree.host_bridges.iter().zip(&layout.host_bridges) {
        text += &format!("host bridge {:02x} of node {:?}\n", place.buses.0, bridge.numa_node);
        for range in place.low.iter().chain(&place.high) {
            text += &format!("  {:#x}..{:#x}\n", range.start, range.end);
        }
    }
    for port in &layout.ports {
        let (low, high) = (&port.windows.low, &port.windows.high);
        let bar = port.bar.map_or_else(|| "none".to_owned(), |bar| format!("{bar:#x}"));
        text += &format!(
            "port {:02x}:{:02x}.{} {}: BAR {bar}, {:#x}..{:#x}, {:#x}..{:#x}\n",
            port.primary,
            port.device,
            port.function,
            buses(port),
            low.start,
            low.end,
            high.start,
            high.end
        );
    }
    for (demand, bases) in tree.functions().iter().zip(&layout.functions) {
        let bases: Vec<String> = bases.iter().map(|base| format!("{base:#x}")).collect();
        text += &format!("{}: {}\n", demand.id, bases.join(" "));
    }
    insta::assert_snapshot!(text);
}
