//! The PCI devices that hosts can have, as a host's kernel sees them, on the kernel with iommufd.

#![allow(clippy::unwrap_used, reason = "in tests a panic is the message")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use lathe_testbed::{Bed, Device, DeviceKind, Host, HostDescription, KernelFlavour, Wire, image};
use sha2::{Digest, Sha256};

/// The EtherType of `device-test e1000e`.
const ETHER_TYPE: u16 = 0x88b5;
const FRAMES: usize = 48;

/// Where a description's tree ends up.
const DISK: &str = "0000:01:00.0";
const EDU: &str = "0000:02:00.0";
const DISPLAY: &str = "0000:05:00.0";
const CARD: &str = "0000:0a:00.1";

fn description(disk: &Path, wire: &Wire) -> HostDescription {
    let device_test = image::binary("device-test").expect("cargo build --release -p lathe-init builds it");
    HostDescription::new("n1")
        .kernel_flavour(KernelFlavour::Iommufd)
        .numa_node(1, 2048)
        .numa_node(1, 1024)
        .file(device_test, "/usr/bin/device-test")
        .wire(wire)
        .device(Device::root_port(Device::nvme_sriov(disk, "abc", 2)))
        .device(Device::root_port(Device::from(DeviceKind::Edu).id("edu")).id("bay"))
        .device(Device::root_port(Device::switch([
            DeviceKind::BochsDisplay.into(),
            Device::other("secondary-vga").property("vgamem_mb", "64"),
        ])))
        .device(Device::root_port(Device::pci_bridge([DeviceKind::Edu.into(), DeviceKind::E1000e.into()])))
        .device(Device::root_port(DeviceKind::IvshmemPlain { size_mib: 16 << 10 }.into()))
        .device(Device::functions([
            DeviceKind::Edu.into(),
            Device::from(DeviceKind::E1000e).property("netdev", "wire0"),
        ]))
        .device(Device::expander_bridge(128, Some(1), [Device::root_port(DeviceKind::BochsDisplay.into())]))
}

#[test]
fn devices_of_a_host() {
    let files = tempfile::tempdir().unwrap();
    let disk = files.path().join("nvme.img");
    let content: Vec<u8> = (0_u32..8 << 20).map(|at| (at / 777) as u8).collect();
    fs::write(&disk, &content).unwrap();
    let wire = Wire::new("wire0").unwrap();
    let bed = Bed::new().unwrap();
    let host = bed.boot(description(&disk, &wire)).unwrap();

    insta::assert_snapshot!(overview(&host));
    both_of_vfios_backends(&host);
    large_bar(&host);
    virtual_functions(&host, &content);
    frames_through_the_wire(&host, &wire);
    unplugging(&host);
    tearing_out(&host);
}

/// One line a device: what it is, who shares its group, its NUMA node and ways to reset it.
fn overview(host: &Host) -> String {
    let script = "for d in /sys/bus/pci/devices/*; do
        echo ${d##*/} $(cat $d/vendor):$(cat $d/device) driver=$(basename $(readlink $d/driver) 2>/dev/null) \
            group=$(ls $d/iommu_group/devices | tr '\\n' ' ' | sed 's/ $//; s/ /+/g') numa=$(cat $d/numa_node) \
            reset=$(cat $d/reset_method 2>/dev/null | tr ' ' '+')
    done";
    // The host's own devices say nothing about the description's.
    let own = |line: &&str| !line.starts_with("0000:00:") || line.contains("0x1b36:0x000c");
    host.shell(script).unwrap().lines().filter(own).collect::<Vec<_>>().join("\n")
}

fn exists(host: &Host, address: &str) -> bool {
    host.exec(["test", "-e", &format!("/sys/bus/pci/devices/{address}")]).unwrap().status.success()
}

fn comes(host: &Host, address: &str) {
    wait(host, &format!("until [ -e /sys/bus/pci/devices/{address} ]; do sleep 0.1; done"));
}

fn goes(host: &Host, address: &str) {
    wait(host, &format!("while [ -e /sys/bus/pci/devices/{address} ]; do sleep 0.1; done"));
}

fn wait(host: &Host, script: &str) {
    let waited = host.command(["sh", "-c", script]).unwrap().limit(Duration::from_secs(45)).check();
    waited.unwrap_or_else(|error| panic!("{error}\n{}", host.shell("dmesg | tail -n 30").unwrap()));
}

fn give_to_vfio(host: &Host, address: &str) {
    let script = format!(
        "cd /sys/bus/pci/devices/{address}
         [ ! -e driver ] || echo {address} >driver/unbind
         echo vfio-pci >driver_override && echo {address} >/sys/bus/pci/drivers_probe
         [ $(basename $(readlink driver)) = vfio-pci ]"
    );
    host.shell(&script).unwrap();
}

fn both_of_vfios_backends(host: &Host) {
    give_to_vfio(host, EDU);
    host.shell("[ -c /dev/iommu ] && [ -c /dev/vfio/vfio ]").unwrap();
    let script = format!(
        "cd /sys/bus/pci/devices/{EDU}
         [ -c /dev/vfio/devices/$(ls vfio-dev) ] && [ -c /dev/vfio/$(basename $(readlink iommu_group)) ]"
    );
    host.shell(&script).unwrap();
}

fn large_bar(host: &Host) {
    let bars = host.check(["device-test", "bars"]).unwrap();
    assert!(bars.contains(" 0x400000000 mem 64 prefetch"), "{bars}");
    let options = ["device=0000:09:00.0", "stride=268435456"];
    let zero =
        host.check([&["device-test", "vram-zero,vram-fill,vram-check"][..], &options].concat()).unwrap();
    assert!(zero.contains("vram_zero yes") && zero.contains("DEVICES-DONE"), "{zero}");
}

/// They share a disk, whose content each of them reads.
fn virtual_functions(host: &Host, content: &[u8]) {
    let output = host.check(["device-test", "nvme-sriov", &format!("device={DISK}")]).unwrap();
    let functions: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("nvme_function ")).collect();
    assert_eq!(functions, ["0000:01:00.1", "0000:01:00.2"], "{output}");
    host.shell(&format!("echo {} >/sys/bus/pci/drivers/nvme/bind", functions[1])).unwrap();
    let find = "basename $(dirname $(grep -l 0000:01:00.2 /sys/class/nvme/*/address))";
    let controller = host.shell(find).unwrap();
    // All functions are paths to one namespace, which the first one's name is for.
    let namespaces = host.shell(&format!("ls -d /sys/class/nvme/{}/nvme*n1", controller.trim())).unwrap();
    let disk = namespaces.trim().rsplit('/').next().unwrap().to_owned();
    let read = host.check(["device-test", "nvme", &format!("nvme={disk}"), "writes=8"]).unwrap();
    assert!(read.contains(&format!("{:x}", Sha256::digest(content))), "{read}");
}

fn frames_through_the_wire(host: &Host, wire: &Wire) {
    let seen = std::thread::scope(|scope| {
        let peer = scope.spawn(|| wire.echo(ETHER_TYPE, FRAMES, Duration::from_secs(60)).unwrap());
        let options = [format!("device={CARD}"), format!("frames={FRAMES}")];
        let output =
            host.check(["device-test", "e1000e"].map(String::from).into_iter().chain(options)).unwrap();
        let frames = peer.join().unwrap();
        let sum = frames.iter().fold(Sha256::new(), |sum, frame| sum.chain_update(&frame[14..]));
        let sum = format!("{FRAMES} {:x}", sum.finalize());
        assert!(output.contains(&format!("e1000e_sent {sum}")), "{output}");
        assert!(output.contains(&format!("e1000e_received {sum}")), "{output}");
        frames
    });
    assert_eq!(seen.len(), FRAMES);
}

fn unplugging(host: &Host) {
    assert!(host.has_device("edu").unwrap());
    host.unplug("edu").unwrap();
    assert!(!exists(host, EDU));
    host.plug("edu", "edu", "bay", &[]).unwrap();
    comes(host, EDU);
}

fn tearing_out(host: &Host) {
    give_to_vfio(host, EDU);
    host.tear_out(EDU).unwrap();
    goes(host, EDU);
    assert!(!host.has_device("edu").unwrap());
    // The slot takes another.
    host.plug("edu", "edu", "bay", &[]).unwrap();
    comes(host, EDU);
    assert!(exists(host, DISPLAY), "its neighbours are untouched");
}
