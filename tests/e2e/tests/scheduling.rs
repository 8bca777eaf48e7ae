//! The planner's decisions as real nodes carry them out: room is made for what is urgent and what was
//! stopped gets its signal and starts again, borrowed quota comes back, a node is emptied, and work goes
//! where its data is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use lathe_api::artefact::Dataset;
use lathe_api::job::{Job, JobState, TaskState};
use lathe_api::node::Node;
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};

/// Runs until it is told to stop; then it writes what a real job would write to disk.
const TRAIN: &str = "import signal, sys, time\n\
    def stop(number, frame):\n    print('checkpoint', flush=True); sys.exit(0)\n\
    signal.signal(signal.SIGTERM, stop)\n\
    print('training', flush=True)\n\
    while True: time.sleep(0.2)\n";

fn lathe(cluster: &Cluster, args: &[&str]) -> String {
    let output = cluster.lathe(args).unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn cluster() -> Cluster {
    let cluster = Cluster::start(&Options::default()).unwrap();
    let image = artefacts::python_ml_image().unwrap();
    lathe(&cluster, &["image", "add", "python", image.to_str().unwrap()]);
    cluster
}

/// A container of one CPU a task that runs `code`; `more` are lines of the job, before its tables.
fn job(name: &str, tasks: u32, more: &str, code: &str) -> String {
    format!(
        "name = \"{name}\"\nclass = \"container\"\nimage = \"python\"\ntasks = {tasks}\n\
         entrypoint = [\"/usr/bin/python3\", \"-c\", '''\n{code}''']\ngrace_seconds = 30\n{more}\n\
         [resources]\ncpus = 1\nmemory = \"128 MiB\"\n"
    )
}

fn set(cluster: &Cluster, what: &str, text: &str) {
    let file = cluster.scratch().join(format!("{what}.toml"));
    std::fs::write(&file, text).unwrap();
    lathe(cluster, &[what, "set", file.to_str().unwrap()]);
}

/// Submits as a user of a tenant.
fn submit_as(cluster: &Cluster, tenant: &str, text: &str) -> Job {
    let token = lathe(cluster, &["token", "create", "user", "--tenant", tenant]);
    let token_file = cluster.scratch().join(format!("{tenant}.token"));
    std::fs::write(&token_file, token.trim()).unwrap();
    let file = cluster.scratch().join(format!("{tenant}.toml"));
    std::fs::write(&file, text).unwrap();
    let mut command = cluster.lathe_command().unwrap();
    command.env("LATHE_TOKEN_FILE", token_file).args(["--json", "job", "run", "--detach"]).arg(&file);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Waits until the job is as wanted.
fn wait(cluster: &Cluster, id: &str, what: &str, wanted: impl Fn(&Job) -> bool) -> Job {
    let job = until(&format!("{id} {what}"), PATIENCE, || {
        let job = cluster.job(id)?;
        anyhow::ensure!(wanted(&job), "{:?}, attempt {}: {:?}", job.state, job.attempt, job.reason);
        Ok(Some(job))
    });
    if job.is_err() {
        cluster.save_logs(id);
    }
    job.unwrap()
}

/// Waits until every task runs and has said so, so that it is ready for signals.
fn trains(cluster: &Cluster, id: &str, attempt: u32, tasks: usize) -> Job {
    let runs = |job: &Job| {
        let running = job.tasks.iter().filter(|task| task.state == TaskState::Running).count();
        job.attempt == attempt && running == tasks && job.tasks.len() == tasks
    };
    wait(cluster, id, &format!("runs, attempt {attempt}"), |job| {
        runs(job) && cluster.logs(id).is_ok_and(|logs| logs.matches("training").count() >= tasks)
    })
}

fn waits(job: &Job) -> bool {
    job.state == JobState::Pending && job.reason.is_some()
}

fn nodes(job: &Job) -> Vec<&str> {
    let mut nodes: Vec<&str> = job.tasks.iter().filter_map(|task| task.node.as_deref()).collect();
    nodes.dedup();
    nodes
}

fn cancel(cluster: &Cluster, id: &str) {
    let _: Job = cluster.json(["job", "cancel", id]).unwrap();
    wait(cluster, id, "is cancelled", |job| job.state == JobState::Cancelled);
}

#[test]
fn room_is_made_for_the_urgent_and_for_owners_and_nodes_are_emptied() {
    let cluster = cluster();
    set(&cluster, "pool", "name = \"default\"\nqueue = \"priority\"\npreemption = true\n");
    urgent_work_comes_first(&cluster);
    a_drained_node_is_emptied(&cluster);
    borrowed_quota_comes_back(&cluster);
}

fn urgent_work_comes_first(cluster: &Cluster) {
    let low = cluster.submit_text(&job("low", 4, "preemptible = true", TRAIN)).unwrap();
    assert_eq!(nodes(&trains(cluster, &low.id, 1, 4)), ["n1", "n2"], "a gang of four fills both hosts");
    // A gang that would not fit beside it, and is no more urgent, waits and says for what.
    let equal = cluster.submit_text(&job("equal", 3, "", TRAIN)).unwrap();
    let equal = wait(cluster, &equal.id, "waits", waits);
    assert!(equal.reason.as_ref().unwrap().contains("CPUs"), "{:?}", equal.reason);
    let why = lathe(cluster, &["job", "why", &equal.id]);
    assert!(why.contains(equal.reason.as_ref().unwrap()), "{why}");
    cancel(cluster, &equal.id);

    let high = cluster.submit_text(&job("high", 3, "priority = 10", TRAIN)).unwrap();
    trains(cluster, &high.id, 1, 3);
    let stopped = wait(cluster, &low.id, "waits again", waits);
    assert_eq!((stopped.preemptions, stopped.attempt), (1, 1), "{stopped:?}");
    let logs = cluster.logs(&low.id).unwrap();
    assert_eq!(logs.matches("checkpoint").count(), 4, "every task got its signal:\n{logs}");
    let why = lathe(cluster, &["job", "why", &low.id]);
    assert!(why.contains(&high.id), "it says for whom it was stopped: {why}");

    cancel(cluster, &high.id);
    let again = trains(cluster, &low.id, 2, 4);
    assert_eq!(again.preemptions, 1);
    cancel(cluster, &low.id);
}

fn a_drained_node_is_emptied(cluster: &Cluster) {
    let moves = cluster.submit_text(&job("moves", 1, "preemptible = true", TRAIN)).unwrap();
    let placed = trains(cluster, &moves.id, 1, 1);
    let from = nodes(&placed)[0].to_owned();
    lathe(cluster, &["node", "drain", &from, "--reason", "new disks"]);
    let moved = trains(cluster, &moves.id, 2, 1);
    assert_ne!(nodes(&moved)[0], from, "the drained node takes no work");
    // More than the other node has: what waits says that the rest is not offered.
    let large = cluster.submit_text(&job("large", 3, "", TRAIN)).unwrap();
    let large = wait(cluster, &large.id, "waits", waits);
    cancel(cluster, &moves.id);
    assert!(waits(&cluster.job(&large.id).unwrap()), "three tasks on a node of two CPUs");
    lathe(cluster, &["node", "uncordon", &from]);
    trains(cluster, &large.id, 1, 3);
    cancel(cluster, &large.id);
}

fn borrowed_quota_comes_back(cluster: &Cluster) {
    set(cluster, "tenant", "name = \"owner\"\nguaranteed = { cpus = 2 }\n");
    let borrower = submit_as(cluster, "borrower", &job("borrows", 4, "preemptible = true", TRAIN));
    trains(cluster, &borrower.id, 1, 4);
    let owner = submit_as(cluster, "owner", &job("owns", 2, "", TRAIN));
    trains(cluster, &owner.id, 1, 2);
    let stopped = wait(cluster, &borrower.id, "waits again", waits);
    assert_eq!(stopped.preemptions, 1);
    cancel(cluster, &owner.id);
    trains(cluster, &borrower.id, 2, 4);
    cancel(cluster, &borrower.id);
}

/// Data that only tasks of one job have read: which node has it is known from that job.
fn dataset(cluster: &Cluster, directory: &Path, name: &str) {
    let file = directory.join(format!("{name}.csv"));
    std::fs::write(&file, name.repeat(4 << 20)).unwrap();
    lathe(cluster, &["dataset", "add", name, file.to_str().unwrap()]);
}

/// Nodes say what they have with their reports.
fn knows(cluster: &Cluster, node: &str, dataset: &str) {
    let datasets: Vec<Dataset> = cluster.json(["dataset", "list"]).unwrap();
    let digest = datasets.iter().find(|one| one.name == dataset).unwrap().digest;
    until(&format!("{node} is known to have {dataset}"), PATIENCE, || {
        let node: Node = cluster.json(["node", "show", node])?;
        Ok(node.inventory.artefacts.iter().any(|one| one.digest == digest).then_some(()))
    })
    .unwrap();
}

#[test]
fn work_goes_where_its_data_is() {
    let cluster = cluster();
    let directory = tempfile::tempdir().unwrap();
    let reads = |dataset: &str, node: Option<&str>| {
        let constraint = node.map_or_else(String::new, |node| {
            format!("[[constraints]]\nlabel = \"name\"\noperator = \"in\"\nvalues = [\"{node}\"]\n")
        });
        let text = job("reads", 1, "", "import os; print(sum(len(f) for *_, f in os.walk('/data')))\n");
        let text = format!("{text}[[datasets]]\nname = \"{dataset}\"\nmount = \"/data\"\n{constraint}");
        let job = cluster.submit_text(&text).unwrap();
        wait(&cluster, &job.id, "succeeds", |job| job.state == JobState::Succeeded)
    };
    // The other way round for the second: a tie between the nodes would be decided alike both times.
    for (name, node) in [("first", "n2"), ("second", "n1")] {
        dataset(&cluster, directory.path(), name);
        let placed = reads(name, Some(node));
        assert_eq!(nodes(&placed), [node]);
        knows(&cluster, node, name);
    }
    for (name, node) in [("first", "n2"), ("second", "n1")] {
        for _ in 0..2 {
            assert_eq!(nodes(&reads(name, None)), [node], "its data is on {node} alone");
        }
    }
}
