//! Bad input gets one clear line and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Output;

use lathe_api::job::{Job, JobState};
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};

/// The one line on stderr of a command that must fail with `code`.
fn refusal(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line, not:\n{stderr}");
    stderr
}

fn job(more: &str) -> String {
    format!("name = \"bad\"\nclass = \"container\"\nimage = \"least-squares\"\n{more}\n")
}

#[test]
fn mistakes_are_named_and_nothing_comes_of_them() {
    let image = artefacts::least_squares_image().unwrap();
    let mut cluster = Cluster::start(&Options { hosts: 1, ..Options::default() }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run = |cluster: &Cluster, text: &str| {
        let path = dir.path().join("job.toml");
        std::fs::write(&path, text).unwrap();
        cluster.lathe(["job", "run", "--detach", path.to_str().unwrap()]).unwrap()
    };

    // Files and fields.
    let line = refusal(&run(&cluster, &job("tusks = 4")), 2);
    assert!(line.contains("tusks") && line.contains("line 4"), "{line}");
    let line = refusal(&run(&cluster, "name = \"bad\"\nclass = \"microvm\"\n"), 2);
    assert!(line.contains("image"), "{line}");
    let line = refusal(&run(&cluster, &job("")), 2);
    assert!(line.contains("least-squares"), "an unknown image is named: {line}");

    // Images.
    let damaged = dir.path().join("damaged.tar");
    let mut bytes = std::fs::read(&image).unwrap();
    // A layer's content starts after the first kilobytes and is most of the archive.
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let line = refusal(&cluster.lathe(["image", "add", "bad", damaged.to_str().unwrap()]).unwrap(), 2);
    assert!(line.contains("sha256:") && line.contains("damaged"), "{line}");
    let images: Vec<lathe_api::artefact::Image> = cluster.json(["image", "list"]).unwrap();
    assert!(images.is_empty(), "a damaged image was taken: {images:?}");
    let added = cluster.lathe(["image", "add", "least-squares", image.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));

    // Values.
    let zeros = "0".repeat(64);
    let wrong_digest = job("").replace("least-squares", &format!("least-squares@sha256:{zeros}"));
    for (text, named) in [
        (job("tasks = 0"), "tasks"),
        (job("[resources]\ncpus = 0"), "cpus"),
        (job("[resources]\nmemory = \"12\""), "memory"),
        (job("[resources]\ngpus = 1"), "gpus"),
        (job("[[datasets]]\nname = \"nope\"\nmount = \"/data\""), "nope"),
        (job("").replace("container", "unikernel"), "unikernel"),
        (wrong_digest, "sha256:0000"),
    ] {
        let line = refusal(&run(&cluster, &text), 2);
        assert!(line.contains(named), "{named:?} is not in: {line}");
    }
    let jobs: Vec<Job> = cluster.json(["job", "list"]).unwrap();
    assert!(jobs.is_empty(), "a refused job was kept: {jobs:?}");

    // Larger than the cluster: accepted, pending, with the reason; and it can be cancelled.
    let large = cluster.submit_text(&job("tasks = 64")).unwrap();
    let pending = until("a reason", PATIENCE, || {
        let job = cluster.job(&large.id)?;
        Ok(job.reason.is_some().then_some(job))
    })
    .unwrap();
    assert_eq!(pending.state, JobState::Pending);
    assert!(pending.reason.as_ref().unwrap().contains("64"), "{:?}", pending.reason);
    let cancelled: Job = cluster.json(["job", "cancel", &large.id]).unwrap();
    assert!(matches!(cancelled.state, JobState::Cancelling | JobState::Cancelled));

    // A broken row is named by its line, in the job's output.
    let broken = dir.path().join("broken.csv");
    std::fs::write(&broken, "y,x\n1,1\n2,2\n3,zwei\n4,4\n").unwrap();
    let added = cluster.lathe(["dataset", "add", "broken", broken.to_str().unwrap()]).unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let fit = job("args = [\"fit\", \"--data\", \"/data/broken.csv\", \"--response\", \"y\"]\n\
         [[datasets]]\nname = \"broken\"\nmount = \"/data\"");
    let failed = cluster.submit_text(&fit).unwrap();
    let failed = cluster.wait_for_job(&failed.id).unwrap();
    assert_eq!(failed.state, JobState::Failed, "{failed:?}");
    let logs = cluster.logs(&failed.id).unwrap();
    assert!(logs.contains("line 4") && logs.contains("zwei"), "{logs}");

    // Credentials.
    let with = |variable: &str, path: &std::path::Path| {
        let mut command = cluster.lathe_command().unwrap();
        command.args(["node", "list"]).env(variable, path).output().unwrap()
    };
    let token = dir.path().join("token");
    let created = cluster
        .json::<lathe_api::token::TokenCreated, _>(["token", "create", "user", "--hours", "1"])
        .unwrap();
    std::fs::write(&token, &created.token).unwrap();
    assert!(with("LATHE_TOKEN_FILE", &token).status.success(), "a fresh token works");
    assert!(cluster.lathe(["token", "revoke", &created.info.id]).unwrap().status.success());
    let line = refusal(&with("LATHE_TOKEN_FILE", &token), 3);
    assert!(line.contains("token"), "{line}");
    let other = dir.path().join("other");
    let made = std::process::Command::new(artefacts::binary("lathe-coordinator").unwrap())
        .args(["init", "--address", "10.88.0.1:7700", "--data-dir"])
        .arg(&other)
        .output()
        .unwrap();
    assert!(made.status.success());
    let line = refusal(&with("LATHE_CA", &other.join("ca.pem")), 3);
    assert!(line.contains("certificate") && line.contains("cluster"), "{line}");

    // A dead coordinator.
    cluster.kill_coordinator();
    let line = refusal(&cluster.lathe(["node", "list"]).unwrap(), 3);
    assert!(line.contains("10.88.0.1:7700") && line.contains("refused"), "{line}");
}
