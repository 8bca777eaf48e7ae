//! What users see of GPUs: real display controllers on emulated hosts, on root ports, behind a switch
//! and on a shared bus, with an IOMMU and without.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lathe_api::gpu::{BarKind, DeviceCheck, Gpu, GpuState, Severity};
use lathe_api::job::{Job, JobState};
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};
use lathe_testbed::{Bed, Device, DeviceKind, Host, HostDescription, Iommu, Status};

/// One alone, one below a switch that has no ACS, beside a network card, and one that shares a
/// conventional bus with another device. A host with all of these and 3 GiB of memory stops before its
/// kernel starts (QEMU 10.0.2): the one that has them has 1 GiB.
fn devices() -> Vec<Device> {
    vec![
        Device::root_port(DeviceKind::BochsDisplay.into()),
        Device::root_port(Device::switch([DeviceKind::BochsDisplay.into(), DeviceKind::E1000e.into()])),
        Device::pci_bridge([Device::other("secondary-vga"), DeviceKind::Edu.into()]),
    ]
}

fn host(iommu: Iommu) -> (Bed, Host) {
    let bed = Bed::new().unwrap();
    let mut description = HostDescription::new("n1").memory_mib(1024).disk_mib(0).iommu(iommu);
    description.devices = devices();
    for name in ["lathe", "lathe-agent"] {
        description = description.file(artefacts::binary(name).unwrap(), format!("/usr/bin/{name}"));
    }
    let host = bed.boot(description).unwrap();
    (bed, host)
}

fn gpus(host: &Host) -> Vec<Gpu> {
    serde_json::from_str(&host.check(["lathe", "--json", "gpu", "list", "--host"]).unwrap()).unwrap()
}

/// The lines of `lathe gpu check`, and its exit status.
fn check(host: &Host, addresses: &[&str]) -> (String, Status) {
    let words = ["lathe", "gpu", "check"].iter().chain(addresses).copied();
    let output = host.command(words).unwrap().run().unwrap();
    (output.text(), output.status)
}

fn names(addresses: &[lathe_api::HostPciAddress]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn gpus_are_found_with_their_place_and_checked_with_one_line_a_problem() {
    let (_bed, host) = host(Iommu::Intel);
    let gpus = gpus(&host);
    let found: Vec<_> = gpus.iter().map(|gpu| (gpu.address.to_string(), gpu.is_usable())).collect();
    let [alone, switched, shared] = ["0000:01:00.0", "0000:04:00.0", "0000:06:01.0"];
    assert_eq!(found, [(alone.into(), true), (switched.into(), true), (shared.into(), false)]);
    assert_eq!(names(&gpus[0].path), ["0000:00:01.0"]);
    assert_eq!(names(&gpus[1].path), ["0000:00:04.0", "0000:02:00.0", "0000:03:00.0"]);
    for gpu in &gpus {
        // QEMU's display controllers have 16 MiB of video memory in BAR 0.
        assert_eq!(
            (gpu.model.as_str(), gpu.memory_bytes, gpu.state),
            ("1234:1111", 16 << 20, GpuState::Free)
        );
        assert_eq!(
            (gpu.bars[0].index, gpu.bars[0].kind, gpu.bars[0].prefetchable),
            (0, BarKind::Memory32, true)
        );
        assert!(gpu.iommu_group.is_some() && gpu.nvml.is_none());
    }
    assert_eq!(
        gpus[2].group_members.iter().map(|it| it.address.to_string()).collect::<Vec<_>>(),
        ["0000:06:02.0"]
    );

    let (text, status) = check(&host, &[]);
    assert_eq!(status, Status::Exited(4), "{text}");
    let lines: Vec<_> = text.lines().collect();
    let group = gpus[2].iommu_group.unwrap();
    assert_eq!(lines[0], format!("ok      {alone} display controller 1234:1111: can be passed through"));
    assert_eq!(lines[1], format!("ok      {switched} display controller 1234:1111: can be passed through"));
    assert!(lines[2].starts_with(&format!(
        "warns   {switched} 0000:03:00.0 above it (switch downstream port) has no ACS"
    )));
    let mates =
        format!("blocks  {shared} it shares IOMMU group {group} with 0000:06:02.0 (device, driver none)");
    assert!(lines[3].starts_with(&mates), "{text}");
    assert!(
        lines[4].starts_with(&format!("blocks  {shared} it can only be reset by its bus, which it shares"))
    );
    assert!(lines[5].contains("(bridge to a conventional PCI bus)"), "{text}");
    assert_eq!(lines.len(), 6, "{text}");
    assert_eq!(check(&host, &[alone]).1, Status::Exited(0));

    // What is no GPU, no device, or in use.
    host.shell("ip link set eth1 up").unwrap();
    for (address, words) in [
        ("0000:03:00.0", "it is a bridge"),
        ("0000:99:00.0", "there is no PCI device 0000:99:00.0"),
        ("0000:05:00.0", "the host's network interface eth1 is up"),
    ] {
        let (text, status) = check(&host, &[address]);
        assert_eq!(status, Status::Exited(4), "{text}");
        assert!(text.lines().any(|line| line.starts_with("blocks") && line.contains(words)), "{text}");
    }
    let (_, status) = check(&host, &["65:00.0"]);
    assert_eq!(status, Status::Exited(2));

    // Surprise removal.
    host.shell(&format!("echo 1 >/sys/bus/pci/devices/{alone}/remove")).unwrap();
    let (text, _) = check(&host, &[alone]);
    assert!(text.contains("there is no PCI device") && text.lines().count() == 1, "{text}");
}

#[test]
fn without_an_iommu_every_gpu_is_blocked_and_the_fix_is_named() {
    let (_bed, host) = host(Iommu::None);
    let json = host.command(["lathe", "--json", "gpu", "check"]).unwrap().run().unwrap();
    assert_eq!(json.status, Status::Exited(4));
    let checks: Vec<DeviceCheck> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(checks.len(), 3);
    for check in checks {
        let first = &check.problems[0];
        assert_eq!((first.severity, first.what.starts_with("the IOMMU is off")), (Severity::Blocks, true));
        assert!(first.fix.contains("amd_iommu=on"), "the emulated CPU is AMD's: {}", first.fix);
    }
    assert!(gpus(&host).iter().all(|gpu| !gpu.is_usable()));
}

#[test]
fn the_cluster_lists_gpus_and_a_job_that_waits_for_them_says_why() {
    let devices = vec![
        Device::root_port(DeviceKind::BochsDisplay.into()),
        Device::pci_bridge([Device::other("secondary-vga"), DeviceKind::Edu.into()]),
    ];
    let options = Options { hosts: 1, devices, ..Options::default() };
    let cluster = Cluster::start(&options).unwrap();
    let listed: Vec<serde_json::Value> = cluster.json(["gpu", "list"]).unwrap();
    let places: Vec<_> =
        listed.iter().map(|it| (it["node"].as_str().unwrap(), it["address"].as_str().unwrap())).collect();
    assert_eq!(places, [("n1", "0000:01:00.0"), ("n1", "0000:02:01.0")]);

    let image = artefacts::least_squares_image().unwrap();
    let added = cluster.lathe(["image", "add", "least-squares", image.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let file = cluster.scratch().join("gpus.toml");
    let spec = "name = \"gpus\"\nclass = \"microvm\"\nimage = \"least-squares\"\n[resources]\ngpus = 2\n";
    std::fs::write(&file, spec).unwrap();
    let submitted: Job = cluster.json(["job", "run", "--detach", file.to_str().unwrap()]).unwrap();
    let waiting = until("the job has a reason to wait", PATIENCE, || {
        let job: Job = cluster.json(["job", "show", &submitted.id])?;
        Ok(job.reason.is_some().then_some(job))
    });
    let waiting = waiting.unwrap();
    assert_eq!(waiting.state, JobState::Pending);
    let reason = waiting.reason.unwrap();
    let wanted =
        "needs 2 GPUs, the most that a ready node can give is 1: n1: 0000:02:01.0: it shares IOMMU group";
    assert!(reason.starts_with(wanted), "{reason}");
}
