//! What depends on the host's kernel and IOMMU: both of VFIO's interfaces, virtual functions, devices of several
//! functions, and an IOMMU that translates fewer addresses than the CPU has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use lathe_e2e::leftovers;
use lathe_e2e::passthrough::{
    self, BACKENDS, Ended, Machine, bind, pinned_pages, rounds, turned_down, unbind,
};
use lathe_e2e::wait::{PATIENCE, until};
use lathe_testbed::{Bed, Device, DeviceKind, Host, Iommu, KernelFlavour, Status};
use serde_json::json;
use sha2::{Digest, Sha256};

const DISK_BYTES: u32 = 16 << 20;

/// A disk whose content differs everywhere, and the line that says so.
fn disk(directory: &Path) -> (PathBuf, String) {
    let path = directory.join("nvme.img");
    let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 777) as u8).collect();
    fs::write(&path, &content).unwrap();
    (path, format!("{DISK_BYTES} {:x}", Sha256::digest(&content)))
}

fn assert_edu(ended: &Ended) {
    assert_eq!(ended.lines("edu_factorial"), ["polled 479001600", "intx 479001600", "msi 479001600"]);
    assert!(ended.lines("edu_dma")[0].starts_with("12288 "), "{}", ended.text());
    assert_eq!(ended.lines("edu_dma_interrupt"), ["msi"]);
}

/// How often each of the disk's interrupts came.
fn interrupts(ended: &Ended) -> Vec<u64> {
    let of = |line: &String| line.split_once(' ').unwrap().1.parse().unwrap();
    ended.lines("nvme_interrupts").iter().map(of).collect()
}

const NVME: &str = "0000:01:00.0";
const EDU: &str = "0000:02:00.0";
/// One IOMMU group: a bridge to a conventional bus, a device without a reset of its own, and a network card.
const BRIDGE: &str = "0000:03:00.0";
const SHARING: &str = "0000:04:01.0";
const CARD: &str = "0000:04:02.0";

#[test]
fn both_of_the_kernels_interfaces_do_the_same() {
    let files = tempfile::tempdir().unwrap();
    let (disk, sum) = disk(files.path());
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .device(Device::root_port(Device::nvme(&disk, "abc")))
        .device(Device::root_port(DeviceKind::Edu.into()))
        .device(Device::root_port(Device::pci_bridge([DeviceKind::Edu.into(), DeviceKind::E1000e.into()])));
    let host = bed.boot(description).unwrap();
    a_bridge_keeps_its_driver_or_its_group(&host);
    for backend in BACKENDS {
        bind(&host, &[NVME, EDU, SHARING, CARD]).unwrap();
        let before = (leftovers::census(&host).unwrap(), pinned_pages(&host).unwrap());
        // The image is the same again: blocks that a guest wrote are in it otherwise.
        let (_, again) = self::disk(files.path());
        assert_eq!(again, sum);
        devices(&host, backend, &[NVME, EDU], &sum);
        one_group(&host, backend);
        // With containers passthrough_hotplug has it do the same.
        if backend == "iommufd" {
            rounds::comes_and_goes(&host, backend, EDU, |_| ()).unwrap();
        }
        hung(&host, backend, EDU);
        let left = leftovers::new_since(&before.0, &leftovers::census(&host).unwrap());
        assert_eq!((left, pinned_pages(&host).unwrap()), (Vec::new(), before.1), "{backend}");
    }
}

/// A driver of the host's on a bridge keeps the group.
fn a_bridge_keeps_its_driver_or_its_group(host: &Host) {
    bind(host, &[SHARING, CARD]).unwrap();
    let words = [SHARING, "shares IOMMU group", BRIDGE, "(driver shpchp)", "take the driver from the bridge"];
    Machine::new("tree", &[SHARING, CARD]).refused(host, &words).unwrap();
    unbind(host, BRIDGE).unwrap();
}

/// Devices of one group are one machine's. One that has no reset of its own is reset by its bus, which takes its
/// neighbour along: not while that is in use, and not if no driver of VFIO's has it.
fn one_group(host: &Host, backend: &str) {
    let ended = Machine::new("tree,edu", &[SHARING, CARD]).backend(backend).check(host).unwrap();
    assert_eq!(ended.lines("edu_factorial").len(), 3);
    insta::assert_snapshot!("tree_of_one_group", ended.lines("tree").join("\n"));
    // The guest's driver asks for a reset that its neighbour would have to share.
    let said = ended.stderr();
    let (resets, others): (Vec<_>, Vec<_>) =
        said.lines().partition(|line| line.contains("for a reset, which failed"));
    assert_eq!((resets.len(), others.len()), (1, usize::from(backend == "iommufd")), "{said}");

    let machine = Machine::new("edu-loop lathe.rounds=1", &[CARD]).with("hotplug_slots", json!(1));
    let mut running = machine.backend(backend).start(host).unwrap();
    until("the machine runs", PATIENCE, || Ok((running.devices()?.len() == 1).then_some(()))).unwrap();
    let answer = [SHARING, "cannot be reset", "its bus has functions"];
    turned_down(&running.device("plug", &[SHARING]).unwrap(), &answer).unwrap();
    assert_eq!(running.devices().unwrap().len(), 1);
    host.check(["lathe", "vm", "control", "kill", passthrough::SOCKET]).unwrap();
    assert_eq!(running.process.wait(PATIENCE).unwrap(), Some(Status::Exited(12)));

    // With containers the group is owned, and it takes the kernel's answer to know that its bus cannot be reset.
    unbind(host, CARD).unwrap();
    let refused =
        if backend == "iommufd" { "its bus has functions" } else { "bus reset failed: Invalid argument" };
    let words = ["passthrough[0].address", SHARING, "cannot be reset", refused];
    Machine::new("tree", &[SHARING]).backend(backend).refused(host, &words).unwrap();
}

fn devices(host: &Host, backend: &str, devices: &[&str], sum: &str) {
    let ended = Machine::new("nvme,edu", devices).backend(backend).check(host).unwrap();
    assert_eq!(ended.lines("nvme_sha256"), [sum], "{backend}");
    let interrupts = interrupts(&ended);
    assert!(interrupts.len() == 3 && interrupts.iter().all(|count| *count > 0), "{interrupts:?}");
    assert_edu(&ended);
    ended.check_peers(backend).unwrap();
}

/// A card that stops answering under a guest: its reset afterwards is in vain, although the kernel takes its silence
/// for readiness, and that is said; no machine gets it until it answers again.
fn hung(host: &Host, backend: &str, edu: &str) {
    let machine = Machine::new("edu-loop lathe.rounds=1", &[]).with("hotplug_slots", json!(1));
    let mut running = machine.backend(backend).start(host).unwrap();
    running.plug_edu(edu, 1).unwrap();
    host.power_slot(edu, false).unwrap();
    running.wait_for("unplugged", 1).unwrap();
    rounds::unplug(&running, &["edu", "--surprise"]).unwrap();
    assert_eq!(
        running.process.wait(PATIENCE).unwrap(),
        Some(Status::Exited(0)),
        "{}",
        running.text().unwrap()
    );
    let text = running.text().unwrap();
    let said: Vec<_> = text.lines().filter(|line| line.contains("after use")).collect();
    assert_eq!(said.len(), 1, "{text}");
    for words in [edu, "cannot be reset", "bus reset left it without an answer", "turn its slot"] {
        assert!(said[0].contains(words), "{words:?} is not in: {}", said[0]);
    }
    host.shell(&format!("rm -f {}", passthrough::SOCKET)).unwrap();
    let again = Machine::new("edu", &[edu]).backend(backend);
    again.refused(host, &["passthrough[0].address", edu, "does not answer"]).unwrap();

    host.power_slot(edu, true).unwrap();
    // It has lost its addresses.
    host.shell(&format!("echo 1 >/sys/bus/pci/devices/{edu}/remove && echo 1 >/sys/bus/pci/rescan")).unwrap();
    bind(host, &[edu]).unwrap();
    assert_edu(&again.check(host).unwrap());
}

#[test]
fn virtual_functions_and_functions_of_one_device() {
    const DISK: &str = "0000:01:00.0";
    let files = tempfile::tempdir().unwrap();
    let (disk, sum) = disk(files.path());
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .device(Device::root_port(Device::nvme_sriov(&disk, "abc", 2)))
        .device(Device::functions([DeviceKind::Edu.into(), DeviceKind::E1000e.into()]));
    let host = bed.boot(description).unwrap();
    let output = host.check(["device-test", "nvme-sriov", &format!("device={DISK}")]).unwrap();
    let functions: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("nvme_function ")).collect();
    let edu = host.shell("dirname $(grep -l 0x11e8 /sys/bus/pci/devices/*/device)").unwrap();
    let edu = edu.trim().rsplit('/').next().unwrap().to_owned();
    let card = edu.replace(".0", ".1");
    let devices = [functions[1], &edu, &card];
    bind(&host, &devices).unwrap();
    for backend in BACKENDS {
        // Blocks that a guest wrote are in it otherwise.
        assert_eq!(self::disk(files.path()).1, sum);
        functions_in_a_guest(&host, backend, &devices, &sum);
    }
}

fn functions_in_a_guest(host: &Host, backend: &str, devices: &[&str], sum: &str) {
    let ended = Machine::new("tree,nvme,edu", devices).backend(backend).check(host).unwrap();
    insta::assert_snapshot!("tree_of_functions", ended.lines("tree").join("\n"));
    assert_eq!(ended.lines("nvme_sha256"), [sum], "{backend}");
    // Two pairs of queues are its own, one a CPU, beside that for administration.
    assert_eq!(ended.lines("nvme_queues"), ["2"]);
    let interrupts = interrupts(&ended);
    assert!(interrupts.len() == 3 && interrupts.iter().all(|count| *count > 0), "{interrupts:?}");
    assert_edu(&ended);
    ended.check_peers(backend).unwrap();
    // The host keeps the physical function's disk, where the guest's blocks are.
    let written = host.check(["device-test", "nvme-verify"]).unwrap();
    assert!(written.contains(&format!("nvme_written {}", ended.lines("nvme_written")[0])), "{written}");
}

/// QEMU's AMD IOMMU delivers neither DMA nor interrupts of passed-through devices (tests/testbed/README.md), so the
/// guest touches registers and memory alone. What it does show: addresses above its aperture cannot be mapped.
#[test]
fn bars_lie_below_the_end_of_a_narrow_iommu() {
    const EDU: &str = "0000:01:00.0";
    const SHARED_MEMORY: &str = "0000:02:00.0";
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .iommu(Iommu::Amd)
        .device(Device::root_port(DeviceKind::Edu.into()))
        .device(Device::root_port(DeviceKind::IvshmemPlain { size_mib: 16 << 10 }.into()));
    let host = bed.boot(description).unwrap();
    bind(&host, &[EDU, SHARED_MEMORY]).unwrap();
    // What the first machine wrote is there for the second.
    for (backend, found) in BACKENDS.into_iter().zip(["vram-zero", "vram-check"]) {
        let actions = format!("bars,{found},vram-fill,vram-check");
        let ended = Machine::new(&actions, &[EDU, SHARED_MEMORY]).backend(backend).check(&host).unwrap();
        assert_eq!(ended.lines("vram_zero").len() + ended.lines("vram_intact").len(), 2, "{}", ended.text());
        assert_below_the_aperture(&host, EDU, &ended);
        // Where peers reach each other, they do so at those addresses: nothing could not be mapped.
        ended.check_peers(backend).unwrap();
    }
}

fn assert_below_the_aperture(host: &Host, device: &str, ended: &Ended) {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let end = |bar: &String| {
        let words: Vec<_> = bar.split(' ').collect();
        number(words[2]) + number(words[3])
    };
    let highest = ended.lines("bar").iter().map(end).max().unwrap();
    // The reserved range of HyperTransport begins there, and the aperture ends.
    let aperture = aperture_end(host, device);
    assert!(highest > 16 << 30 && highest <= aperture, "{highest:#x} {aperture:#x}");
}

/// The first address after those that the kernel translates for a device's group, as its reserved regions have it.
fn aperture_end(host: &Host, address: &str) -> u64 {
    let text =
        host.shell(&format!("cat /sys/bus/pci/devices/{address}/iommu_group/reserved_regions")).unwrap();
    let starts = text.lines().filter_map(|line| line.split(' ').next());
    let high = starts.filter_map(|start| u64::from_str_radix(start.trim_start_matches("0x"), 16).ok());
    high.filter(|start| *start > 1 << 32).min().unwrap_or_else(|| panic!("no high reserved region: {text}"))
}
