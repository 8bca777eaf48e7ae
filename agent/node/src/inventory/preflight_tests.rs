use super::*;
use crate::inventory::config_space::tests::port;
use crate::inventory::fake::{FakeHost, two_gpus};

const GPU: &str = "0000:03:00.0";
const CARD: &str = "0000:00:05.0";

/// Problems of a function as lines of severity, what and fix.
fn lines(host: &FakeHost, address: &str) -> Vec<String> {
    let checks = crate::inventory::check(host.root(), &[address.parse().unwrap()]);
    let problems = checks.into_iter().flat_map(|check| check.problems);
    problems.map(|it| format!("{:?}: {} -> {}", it.severity, it.what, it.fix).to_lowercase()).collect()
}

fn has(host: &FakeHost, address: &str, severity: &str, words: &[&str]) {
    let lines = lines(host, address);
    let found = lines.iter().any(|line| line.starts_with(severity) && words.iter().all(|w| line.contains(w)));
    assert!(found, "no {severity} with {words:?} in {lines:#?}");
}

#[test]
fn a_good_gpu_has_nothing_in_its_way() {
    let host = two_gpus();
    assert_eq!(lines(&host, GPU), [] as [&str; 0]);
    let all = crate::inventory::check(host.root(), &[]);
    assert_eq!(all.iter().map(|check| check.address.to_string()).collect::<Vec<_>>(), [CARD, GPU]);
    assert_eq!(all[1].what, "3D controller 10de:2330");
}

#[test]
fn what_is_no_device_gets_one_line() {
    let host = two_gpus().file_of(CARD, "config", [0xff; 64]);
    for (address, words) in [
        ("0000:99:00.0", "there is no pci device 0000:99:00.0"),
        ("0000:02:04.0", "it is a bridge"),
        (CARD, "does not answer"),
    ] {
        assert_eq!(lines(&host, address).len(), 1);
        has(&host, address, "blocks", &[words]);
    }
}

#[test]
fn an_iommu_that_is_off_is_told_apart_by_vendor_and_firmware() {
    let off = || {
        two_gpus()
            .without("sys/kernel/iommu_groups")
            .without(&format!("sys/bus/pci/devices/{GPU}/iommu_group"))
    };
    has(&off(), GPU, "blocks", &["iommu is off", "enable vt-d", "intel_iommu=on"]);
    let firmware = off().file("sys/firmware/acpi/tables/DMAR", "");
    has(&firmware, GPU, "blocks", &["the firmware has vt-d on", "intel_iommu=on"]);
    let amd = off().file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    has(&amd, GPU, "blocks", &["amd-vi", "amd_iommu=on"]);
    let left_out = two_gpus().without(&format!("sys/bus/pci/devices/{GPU}/iommu_group"));
    has(&left_out, GPU, "blocks", &["no iommu group"]);
}

#[test]
fn group_mates_are_listed_with_their_drivers() {
    has(&two_gpus(), CARD, "warns", &["other functions", "0000:00:05.1 (audio, driver snd_hda_intel)"]);
    let disk = "0000:04:00.0";
    let host = two_gpus().function(disk, 0x01_08_02).bound(disk, "nvme").group(12, &[disk]);
    has(&host, GPU, "blocks", &["iommu group 12", "0000:04:00.0 (nvme disk, driver nvme)", "acs"]);
}

#[test]
fn ports_without_acs_are_named_where_they_made_a_group() {
    let switch = |acs| two_gpus().file_of("0000:02:04.0", "config", port(6, acs));
    assert_eq!(lines(&switch(None), GPU), [] as [&str; 0], "the kernel found it isolated");
    let shared = |acs| switch(acs).group(12, &["0000:02:04.0"]);
    has(&shared(None), GPU, "warns", &["0000:02:04.0", "switch downstream port", "no acs"]);
    has(&shared(Some(0)), GPU, "warns", &["0000:02:04.0", "it is off"]);
    assert_eq!(lines(&shared(Some(0x1d)), GPU), [] as [&str; 0]);
    let conventional =
        two_gpus().file_of("0000:02:04.0", "config", port(7, None)).group(12, &["0000:02:04.0"]);
    has(&conventional, GPU, "warns", &["conventional pci bus", "pci express slot"]);
}

#[test]
fn what_the_host_lacks_is_named_with_its_remedy() {
    for (gone, words) in [
        ("proc/interrupts", ["interrupt remapping is off", "x2apic"]),
        ("sys/bus/pci/drivers/vfio-pci", ["vfio-pci is not loaded", "modprobe vfio-pci"]),
        ("dev/vfio/vfio", ["neither /dev/vfio/vfio nor /dev/iommu", "modprobe vfio_iommu_type1"]),
    ] {
        has(&two_gpus().without(gone), GPU, "blocks", &words);
    }
    let allowed = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    has(&two_gpus().without("proc/interrupts").file(allowed, "Y\n"), GPU, "warns", &["interrupt remapping"]);
    let cdev = two_gpus().without("dev/vfio/vfio").file("dev/iommu", "");
    assert_eq!(lines(&cdev, GPU), [] as [&str; 0]);
}

#[test]
fn interrupts_of_hundreds_of_cpus_are_read() {
    // A line has 11 characters a CPU.
    let line = format!("  1: {} IR-IO-APIC   1-edge   i8042\n", "         0 ".repeat(512));
    let long = two_gpus().file("proc/interrupts", line.repeat(1000));
    assert_eq!(lines(&long, GPU), [] as [&str; 0]);
}

#[test]
fn devices_that_cannot_be_taken_or_cleaned_are_refused() {
    has(&two_gpus().file_of(CARD, "boot_vga", "1\n"), CARD, "blocks", &["console", "boot vga"]);
    let emptied = two_gpus().file_of(GPU, "reset_method", "\n");
    has(&emptied, GPU, "blocks", &["must not be reset", "echo default > ", "0000:03:00.0/reset_method"]);
    let none = || two_gpus().without(&format!("sys/bus/pci/devices/{GPU}/reset_method"));
    has(&none(), GPU, "blocks", &["no way to reset"]);
    let subordinate = none().file_of("0000:02:04.0", "reset_subordinate", "");
    assert_eq!(lines(&subordinate, GPU), [] as [&str; 0], "the port above resets all of it");
    let shared = subordinate.function("0000:00:01.0/0000:01:00.0/0000:02:04.0/0000:03:01.0", 0x01_08_02);
    has(&shared, GPU, "blocks", &["no way to reset"]);
    let beside = two_gpus().function("0000:00:01.0/0000:01:00.0/0000:02:04.0/0000:03:01.0", 0x01_08_02);
    assert_eq!(lines(&beside, GPU), [] as [&str; 0], "it has a reset of its own");
    let bus_only = beside.file_of(GPU, "reset_method", "bus\n");
    has(&bus_only, GPU, "blocks", &["by its bus, which it shares with 0000:03:01.0"]);
    has(&two_gpus().file_of(GPU, "sriov_numvfs", "16\n"), GPU, "blocks", &["16 virtual functions", "echo 0"]);
    let child = two_gpus().link(&format!("sys/bus/pci/devices/{GPU}/physfn"), "../0000:00:05.0");
    has(&child, GPU, "warns", &["virtual function of 0000:00:05.0"]);
}

#[test]
fn bars_have_to_fit_into_cpu_and_iommu() {
    let narrow = two_gpus().file("proc/cpuinfo", "address sizes\t: 37 bits physical, 48 bits virtual\n");
    has(&narrow, GPU, "blocks", &["bar 2 of 128 gib", "37 bits in the cpu, ? in the iommu"]);
    // VT-d with 39 bits, both by width and by depth: a place is left at 128 GiB, until it is reserved.
    let capability = format!("{:x}\n", 38_u64 << 16 | 2 << 8);
    let vtd = || two_gpus().file_of(GPU, "iommu/intel-iommu/cap", &capability);
    assert_eq!(lines(&vtd(), GPU), [] as [&str; 0]);
    let regions =
        "0x00000000fee00000 0x00000000feefffff msi\n0x0000002000000000 0x0000007fffffffff reserved\n";
    let full = vtd().file("sys/kernel/iommu_groups/12/reserved_regions", regions);
    has(&full, GPU, "blocks", &["bar 2 of 128 gib", "46 bits in the cpu, 39 in the iommu"]);
}

#[test]
fn bars_without_an_address_are_named() {
    let line = "0x0000000000000000 0x00000003ffffffff 0x000000002014220c\n";
    has(&two_gpus().file_of(GPU, "resource", line), GPU, "blocks", &["bar 0 of 16 gib", "above 4g"]);
}

#[test]
fn users_on_the_host_are_named() {
    let held = two_gpus()
        .file(&format!("proc/driver/nvidia/gpus/{GPU}/information"), "Model: x\nDevice Minor: \t 2\n")
        .file("proc/41/comm", "python3\n")
        .link("proc/41/fd/7", "/dev/nvidia2")
        .file("proc/42/comm", "nvidia-persiste\n")
        .link("proc/42/fd/3", "/dev/nvidia2")
        .file("proc/43/comm", "other\n")
        .link("proc/43/fd/3", "/dev/nvidia20");
    has(&held, GPU, "blocks", &["nvidia-persiste (process 42), python3 (process 41)", "nvidia-persistenced"]);
    assert!(!lines(&held, GPU).iter().any(|line| line.contains("process 43")));

    let guest = two_gpus().file("proc/50/comm", "lathe-vmm\n").link("proc/50/fd/9", "/dev/vfio/3");
    has(&guest, CARD, "blocks", &["a guest has it: lathe-vmm (process 50)"]);
    let root = guest.root();
    let problems = crate::inventory::read(root, &[]).gpus.remove(0).problems;
    assert!(!problems.iter().any(|it| it.what.contains("guest")), "use is a state, not a problem");

    let disk = "0000:04:00.0";
    let mounted = two_gpus()
        .function(disk, 0x01_08_02)
        .file_of(disk, "reset_method", "flr\n")
        .file_of(disk, "nvme/nvme0/nvme0n1/size", "1\n")
        .group(20, &[disk])
        .file("proc/self/mounts", "/dev/nvme0n10 /x ext4 rw 0 0\n/dev/nvme0n1p2 /data ext4 rw 0 0\n");
    has(&mounted, disk, "blocks", &["mounted at /data ->"]);

    let nic = "0000:05:00.0";
    let up =
        two_gpus().function(nic, 0x02_00_00).group(21, &[nic]).file_of(nic, "net/eth0/flags", "0x1003\n");
    has(&up, nic, "blocks", &["eth0 is up", "ip link set eth0 down"]);
}

#[test]
fn nvswitches_are_mentioned() {
    let switch = "0000:06:00.0";
    let host = two_gpus().function(switch, CLASS_OTHER_BRIDGE).file_of(switch, "vendor", "0x10de\n");
    has(&host, GPU, "warns", &["1 nvswitch", "fabric manager"]);
    assert!(!lines(&host, CARD).iter().any(|line| line.contains("nvswitch")), "another vendor's");
}
