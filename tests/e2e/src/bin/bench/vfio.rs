//! Passed-through devices: reads of an NVMe disk in a guest and on its host, and how long attaching takes
//! against the size of memory, of its pages and of the device's BAR.
//!
//! `nvme_4k_read` is how many random reads of 4 KiB a second are answered with 32 under way, the depth at which
//! makers of disks state such figures; `nvme_4k_read_depth8` and `nvme_4k_read_depth1` are the same with fewer.
//! All readers have the same kernel, one CPU, so one queue of the disk's, and neither waits by halting nor has
//! mitigations of CPU flaws, since the host of this clock does not (`guest-halting` does wait so).
//!
//! The host's clock counts instructions. So the figures compare what software does for a read, with a disk that
//! takes next to no time: a real one's 10 to 100 µs would hide most of the difference of single reads. An interrupt
//! costs a guest two exits, one itself and one by its end, none of them to the VMM, and is shared by the reads
//! that ended together: with one read under way there is one for each. The second exit is there on emulated hosts,
//! where lathe-vmm hides KVM's paravirtual end of interrupt (tests/testbed/README.md). It costs more than on metal,
//! too: QEMU's SVM does not save where the next instruction is, so KVM decodes the one that made the exit
//! (`nvme_4k_read_emulated`).
//!
//! `attach_*` counts the kernel's work a page (clearing, pinning, entries of the IOMMU's tables) rather than the
//! memory's speed, while waits that the kernel imposes, as after a reset, are whole. Attaching is measured with a
//! guest that does nothing, by lathe-vmm's own metrics; `attach_bind`, which is the agent's part, by the same
//! writes to sysfs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lathe_e2e::{artefacts, tiny_guest};
use lathe_testbed::{Bed, Device, DeviceKind, Host, HostDescription, HostFile, KernelFlavour};
use serde::Deserialize;
use serde_json::json;

use crate::qemu;
use crate::record::{self, Record};

/// Of the guest's random reads, in one run each. What differs between the first and the last is due to reads
/// alone, without the boot.
const GUEST_READS: [u32; 3] = [512, 1024, 1536];

/// Of the host's, in each run.
const HOST_READS: u32 = 1024;

/// How many reads are under way. The first is the headline's.
const DEPTHS: [u32; 3] = [32, 8, 1];

/// Memory of the guests that devices are attached to.
const SIZES_MIB: [u32; 5] = [512, 1024, 2048, 4096, 8192];

/// What a host needs beside its guest.
const HOST_MIB: u32 = 1536;

/// Devices in the order of the host's root ports, with the names and sizes of their BARs.
const DISPLAY: &str = "0000:02:00.0";
const SHARED: [(u32, &str, &str); 3] = [
    (256, "0000:03:00.0", "BAR-256MiB"),
    (1024, "0000:04:00.0", "BAR-1GiB"),
    (16384, "0000:05:00.0", "BAR-16GiB"),
];
const DISK: &str = "0000:01:00.0";

/// QEMU's disk of 1 GiB that answers without a file: at once, in the thread that takes the request. A file is read
/// by another thread, whose turn comes sooner or later depending on the real machine: the host's figures then
/// differed by half from run to run, and repeat to a percent without.
const NO_DISK: &str = "null-co://";

/// Of guests that read.
const GUEST_MIB: u64 = 256;

/// Where the description of a machine lies, the socket it answers at, and how it is started.
const CONFIG: &str = "/bench/vm.json";
const API: &str = "/bench/api";
const LATHE: [&str; 5] = ["lathe-vmm", "--config", CONFIG, "--api-socket", API];

/// A guest whose interrupts QEMU's emulated SVM delivered twice hangs (tests/testbed/README.md); the machine is
/// then started again.
const ATTEMPTS: usize = 5;

/// Of real time, for a guest that takes 10 s of it, and four times as much where others use the machine.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Deserialize)]
struct Measured {
    marker_ns: u64,
    from_ns: u64,
    lines: BTreeMap<String, f64>,
}

impl Measured {
    fn line(&self, name: &str) -> anyhow::Result<f64> {
        self.lines.get(name).copied().with_context(|| format!("there is no {name}"))
    }
}

pub fn run() -> anyhow::Result<Vec<Record>> {
    let scratch = tempfile::tempdir()?;
    let bed = Bed::new()?;
    let mut records = reads(&bed, scratch.path())?;
    records.extend(attach(&bed, scratch.path())?);
    Ok(records)
}

/// The reads, and what part of the host's rate is the guest's; then a row a machine, a column a stage.
pub fn print(records: &[Record]) {
    let (stages, reads): (Vec<_>, Vec<_>) =
        records.iter().cloned().partition(|record| record.metric.starts_with("attach_"));
    record::print(&reads);
    for depth in DEPTHS {
        let metric = metric(depth);
        let of = |subject: &str| {
            let record = reads.iter().find(|record| record.metric == metric && record.subject == subject);
            record.map(|record| record.value)
        };
        if let (Some(guest), Some(host)) = (of("guest"), of("host")) {
            println!("{metric}, {depth} under way: the guest's rate is {:.3} of the host's", guest / host);
        }
    }
    println!();
    record::print_by_subject(&stages);
}

/// A host with the disk at its first root port.
fn description(name: &str, scratch: &Path) -> anyhow::Result<HostDescription> {
    let tiny = scratch.join("tiny.elf");
    std::fs::write(&tiny, tiny_guest::elf())?;
    let guest = artefacts::device_guest_bundle()?;
    let mut description = HostDescription::new(name).deterministic().disk_mib(0);
    description = description.device(Device::root_port(Device::nvme(NO_DISK, "bench")));
    for (local, remote) in [
        (guest.join("vmlinuz"), "/bench/vmlinux"),
        (guest.join("device-initramfs"), "/bench/initramfs"),
        (tiny, "/bench/tiny.elf"),
        (artefacts::binary("lathe-vmm")?, "/usr/bin/lathe-vmm"),
        (artefacts::binary("device-test")?, "/usr/bin/device-test"),
        (artefacts::binary("measure")?, "/usr/bin/measure"),
    ] {
        description.files.push(HostFile { local, remote: remote.to_owned() });
    }
    Ok(description)
}

/// Who reads: a guest of some machine monitor.
struct Reader {
    subject: &'static str,
    monitor: Monitor,
    /// Where the guest's CPU waits. The host's polls, as its clock demands, so guests do in comparison.
    idle: &'static str,
    /// How many reads are under way.
    depth: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Lathe,
    Qemu,
}

impl Reader {
    const fn guest(depth: u32) -> Self {
        Self { subject: "guest", monitor: Monitor::Lathe, idle: "idle=poll", depth }
    }

    const fn halting(depth: u32) -> Self {
        Self { subject: "guest-halting", monitor: Monitor::Lathe, idle: "", depth }
    }

    const fn qemu(depth: u32) -> Self {
        Self { subject: "qemu", monitor: Monitor::Qemu, idle: "idle=poll", depth }
    }
}

const READERS: [Reader; 7] = [
    Reader::guest(32),
    Reader::guest(8),
    Reader::guest(1),
    Reader::halting(32),
    Reader::halting(1),
    Reader::qemu(32),
    Reader::qemu(1),
];

/// What device-test prints of interest: the median. Now and then QEMU's thread that does the disk's work waits for
/// a CPU of the real machine, and the mean has that in it.
const LINE: &str = "nvme_4k_read_median_ns";

fn metric(depth: u32) -> String {
    if depth == DEPTHS[0] { "nvme_4k_read".to_owned() } else { format!("nvme_4k_read_depth{depth}") }
}

/// Reads by the host's driver, then by guests'.
fn reads(bed: &Bed, scratch: &Path) -> anyhow::Result<Vec<Record>> {
    eprintln!("bench: starting a host with a deterministic clock and an NVMe disk");
    // The kernel that the guests have: Debian's takes another number of instructions for a read.
    let mut description =
        description("reads", scratch)?.memory_mib(1536).kernel_flavour(KernelFlavour::Iommufd);
    description.files.extend(qemu::files()?);
    let host = bed.boot(description)?;
    // KVM's statistics; mounted already on some kernels.
    let _ = host.exec(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"])?;
    let mut by_host = Vec::new();
    for depth in DEPTHS {
        eprintln!("bench: host {}", metric(depth));
        by_host.push(of_rates(&metric(depth), "host", host_reads(&host, depth)?));
    }
    bind(&host, DISK, "vfio-pci")?;
    let mut records = Vec::new();
    for reader in &READERS {
        let (metric, mut runs) = (metric(reader.depth), Vec::new());
        for reads in GUEST_READS {
            eprintln!("bench: {} {metric} ({reads} reads)", reader.subject);
            match reader.run(&host, reads) {
                Ok(run) => runs.push(run),
                Err(error) if reader.monitor == Monitor::Qemu => eprintln!("bench: no figure: {error:#}"),
                Err(error) => return Err(error),
            }
        }
        if runs.len() < GUEST_READS.len() {
            continue;
        }
        let times = runs.iter().map(|run| run.line(LINE)).collect::<anyhow::Result<Vec<_>>>()?;
        records.push(of_rates(&metric, reader.subject, times));
        records.extend(details(&metric, reader.subject, &runs)?);
        if reader.subject == "guest" {
            // Second in the table.
            let depth_is = |record: &Record| record.metric == metric;
            records.extend(by_host.iter().filter(|record| depth_is(record)).cloned());
        }
    }
    host.shutdown()?;
    Ok(records)
}

/// Operations a second, of times in nanoseconds.
fn of_rates(metric: &str, subject: &str, times: Vec<f64>) -> Record {
    let rates = times.into_iter().map(|ns| 1e9 / ns).collect();
    Record::of(metric, subject, "ops/virtual_s", rates)
}

/// Nanoseconds a read of some runs, each after one that is not counted.
fn host_reads(host: &Host, depth: u32) -> anyhow::Result<Vec<f64>> {
    let options = [format!("reads={HOST_READS}"), format!("depth={depth}")];
    let actions = ["nvme-iops"; 4].join(",");
    let text = host.check(["device-test".to_owned(), actions].into_iter().chain(options))?;
    let name = format!("{LINE} ");
    let times: Vec<f64> =
        text.lines().filter_map(|line| line.strip_prefix(&name)?.trim().parse().ok()).skip(1).collect();
    ensure!(times.len() == 3, "device-test on the host printed\n{text}");
    Ok(times)
}

impl Reader {
    /// A guest that reads twice as often as counted, the first half for warming up.
    fn run(&self, host: &Host, reads: u32) -> anyhow::Result<Measured> {
        let Self { idle, depth, .. } = self;
        // The last action waits for what does not come, so that the machine can be asked what it counted.
        let cmdline = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable noreplace-smp mitigations=off {idle} \
             lathe.test=nvme-iops,nvme-iops,tree,hotplug-wait lathe.devices=99 lathe.reads={reads} \
             lathe.depth={depth}"
        );
        let command = match self.monitor {
            Monitor::Lathe => lathe(host, &cmdline)?,
            Monitor::Qemu => qemu(&cmdline),
        };
        measure(host, &command, "tree pci", GUEST_MIB)
    }
}

fn lathe(host: &Host, cmdline: &str) -> anyhow::Result<Vec<String>> {
    let config = json!({
        "boot": {"kernel": "/bench/vmlinux", "initramfs": "/bench/initramfs", "cmdline": cmdline},
        "cpus": {"count": 1},
        "memory": {"size": format!("{GUEST_MIB} MiB")},
        "serial": {"mode": "stdio"},
        "rng": false,
        "passthrough": [{"id": "disk", "address": DISK}],
    });
    host.write_file(CONFIG, config.to_string())?;
    Ok(LATHE.map(str::to_owned).to_vec())
}

/// With what lathe-vmm hides on an emulated host hidden as well: see the limits above.
fn qemu(cmdline: &str) -> Vec<String> {
    let mut command = qemu::command("q35", GUEST_MIB);
    for word in &mut command {
        if word == "host" {
            *word = "host,kvm-pv-eoi=off".to_owned();
        }
    }
    let device = format!("vfio-pci,host={DISK},bus=root");
    let words = ["-kernel", "/bench/vmlinux", "-initrd", "/bench/initramfs", "-append", cmdline];
    command.extend(words.map(str::to_owned));
    command.extend(["-device", "pcie-root-port,id=root", "-device", &device].map(str::to_owned));
    command
}

/// What a read costs besides: exits of the guest's CPU and interrupts; and whether the guest's clock is the
/// host's.
fn details(metric: &str, subject: &str, runs: &[Measured]) -> anyhow::Result<Vec<Record>> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { bail!("no runs") };
    let (few, many) = (GUEST_READS[0], GUEST_READS[GUEST_READS.len() - 1]);
    // Each has read twice.
    let more = f64::from(2 * (many - few));
    let difference = |names: &[&str]| -> f64 {
        let of = |run: &Measured| names.iter().filter_map(|name| run.lines.get(*name)).sum::<f64>();
        (of(last) - of(first)) / more
    };
    let mmio = "lathe_vmm_exits_total{vcpu=\"0\",kind=\"mmio\"}";
    let io = "lathe_vmm_exits_total{vcpu=\"0\",kind=\"io\"}";
    let mut records = Vec::new();
    for (what, names) in [
        ("exits", &["kvm_exits"][..]),
        ("halts", &["kvm_halt_exits"]),
        ("exits_to_vmm", &[mmio, io]),
        ("interrupts", &["kvm_irq_injections"]),
        ("emulated", &["kvm_insn_emulation"]),
    ] {
        records.push(Record::of(&format!("{metric}_{what}"), subject, "per read", vec![difference(names)]));
    }
    let host_ns = |run: &Measured| (run.marker_ns - run.from_ns) as f64;
    let guest_ns =
        |run: &Measured, reads: u32| Ok::<_, anyhow::Error>(run.line("nvme_4k_read_ns")? * f64::from(reads));
    let ratio = (host_ns(last) - host_ns(first)) / (guest_ns(last, many)? - guest_ns(first, few)?);
    records.push(Record::of(&format!("{metric}_clock"), subject, "host_ns/guest_ns", vec![ratio]));
    Ok(records)
}

/// Stages against memory with the disk, and against BARs with little memory.
fn attach(bed: &Bed, scratch: &Path) -> anyhow::Result<Vec<Record>> {
    let available = available_mib()?.saturating_sub(2048);
    let sizes: Vec<u32> =
        SIZES_MIB.into_iter().filter(|size| u64::from(size + HOST_MIB) <= available).collect();
    let largest = *sizes.last().with_context(|| format!("{available} MiB are too little for a host"))?;
    if largest < SIZES_MIB[SIZES_MIB.len() - 1] {
        eprintln!("bench: {available} MiB are free: guests of at most {largest} MiB");
    }
    eprintln!("bench: starting a host of {} MiB with a deterministic clock and devices", largest + HOST_MIB);
    let mut description = description("attach", scratch)?.memory_mib(largest + HOST_MIB);
    description = description.device(Device::root_port(DeviceKind::BochsDisplay.into()));
    for (size_mib, _, _) in SHARED {
        description = description.device(Device::root_port(DeviceKind::IvshmemPlain { size_mib }.into()));
    }
    let host = bed.boot(description)?;
    let mut records = Vec::new();
    for (address, name) in [(DISK, "BAR-16KiB"), (DISPLAY, "BAR-16MiB")]
        .into_iter()
        .chain(SHARED.map(|(_, address, name)| (address, name)))
    {
        let took = bind(&host, address, "vfio-pci")?;
        records.push(Record::of("attach_bind", name, "virtual_ms", vec![took]));
        records.extend(attach_one(&host, address, 512, false, name)?);
    }
    for size in sizes {
        records.extend(attach_one(&host, DISK, size, false, &format!("{size}MiB-plain"))?);
    }
    for size in SIZES_MIB.into_iter().filter(|size| *size <= largest) {
        reserve(&host, size / 2)?;
        records.extend(attach_one(&host, DISK, size, true, &format!("{size}MiB-2MiB-pages"))?);
    }
    host.shutdown()?;
    Ok(records)
}

fn attach_one(
    host: &Host,
    address: &str,
    size_mib: u32,
    huge: bool,
    subject: &str,
) -> anyhow::Result<Vec<Record>> {
    eprintln!("bench: attaching {address} to {subject}");
    let mut config = json!({
        "boot": {"kernel": "/bench/tiny.elf"},
        "cpus": {"count": 1},
        "memory": {"size": format!("{size_mib} MiB")},
        "serial": {"mode": "stdio"},
        "rng": false,
        "passthrough": [{"id": "device", "address": address}],
    });
    if huge {
        config["memory"]["hugepages"] = json!("2 MiB");
    }
    host.write_file(CONFIG, config.to_string())?;
    let command = LATHE.map(str::to_owned);
    let measured = measure(host, &command, tiny_guest::MARKER, u64::from(size_mib))?;
    let stage = |stage: &str| {
        let seconds = measured.line(&format!("lathe_vmm_attach_seconds{{stage=\"{stage}\"}}"))?;
        Ok(Record::of(&format!("attach_{stage}"), subject, "virtual_ms", vec![seconds * 1e3]))
    };
    ["open", "reset", "populate", "map", "bar_map"].into_iter().map(stage).collect()
}

/// Runs a machine until its guest prints `marker`.
fn measure(host: &Host, command: &[String], marker: &str, guest_mib: u64) -> anyhow::Result<Measured> {
    let limit = LIMIT + Duration::from_millis(30 * guest_mib);
    let mut argv = ["measure", "--marker", marker, "--from", "nvme_reading", "--timeout-s", "600"].to_vec();
    let guest_mib = guest_mib.to_string();
    argv.extend(["--guest-mib", &guest_mib]);
    if command.iter().any(|word| word == API) {
        argv.extend(["--api", API]);
    }
    argv.push("--");
    argv.extend(command.iter().map(String::as_str));
    for attempt in 1..=ATTEMPTS {
        // A machine that was killed leaves it.
        host.check(["rm", "-f", API])?;
        let output = match host.command(argv.iter().copied())?.limit(limit).run() {
            Ok(output) => output,
            Err(error) => {
                eprintln!("bench: attempt {attempt}: {error}");
                // The device is free when the machine is gone.
                host.shell(&format!(
                    "while kill -9 $(pidof measure lathe-vmm {}); do sleep 0.1; done",
                    qemu::PROCESS
                ))?;
                continue;
            }
        };
        let text = output.text();
        let line = text.lines().last().unwrap_or_default();
        return serde_json::from_str(line)
            .with_context(|| format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    bail!("no guest of {ATTEMPTS} got to {marker:?}: {command:?}");
}

/// Binds a function; how many milliseconds that took.
fn bind(host: &Host, address: &str, driver: &str) -> anyhow::Result<f64> {
    #[derive(Deserialize)]
    struct Bound {
        bind_ns: f64,
    }
    let text = host.check(["measure", "--bind", address, driver])?;
    let bound: Bound = serde_json::from_str(text.trim()).context(text)?;
    Ok(bound.bind_ns / 1e6)
}

/// Has the host keep `count` 2 MiB pages for guests.
fn reserve(host: &Host, count: u32) -> anyhow::Result<()> {
    let script = format!(
        "echo 1 > /proc/sys/vm/compact_memory; echo {count} > /proc/sys/vm/nr_hugepages; \
         cat /proc/sys/vm/nr_hugepages"
    );
    let got = host.shell(&script)?;
    ensure!(got.trim() == count.to_string(), "the host has {} of {count} pages of 2 MiB", got.trim());
    Ok(())
}

/// Memory of this machine that is free or can be.
fn available_mib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no MemAvailable")?;
    Ok(kib.trim().parse::<u64>()? / 1024)
}
