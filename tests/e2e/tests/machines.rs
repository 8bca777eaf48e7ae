//! One image on machines of many sizes, without a cluster: the VMM with a real Linux guest on real KVM.
//!
//! Mostly with the trimmed kernel: Debian's does not fit into the smallest of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::time::Duration;

use lathe_e2e::wait::{PATIENCE, until};
use lathe_e2e::{artefacts, leftovers};
use lathe_testbed::{Bed, Host, HostDescription, HostFile};
use serde_json::json;

const DISK_BYTES: usize = 8 << 20;
const NET_BYTES: usize = 1 << 20;

fn host() -> (Bed, Host) {
    let (trimmed, cloud) = (artefacts::trimmed_guest_bundle().unwrap(), artefacts::guest_bundle().unwrap());
    let bed = Bed::new().unwrap();
    let mut description = HostDescription::new("vmm");
    // As many as the largest guest has, and more memory: both are checked against the host's.
    description.cpus = 8;
    description.memory_mib = 6 * 1024;
    for (local, remote) in [
        (trimmed.join("vmlinuz"), "/t/vmlinuz"),
        (trimmed.join("bench-initramfs"), "/t/initramfs"),
        (cloud.join("vmlinuz"), "/t/cloud/vmlinuz"),
        (cloud.join("bzImage"), "/t/cloud/bzImage"),
        (cloud.join("bench-initramfs"), "/t/cloud/initramfs"),
        (artefacts::binary("lathe-vmm").unwrap(), "/usr/bin/lathe-vmm"),
        (artefacts::binary("lathe").unwrap(), "/usr/bin/lathe"),
    ] {
        description.files.push(HostFile { local, remote: remote.to_owned() });
    }
    let host = bed.boot(description).unwrap();
    (bed, host)
}

/// Bytes that are different in every place and for every seed.
fn pattern(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((seed >> 16).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// FNV-1a, 64 bits, as the guest prints it.
fn sum(bytes: &[u8]) -> String {
    let sum = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    format!("{sum:016x}")
}

fn config(cpus: u8, memory: &str, cmdline: &str) -> serde_json::Value {
    json!({
        "boot": {"kernel": "/t/vmlinuz", "initramfs": "/t/initramfs",
                 "cmdline": format!("console=ttyS0 quiet panic=-1 {cmdline}")},
        "cpus": {"count": cpus},
        "memory": {"size": memory},
        "serial": {"mode": "stdio"},
    })
}

fn write(host: &Host, name: &str, config: &serde_json::Value) -> String {
    let path = format!("/t/{name}.json");
    host.write_file(&path, config.to_string()).unwrap();
    path
}

/// What the guest printed: the first word of each line and the rest.
fn lines(text: &str) -> HashMap<String, String> {
    text.lines()
        .filter_map(|line| line.trim().split_once(' '))
        .map(|(name, rest)| (name.to_owned(), rest.to_owned()))
        .collect()
}

#[test]
fn one_image_boots_on_one_to_eight_cpus_and_64_mib_to_5_gib_with_disk_and_network() {
    let (_bed, host) = host();
    host.shell("ip tuntap add mode tap tap0 && ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up")
        .unwrap();
    let before = leftovers::census(&host).unwrap();
    for (number, (cpus, memory, mib)) in
        [(1, "64 MiB", 64), (2, "256 MiB", 256), (8, "1 GiB", 1024), (2, "5 GiB", 5120)]
            .into_iter()
            .enumerate()
    {
        let disk = pattern(DISK_BYTES, number as u64);
        host.write_file("/t/disk", disk.clone()).unwrap();
        let answer = pattern(NET_BYTES, 77 + number as u64);
        host.write_file("/t/send", answer.clone()).unwrap();
        // Takes what the guest sends, then answers.
        let mut peer = host
            .spawn(
                ["nc", "-l", "-p", "9000", "-e", "sh", "-c", "head -c 1048576 >/t/got; cat /t/send"],
                "/t/nc.log",
            )
            .unwrap();
        let mut vm = config(
            cpus,
            memory,
            "lathe.test=info,disk,net lathe.net=10.9.0.2/24,10.9.0.1:9000 lathe.bytes=1048576",
        );
        vm["disks"] = json!([{"id": "data", "path": "/t/disk", "format": "raw"}]);
        vm["networks"] = json!([{"id": "net0", "tap": "tap0", "mac": "02:00:00:00:09:02"}]);
        let path = write(&host, "machine", &vm);
        let output = host
            .command(["lathe", "vm", "run", &path])
            .unwrap()
            .limit(Duration::from_secs(240))
            .run()
            .unwrap();
        let text = output.text();
        assert_eq!(output.status, lathe_testbed::Status::Exited(0), "{cpus} CPUs, {memory}: {text}");
        let said = lines(&text);
        assert_eq!(said["cpus"], cpus.to_string());
        let seen: u64 = said["memory_kib"].parse().unwrap();
        // The kernel keeps some for itself.
        assert!((mib * 1024 * 6 / 10..=mib * 1024).contains(&seen), "{memory}: the guest sees {seen} KiB");

        assert_eq!(said["disk_read"], format!("{DISK_BYTES} {}", sum(&disk)), "{text}");
        let after = host.read_file("/t/disk").unwrap();
        let (kept, written) = after.split_at(DISK_BYTES / 2);
        assert_eq!(kept, &disk[..DISK_BYTES / 2], "the half that was not written changed");
        assert_ne!(written, &disk[DISK_BYTES / 2..], "nothing was written");
        assert_eq!(said["disk_wrote"], format!("{} {} {}", DISK_BYTES / 2, DISK_BYTES / 2, sum(written)));

        peer.wait(Duration::from_secs(60)).unwrap();
        let got = host.read_file("/t/got").unwrap();
        assert_eq!(said["net_sent"], format!("{NET_BYTES} {}", sum(&got)), "{text}");
        assert_eq!(said["net_received"], format!("{NET_BYTES} {}", sum(&answer)), "{text}");
    }
    assert_eq!(leftovers::new_since(&before, &leftovers::census(&host).unwrap()), [""; 0]);
}

#[test]
fn a_distributions_kernel_boots_as_it_is_shipped_and_unpacked() {
    let (_bed, host) = host();
    for kernel in ["bzImage", "vmlinuz"] {
        let mut vm = config(2, "256 MiB", "lathe.test=info");
        vm["boot"]["kernel"] = json!(format!("/t/cloud/{kernel}"));
        vm["boot"]["initramfs"] = json!("/t/cloud/initramfs");
        let path = write(&host, kernel, &vm);
        let output = host.exec(["lathe-vmm", "--config", &path]).unwrap();
        assert_eq!(output.status, lathe_testbed::Status::Exited(0), "{kernel}: {}", output.text());
        assert_eq!(lines(&output.text())["cpus"], "2", "{kernel}");
    }
}

#[test]
fn read_only_disks_stay_as_they_are_and_bad_machines_are_refused() {
    let (_bed, host) = host();
    let disk = pattern(DISK_BYTES, 5);
    host.write_file("/t/disk", disk.clone()).unwrap();
    host.write_file("/t/text", "this is no kernel").unwrap();
    let mut vm = config(1, "64 MiB", "lathe.test=disk");
    vm["disks"] = json!([{"id": "data", "path": "/t/disk", "format": "raw", "read_only": true}]);
    let path = write(&host, "read-only", &vm);
    let output = host.exec(["lathe-vmm", "--config", &path]).unwrap();
    assert!(output.text().contains("disk_read_only"), "{}", output.text());
    assert_eq!(host.read_file("/t/disk").unwrap(), disk);

    let before = leftovers::census(&host).unwrap();
    let refuse = |name: &str, change: &dyn Fn(&mut serde_json::Value), named: &[&str]| {
        let mut vm = config(1, "64 MiB", "");
        change(&mut vm);
        let path = write(&host, name, &vm);
        let output = host.exec(["lathe-vmm", "--config", &path]).unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert_eq!(output.status, lathe_testbed::Status::Exited(2), "{name}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{name}: {stderr}");
        for word in named {
            assert!(stderr.contains(word), "{name}: {word:?} is not in: {stderr}");
        }
    };
    refuse("kernel", &|vm| vm["boot"]["kernel"] = json!("/t/text"), &["kernel", "/t/text"]);
    refuse("no-kernel", &|vm| vm["boot"]["kernel"] = json!("/t/none"), &["kernel", "/t/none"]);
    refuse("cpus", &|vm| vm["cpus"]["count"] = json!(65), &["cpus", "65", "64"]);
    refuse("cpus-beyond-host", &|vm| vm["cpus"]["count"] = json!(9), &["cpus.count", "9", "8 CPUs"]);
    refuse("memory", &|vm| vm["memory"]["size"] = json!("900 GiB"), &["memory", "900 GiB"]);
    refuse("field", &|vm| vm["memory"]["sise"] = json!("1 GiB"), &["sise"]);
    let none = json!([{"id": "data", "path": "/t/none", "format": "raw"}]);
    refuse("disk", &|vm| vm["disks"] = none.clone(), &["data", "/t/none"]);
    let mut first = config(1, "64 MiB", "lathe.end=hang");
    let used = json!([{"id": "data", "path": "/t/disk", "format": "raw"}]);
    first["disks"] = used.clone();
    first["serial"] = json!({"mode": "file", "path": "/t/first"});
    let path = write(&host, "first", &first);
    let argv = ["lathe-vmm", "--config", &path, "--api-socket", "/t/first.sock"];
    let mut holder = host.spawn(argv, "/t/first.log").unwrap();
    until("the first guest runs", PATIENCE, || {
        Ok(host.shell("cat /t/first")?.contains("LATHE-INIT-READY").then_some(()))
    })
    .unwrap();
    refuse("disk-in-use", &|vm| vm["disks"] = used.clone(), &["data", "/t/disk", "in use"]);
    host.check(["lathe", "vm", "control", "kill", "/t/first.sock"]).unwrap();
    assert_eq!(holder.wait(PATIENCE).unwrap(), Some(lathe_testbed::Status::Exited(12)));
    let tap = json!([{"id": "net0", "tap": "tap99", "mac": "02:00:00:00:09:02"}]);
    refuse("tap", &|vm| vm["networks"] = tap.clone(), &["tap99"]);
    assert_eq!(leftovers::new_since(&before, &leftovers::census(&host).unwrap()), [""; 0]);
}

#[test]
fn a_machine_pauses_resumes_and_ends_in_each_of_its_ways() {
    let (_bed, host) = host();
    let before = leftovers::census(&host).unwrap();
    let mut vm = config(1, "64 MiB", "lathe.test=tick lathe.ticks=600");
    vm["serial"] = json!({"mode": "file", "path": "/t/ticks"});
    let path = write(&host, "ticks", &vm);
    let mut process =
        host.spawn(["lathe-vmm", "--config", &path, "--api-socket", "/t/api"], "/t/ticks.log").unwrap();
    let ticks =
        || -> anyhow::Result<usize> { Ok(host.shell("grep -c ^tick /t/ticks || true")?.trim().parse()?) };
    assert!(host.shell("sleep 1; cat /t/ticks.log").unwrap().is_empty(), "the VMM has something to say");
    let more_than = |count: usize| {
        until("ticks", PATIENCE, || {
            let now = ticks()?;
            Ok((now > count).then_some(now))
        })
        .unwrap()
    };
    more_than(3);
    host.check(["lathe", "vm", "control", "pause", "/t/api"]).unwrap();
    let paused = ticks().unwrap();
    host.shell("sleep 2").unwrap();
    assert_eq!(ticks().unwrap(), paused, "a paused guest went on");
    assert!(host.check(["lathe", "vm", "control", "state", "/t/api"]).unwrap().contains("paused"));
    host.check(["lathe", "vm", "control", "resume", "/t/api"]).unwrap();
    more_than(paused);
    host.check(["lathe", "vm", "control", "kill", "/t/api"]).unwrap();
    let status = process.wait(PATIENCE).unwrap();
    assert_eq!(status, Some(lathe_testbed::Status::Exited(12)), "killed");

    for (end, code) in [("poweroff", 0), ("reboot", 10), ("panic", 11)] {
        let path = write(&host, end, &config(1, "64 MiB", &format!("lathe.end={end}")));
        let output = host.exec(["lathe-vmm", "--config", &path]).unwrap();
        assert_eq!(output.status, lathe_testbed::Status::Exited(code), "{end}: {}", output.text());
    }

    let mut vm = config(1, "64 MiB", "lathe.end=button");
    vm["serial"] = json!({"mode": "file", "path": "/t/button"});
    let path = write(&host, "button", &vm);
    let mut process =
        host.spawn(["lathe-vmm", "--config", &path, "--api-socket", "/t/api"], "/t/button.log").unwrap();
    until("the guest waits for its button", PATIENCE, || {
        Ok(host.shell("cat /t/button")?.contains("LATHE-INIT-READY").then_some(()))
    })
    .unwrap();
    // It prints its line before it opens the button.
    host.shell("sleep 3").unwrap();
    host.check(["lathe", "vm", "control", "power-button", "/t/api"]).unwrap();
    assert_eq!(process.wait(PATIENCE).unwrap(), Some(lathe_testbed::Status::Exited(0)));
    assert!(host.shell("cat /t/button").unwrap().contains("button"));
    assert_eq!(leftovers::new_since(&before, &leftovers::census(&host).unwrap()), [""; 0]);
}
