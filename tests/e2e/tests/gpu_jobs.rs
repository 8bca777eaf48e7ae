//! A tenant's way to a GPU, from `lathe job run` to the device in the guest and back: a display stands for it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use lathe_api::job::JobState;
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_testbed::{Device, DeviceKind};

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

fn spec(actions: &str) -> String {
    format!(
        "name = \"tenant\"\nclass = \"microvm\"\nimage = \"device-test\"\nargs = [\"{actions}\"]\n\
         [resources]\ncpus = 1\nmemory = \"512 MiB\"\ngpus = 1\n"
    )
}

#[test]
fn each_tenant_finds_the_gpu_below_a_root_port_and_nothing_of_the_one_before() {
    let devices = vec![Device::root_port(DeviceKind::BochsDisplay.into())];
    let cluster = Cluster::start(&Options { hosts: 1, devices, ..Options::default() }).unwrap();
    let host = &cluster.hosts()[0];
    let driver = || host.shell("basename $(readlink /sys/bus/pci/devices/0000:01:00.0/driver) 2>&1").unwrap();
    host.shell("modprobe bochs").unwrap();
    let before = driver();
    let image = image(cluster.scratch());
    let added = cluster.lathe(["image", "add", "device-test", image.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    for tenant in ["first", "second"] {
        let file = cluster.scratch().join(format!("{tenant}.toml"));
        fs::write(&file, spec("tree,vram-zero,vram-fill,vram-check")).unwrap();
        let (job, logs) = cluster.run(&file, &[]).unwrap();
        assert_eq!(job.state, JobState::Succeeded, "{tenant}: {job:?}\n{logs}");
        let place = ["0000:00:10.0 1b36:000c 060400 [01-01]", "0000:01:00.0 1234:1111 038000"];
        let memory = ["vram_size 0000:01:00.0 16777216", "vram_zero yes", "vram_intact 16777216"];
        for line in place.into_iter().chain(memory) {
            assert!(logs.contains(line), "{tenant}: no {line:?} in\n{logs}");
        }
        cluster.settled_census(host).unwrap();
        assert_eq!(driver(), before, "the host's driver has it back after the {tenant}");
    }
    let listed: Vec<serde_json::Value> = cluster.json(["gpu", "list"]).unwrap();
    assert_eq!(listed[0]["state"], "free", "{listed:?}");
}
