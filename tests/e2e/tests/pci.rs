//! What an unmodified Linux makes of ports, slots and NUMA nodes: it has to find them as they are, move nothing, and
//! say nothing of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use lathe_e2e::artefacts;
use lathe_testbed::{Bed, HostDescription, HostFile, Status};
use serde_json::json;

/// Prints what the kernel found, a word that says what before each line, and powers off.
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys
dmesg -r | grep -E '^<[0-4]>' | sed 's/^/warned /'
dmesg | grep -iE "can't claim|no compatible|failed to assign|: assigned|conflict" | sed 's/^/moved /'
for d in /sys/bus/pci/devices/*; do
  echo "function $(basename $d) $(cat $d/vendor):$(cat $d/device) node $(cat $d/numa_node)"
done
for s in /sys/bus/pci/slots/*; do
  echo "slot $(basename $s) $(cat $s/address) adapter $(cat $s/adapter)"
done
for n in /sys/devices/system/node/node*; do
  echo "node $(basename $n) cpus $(cat $n/cpulist) distance $(cat $n/distance)"
done
poweroff -f
"#;

fn initramfs(directory: &Path) -> PathBuf {
    let root = directory.join("root");
    for name in ["bin", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(busybox.expect("busybox: run scripts/setup"), root.join("bin/busybox")).unwrap();
    for applet in ["sh", "mount", "dmesg", "grep", "sed", "cat", "basename", "poweroff"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("init"), INIT).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let archive = directory.join("initramfs");
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc", "--owner=0:0"])
        .current_dir(&root)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&archive).unwrap())
        .spawn()
        .unwrap();
    let mut names = vec!["init".to_owned(), "bin".into(), "proc".into(), "sys".into(), "dev".into()];
    for entry in fs::read_dir(root.join("bin")).unwrap() {
        names.push(format!("bin/{}", entry.unwrap().file_name().to_str().unwrap()));
    }
    cpio.stdin.take().unwrap().write_all(names.join("\n").as_bytes()).unwrap();
    assert!(cpio.wait().unwrap().success());
    archive
}

#[test]
fn linux_finds_slots_and_numa_nodes_as_they_are_and_moves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let bundle = artefacts::guest_bundle().unwrap();
    let cmdline = fs::read_to_string(bundle.join("cmdline")).unwrap();
    let bed = Bed::new().unwrap();
    let mut description = HostDescription::new("vmm");
    for (local, remote) in [
        (bundle.join("vmlinuz"), "/t/vmlinuz"),
        (initramfs(directory.path()), "/t/initramfs"),
        (artefacts::binary("lathe-vmm").unwrap(), "/usr/bin/lathe-vmm"),
    ] {
        description.files.push(HostFile { local, remote: remote.to_owned() });
    }
    let host = bed.boot(description).unwrap();
    let node = |host_node: Option<u32>| json!({"cpus": 1, "memory": "192 MiB", "host_node": host_node});
    let vm = json!({
        "boot": {"kernel": "/t/vmlinuz", "initramfs": "/t/initramfs", "cmdline": cmdline.trim()},
        "cpus": {"count": 2},
        "memory": {"size": "384 MiB"},
        "hotplug_slots": 2,
        "numa": [node(Some(0)), node(None)],
        "serial": {"mode": "stdio"},
    });
    host.write_file("/t/vm.json", vm.to_string()).unwrap();
    let run = |path: &str| {
        let command = host.command(["lathe-vmm", "--config", path]).unwrap();
        command.limit(Duration::from_secs(120)).run().unwrap()
    };
    let output = run("/t/vm.json");
    let text = output.text();
    assert_eq!(output.status, Status::Exited(0), "{text}");
    let said = |word: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.trim().strip_prefix(word)).map(str::to_owned).collect()
    };
    assert_eq!(
        said("function "),
        [
            "0000:00:00.0 0x1b36:0x0008 node 0",
            "0000:00:01.0 0x1af4:0x1044 node 0",
            "0000:00:10.0 0x1b36:0x000c node 0",
            "0000:02:00.0 0x1b36:0x0008 node 1",
            "0000:02:10.0 0x1b36:0x000c node 1",
        ]
    );
    assert_eq!(said("slot "), ["1 0000:01:00 adapter 0", "2 0000:03:00 adapter 0"]);
    assert_eq!(said("node "), ["node0 cpus 0 distance 10 20", "node1 cpus 1 distance 20 10"]);
    assert_eq!(said("moved "), [""; 0]);
    // What the kernel warns of has nothing to do with the machine's tables: an emulated CPU's missing driver.
    let warned: Vec<_> = said("warned ").into_iter().filter(|line| !line.contains("amd_pstate")).collect();
    assert_eq!(warned, [""; 0]);

    let mut vm = vm;
    vm["numa"][1]["host_node"] = json!(7);
    host.write_file("/t/vm.json", vm.to_string()).unwrap();
    let output = run("/t/vm.json");
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status, Status::Exited(2), "{stderr}");
    assert!(stderr.contains("numa[1].host_node: this host has no NUMA node 7 with memory"), "{stderr}");
}
