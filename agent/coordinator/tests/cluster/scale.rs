//! Many nodes and tasks at once, small enough for every run: what `scripts/bench coordinator` does with a
//! thousand nodes, with everything checked.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lathe_api::job::{JobState, TaskExit};
use lathe_api::node::NodeState;

use crate::harness::{Cluster, FakeAgent, eventually, spec};

const NODES: u32 = 20;
const CPUS: u32 = 4;
const TASKS: u32 = 500;

/// Ends what runs, once it has been seen to run, and checks that it fits together.
fn pass(agent: &FakeAgent) {
    let Some(desired) = agent.desired() else { return };
    let cpus: u32 = desired.sandboxes.iter().map(|spec| spec.resources.cpus).sum();
    assert!(cpus <= CPUS, "a node of {CPUS} CPUs is to run {cpus} at once");
    let addresses: BTreeSet<_> = desired.sandboxes.iter().map(|spec| &spec.address).collect();
    assert_eq!(addresses.len(), desired.sandboxes.len(), "an address was given twice");
    for sandbox in agent.running() {
        agent.exit(&sandbox, TaskExit::Code(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_nodes_run_five_hundred_tasks_and_nothing_is_left() {
    let cluster = Cluster::start().await;
    let names: Vec<String> = (0..NODES).map(|number| format!("n{number:02}")).collect();
    let agents = join_all(names.iter().map(|name| cluster.node(name, CPUS))).await;
    cluster.image().await;
    let admin = cluster.admin();
    eventually("all nodes", || async {
        let nodes = admin.nodes().await.ok()?;
        (nodes.iter().filter(|node| node.state == NodeState::Ready).count() == NODES as usize).then_some(())
    })
    .await;
    let sizes = [1, 2, 1, 4, 1, 1, 8, 2].into_iter().cycle();
    let mut left = TASKS;
    let sizes: Vec<u32> = sizes
        .map_while(|size: u32| {
            let size = size.min(left);
            left -= size;
            (size > 0).then_some(size)
        })
        .collect();
    let jobs = join_all(sizes.iter().map(|size| async {
        let admin = cluster.admin();
        (*size, admin.submit_job(&spec(*size)).await.expect("accepted"))
    }))
    .await;
    let ids: BTreeSet<_> = jobs.iter().map(|(_, job)| job.id.clone()).collect();
    assert_eq!(ids.len(), jobs.len());
    eventually("all jobs to end", || async {
        agents.iter().for_each(pass);
        let jobs = admin.jobs().await.ok()?;
        jobs.iter().all(|job| job.state.is_terminal()).then_some(())
    })
    .await;
    for (size, job) in &jobs {
        let job = cluster.job(&job.id).await;
        assert_eq!((job.state, job.attempt, job.tasks.len()), (JobState::Succeeded, 1, *size as usize));
        let sandboxes: BTreeSet<_> = job.tasks.iter().map(|task| task.sandbox.clone()).collect();
        assert_eq!(sandboxes.len(), *size as usize);
    }
    let started: usize = agents.iter().map(|agent| agent.seen().len()).sum();
    assert_eq!(started, TASKS as usize, "each task ran once");
    eventually("everything to be released", || async {
        let nodes = admin.nodes().await.ok()?;
        let free = nodes.iter().all(|node| node.allocated_cpus == 0 && node.allocated_memory.bytes() == 0);
        let forgotten = agents.iter().all(|agent| agent.desired().is_some_and(|d| d.sandboxes.is_empty()));
        (free && forgotten).then_some(())
    })
    .await;
}
