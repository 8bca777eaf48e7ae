//! A tenant's way to a GPU, from `lathe job run` to the device in the guest and back: a display stands for it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use lathe_api::job::JobState;
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};
use lathe_testbed::{Device, DeviceKind, Host};

/// An image whose program finds the display, says where it sits, whether its memory holds anything, and fills it.
/// Its user is root: the program stands for a driver.
fn image(directory: &Path) -> PathBuf {
    let root = directory.join("root");
    for mount_point in ["dev", "etc", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(root.join(mount_point)).unwrap();
    }
    fs::copy(artefacts::binary("device-test").unwrap(), root.join("device-test")).unwrap();
    let output = directory.join("device-test.tar");
    let (root, archive) = (root.to_str().unwrap(), output.to_str().unwrap());
    let args = ["--name", "device-test", "--root", root, "--output", archive, "--entrypoint", "/device-test"];
    artefacts::built("oci/pack", &args).unwrap();
    output
}

fn spec(gpus: u32, actions: &str) -> String {
    format!(
        "name = \"tenant\"\nclass = \"microvm\"\nimage = \"device-test\"\nargs = [\"{actions}\"]\n\
         [resources]\ncpus = {gpus}\nmemory = \"512 MiB\"\ngpus = {gpus}\n"
    )
}

/// The displays, one near each of the host's NUMA nodes.
const NEAR: [&str; 2] = ["0000:41:00.0", "0000:81:00.0"];

/// A host with two sockets, and a display below a root port of each.
fn two_sockets() -> Options {
    let socket = |bus, node| {
        Device::expander_bridge(bus, Some(node), [Device::root_port(DeviceKind::BochsDisplay.into())])
    };
    let numa = vec![(1, 1536), (1, 1536)];
    Options { hosts: 1, numa, devices: vec![socket(0x40, 0), socket(0x80, 1)], ..Options::default() }
}

fn driver(host: &Host, address: &str) -> String {
    host.shell(&format!("basename $(readlink /sys/bus/pci/devices/{address}/driver) 2>&1")).unwrap()
}

/// Runs a job to its success; its output, and how many MiB of its machine's memory were on each of the host's nodes.
fn run(cluster: &Cluster, gpus: u32, actions: &str) -> (String, [u64; 2]) {
    let submitted = cluster.submit_text(&spec(gpus, actions)).unwrap();
    let memory = until("the machine has its memory", PATIENCE, || {
        let memory = bound_memory(&cluster.hosts()[0])?;
        let there = memory.iter().sum::<u64>() >= 512;
        let ended = cluster.job(&submitted.id)?.state.is_terminal();
        Ok((there || ended).then_some(memory))
    })
    .unwrap();
    let job = cluster.wait_for_job(&submitted.id).unwrap();
    let logs = cluster.logs(&job.id).unwrap();
    assert_eq!(job.state, JobState::Succeeded, "{job:?}\n{logs}");
    (logs, memory)
}

/// The memory of VMMs that is bound to a node of the host's, by the node that it lies on, in MiB.
fn bound_memory(host: &Host) -> anyhow::Result<[u64; 2]> {
    let script = "for p in /proc/[0-9]*; do
        case $(readlink $p/exe) in */lathe-vmm) grep ' bind:' $p/numa_maps;; esac
    done; true";
    let text = host.shell(script)?;
    let pages = |node: &str| -> u64 {
        text.split_whitespace().filter_map(|word| word.strip_prefix(node)?.parse::<u64>().ok()).sum()
    };
    Ok([pages("N0="), pages("N1=")].map(|pages| pages * 4 / 1024))
}

#[test]
fn each_tenant_finds_the_gpu_below_a_root_port_and_nothing_of_the_one_before() {
    let cluster = Cluster::start(&two_sockets()).unwrap();
    let host = &cluster.hosts()[0];
    host.shell("modprobe bochs").unwrap();
    let before = NEAR.map(|address| driver(host, address));
    let image = image(cluster.scratch());
    let added = cluster.lathe(["image", "add", "device-test", image.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    // The GPU near the first socket is somebody else's.
    host.check(["lathe-agent", "gpus", "take", NEAR[0]]).unwrap();
    for tenant in ["first", "second"] {
        let (logs, memory) = run(&cluster, 1, "tree,numa,vram-zero,vram-fill,vram-check");
        let place = ["0000:00:10.0 1b36:000c 060400 [01-01]", "0000:01:00.0 1234:1111 038000"];
        let vram = ["vram_size 0000:01:00.0 16777216", "vram_zero yes", "vram_intact 16777216"];
        for line in place.into_iter().chain(vram).chain(["numa_node 0 cpus=0 "]) {
            assert!(logs.contains(line), "{tenant}: no {line:?} in\n{logs}");
        }
        assert_eq!(memory, [0, 512], "{tenant}: its memory is near its GPU");
        cluster.settled_census(host).unwrap();
        assert_eq!(driver(host, NEAR[1]), before[1], "the host's driver has it back after the {tenant}");
    }
    host.check(["lathe-agent", "gpus", "release", NEAR[0]]).unwrap();
    near_each_socket(&cluster);
    cluster.settled_census(host).unwrap();
    assert_eq!(NEAR.map(|address| driver(host, address)), before);
    let listed: Vec<serde_json::Value> = cluster.json(["gpu", "list"]).unwrap();
    assert!(listed.len() == 2 && listed.iter().all(|gpu| gpu["state"] == "free"), "{listed:?}");
}

/// A machine with GPUs of both sockets has two nodes, each with a CPU, half of the memory, and the GPU of the socket
/// that its memory comes from.
fn near_each_socket(cluster: &Cluster) {
    let (logs, memory) = run(cluster, 2, "tree,numa,vram-zero");
    assert_eq!(memory, [256, 256]);
    let displays: Vec<_> = logs.lines().filter(|line| line.contains("1234:1111")).collect();
    assert!(displays.len() == 2, "{logs}");
    for (node, display) in displays.iter().enumerate() {
        assert!(display.ends_with(&format!(" numa={node}")), "{logs}");
        let words = format!("numa_node {node} cpus={node} memory_mib=");
        let mib = logs.lines().find_map(|line| line.split_once(&words)?.1.trim().parse::<u64>().ok());
        // The kernel keeps some of it for itself.
        assert!(mib.is_some_and(|mib| (128..=256).contains(&mib)), "{logs}");
    }
}
