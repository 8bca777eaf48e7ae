//! Gangs from submission to their end, with what can go wrong in between.

use std::collections::BTreeSet;
use std::time::Duration;

use lathe_api::job::{JobSpec, JobState, RestartPolicy, TaskExit, TaskState};
use lathe_api::node::NodeState;

use crate::harness::{Cluster, eventually, spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_is_spread_told_who_it_is_and_succeeds_when_all_exit_with_0() {
    let cluster = Cluster::start().await;
    let (one, two) = (cluster.node("n1", 2).await, cluster.node("n2", 2).await);
    cluster.image().await;
    eventually("two nodes", || async {
        let nodes = cluster.admin().nodes().await.ok()?;
        (nodes.iter().filter(|node| node.state == NodeState::Ready).count() == 2).then_some(())
    })
    .await;
    let job = cluster.admin().submit_job(&spec(4)).await.expect("accepted");
    assert_eq!((job.state, job.attempt), (JobState::Pending, 0));
    let on_one = one.running_when(2).await;
    let on_two = two.running_when(2).await;
    let job = cluster.job_when(&job.id, |job| job.tasks.iter().all(|t| t.state == TaskState::Running)).await;
    assert_eq!((job.state, job.attempt), (JobState::Running, 1));

    let addresses: BTreeSet<_> = job.tasks.iter().map(|task| task.address.clone().expect("one")).collect();
    assert_eq!(addresses.len(), 4, "addresses are unique");
    for spec in one.seen().iter().chain(&two.seen()) {
        let env = |name: &str| &spec.env.iter().find(|(n, _)| n == name).expect(name).1;
        assert_eq!(env("MASTER_ADDR"), job.tasks[0].address.as_ref().expect("one"));
        assert_eq!((env("RANK"), env("WORLD_SIZE")), (&spec.rank.to_string(), &"4".to_owned()));
        assert_eq!(spec.hosts.len(), 4);
        assert!(spec.hosts.contains(&(spec.address.clone(), format!("{}-{}", job.id, spec.rank))));
    }
    let network = one.desired().expect("told").network_with_gangs();
    assert_eq!(network.tenants[0].addresses.len(), 4, "the whole gang, at once");
    let network = eventually("the way to the other node", || async {
        one.desired()?.network.filter(|network| network.routes.len() == 1)
    })
    .await;
    assert!(job.tasks[0].address.as_ref().expect("one").starts_with(network.subnet.trim_end_matches("0/24")));

    for sandbox in &on_one {
        one.exit(sandbox, TaskExit::Code(0));
    }
    for sandbox in &on_two {
        two.exit(sandbox, TaskExit::Code(0));
    }
    let job = cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    assert_eq!((job.state, job.reason), (JobState::Succeeded, None));
    eventually("everything to be released", || async {
        let nodes = cluster.admin().nodes().await.ok()?;
        let free = nodes.iter().all(|node| node.allocated_cpus == 0 && node.allocated_memory.bytes() == 0);
        let forgotten = [&one, &two].iter().all(|a| a.desired().is_some_and(|d| d.sandboxes.is_empty()));
        (free && forgotten).then_some(())
    })
    .await;
    // The next tenant with these addresses must not find the door of this one open.
    eventually("the addresses to be shut out", || async {
        let told = |network: lathe_api::sandbox::NodeNetwork| network.tenants.is_empty();
        let shut = [&one, &two].iter().all(|a| a.desired().and_then(|d| d.network).is_some_and(told));
        shut.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_task_stops_the_gang_which_starts_again_as_often_as_allowed() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let policy = RestartPolicy { on_failure: 1, on_loss: 0 };
    let job = cluster.admin().submit_job(&JobSpec { restart: policy, ..spec(2) }).await.expect("accepted");
    let first = node.running_when(2).await;
    node.exit(&first[1], TaskExit::Code(3));
    let job = cluster.job_when(&job.id, |job| job.attempt == 2).await;
    let second = eventually("the second attempt", || async {
        Some(node.running()).filter(|running| running.len() == 2 && running[0] != first[0])
    })
    .await;
    assert!(second.iter().all(|sandbox| !first.contains(sandbox)), "a sandbox is never started twice");
    let reason = cluster.job(&job.id).await.reason.expect("why it started again");
    assert!(reason.contains("rank 1 exited with code 3"), "{reason}");
    node.exit(&second[0], TaskExit::OutOfMemory);
    let job = cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    let reason = job.reason.expect("why it failed");
    assert_eq!(job.state, JobState::Failed);
    assert!(reason.contains("rank 0 ran out of memory") && reason.contains("on_failure = 1"), "{reason}");
    assert_eq!(job.tasks[1].state, TaskState::Exited, "the other was stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_is_seen_and_its_gang_runs_elsewhere() {
    let cluster = Cluster::start_with_expiry(Duration::from_millis(1500)).await;
    let one = cluster.node("n1", 2).await;
    cluster.image().await;
    let job = cluster.admin().submit_job(&spec(2)).await.expect("accepted");
    one.running_when(2).await;
    one.kill();
    let lost = cluster.job_when(&job.id, |job| job.state == JobState::Pending).await;
    assert!(cluster.admin().node("n1").await.expect("known").state == NodeState::Lost);
    assert_eq!(lost.attempt, 1);
    let two = cluster.node("n2", 2).await;
    let sandboxes = two.running_when(2).await;
    for sandbox in &sandboxes {
        two.exit(sandbox, TaskExit::Code(0));
    }
    let job = cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    assert_eq!((job.state, job.attempt), (JobState::Succeeded, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_on_a_restarted_host_is_lost() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 1).await;
    cluster.image().await;
    let policy = RestartPolicy { on_failure: 0, on_loss: 0 };
    let job = cluster.admin().submit_job(&JobSpec { restart: policy, ..spec(1) }).await.expect("accepted");
    node.running_when(1).await;
    cluster.job_when(&job.id, |job| job.tasks[0].state == TaskState::Running).await;
    node.reboot();
    let job = cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    assert_eq!((job.state, job.tasks[0].state), (JobState::Failed, TaskState::Lost));
    assert!(job.reason.expect("why").contains("node n1 was restarted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_dies_is_a_loss_not_a_failure() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 1).await;
    cluster.image().await;
    let policy = RestartPolicy { on_failure: 0, on_loss: 1 };
    let job = cluster.admin().submit_job(&JobSpec { restart: policy, ..spec(1) }).await.expect("accepted");
    let first = node.running_when(1).await;
    node.set(&first[0], |status| {
        status.state = TaskState::Failed;
        status.lost = true;
        status.reason = Some("the VMM was killed by signal 9".to_owned());
    });
    let job = cluster.job_when(&job.id, |job| job.attempt == 2).await;
    assert!(job.reason.expect("why").contains("the VMM was killed by signal 9"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_stops_what_runs_and_what_waits() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 1).await;
    cluster.image().await;
    let admin = cluster.admin();
    let running = admin.submit_job(&spec(1)).await.expect("accepted");
    node.running_when(1).await;
    let waiting = admin.submit_job(&spec(1)).await.expect("accepted");
    let waiting = cluster.job_when(&waiting.id, |job| job.reason.is_some()).await;
    assert_eq!(waiting.reason.as_deref(), Some("needs 1 CPUs in total across nodes; 0 are free"));
    admin.cancel_job(&waiting.id).await.expect("cancelled");
    let waiting = cluster.job_when(&waiting.id, |job| job.state.is_terminal()).await;
    assert_eq!((waiting.state, waiting.attempt), (JobState::Cancelled, 0));

    assert_eq!(admin.cancel_job(&running.id).await.expect("asked").state, JobState::Cancelling);
    let running = cluster.job_when(&running.id, |job| job.state.is_terminal()).await;
    assert_eq!(running.state, JobState::Cancelled);
    assert_eq!(running.tasks[0].exit, Some(TaskExit::Signal(15)));
    assert_eq!(admin.cancel_job(&running.id).await.expect("again").state, JobState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_larger_than_the_cluster_waits_and_others_run() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let huge = cluster.admin().submit_job(&spec(8)).await.expect("accepted");
    let huge = cluster
        .job_when(&huge.id, |job| job.reason.as_deref().is_some_and(|reason| reason.contains("larger")))
        .await;
    assert_eq!(huge.state, JobState::Pending);
    cluster.admin().submit_job(&spec(2)).await.expect("accepted");
    node.running_when(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_coordinator_knows_all_it_knew() {
    let mut cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    let image = cluster.image().await;
    let user = cluster.user("research").await;
    let job = user.submit_job(&spec(2)).await.expect("accepted");
    let sandboxes = node.running_when(2).await;
    node.log(&sandboxes[0], 0, &["before"]).await;
    let before =
        cluster.job_when(&job.id, |job| job.tasks.iter().all(|t| t.state == TaskState::Running)).await;
    cluster.restart().await;
    assert_eq!(user.job(&job.id).await.expect("its token still works"), before);
    assert_eq!(user.images().await.expect("listed"), [image]);
    node.log(&sandboxes[0], 0, &["before", "after"]).await;
    for sandbox in &sandboxes {
        node.exit(sandbox, TaskExit::Code(0));
    }
    let job = cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    assert_eq!(job.state, JobState::Succeeded, "nothing was started again");
    assert_eq!(node.seen().len(), 2);
}
