//! Root ports, switches and NUMA nodes of hosts as guests see them, which libraries that move data between devices
//! plan their routes by; the same by both of the kernel's interfaces.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lathe_e2e::passthrough::{self, BACKENDS, Machine, bind};
use lathe_testbed::{Bed, Device, DeviceKind, Host, KernelFlavour};
use serde_json::{Value, json};

fn edu() -> Device {
    DeviceKind::Edu.into()
}

/// The addresses of all edu devices, bound.
fn edus(host: &Host) -> Vec<String> {
    let text =
        host.shell("for f in $(grep -l 0x11e8 /sys/bus/pci/devices/*/device); do dirname $f; done").unwrap();
    let addresses: Vec<String> =
        text.lines().map(|path| path.rsplit('/').next().unwrap().to_owned()).collect();
    bind(host, &references(&addresses)).unwrap();
    addresses
}

fn references(addresses: &[String]) -> Vec<&str> {
    addresses.iter().map(String::as_str).collect()
}

fn two_nodes() -> Value {
    let node = |host_node: u32| json!({"cpus": 1, "memory": "128 MiB", "host_node": host_node});
    json!([node(0), node(1)])
}

/// Without the interrupt pin: QEMU (10.0.2) routes the pins behind an expander bridge to lines of the legacy interrupt
/// controller, and the host counts no interrupt there (`vfio-intx` at IRQ 11 in /proc/interrupts stays at 0 while the
/// device asserts its pin).
#[test]
fn a_board_with_two_sockets_four_switches_and_eight_devices() {
    let bed = Bed::new().unwrap();
    let switch = || Device::root_port(Device::switch([edu(), edu()]));
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .numa_node(1, 1536)
        .numa_node(1, 1536)
        .device(Device::expander_bridge(64, Some(0), [switch(), switch()]))
        .device(Device::expander_bridge(128, Some(1), [switch(), switch()]));
    let host = bed.boot(description).unwrap();
    let devices = edus(&host);
    assert_eq!(devices.len(), 8);
    for backend in BACKENDS {
        guests_of_the_board(&host, backend, &devices);
    }
}

fn guests_of_the_board(host: &Host, backend: &str, devices: &[String]) {
    let machine = Machine::new("tree,edu lathe.pin=off", &references(devices)).backend(backend);
    let ended = machine.clone().with("numa", two_nodes()).check(host).unwrap();
    insta::assert_snapshot!("eight_devices_two_nodes", ended.lines("tree").join("\n"));
    assert_eq!(ended.lines("edu_dma_interrupt"), ["msi"]);
    ended.check_peers(backend).unwrap();

    // A guest without nodes has them all on one root complex; one with a single socket's has those alone.
    let ended = machine.check(host).unwrap();
    insta::assert_snapshot!("eight_devices_no_nodes", ended.lines("tree").join("\n"));
    let second = Machine::new("tree,edu lathe.pin=off", &references(&devices[4..])).backend(backend);
    let ended = second.with("numa", two_nodes()).check(host).unwrap();
    insta::assert_snapshot!("the_second_sockets_devices", ended.lines("tree").join("\n"));
}

#[test]
fn switches_below_switches_and_devices_on_the_root_complex() {
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .device(Device::root_port(Device::switch([edu(), Device::switch([edu(), edu()])])))
        .device(Device::root_port(Device::pci_bridge([edu()])))
        .device(Device::root_port(edu()));
    let host = bed.boot(description).unwrap();
    let bridge = host.shell("dirname $(grep -l 0x000e /sys/bus/pci/devices/*/device)").unwrap();
    // Its driver would keep the group.
    passthrough::unbind(&host, bridge.trim().rsplit('/').next().unwrap()).unwrap();
    let devices = edus(&host);
    assert_eq!(devices.len(), 5);
    let machine = Machine::new("tree,edu", &references(&devices)).with("hotplug_slots", json!(2));
    for backend in BACKENDS {
        let ended = machine.clone().backend(backend).check(&host).unwrap();
        insta::assert_snapshot!("cascaded_switches_a_bridge_and_slots", ended.lines("tree").join("\n"));
        assert_eq!(ended.lines("edu_dma_interrupt"), ["msi"]);
        ended.check_peers(backend).unwrap();
    }
}
