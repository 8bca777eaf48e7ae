//! A tenant's way to a GPU, from `lathe job run` to the device in the guest and back: a display stands for it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lathe_api::job::JobState;
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_testbed::{Device, DeviceKind};

/// What runs in the guest: finds the display, says where it sits, whether its memory holds anything, and fills it.
const TENANT: &str = r#"
import glob, mmap, os
found = [d for d in glob.glob("/sys/bus/pci/devices/*") if open(d + "/class").read().startswith("0x03")]
for device in found:
    path = os.path.realpath(device).split("/")
    above = "/sys/bus/pci/devices/" + path[-2]
    kind = open(above + "/class").read().strip()
    print("gpu", path[-1], "below", path[-2], kind)
    open(device + "/enable", "w").write("1")
    file = os.open(device + "/resource0", os.O_RDWR | os.O_SYNC)
    size = os.fstat(file).st_size
    memory = mmap.mmap(file, size)
    print("memory", size, "zero" if not any(memory[i] for i in range(0, size, 4093)) else "NOT ZERO")
    memory[0:size] = b"\xa5" * size
    print("wrote", sum(memory[i] == 0xa5 for i in range(0, size, 65536)))
print("gpus", len(found), os.environ.get("LATHE_GPU_COUNT"))
"#;

fn spec(gpus: u32) -> String {
    let script = TENANT.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!(
        "name = \"tenant\"\nclass = \"microvm\"\nimage = \"python-ml\"\nentrypoint = [\"python3\", \"-c\", \"{script}\"]\n\
         [resources]\ncpus = 1\nmemory = \"512 MiB\"\ngpus = {gpus}\n"
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
    let image = artefacts::python_ml_image().unwrap();
    let added = cluster.lathe(["image", "add", "python-ml", image.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    for tenant in ["first", "second"] {
        let file = cluster.scratch().join(format!("{tenant}.toml"));
        std::fs::write(&file, spec(1)).unwrap();
        let (job, logs) = cluster.run(&file, &[]).unwrap();
        assert_eq!(job.state, JobState::Succeeded, "{tenant}: {job:?}\n{logs}");
        for line in
            ["gpu 0000:01:00.0 below 0000:00:10.0 0x060400", "memory 16777216 zero", "wrote 256", "gpus 1 1"]
        {
            assert!(logs.contains(line), "{tenant}: no {line:?} in\n{logs}");
        }
        cluster.settled_census(host).unwrap();
        assert_eq!(driver(), before, "the host's driver has it back after the {tenant}");
    }
    let listed: Vec<serde_json::Value> = cluster.json(["gpu", "list"]).unwrap();
    assert_eq!(listed[0]["state"], "free", "{listed:?}");
}
