//! Devices lent and taken back on an emulated host, with real drivers, a real IOMMU and real memory: displays
//! stand for GPUs. What a guest would do with a device while it is lent is done by the host here.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lathe_api::MemorySize;
use lathe_api::artefact::{Dataset, DatasetFile, Digest, Image};
use lathe_api::job::{IsolationClass, Resources};
use lathe_api::sandbox::{Desired, SandboxDataset, SandboxSpec};
use lathe_e2e::artefacts;
use lathe_e2e::wait::{PATIENCE, until};
use lathe_testbed::{Bed, Device, Host, HostDescription, Process};
use serde_json::Value;

const GPU: &str = "0000:01:00.0";
const BARE: &str = "0000:02:00.0";
const LARGE: &str = "0000:03:00.0";
const DISK: &str = "0000:04:00.0";
const NIC: &str = "0000:05:00.0";
const SHARED: [&str; 2] = ["0000:07:01.0", "0000:07:02.0"];
/// A bridge to a conventional bus with slots, and the display alone behind it.
const BRIDGE: &str = "0000:08:00.0";
const BEHIND: &str = "0000:09:01.0";

/// `01:00.0` has the driver `bochs-drm`, `02:00.0` and `03:00.0` (256 MiB) have none, `04:00.0` is a disk,
/// `05:00.0` a network card, behind a bridge two displays share a group, and one is alone behind another.
fn host() -> (Bed, Host, tempfile::NamedTempFile) {
    let bed = Bed::new().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(64 << 20).unwrap();
    let display = || Device::other("bochs-display");
    let description = HostDescription::new("n1")
        .memory_mib(2048)
        .device(Device::root_port(display()))
        .device(Device::root_port(display()))
        .device(Device::root_port(display().property("vgamem", "256M")))
        .device(Device::root_port(Device::nvme(disk.path(), "scratch")))
        .device(Device::root_port(Device::other("e1000e")))
        .device(Device::root_port(Device::pci_bridge([display(), display()])))
        .device(Device::root_port(Device::pci_bridge([display()])))
        .file(artefacts::binary("lathe-agent").unwrap(), "/usr/bin/lathe-agent");
    let host = bed.boot(description).unwrap();
    host.shell("modprobe bochs; modprobe vfio-pci").unwrap();
    for bare in [BARE, LARGE] {
        host.shell(&format!("echo {bare} >/sys/bus/pci/drivers/bochs-drm/unbind")).unwrap();
    }
    assert_eq!(driver(&host, GPU), "bochs-drm");
    (bed, host, disk)
}

fn driver(host: &Host, address: &str) -> String {
    let link = format!("readlink /sys/bus/pci/devices/{address}/driver || echo none");
    host.shell(&link).unwrap().trim().rsplit('/').next().unwrap().to_owned()
}

/// Runs `lathe-agent gpus`: whether it succeeded, and all that it said.
fn gpus(host: &Host, args: &str) -> (bool, String) {
    let argv = ["lathe-agent", "gpus"].into_iter().chain(args.split_whitespace());
    let output = host.command(argv).unwrap().limit(Duration::from_secs(300)).run().unwrap();
    (output.status.success(), output.text() + &String::from_utf8_lossy(&output.stderr))
}

fn succeeds(host: &Host, args: &str) -> String {
    let (succeeded, text) = gpus(host, args);
    assert!(succeeded, "{args}: {text}");
    text
}

fn fails(host: &Host, args: &str) -> String {
    let (succeeded, text) = gpus(host, args);
    assert!(!succeeded, "{args}: {text}");
    text
}

/// A device's line in the list.
fn row(host: &Host, address: &str) -> Value {
    let text = host.check(["lathe-agent", "gpus", "list", "--json"]).unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    rows.into_iter().find(|row| row["address"] == address).unwrap()
}

fn state(host: &Host, address: &str) -> String {
    row(host, address)["state"].as_str().unwrap().to_owned()
}

/// The device decodes its memory, until it is reset.
fn open_memory(host: &Host, address: &str) -> u64 {
    let device = format!("/sys/bus/pci/devices/{address}");
    // Memory space enable (PCIe 6.0 §7.5.1.1.3).
    host.shell(&format!("printf '\\002\\000' | dd of={device}/config bs=2 seek=2 conv=notrunc")).unwrap();
    let start = host.shell(&format!("head -n 1 {device}/resource")).unwrap();
    let start = start.split_whitespace().next().unwrap().trim_start_matches("0x").to_owned();
    u64::from_str_radix(&start, 16).unwrap()
}

/// Places in 16 MiB of memory: both ends, and a few between. busybox maps the 32 bytes behind a place.
const PLACES: [u64; 5] = [0, 4, 0x12_3458, 0x80_0000, 0xff_ffd0];

fn write_memory(host: &Host, address: &str) {
    let base = open_memory(host, address);
    for place in PLACES {
        host.shell(&format!("devmem {:#x} 32 0x5ec2e7", base + place)).unwrap();
    }
    assert!(read_memory(host, address).iter().all(|word| word == "0x005EC2E7"));
}

fn read_memory(host: &Host, address: &str) -> Vec<String> {
    let base = open_memory(host, address);
    let read = |place: u64| host.shell(&format!("devmem {:#x} 32", base + place)).unwrap().trim().to_owned();
    PLACES.into_iter().map(read).collect()
}

#[test]
fn what_a_tenant_leaves_is_gone_before_anybody_else_has_the_device() {
    let (_bed, host, _disk) = host();
    // A device without a driver goes back to none: its memory can be looked at right after.
    succeeds(&host, &format!("take {BARE}"));
    assert_eq!((driver(&host, BARE).as_str(), state(&host, BARE).as_str()), ("vfio-pci", "in_use"));
    write_memory(&host, BARE);
    let said = succeeds(&host, &format!("release {BARE}"));
    assert!(said.contains("reset by bus") && said.contains("memory proven zero: 16 MiB"), "{said}");
    assert_eq!((driver(&host, BARE).as_str(), state(&host, BARE).as_str()), ("none", "free"));
    assert!(read_memory(&host, BARE).iter().all(|word| word == "0x00000000"));

    // One that the host uses comes from its driver and goes back to it.
    let said = succeeds(&host, &format!("take {GPU} --as tenant-a"));
    assert!(said.contains("operator tenant-a"), "{said}");
    write_memory(&host, GPU);
    let refused = fails(&host, &format!("take {GPU} --as tenant-b"));
    assert!(refused.contains("operator tenant-a has it"), "{refused}");
    succeeds(&host, &format!("release {GPU}"));
    assert_eq!(driver(&host, GPU), "bochs-drm");
    succeeds(&host, &format!("take {GPU} --as tenant-b"));
    assert!(read_memory(&host, GPU).iter().all(|word| word == "0x00000000"));

    // A driver of the bridge above would keep the group the host's: it goes along, there and back.
    let behind = || [BRIDGE, BEHIND].map(|address| driver(&host, address));
    assert_eq!(behind(), ["shpchp", "bochs-drm"]);
    succeeds(&host, &format!("take {BEHIND}"));
    assert_eq!(behind(), ["none", "vfio-pci"]);
    succeeds(&host, &format!("release {BEHIND}"));
    assert_eq!(behind(), ["shpchp", "bochs-drm"]);

    // Devices without memory of their own are reset, and no more is claimed.
    let said = succeeds(&host, &format!("take {NIC} {DISK}"));
    assert_eq!(said.matches("reset only: no memory BAR").count(), 2, "{said}");
    assert_eq!([NIC, DISK].map(|address| driver(&host, address)), ["vfio-pci", "vfio-pci"]);
    // Lathe leaves, and all is as it was.
    host.check(["lathe-agent", "reset"]).unwrap();
    assert_eq!([GPU, NIC, DISK].map(|address| driver(&host, address)), ["bochs-drm", "e1000e", "nvme"]);
    let overrides = host.shell("cat /sys/bus/pci/devices/*/driver_override | sort -u").unwrap();
    assert_eq!(overrides.trim(), "(null)");
}

/// Runs `args` with an abort at every effect until it comes through; says at how many it died.
fn abort_everywhere(host: &Host, before: &str, args: &str, address: &str) -> u32 {
    for at in 1.. {
        if !before.is_empty() {
            succeeds(host, before);
            write_memory(host, address);
        }
        let (succeeded, _) = gpus(host, &format!("{args} --abort-at {at}"));
        // An agent that starts does the same.
        let text = succeeds(host, "recover");
        match state(host, address).as_str() {
            "free" => assert_eq!(driver(host, address), "bochs-drm", "after effect {at}: {text}"),
            "in_use" => {
                assert_eq!(driver(host, address), "vfio-pci", "after effect {at}: {text}");
                succeeds(host, &format!("release {address}"));
            }
            other => panic!("{other} after effect {at}: {text}"),
        }
        if succeeded {
            return at - 1;
        }
    }
    unreachable!()
}

#[test]
fn a_crash_at_any_step_leaves_a_device_that_is_the_host_s_or_lent_and_never_between() {
    let (_bed, host, _disk) = host();
    let taking = abort_everywhere(&host, "", &format!("take {GPU}"), GPU);
    let releasing = abort_everywhere(&host, &format!("take {GPU}"), &format!("release {GPU}"), GPU);
    println!("died at {taking} places of taking and {releasing} of releasing");
    // Two states and, each before and after, override, unbind, reset, scrub and bind or restore.
    assert!(taking >= 12 && releasing >= 12);
    succeeds(&host, &format!("take {GPU}"));
    assert!(read_memory(&host, GPU).iter().all(|word| word == "0x00000000"));
    assert_eq!(host.shell(&format!("cat /sys/bus/pci/devices/{GPU}/reset_method")).unwrap().trim(), "bus");
}

#[test]
fn what_fails_is_quarantined_and_the_host_goes_on() {
    let (_bed, host, _disk) = host();
    // Its reset is gone while a tenant has it.
    succeeds(&host, &format!("take {GPU} {BARE}"));
    write_memory(&host, GPU);
    let methods = format!("/sys/bus/pci/devices/{GPU}/reset_method");
    host.shell(&format!("echo >{methods}")).unwrap();
    let said = fails(&host, &format!("release {GPU} {BARE}"));
    assert!(said.contains("no reset that the kernel can do"), "{said}");
    // The other is not held up, and the sick one is nobody's.
    assert_eq!([GPU, BARE].map(|address| state(&host, address)), ["quarantined", "free"]);
    assert_ne!(driver(&host, GPU), "bochs-drm");
    succeeds(&host, "recover");
    let refused = fails(&host, &format!("take {GPU}"));
    assert!(refused.contains("release-quarantine"), "{refused}");
    fails(&host, &format!("release-quarantine {GPU}"));
    host.shell(&format!("echo bus >{methods}")).unwrap();
    succeeds(&host, &format!("release-quarantine {GPU}"));
    assert_eq!((state(&host, GPU).as_str(), driver(&host, GPU).as_str()), ("free", "bochs-drm"));

    // It is torn out in the middle of a scrub: whatever does that survives it and says so.
    let mut taking = host.spawn(["lathe-agent", "gpus", "take", LARGE], "/run/take.log").unwrap();
    let record = format!("/var/lib/lathe/gpus/{LARGE}.json");
    until("the scrub has begun", PATIENCE, || {
        let text = host.read_file(&record).unwrap_or_default();
        Ok(String::from_utf8_lossy(&text).contains("\"scrub\"").then_some(()))
    })
    .unwrap();
    host.tear_out(LARGE).unwrap();
    let status = taking.wait(Duration::from_secs(120)).unwrap().unwrap();
    assert!(!status.success());
    let reason = row(&host, LARGE)["reason"].as_str().unwrap().to_owned();
    println!("torn out while it was scrubbed: {reason}");
    assert_eq!(state(&host, LARGE), "quarantined");

    // And while a tenant has it.
    succeeds(&host, &format!("take {BARE}"));
    host.tear_out(BARE).unwrap();
    fails(&host, &format!("release {BARE}"));
    let reason = row(&host, BARE)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("does not answer"), "{reason}");
    succeeds(&host, &format!("take {GPU}"));
    succeeds(&host, &format!("release {GPU}"));
}

#[test]
fn mistakes_are_refused_in_one_line_and_change_nothing() {
    let (_bed, host, _disk) = host();
    host.shell("mkfs.ext4 -q /dev/nvme0n1 && mkdir -p /mnt/d && mount /dev/nvme0n1 /mnt/d").unwrap();
    let before =
        host.shell("ls -l /sys/bus/pci/devices/*/driver; cat /sys/bus/pci/devices/*/driver_override");
    for (args, why) in [
        (format!("take {}", SHARED[0]), format!("shares its IOMMU group with {}", SHARED[1])),
        ("take 0000:00:05.0".into(), "it is a bridge".into()),
        ("take 0000:77:00.0".into(), "there is no such device".into()),
        (format!("take {DISK}"), "mounted at /mnt/d".into()),
        ("take --count 9".into(), "9 GPUs are wanted".into()),
        (format!("release {NIC}"), "was not taken by hand".into()),
        (format!("release-quarantine {NIC}"), "is not quarantined".into()),
    ] {
        let said = fails(&host, &args);
        assert!(said.contains(&why), "{args}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
    let after = host.shell("ls -l /sys/bus/pci/devices/*/driver; cat /sys/bus/pci/devices/*/driver_override");
    assert_eq!(before.unwrap(), after.unwrap());
    let taken = succeeds(&host, "take --count 2 --gpu-devices 0000:05:00.0,0000:02:00.0");
    assert!(taken.contains(NIC) && taken.contains(BARE), "{taken}");
}

/// Blobs of the image and the dataset, in a folder, and the specification of a sandbox that waits for a
/// member of its gang that never comes.
fn waiting_sandbox(folder: &Path) -> SandboxSpec {
    let archive = artefacts::least_squares_image().unwrap();
    let unpacked = Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(folder).status().unwrap();
    assert!(unpacked.success());
    let index: Value = serde_json::from_slice(&fs::read(folder.join("index.json")).unwrap()).unwrap();
    let manifest = &index["manifests"][0];
    let csv = fs::read(artefacts::longley()).unwrap();
    let digest = Digest::of(&csv);
    fs::write(folder.join("blobs/sha256").join(digest.hex()), &csv).unwrap();
    let files = vec![DatasetFile { path: "longley.csv".into(), digest, size_bytes: csv.len() as u64 }];
    let dataset = Dataset { name: "longley".into(), digest: Dataset::digest_of(&files), files };
    let args = "fit --data /data/longley.csv --response TOTEMP --features GNP --world-size 99 \
                --connect-timeout 3600";
    SandboxSpec {
        id: "gpu-0-1".into(),
        tenant: "default".into(),
        job: "gpu".into(),
        rank: 0,
        desired: Desired::Running,
        class: IsolationClass::Microvm,
        image: Image {
            name: "least-squares".into(),
            digest: manifest["digest"].as_str().unwrap().parse().unwrap(),
            size_bytes: manifest["size"].as_u64().unwrap(),
        },
        entrypoint: None,
        args: args.split_whitespace().map(str::to_owned).collect(),
        env: Vec::new(),
        resources: Resources { memory: MemorySize::from_mib(128), gpus: 1, ..Resources::default() },
        gpus: Vec::new(),
        numa_node: None,
        datasets: vec![SandboxDataset { dataset, mount: "/data".into() }],
        address: "10.42.0.2".into(),
        port: None,
        hosts: Vec::new(),
        grace_seconds: 1,
    }
}

#[test]
fn a_sandbox_has_its_device_until_nothing_of_it_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let spec = waiting_sandbox(folder.path());
    let guest = artefacts::guest_bundle().unwrap();
    let bed = Bed::new().unwrap();
    let mut description = HostDescription::new("n1")
        .device(Device::root_port(Device::other("bochs-display")))
        .share(folder.path())
        .file(artefacts::binary("lathe-agent").unwrap(), "/usr/bin/lathe-agent")
        .file(artefacts::binary("lathe-vmm").unwrap(), "/usr/bin/lathe-vmm");
    for name in ["vmlinuz", "initramfs", "cmdline"] {
        description = description.file(guest.join(name), format!("/usr/lib/lathe/guest/{name}"));
    }
    let host = bed.boot(description).unwrap();
    host.shell("modprobe bochs").unwrap();
    host.write_file("/run/spec.json", serde_json::to_vec(&spec).unwrap()).unwrap();
    let run = ["lathe-agent", "sandbox", "run", "/run/spec.json", "--blobs", "/share/blobs/sha256"];
    let mut agent = host.spawn(run, "/run/first.log").unwrap();
    until_running(&host, &mut agent, "/run/first.log");
    assert_eq!(row(&host, GPU)["owner"], "sandbox gpu-0-1");
    assert_eq!(driver(&host, GPU), "vfio-pci");
    let machine = host.read_file("/var/lib/lathe/sandboxes/gpu-0-1/vm.json").unwrap();
    let machine: Value = serde_json::from_slice(&machine).unwrap();
    assert_eq!(machine["passthrough"][0]["address"], GPU);
    // All of its memory is pinned for the device.
    let limits = host.shell("cat /proc/$(pidof lathe-vmm)/limits | grep 'locked memory'").unwrap();
    assert!(limits.contains("unlimited"), "{limits}");

    // The agent dies, and its sandbox has the device still.
    agent.signal(9).unwrap();
    agent.wait(PATIENCE).unwrap();
    succeeds(&host, "recover");
    assert_eq!(state(&host, GPU), "in_use");
    assert!(fails(&host, &format!("take {GPU}")).contains("sandbox gpu-0-1 has it"));
    // The next one takes it over, and gives the device back with the rest.
    let mut agent = host.spawn(run, "/run/second.log").unwrap();
    until_running(&host, &mut agent, "/run/second.log");
    let caught = format!("grep SigCgt /proc/{}/status", agent.pid());
    until("it listens to signals", PATIENCE, || {
        let text = host.shell(&caught)?;
        let mask = u64::from_str_radix(text.trim_start_matches("SigCgt:").trim(), 16)?;
        // Signal n is bit n - 1.
        Ok((mask & 1 << 14 != 0).then_some(()))
    })
    .unwrap();
    agent.signal(15).unwrap();
    agent.wait(Duration::from_secs(120)).unwrap().unwrap();
    assert_eq!((state(&host, GPU).as_str(), driver(&host, GPU).as_str()), ("free", "bochs-drm"));
    assert!(row(&host, GPU)["last"].as_str().unwrap().contains("memory proven zero: 16 MiB"));
}

/// Waits until the sandbox's supervisor says that its task runs.
fn until_running(host: &Host, agent: &mut Process, log: &str) {
    let status = "/var/lib/lathe/sandboxes/gpu-0-1/status.json";
    let running = until("the task runs", PATIENCE, || {
        if let Some(ended) = agent.wait(Duration::ZERO)? {
            anyhow::bail!("the agent ended: {ended:?}");
        }
        let text = host.read_file(status).unwrap_or_default();
        Ok(String::from_utf8_lossy(&text).contains("\"running\"").then_some(()))
    });
    if let Err(error) = running {
        panic!("{error:#}: {}", String::from_utf8_lossy(&host.read_file(log).unwrap_or_default()));
    }
}
