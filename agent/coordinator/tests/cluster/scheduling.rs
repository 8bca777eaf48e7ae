//! What the planner decides, carried out: jobs stopped for others, moved from nodes, put where their data
//! is, and kept from nodes that refuse.

use std::collections::BTreeSet;
use std::time::Duration;

use lathe_api::job::{Job, JobSpec, JobState, RestartPolicy, TaskExit};
use lathe_api::node::{CachedArtefact, Nic, NodeOffer, NodeOperation, NodeState};
use lathe_api::pool::{Pool, Tenant};
use lathe_api::scheduling::DecisionKind;

use crate::harness::{Cluster, FakeAgent, add_image, eventually, spec};

fn preemptible(tasks: u32) -> JobSpec {
    // Nothing of it may be used up by being stopped for others.
    let restart = RestartPolicy { on_failure: 0, on_loss: 0 };
    JobSpec { preemptible: true, restart, ..spec(tasks) }
}

fn pool(json: &str) -> Pool {
    serde_json::from_str(json).expect("a pool")
}

async fn ready(cluster: &Cluster, count: usize) {
    let admin = cluster.admin();
    eventually("nodes", || async {
        let nodes = admin.nodes().await.ok()?;
        (nodes.iter().filter(|node| node.state == NodeState::Ready).count() == count).then_some(())
    })
    .await;
}

fn running(job: &Job) -> bool {
    job.state == JobState::Running
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_stopped_for_another_waits_again_and_has_lost_nothing() {
    let cluster = Cluster::start().await;
    let (node, admin) = (cluster.node("n1", 2).await, cluster.admin());
    cluster.image().await;
    let policy = pool(r#"{"name": "default", "queue": "priority", "preemption": true}"#);
    admin.set_pool(&policy).await.expect("set");
    let low = admin.submit_job(&preemptible(2)).await.expect("accepted");
    let first = node.running_when(2).await;
    let high = admin.submit_job(&JobSpec { priority: 10, ..spec(2) }).await.expect("accepted");
    cluster.job_when(&high.id, running).await;
    let waits = cluster.job_when(&low.id, |job| job.state == JobState::Pending).await;
    assert_eq!((waits.attempt, waits.preemptions), (1, 1));
    let reason = waits.reason.expect("why it waits");
    assert!(reason.contains(&format!("preempted for job {}", high.id)), "{reason}");
    let why = admin.job_why(&low.id).await.expect("its history");
    assert!(why.decisions.iter().any(|decision| decision.kind == DecisionKind::Preempted), "{why:?}");
    assert_eq!(waits.submitted_ms, low.submitted_ms, "its place in the queue");

    let sandboxes = eventually("the other's tasks", || async {
        Some(node.running()).filter(|running| running.len() == 2 && running[0] != first[0])
    })
    .await;
    sandboxes.iter().for_each(|sandbox| node.exit(sandbox, TaskExit::Code(0)));
    let again = cluster.job_when(&low.id, |job| running(job) && job.attempt == 2).await;
    assert_eq!(again.tasks.len(), 2);
    let second = eventually("its second attempt", || async {
        Some(node.running()).filter(|all| all.len() == 2 && all.iter().all(|one| one.starts_with(&low.id)))
    })
    .await;
    second.iter().for_each(|sandbox| node.exit(sandbox, TaskExit::Code(0)));
    let done = cluster.job_when(&low.id, |job| job.state.is_terminal()).await;
    assert_eq!((done.state, done.attempt), (JobState::Succeeded, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_a_node_moves_what_may_move_and_leaves_the_rest() {
    let cluster = Cluster::start().await;
    let (one, two) = (cluster.node("n1", 2).await, cluster.node("n2", 2).await);
    let admin = cluster.admin();
    cluster.image().await;
    ready(&cluster, 2).await;
    let moves = admin.submit_job(&preemptible(1)).await.expect("accepted");
    let stays = admin.submit_job(&spec(1)).await.expect("accepted");
    let node_of = |job: &Job| job.tasks[0].node.clone().expect("placed");
    let moves = cluster.job_when(&moves.id, running).await;
    let stays = cluster.job_when(&stays.id, running).await;
    for name in BTreeSet::from([node_of(&moves), node_of(&stays)]) {
        let drain = NodeOperation::Drain { reason: "new memory".to_owned() };
        admin.operate_node(&name, &drain).await.expect("drained");
        let moved =
            cluster.job_when(&moves.id, |job| job.state == JobState::Running || job.attempt > 1).await;
        assert!(moved.attempt >= 1);
        if name == node_of(&moves) {
            let moved = cluster.job_when(&moves.id, |job| running(job) && node_of(job) != name).await;
            assert_eq!(moved.attempt, 2);
        }
        admin.operate_node(&name, &NodeOperation::Uncordon).await.expect("uncordoned");
    }
    let stayed = cluster.job(&stays.id).await;
    assert_eq!((stayed.state, stayed.attempt), (JobState::Running, 1), "nobody may stop it");
    assert_eq!(one.running().len() + two.running().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn borrowed_quota_is_had_back_by_its_owner() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 4).await;
    let (admin, red, blue) = (cluster.admin(), cluster.user("red").await, cluster.user("blue").await);
    cluster.image().await;
    admin.set_pool(&pool(r#"{"name": "default", "preemption": true}"#)).await.expect("set");
    for name in ["red", "blue"] {
        let text =
            format!(r#"{{"name": "{name}", "guaranteed": {{"cpus": 2, "memory": "1 GiB", "tasks": 2}}}}"#);
        let tenant: Tenant = serde_json::from_str(&text).expect("a tenant");
        admin.set_tenant(&tenant).await.expect("set");
    }
    let mut borrowed = Vec::new();
    for _ in 0..4 {
        borrowed.push(red.submit_job(&preemptible(1)).await.expect("accepted").id);
    }
    node.running_when(4).await;
    let own = blue.submit_job(&spec(2)).await.expect("accepted");
    cluster.job_when(&own.id, running).await;
    let mut left = 0;
    for id in &borrowed {
        let job =
            cluster.job_when(id, |job| matches!(job.state, JobState::Running | JobState::Pending)).await;
        left += u32::from(running(&job));
    }
    assert_eq!(left, 2, "red has what is its own, and no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_where_its_image_is() {
    let cluster = Cluster::start().await;
    let (far, near) = (cluster.node("n1", 4).await, cluster.node("n2", 4).await);
    let admin = cluster.admin();
    let image = add_image(&admin, "test").await;
    let nic = Nic { name: "eth0".to_owned(), speed_mbps: Some(1000), ..Nic::default() };
    far.set_inventory(|inventory| inventory.nics = vec![nic.clone()]);
    near.set_inventory(|inventory| {
        inventory.nics = vec![nic.clone()];
        inventory.artefacts = vec![CachedArtefact { digest: image.digest, bytes: 8 << 30 }];
    });
    eventually("the cache to be known", || async {
        let nodes = admin.nodes().await.ok()?;
        (nodes.len() == 2
            && nodes.iter().all(|node| !node.inventory.nics.is_empty())
            && nodes.iter().any(|node| !node.inventory.artefacts.is_empty()))
        .then_some(())
    })
    .await;
    for count in 1..=3 {
        let job = admin.submit_job(&spec(1)).await.expect("accepted");
        let job = cluster.job_when(&job.id, running).await;
        assert_eq!(job.tasks[0].node.as_deref(), Some("n2"), "job {count} would fetch what n2 has");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_nothing_gets_no_more_and_says_why() {
    let cluster = Cluster::start().await;
    let (bad, good) = (cluster.node("n1", 4).await, cluster.node("n2", 4).await);
    let admin = cluster.admin();
    cluster.image().await;
    ready(&cluster, 2).await;
    bad.refuse_with(Some("no space left on device"));
    // Whatever the planner prefers, the bad one gets some: the other has no room for all.
    let mut jobs = Vec::new();
    for _ in 0..8 {
        let restart = RestartPolicy { on_failure: 0, on_loss: 100 };
        jobs.push(admin.submit_job(&JobSpec { restart, ..spec(1) }).await.expect("accepted").id);
    }
    let suspected = eventually("n1 to be suspected", || async {
        let node = admin.node("n1").await.ok()?;
        match node.offer {
            NodeOffer::Suspected(reason) => Some(reason),
            _ => None,
        }
    })
    .await;
    assert!(suspected.contains("no space left on device"), "{suspected}");
    good.running_when(4).await;
    // Somebody has made space.
    bad.refuse_with(None);
    admin.operate_node("n1", &NodeOperation::Uncordon).await.expect("trusted again");
    for id in &jobs {
        cluster.job_when(id, running).await;
    }
    bad.running_when(4).await;
    let mut refused = 0;
    for id in &jobs {
        let why = admin.job_why(id).await.expect("its history");
        let of_it = why.decisions.iter().filter(|one| one.kind == DecisionKind::Refused);
        refused += of_it.inspect(|one| assert_eq!(one.why, "node n1: no space left on device")).count();
    }
    assert!(refused >= 3, "a node that is suspected refused some: {refused}");
}

/// An elastic job of 2 to 4 tasks.
fn elastic() -> JobSpec {
    let restart = RestartPolicy { on_failure: 0, on_loss: 0 };
    JobSpec { tasks_min: Some(2), restart, ..spec(4) }
}

/// The job once it runs with so many tasks, each of which knows how many there are.
async fn running_with(cluster: &Cluster, agents: &[&FakeAgent], id: &str, tasks: usize) -> Job {
    let job = cluster.job_when(id, |job| running(job) && job.tasks.len() == tasks).await;
    assert_eq!(job.size, u32::try_from(tasks).ok());
    let sandboxes: BTreeSet<_> = job.tasks.iter().filter_map(|task| task.sandbox.clone()).collect();
    assert_eq!(sandboxes.len(), tasks);
    eventually("all of them to run", || async {
        let all: BTreeSet<String> = agents.iter().flat_map(|agent| agent.running()).collect();
        sandboxes.is_subset(&all).then_some(())
    })
    .await;
    let specs = agents.iter().flat_map(|agent| agent.seen());
    for spec in specs.filter(|spec| sandboxes.contains(&spec.id)) {
        assert!(spec.env.contains(&("WORLD_SIZE".to_owned(), tasks.to_string())), "{:?}", spec.env);
    }
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn an_elastic_gang_grows_into_room_that_comes_and_uses_up_nothing() {
    let cluster = Cluster::start().await;
    let one = cluster.node("n1", 2).await;
    let admin = cluster.admin();
    cluster.image().await;
    let id = admin.submit_job(&elastic()).await.expect("accepted").id;
    let small = running_with(&cluster, &[&one], &id, 2).await;
    assert_eq!(small.attempt, 1);
    let two = cluster.node("n2", 2).await;
    let large = running_with(&cluster, &[&one, &two], &id, 4).await;
    assert_eq!((large.attempt, large.preemptions), (2, 0));
    let why = admin.job_why(&id).await.expect("its history");
    let resized = why.decisions.iter().find(|decision| decision.kind == DecisionKind::Resized);
    assert!(resized.is_some_and(|one| one.why.contains("with 4 tasks instead of 2")), "{why:?}");
    for agent in [&one, &two] {
        agent.running().iter().for_each(|sandbox| agent.exit(sandbox, TaskExit::Code(0)));
    }
    let done = cluster.job_when(&id, |job| job.state.is_terminal()).await;
    assert_eq!((done.state, done.attempt), (JobState::Succeeded, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_elastic_gang_gives_up_what_it_has_beyond_its_least_for_a_job_that_waits() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 4).await;
    let admin = cluster.admin();
    cluster.image().await;
    let id = admin.submit_job(&elastic()).await.expect("accepted").id;
    running_with(&cluster, &[&node], &id, 4).await;
    let other = admin.submit_job(&spec(2)).await.expect("accepted").id;
    let other = cluster.job_when(&other, running).await;
    let small = running_with(&cluster, &[&node], &id, 2).await;
    assert_eq!((small.attempt, small.preemptions), (2, 0));
    let why = admin.job_why(&id).await.expect("its history");
    let resized = why.decisions.iter().find(|decision| decision.kind == DecisionKind::Resized);
    assert!(resized.is_some_and(|one| one.why.contains(&other.id)), "{why:?}");

    // When the other is gone it has its room again.
    let others: Vec<_> = other.tasks.iter().filter_map(|task| task.sandbox.clone()).collect();
    eventually("the other to run", || async {
        let running = node.running();
        others.iter().all(|sandbox| running.contains(sandbox)).then_some(())
    })
    .await;
    others.iter().for_each(|sandbox| node.exit(sandbox, TaskExit::Code(0)));
    let large = running_with(&cluster, &[&node], &id, 4).await;
    assert_eq!(large.attempt, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tenants_had_counts_after_a_restart() {
    let mut cluster = Cluster::start().await;
    let node = cluster.node("n1", 1).await;
    cluster.image().await;
    cluster.admin().set_pool(&pool(r#"{"name": "default", "queue": "fair_share"}"#)).await.expect("set");
    let (red, blue) = (cluster.user("red").await, cluster.user("blue").await);
    let had = red.submit_job(&spec(1)).await.expect("accepted").id;
    let sandboxes = node.running_when(1).await;
    // Less than a millionth of the pool counts for nothing.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    node.exit(&sandboxes[0], TaskExit::Code(0));
    cluster.job_when(&had, |job| job.state.is_terminal()).await;
    cluster.restart().await;

    let cordon = NodeOperation::Cordon { reason: "so that both wait".to_owned() };
    cluster.admin().operate_node("n1", &cordon).await.expect("cordoned");
    let (first, second) = (red.submit_job(&spec(1)).await, blue.submit_job(&spec(1)).await);
    let (first, second) = (first.expect("accepted").id, second.expect("accepted").id);
    for id in [&first, &second] {
        cluster.job_when(id, |job| job.reason.is_some()).await;
    }
    cluster.admin().operate_node("n1", &NodeOperation::Uncordon).await.expect("uncordoned");
    cluster.job_when(&second, running).await;
    assert_eq!(cluster.job(&first).await.state, JobState::Pending, "red had its turn before the restart");
}
