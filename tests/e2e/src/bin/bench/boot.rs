//! From starting the process to the guest's first output and to Linux's init; memory; block I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};
use lathe_e2e::{artefacts, tiny_guest};
use lathe_testbed::{Bed, Host, HostDescription, HostFile};
use serde::Deserialize;
use serde_json::json;

use crate::qemu;
use crate::record::Record;

/// Runs of each measurement; the clock is deterministic, so these show that it is.
const RUNS: usize = 3;

/// The guest's memory, as in the peers' published figures.
const MEMORY_MIB: u64 = 128;

/// Bytes of the disk for block I/O.
const DISK_BYTES: u64 = 64 << 20;

/// What is started: a machine monitor with one guest.
struct Subject {
    name: &'static str,
    /// The command for a kernel, initramfs and command line, with or without the disk.
    command: fn(guest: &Guest) -> Vec<String>,
}

struct Guest {
    /// Path of its `vm.json`, for ours.
    config: String,
    kernel: &'static str,
    initramfs: Option<&'static str>,
    cmdline: String,
    disk: bool,
}

const SUBJECTS: [Subject; 3] = [
    Subject { name: "lathe-vmm", command: lathe },
    Subject { name: "qemu-microvm", command: qemu_microvm },
    Subject { name: "qemu-q35", command: qemu_q35 },
];

#[derive(Deserialize)]
struct Measured {
    marker_ns: u64,
    anonymous_kib: u64,
    resident_kib: u64,
    lines: BTreeMap<String, f64>,
}

pub fn run() -> anyhow::Result<Vec<Record>> {
    let scratch = tempfile::tempdir()?;
    let guest = artefacts::built("guest/build", &["--kernel", "trimmed"])?;
    let tiny = scratch.path().join("tiny.elf");
    std::fs::write(&tiny, tiny_guest::elf())?;
    let mut files = qemu::files()?;
    for (local, remote) in [
        (guest.join("vmlinuz"), "/bench/vmlinux"),
        (guest.join("bench-initramfs"), "/bench/initramfs"),
        (tiny, "/bench/tiny.elf"),
        (artefacts::binary("lathe-vmm")?, "/usr/bin/lathe-vmm"),
        (artefacts::binary("measure")?, "/usr/bin/measure"),
    ] {
        files.push(HostFile { local, remote: remote.to_owned() });
    }
    let mut description = HostDescription::new("bench");
    description.cpus = 1;
    description.deterministic = true;
    description.files = files;
    let bed = Bed::new()?;
    eprintln!("bench: starting a host with a deterministic clock");
    let host = bed.boot(description)?;
    host.shell(&format!("truncate -s {DISK_BYTES} /bench/disk && tr '\\0' x < /bench/disk > /bench/full && mv /bench/full /bench/disk"))?;

    // The same for every subject.
    let cmdline = std::fs::read_to_string(guest.join("cmdline")).context("the guest's command line")?;
    let mut records = first_output(&host)?;
    records.extend(linux(&host, &cmdline, "ready", "LATHE-INIT-READY", false)?);
    // `info` follows so that the last figure's line is whole when the marker comes.
    records.extend(linux(&host, &cmdline, "blk,info", "cpus ", true)?);
    host.shutdown()?;
    Ok(records)
}

/// The tiny guest: what the machine itself costs.
fn first_output(host: &Host) -> anyhow::Result<Vec<Record>> {
    let guest = Guest {
        config: "/bench/tiny.json".to_owned(),
        kernel: "/bench/tiny.elf",
        initramfs: None,
        cmdline: String::new(),
        disk: false,
    };
    write_config(host, &guest)?;
    let mut records = Vec::new();
    for subject in &SUBJECTS {
        let runs = repeat(host, subject, &guest, tiny_guest::MARKER)?;
        let of = |metric, unit, value: fn(&Measured) -> f64| {
            Record::of(metric, subject.name, unit, runs.iter().map(value).collect())
        };
        records.push(of("first_output", "virtual_ms", |run| run.marker_ns as f64 / 1e6));
        records.push(of("memory_overhead", "KiB", |run| run.anonymous_kib as f64));
        records.push(of("memory_resident", "KiB", |run| run.resident_kib as f64));
    }
    Ok(records)
}

/// A Linux guest with the trimmed kernel. `test` is what its init does after saying that it runs.
fn linux(
    host: &Host,
    cmdline: &str,
    test: &'static str,
    marker: &str,
    disk: bool,
) -> anyhow::Result<Vec<Record>> {
    let guest = Guest {
        config: format!("/bench/{test}.json"),
        kernel: "/bench/vmlinux",
        initramfs: Some("/bench/initramfs"),
        cmdline: format!("{} lathe.test={test}", cmdline.trim()),
        disk,
    };
    write_config(host, &guest)?;
    let mut records = Vec::new();
    for subject in &SUBJECTS {
        // QEMU's microvm gives this kernel no ACPI tables to find its PCI Express bus by.
        if disk && subject.name == "qemu-microvm" {
            eprintln!("bench: no block I/O with {}: the guest finds no PCI bus there", subject.name);
            continue;
        }
        let runs = repeat(host, subject, &guest, marker)?;
        if test == "ready" {
            let times = runs.iter().map(|run| run.marker_ns as f64 / 1e6).collect();
            records.push(Record::of("linux_init", subject.name, "virtual_ms", times));
            continue;
        }
        for name in ["blk_read_4k", "blk_read_1m", "blk_write_4k"] {
            let times: Option<Vec<f64>> = runs.iter().map(|run| run.lines.get(name).copied()).collect();
            let times = times.with_context(|| format!("{}: the guest did not print {name}", subject.name))?;
            records.push(Record::of(name, subject.name, "virtual_us", times));
        }
    }
    Ok(records)
}

fn repeat(host: &Host, subject: &Subject, guest: &Guest, marker: &str) -> anyhow::Result<Vec<Measured>> {
    let command = (subject.command)(guest);
    let mut runs = Vec::new();
    for run in 1..=RUNS {
        eprintln!("bench: {} {} ({run} of {RUNS})", subject.name, guest.config);
        let mut argv = ["measure", "--marker", marker, "--guest-mib"].map(str::to_owned).to_vec();
        argv.extend([MEMORY_MIB.to_string(), "--timeout-s".to_owned(), "120".to_owned(), "--".to_owned()]);
        argv.extend(command.iter().cloned());
        // Virtual seconds pass more slowly than real ones.
        let output = host.command(argv)?.limit(Duration::from_secs(900)).run()?;
        let text = output.text();
        let line = text.lines().last().unwrap_or_default();
        match serde_json::from_str(line) {
            Ok(measured) => runs.push(measured),
            Err(_) => bail!("{}: {}", subject.name, String::from_utf8_lossy(&output.stderr)),
        }
    }
    Ok(runs)
}

fn write_config(host: &Host, guest: &Guest) -> anyhow::Result<()> {
    let mut config = json!({
        "boot": {"kernel": guest.kernel, "cmdline": guest.cmdline},
        "cpus": {"count": 1},
        "memory": {"size": format!("{MEMORY_MIB} MiB")},
        "serial": {"mode": "stdio"},
        "rng": false,
    });
    if let Some(initramfs) = guest.initramfs {
        config["boot"]["initramfs"] = json!(initramfs);
    }
    if guest.disk {
        config["disks"] = json!([{"id": "bench", "path": "/bench/disk", "format": "raw"}]);
    }
    Ok(host.write_file(&guest.config, config.to_string())?)
}

fn lathe(guest: &Guest) -> Vec<String> {
    ["/usr/bin/lathe-vmm", "--config", &guest.config].map(str::to_owned).to_vec()
}

/// QEMU's smallest machine, with its legacy devices off except the serial port; PCI on for the disk, so
/// that every subject's disk is virtio over PCI.
fn qemu_microvm(guest: &Guest) -> Vec<String> {
    let pcie = if guest.disk { "on" } else { "off" };
    let machine = format!("microvm,pit=off,pic=off,rtc=off,isa-serial=on,acpi=on,pcie={pcie}");
    qemu_with(&machine, guest)
}

fn qemu_q35(guest: &Guest) -> Vec<String> {
    qemu_with("q35", guest)
}

fn qemu_with(machine: &str, guest: &Guest) -> Vec<String> {
    let mut command = qemu::command(machine, MEMORY_MIB);
    command.extend(["-kernel".to_owned(), guest.kernel.to_owned()]);
    if let Some(initramfs) = guest.initramfs {
        command.extend(["-initrd".to_owned(), initramfs.to_owned()]);
    }
    if !guest.cmdline.is_empty() {
        command.extend(["-append".to_owned(), guest.cmdline.clone()]);
    }
    if guest.disk {
        let drive = "file=/bench/disk,if=none,id=d,format=raw,cache=writeback";
        command.extend(["-drive", drive, "-device", "virtio-blk-pci,drive=d"].map(str::to_owned));
    }
    command
}
