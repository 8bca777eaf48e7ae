//! Devices that come to a machine and go from it while its guest uses them, and requests that cannot be met: each
//! is answered with one line, and the host is as before.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lathe_e2e::leftovers;
use lathe_e2e::passthrough::{self, Machine, Running, bind, pinned_pages, rounds, turned_down};
use lathe_e2e::wait::{PATIENCE, until};
use lathe_testbed::{Bed, Device, DeviceKind, Host, Output, Status};
use serde_json::json;

/// Below a switch.
const EDU: &str = "0000:03:00.0";
/// In a slot of its own.
const LOOSE: &str = "0000:04:00.0";
/// One IOMMU group: a bridge to a conventional bus, a device without a reset of its own, and a network card.
const BRIDGE: &str = "0000:05:00.0";
const SHARING: &str = "0000:06:01.0";
const CARD: &str = "0000:06:02.0";

/// On the root complex itself.
const NO_RESET: &str = "0000:00:10.0";

fn host(bed: &Bed) -> Host {
    let description = passthrough::host()
        .unwrap()
        .device(Device::root_port(Device::switch([DeviceKind::Edu.into()])))
        .device(Device::root_port(DeviceKind::Edu.into()))
        .device(Device::root_port(Device::pci_bridge([DeviceKind::Edu.into(), DeviceKind::E1000e.into()])))
        .device(Device::from(DeviceKind::Edu).property("addr", "0x10"));
    bed.boot(description).unwrap()
}

#[test]
fn devices_come_and_go_and_what_is_refused_changes_nothing() {
    let bed = Bed::new().unwrap();
    let host = host(&bed);
    let before = (leftovers::census(&host).unwrap(), pinned_pages(&host).unwrap());

    mistakes_in_a_description(&host);
    rounds::comes_and_goes(&host, "container", EDU, |running| mistakes_while_it_runs(&host, running))
        .unwrap();
    torn_out_of_the_host(&host);

    let left = leftovers::new_since(&before.0, &leftovers::census(&host).unwrap());
    assert_eq!((left, pinned_pages(&host).unwrap()), (Vec::new(), before.1));
}

fn mistakes_in_a_description(host: &Host) {
    let refused = |devices: &[&str], words: &[&str]| {
        let words = [&["passthrough["], words].concat();
        Machine::new("tree", devices).refused(host, &words).unwrap();
    };
    refused(&["0000:99:00.0"], &["[0].address: 0000:99:00.0", "no such PCI function"]);
    refused(&[BRIDGE], &[BRIDGE, "is a bridge"]);
    refused(&[EDU], &[EDU, "is bound to no driver", "driver_override"]);
    bind(host, &[EDU, LOOSE]).unwrap();
    refused(&[EDU, CARD], &["[1].address", CARD, "is bound to the driver e1000e"]);
    refused(&[EDU, EDU], &[EDU]);
    // On the root bus, which cannot be reset.
    bind(host, &[NO_RESET]).unwrap();
    refused(&[NO_RESET], &["[0].address", NO_RESET, "cannot be reset: it has no reset of its own"]);
    bind(host, &[SHARING]).unwrap();
    refused(&[SHARING], &[SHARING, "shares IOMMU group", CARD, "(driver e1000e)"]);
    let iommufd = Machine::new("tree", &[EDU]).backend("iommufd");
    iommufd.refused(host, &["vfio.backend", "CONFIG_IOMMUFD", "use container"]).unwrap();
}

fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}{}", output.text(), String::from_utf8_lossy(&output.stderr));
}

fn mistakes_while_it_runs(host: &Host, running: &Running) {
    let devices = running.devices().unwrap();
    let (id, address) = (&devices[0]["id"], &devices[0]["address"]);
    assert_eq!((id, address), (&json!("edu"), &json!(EDU)));
    for (words, answer) in [
        (&[LOOSE, "--id", "edu"][..], &["\"edu\"", "is there already"][..]),
        (&[LOOSE], &["no free hotplug slot", "hotplug_slots: 1"]),
    ] {
        turned_down(&running.device("plug", words).unwrap(), answer).unwrap();
    }
    let unknown = running.device("unplug", &["nobody"]).unwrap();
    turned_down(&unknown, &["\"nobody\"", "is not the ID"]).unwrap();
    assert_eq!(running.devices().unwrap(), devices);
    Machine::new("tree", &[EDU]).refused(host, &[EDU, "is in use by another process"]).unwrap();
}

/// A card that somebody pulls out of the host: the guest sees the same, and goes on.
fn torn_out_of_the_host(host: &Host) {
    let machine = Machine::new("edu-loop lathe.rounds=2", &[LOOSE]).with("hotplug_slots", json!(1));
    let mut running = machine.start(host).unwrap();
    running.wait_for("plugged", 1).unwrap();
    host.tear_out(LOOSE).unwrap();
    running.wait_for_devices(0).unwrap();
    running.wait_for("unplugged", 1).unwrap();
    until("the host lets it go", PATIENCE, || {
        let path = format!("/sys/bus/pci/devices/{LOOSE}");
        Ok((!host.exec(["test", "-e", &path])?.status.success()).then_some(()))
    })
    .unwrap();
    let absent = running.device("plug", &[LOOSE]).unwrap();
    turned_down(&absent, &["address", LOOSE, "no such PCI function"]).unwrap();
    let text = running.text().unwrap();
    let said: Vec<_> = text.lines().filter(|line| line.starts_with("lathe-vmm: ")).collect();
    let lost = format!("lathe-vmm: device d0: {LOOSE}: it answers no more: pulled out of the host");
    assert!(said.len() == 1 && said[0].starts_with(&lost), "{text}");
    // The machine goes on: another device works.
    assert_done(&running.device("plug", &[EDU, "--id", "edu"]).unwrap());
    running.wait_for("plugged", 2).unwrap();
    assert_done(&running.device("unplug", &["edu"]).unwrap());
    assert_eq!(
        running.process.wait(PATIENCE).unwrap(),
        Some(Status::Exited(0)),
        "{}",
        running.text().unwrap()
    );
    host.shell(&format!("rm -f {}", passthrough::SOCKET)).unwrap();
}
