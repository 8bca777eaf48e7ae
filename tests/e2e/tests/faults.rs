//! `kill -9` of each part in the middle of a job: the state reported is true, what can go on goes on, what
//! was lost runs again, and nothing is left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Instant;

use lathe_api::job::{Job, JobState, TaskState};
use lathe_api::node::{Node, NodeState};
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};
use lathe_e2e::{artefacts, leftovers};
use lathe_testbed::Host;

/// A rank of this job waits for a rank that never comes: it runs until it is stopped.
fn waiting_job(class: &str, tasks: u32, restart: &str) -> String {
    format!(
        "name = \"waiting\"\nclass = \"{class}\"\nimage = \"least-squares\"\ntasks = {tasks}\n\
         args = [\"fit\", \"--data\", \"/data/longley.csv\", \"--response\", \"TOTEMP\", \
         \"--features\", \"GNP\", \"--world-size\", \"99\", \"--connect-timeout\", \"3600\"]\n\
         grace_seconds = 1\n\
         [resources]\nmemory = \"128 MiB\"\n\
         [restart]\n{restart}\n\
         [[datasets]]\nname = \"longley\"\nmount = \"/data\"\n"
    )
}

fn cluster(hosts: usize) -> Cluster {
    let image = artefacts::least_squares_image().unwrap();
    let cluster = Cluster::start(&Options { hosts, ..Options::default() }).unwrap();
    for args in [
        ["image", "add", "least-squares", image.to_str().unwrap()],
        ["dataset", "add", "longley", artefacts::longley().to_str().unwrap()],
    ] {
        let output = cluster.lathe(args).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    cluster
}

/// Waits until every task of the job's attempt `attempt` runs.
fn running(cluster: &Cluster, id: &str, attempt: u32) -> Job {
    let job = until(&format!("{id} runs, attempt {attempt}"), PATIENCE, || {
        let job = cluster.job(id)?;
        let runs = job.tasks.iter().all(|task| task.state == TaskState::Running);
        let running = job.attempt == attempt && !job.tasks.is_empty() && runs;
        Ok((running || job.state.is_terminal()).then_some(job))
    });
    if !job.as_ref().is_ok_and(|job| !job.state.is_terminal()) {
        cluster.save_logs(id);
    }
    let job = job.unwrap();
    assert!(!job.state.is_terminal(), "it ended: {job:?}\n{}", cluster.logs(id).unwrap());
    job
}

fn cancel(cluster: &Cluster, id: &str) {
    let _: Job = cluster.json(["job", "cancel", id]).unwrap();
    assert_eq!(cluster.wait_for_job(id).unwrap().state, JobState::Cancelled);
}

/// Kills every process in the host whose command line has `pattern`; there must be one.
fn kill(host: &Host, pattern: &str) {
    let script = format!(
        "n=0; for p in /proc/[0-9]*; do [ $p = /proc/$$ ] && continue; \
         if tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -q -- '{pattern}'; then \
         kill -9 ${{p#/proc/}} && n=$((n+1)); fi; done; echo $n"
    );
    let killed = host.shell(&script).unwrap();
    assert_ne!(killed.trim(), "0", "no process is {pattern:?}");
}

/// The baseline: a job has run to its end once, so what stays by design is there.
fn settled(cluster: &Cluster) -> Vec<leftovers::Census> {
    let first = cluster.submit_text(&waiting_job("microvm", 2, "")).unwrap();
    running(cluster, &first.id, 1);
    cancel(cluster, &first.id);
    cluster.hosts().iter().map(|host| cluster.settled_census(host).unwrap()).collect()
}

fn nothing_left(cluster: &Cluster, before: &[leftovers::Census]) {
    for (host, before) in cluster.hosts().iter().zip(before) {
        let left = until("nothing is left", PATIENCE, || {
            let left = leftovers::new_since(before, &leftovers::census(host)?);
            if left.is_empty() { Ok(Some(())) } else { anyhow::bail!("{left:?}") }
        });
        if left.is_err() {
            cluster.save_logs("leftovers");
        }
        left.unwrap();
    }
}

#[test]
fn a_killed_vmm_or_worker_is_reported_and_retried() {
    let cluster = cluster(1);
    let before = settled(&cluster);
    let host = &cluster.hosts()[0];

    // The VMM dies: not the task's fault, so the gang starts again.
    let job = cluster.submit_text(&waiting_job("microvm", 2, "on_loss = 1")).unwrap();
    let first = running(&cluster, &job.id, 1);
    kill(host, "lathe-vmm --config");
    let second = running(&cluster, &job.id, 2);
    assert_ne!(first.tasks[0].sandbox, second.tasks[0].sandbox, "another attempt is another sandbox");
    // The second loss is one too many, and says so.
    let dead = Instant::now();
    kill(host, "lathe-vmm --config");
    let lost = cluster.wait_for_job(&job.id).unwrap();
    println!("a job without VMMs was reported failed after {:.1} s", dead.elapsed().as_secs_f64());
    assert_eq!(lost.state, JobState::Failed);
    assert!(lost.reason.is_some(), "{lost:?}");
    nothing_left(&cluster, &before);

    // The worker dies in a container: the task's failure.
    let job = cluster.submit_text(&waiting_job("container", 1, "on_failure = 1")).unwrap();
    running(&cluster, &job.id, 1);
    kill(host, "least-squares fit");
    running(&cluster, &job.id, 2);
    let dead = Instant::now();
    kill(host, "least-squares fit");
    let failed = cluster.wait_for_job(&job.id).unwrap();
    println!("a killed worker's job was reported failed after {:.1} s", dead.elapsed().as_secs_f64());
    assert_eq!(failed.state, JobState::Failed);
    assert_eq!(failed.tasks[0].exit, Some(lathe_api::job::TaskExit::Signal(9)), "{failed:?}");
    nothing_left(&cluster, &before);
}

#[test]
fn microvms_survive_the_agent_and_everything_survives_the_coordinator() {
    let mut cluster = cluster(1);
    let before = settled(&cluster);
    for class in ["microvm", "container"] {
        let job = cluster.submit_text(&waiting_job(class, 2, "")).unwrap();
        let first = running(&cluster, &job.id, 1);
        let dead = Instant::now();
        kill(&cluster.hosts()[0], "lathe-agent run");
        cluster.start_agent(&cluster.hosts()[0]).unwrap();
        until("the node is ready again", PATIENCE, || {
            let node: Node = cluster.json(["node", "show", "n1"])?;
            Ok((node.state == NodeState::Ready).then_some(()))
        })
        .unwrap();
        let adopted = running(&cluster, &job.id, 1);
        assert_eq!(first.tasks[0].sandbox, adopted.tasks[0].sandbox, "{class}: adopted, not restarted");
        println!("{class}s were adopted {:.1} s after their agent died", dead.elapsed().as_secs_f64());

        let nodes: Vec<Node> = cluster.json(["node", "list"]).unwrap();
        cluster.kill_coordinator();
        cluster.start_coordinator().unwrap();
        let again: Vec<Node> = cluster.json(["node", "list"]).unwrap();
        assert_eq!(nodes[0].subnet, again[0].subnet);
        let known = running(&cluster, &job.id, 1);
        assert_eq!(known.tasks[0].sandbox, adopted.tasks[0].sandbox);
        cancel(&cluster, &job.id);
        nothing_left(&cluster, &before);
    }
}

#[test]
fn a_lost_host_is_seen_and_its_gang_runs_elsewhere() {
    let cluster = cluster(2);
    let job = cluster.submit_text(&waiting_job("microvm", 2, "on_loss = 1")).unwrap();
    let first = running(&cluster, &job.id, 1);
    let node = first.tasks[0].node.clone().unwrap();
    let host = cluster.hosts().iter().find(|host| host.name() == node).unwrap();
    let dead = Instant::now();
    host.kill();
    until("the node is lost", PATIENCE, || {
        let seen: Node = cluster.json(["node", "show", &node])?;
        Ok((seen.state == NodeState::Lost).then_some(()))
    })
    .unwrap();
    println!("a host without power was reported lost after {:.1} s", dead.elapsed().as_secs_f64());
    let second = running(&cluster, &job.id, 2);
    assert!(second.tasks.iter().all(|task| task.node.as_deref() != Some(&node)), "{second:?}");

    // The host comes back with its disk: nothing of the old attempt runs or lies there.
    host.restart().unwrap();
    cluster.start_agent(host).unwrap();
    cluster.wait_for_nodes(2).unwrap();
    until("the old sandboxes are gone", PATIENCE, || {
        let left = leftovers::census(host)?;
        let left: Vec<_> = left
            .keys()
            .filter(|line| line.starts_with("process ") || line.starts_with("sandbox "))
            .cloned()
            .collect();
        if left.is_empty() { Ok(Some(())) } else { anyhow::bail!("{left:?}") }
    })
    .unwrap();
    cancel(&cluster, &job.id);
}
