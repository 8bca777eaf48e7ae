//! Devices of a host driven by a guest's own drivers, over real VFIO: what they do there is what they do on the
//! host, and nothing of them is left when the machine has ended, however it did; by both of the kernel's interfaces.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use lathe_e2e::leftovers;
use lathe_e2e::passthrough::{self, BACKENDS, Machine, bind, pinned_pages, unbind};
use lathe_e2e::wait::PATIENCE;
use lathe_testbed::{Bed, Device, DeviceKind, Host, KernelFlavour, Status, Wire};
use sha2::{Digest, Sha256};

const DISK_BYTES: u32 = 64 << 20;
/// The EtherType of `device-test e1000e`.
const ETHER_TYPE: u16 = 0x88b5;
const FRAMES: usize = 48;
/// Bytes of the display's memory.
const VRAM: &str = "16777216";

/// A disk whose content differs everywhere, and the sum of it.
fn disk(directory: &Path) -> (std::path::PathBuf, String) {
    let path = directory.join("nvme.img");
    let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 777) as u8).collect();
    fs::write(&path, &content).unwrap();
    (path, format!("{:x}", Sha256::digest(&content)))
}

/// A disk and its interrupts are where the guest expects them, on each of its queues.
fn assert_nvme(ended: &passthrough::Ended, sum: &str) {
    assert_eq!(ended.lines("nvme_sha256"), [format!("{DISK_BYTES} {sum}")]);
    let queues: usize = ended.lines("nvme_queues")[0].parse().unwrap();
    assert_eq!(queues, 2, "one a CPU");
    let interrupts = ended.lines("nvme_interrupts");
    // The queue for administration, and one for each of the others.
    assert_eq!(interrupts.len(), queues + 1, "{interrupts:?}");
    for line in interrupts {
        let (_, count) = line.split_once(' ').unwrap();
        assert_ne!(count, "0", "{line}");
    }
}

/// Registers, the pin, messages, and DMA both ways.
fn assert_edu(ended: &passthrough::Ended) {
    assert_eq!(ended.lines("edu_liveness"), ["ok"]);
    assert_eq!(ended.lines("edu_factorial"), ["polled 479001600", "intx 479001600", "msi 479001600"]);
    assert!(ended.lines("edu_dma")[0].starts_with("12288 "), "{}", ended.text());
    assert_eq!(ended.lines("edu_dma_interrupt"), ["msi"]);
}

const NVME: &str = "0000:01:00.0";
const EDU: &str = "0000:04:00.0";
const DISPLAY: &str = "0000:06:00.0";
const CARD: &str = "0000:07:00.0";
const SHARED_MEMORY: &str = "0000:08:00.0";

fn host_with_all_devices(bed: &Bed, disk: &Path, wire: &Wire) -> Host {
    let description = passthrough::host()
        .unwrap()
        .kernel_flavour(KernelFlavour::Iommufd)
        // Built in, it would write to the display's memory.
        .kernel_arg("initcall_blacklist=bochs_pci_driver_init")
        .wire(wire)
        .device(Device::root_port(Device::nvme(disk, "abc")))
        .device(Device::root_port(Device::switch([DeviceKind::Edu.into(), DeviceKind::Edu.into()])))
        .device(Device::root_port(DeviceKind::BochsDisplay.into()))
        .device(Device::root_port(Device::from(DeviceKind::E1000e).property("netdev", "wire0")))
        .device(Device::root_port(DeviceKind::IvshmemPlain { size_mib: 16 << 10 }.into()));
    bed.boot(description).unwrap()
}

#[test]
fn devices_do_in_a_guest_what_they_do_on_the_host() {
    let files = tempfile::tempdir().unwrap();
    let (disk, sum) = disk(files.path());
    let wire = Wire::new("wire0").unwrap();
    let bed = Bed::new().unwrap();
    let host = host_with_all_devices(&bed, &disk, &wire);
    for backend in BACKENDS {
        // The image is the same again: blocks that a guest wrote are in it otherwise.
        assert_eq!(self::disk(files.path()).1, sum);
        bind(&host, &[NVME, EDU, DISPLAY, CARD, SHARED_MEMORY]).unwrap();
        let before = (leftovers::census(&host).unwrap(), pinned_pages(&host).unwrap());

        all_at_once(&host, backend, &wire, &sum);
        what_the_display_shows_is_still_there(&host);
        memory_and_disk_survive_a_reboot(&host, backend);
        killed_while_a_device_writes(&host, backend);

        let left = leftovers::new_since(&before.0, &leftovers::census(&host).unwrap());
        assert_eq!((left, pinned_pages(&host).unwrap()), (Vec::new(), before.1), "{backend}");
    }
}

fn all_at_once(host: &Host, backend: &str, wire: &Wire, sum: &str) {
    // What the first machine wrote to the display is there for the second.
    let (vram, found) = if backend == BACKENDS[0] {
        ("vram-zero", ("vram_zero", "yes"))
    } else {
        ("vram-check", ("vram_intact", VRAM))
    };
    let actions = format!("tree,bars,nvme,edu,e1000e,{vram},vram-fill lathe.frames={FRAMES}");
    let machine = Machine::new(&actions, &[NVME, EDU, DISPLAY, CARD]).backend(backend);
    let (ended, frames) = std::thread::scope(|scope| {
        let peer = scope.spawn(|| wire.echo(ETHER_TYPE, FRAMES, PATIENCE).unwrap());
        (machine.check(host).unwrap(), peer.join().unwrap())
    });
    insta::assert_snapshot!("tree_of_all_devices", ended.lines("tree").join("\n"));
    insta::assert_snapshot!("bars_of_all_devices", ended.lines("bar").join("\n"));
    assert_nvme(&ended, sum);
    assert_edu(&ended);
    let seen = frames.iter().fold(Sha256::new(), |sum, frame| sum.chain_update(&frame[14..]));
    let seen = format!("{FRAMES} {:x}", seen.finalize());
    assert_eq!(
        (ended.lines("e1000e_sent"), ended.lines("e1000e_received")),
        (vec![seen.clone()], vec![seen])
    );
    assert_eq!(
        (ended.lines(found.0), ended.lines("vram_filled")),
        (vec![found.1.to_owned()], vec![VRAM.to_owned()])
    );
    ended.check_peers(backend).unwrap();
}

/// A reset clears nothing in a display's memory: whoever gives it on has to.
fn what_the_display_shows_is_still_there(host: &Host) {
    unbind(host, DISPLAY).unwrap();
    let output = host.check(["device-test", "vram-check", &format!("device={DISPLAY}")]).unwrap();
    assert!(output.contains(&format!("vram_intact {VRAM}")), "{output}");
}

fn memory_and_disk_survive_a_reboot(host: &Host, backend: &str) {
    // What the host wrote is what the guest reads, to the end of 16 GiB.
    unbind(host, SHARED_MEMORY).unwrap();
    let device = format!("device={SHARED_MEMORY}");
    host.check(["device-test", "vram-fill", &device, "seed=5"]).unwrap();
    bind(host, &[SHARED_MEMORY]).unwrap();
    let devices = [NVME, SHARED_MEMORY];
    let machine = Machine::new("bars,nvme,vram-check,reboot lathe.mib=1 lathe.seed=5", &devices);
    let ended = machine.backend(backend).run(host).unwrap();
    assert_eq!(ended.0.status, Status::Exited(10), "{}\n{}", ended.text(), ended.stderr());
    assert!(
        ended.lines("bar").iter().any(|bar| bar.ends_with(" 0x400000000 mem 64 prefetch")),
        "{}",
        ended.text()
    );
    assert_eq!(ended.lines("vram_intact"), ["4194304"]);
    let written = ended.lines("nvme_written");

    // Pages between those that the host wrote.
    let again = Machine::new("nvme-verify,vram-fill lathe.seed=5 lathe.stride=12582912", &devices);
    let ended = again.backend(backend).check(host).unwrap();
    assert_eq!(ended.lines("nvme_written"), written);
    unbind(host, SHARED_MEMORY).unwrap();
    let output = host.check(["device-test", "vram-check", &device, "seed=5", "stride=12582912"]).unwrap();
    assert!(output.contains(&format!("vram_intact {}", ended.lines("vram_filled")[0])), "{output}");
}

fn killed_while_a_device_writes(host: &Host, backend: &str) {
    let pinned = pinned_pages(host).unwrap();
    let machine = |actions| Machine::new(actions, &[EDU, NVME]).backend(backend);
    let mut running = machine("edu-loop lathe.rounds=1").start(host).unwrap();
    running.wait_for("plugged", 1).unwrap();
    assert!(
        pinned_pages(host).unwrap() >= pinned + (256 << 8),
        "guest memory is pinned: {}",
        running.text().unwrap()
    );
    running.process.signal(9).unwrap();
    running.process.wait(PATIENCE).unwrap();
    assert_eq!(pinned_pages(host).unwrap(), pinned);
    // The control socket of the dead one is in the way of nobody.
    let again = machine("edu,nvme-verify lathe.seed=5").check(host).unwrap();
    assert_edu(&again);
    host.shell(&format!("rm -f {}", passthrough::SOCKET)).unwrap();
}
