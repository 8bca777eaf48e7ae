//! The demo where nothing has to be emulated: an emulated host is this machine, and does it all itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use lathe_e2e::{artefacts, leftovers};
use lathe_testbed::{Bed, HostDescription, HostFile, Status};

fn files() -> Vec<HostFile> {
    let file = |local: PathBuf, remote: &str| HostFile { local, remote: format!("/demo/{remote}") };
    let guest = artefacts::guest_bundle().unwrap();
    let mut files = vec![
        file(artefacts::least_squares_image().unwrap(), "artefacts/workloads/least-squares"),
        file(artefacts::longley(), "images/workloads/data/longley.csv"),
    ];
    for name in ["vmlinuz", "initramfs", "cmdline"] {
        files.push(file(guest.join(name), &format!("artefacts/guest/{name}")));
    }
    for name in ["longley.toml", "generated.toml"] {
        files.push(file(artefacts::job(name), &format!("images/workloads/jobs/{name}")));
    }
    for name in ["demo", "lathe", "lathe-agent", "lathe-coordinator", "lathe-vmm", "least-squares"] {
        files.push(file(artefacts::binary(name).unwrap(), &format!("bin/{name}")));
    }
    files
}

#[test]
fn the_demo_uses_a_machine_that_can_be_the_host_and_leaves_nothing_on_it() {
    let bed = Bed::new().unwrap();
    let mut description = HostDescription::new("metal");
    description.files = files();
    let host = bed.boot(description).unwrap();
    // Modules that the agent loads bring interfaces and mounts of their own, once.
    host.shell("/demo/bin/lathe-agent inventory").unwrap();
    let before = leftovers::census(&host).unwrap();
    let script = "cd /demo && LATHE_ARTEFACTS=/demo/artefacts bin/demo --rows 100000 --no-python 2>&1";
    let output = host.command(["sh", "-c", script]).unwrap().limit(Duration::from_secs(600)).run().unwrap();
    let text = output.text();
    assert_eq!(output.status, Status::Exited(0), "{text}");
    assert!(text.contains("this machine as the host"), "{text}");
    assert!(text.contains("agrees with NIST's certified values"), "{text}");
    let report = host.read_file("/demo/target/demo/report.json").unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let jobs: Vec<_> = report
        .as_array()
        .unwrap()
        .iter()
        .map(|job| (job["job"].as_str().unwrap(), job["class"].as_str().unwrap(), &job["ranks"]))
        .collect();
    // As many as it has CPUs.
    let ranks = &serde_json::json!(2);
    assert_eq!(
        jobs,
        [
            ("longley", "microvm", ranks),
            ("longley", "container", ranks),
            ("generated", "microvm", ranks),
            ("generated", "container", ranks)
        ]
    );
    assert_eq!(leftovers::new_since(&before, &leftovers::census(&host).unwrap()), [""; 0]);
    assert_eq!(host.shell("nft list tables; ls /tmp").unwrap().trim(), "", "tables or files are left");
}
