//! What depends on the host's kernel and IOMMU: both of VFIO's interfaces, virtual functions, devices of several
//! functions, and an IOMMU that translates fewer addresses than the CPU has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use lathe_e2e::leftovers;
use lathe_e2e::passthrough::{self, Ended, Machine, bind, pinned_pages};
use lathe_e2e::wait::PATIENCE;
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

#[test]
fn both_of_the_kernels_interfaces_do_the_same() {
    const NVME: &str = "0000:01:00.0";
    const EDU: &str = "0000:02:00.0";
    let files = tempfile::tempdir().unwrap();
    let (disk, sum) = disk(files.path());
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        .device(Device::root_port(Device::nvme(&disk, "abc")))
        .device(Device::root_port(DeviceKind::Edu.into()));
    let host = bed.boot(description).unwrap();
    bind(&host, &[NVME, EDU]).unwrap();
    for backend in ["iommufd", "container"] {
        let before = (leftovers::census(&host).unwrap(), pinned_pages(&host).unwrap());
        // The image is the same again: blocks that a guest wrote are in it otherwise.
        let (_, again) = self::disk(files.path());
        assert_eq!(again, sum);
        devices(&host, backend, &[NVME, EDU], &sum);
        plugged(&host, backend, EDU);
        let left = leftovers::new_since(&before.0, &leftovers::census(&host).unwrap());
        assert_eq!((left, pinned_pages(&host).unwrap()), (Vec::new(), before.1), "{backend}");
    }
}

fn devices(host: &Host, backend: &str, devices: &[&str], sum: &str) {
    let ended = Machine::new("nvme,edu", devices).backend(backend).check(host).unwrap();
    assert_eq!(ended.lines("nvme_sha256"), [sum], "{backend}");
    let interrupts = interrupts(&ended);
    assert!(interrupts.len() == 3 && interrupts.iter().all(|count| *count > 0), "{interrupts:?}");
    assert_edu(&ended);
    // Device memory in the IOMMU takes Linux 6.19 with iommufd: before, devices do without and that is said.
    let stderr = ended.stderr();
    if backend == "iommufd" {
        assert!(
            stderr.contains("not each other: iommufd cannot map") && stderr.lines().count() == 1,
            "{stderr}"
        );
    } else {
        assert_eq!(stderr, "");
    }
}

fn plugged(host: &Host, backend: &str, edu: &str) {
    const ROUNDS: usize = 4;
    let machine = Machine::new(&format!("edu-loop lathe.rounds={ROUNDS}"), &[]);
    let mut running = machine.with("hotplug_slots", json!(1)).backend(backend).start(host).unwrap();
    let mut held = Vec::new();
    for round in 1..=ROUNDS {
        running.plug_edu(edu, round).unwrap();
        assert_eq!(running.devices().unwrap()[0]["backend"], json!(backend));
        let output = running.device("unplug", &["edu"]).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // After the last round the guest powers off, and its VMM no longer answers.
        if round < ROUNDS {
            running.wait_for_devices(0).unwrap();
            held.push(running.held().unwrap());
        }
    }
    assert_eq!(held[1], held[2], "{backend}: {held:#?}");
    assert_eq!(
        running.process.wait(PATIENCE).unwrap(),
        Some(Status::Exited(0)),
        "{}",
        running.text().unwrap()
    );
    host.shell(&format!("rm -f {}", passthrough::SOCKET)).unwrap();
}

#[test]
fn virtual_functions_and_functions_of_one_device() {
    const DISK: &str = "0000:01:00.0";
    let files = tempfile::tempdir().unwrap();
    let (disk, sum) = disk(files.path());
    let bed = Bed::new().unwrap();
    let description = passthrough::host()
        .unwrap()
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
    let ended = Machine::new("tree,nvme,edu", &devices).check(&host).unwrap();
    insta::assert_snapshot!("tree_of_functions", ended.lines("tree").join("\n"));
    assert_eq!(ended.lines("nvme_sha256"), [sum]);
    // Two pairs of queues are its own, one a CPU, beside that for administration.
    assert_eq!(ended.lines("nvme_queues"), ["2"]);
    let interrupts = interrupts(&ended);
    assert!(interrupts.len() == 3 && interrupts.iter().all(|count| *count > 0), "{interrupts:?}");
    assert_edu(&ended);
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
        .iommu(Iommu::Amd)
        .device(Device::root_port(DeviceKind::Edu.into()))
        .device(Device::root_port(DeviceKind::IvshmemPlain { size_mib: 16 << 10 }.into()));
    let host = bed.boot(description).unwrap();
    bind(&host, &[EDU, SHARED_MEMORY]).unwrap();
    let ended =
        Machine::new("bars,vram-zero,vram-fill,vram-check", &[EDU, SHARED_MEMORY]).check(&host).unwrap();
    assert_eq!(ended.lines("vram_zero"), ["yes"]);
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let end = |bar: &String| {
        let words: Vec<_> = bar.split(' ').collect();
        number(words[2]) + number(words[3])
    };
    let highest = ended.lines("bar").iter().map(end).max().unwrap();
    // The reserved range of HyperTransport begins there, and the aperture ends.
    let aperture = aperture_end(&host, EDU);
    assert!(highest > 16 << 30 && highest <= aperture, "{highest:#x} {aperture:#x}");
    // Peers reach each other at those addresses too: nothing could not be mapped.
    assert_eq!(ended.stderr(), "");
}

/// The first address after those that the kernel translates for a device's group, as its reserved regions have it.
fn aperture_end(host: &Host, address: &str) -> u64 {
    let text =
        host.shell(&format!("cat /sys/bus/pci/devices/{address}/iommu_group/reserved_regions")).unwrap();
    let starts = text.lines().filter_map(|line| line.split(' ').next());
    let high = starts.filter_map(|start| u64::from_str_radix(start.trim_start_matches("0x"), 16).ok());
    high.filter(|start| *start > 1 << 32).min().unwrap_or_else(|| panic!("no high reserved region: {text}"))
}
