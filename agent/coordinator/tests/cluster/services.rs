//! Services: replicas that come and go with what is in flight, and come back when they are lost.

use std::collections::BTreeSet;
use std::time::Duration;

use lathe_api::client::Client;
use lathe_api::job::{JobSpec, JobState, TaskExit, TaskState};
use lathe_api::node::{NodeOperation, NodeState};
use lathe_api::pool::{Pool, Tenant};
use lathe_api::scheduling::{DecidedBy, DecisionKind};
use lathe_api::service::{Service, ServiceReplica, ServiceState};

use crate::harness::{Cluster, FakeAgent, eventually, in_flight, spec};

fn service(table: &str) -> JobSpec {
    let text = format!(
        r#"{{"name": "web", "class": "container", "image": "test", "resources": {{"memory": "64 MiB"}},
            "service": {{"port": 8080, {table}}}}}"#
    );
    serde_json::from_str(&text).expect("a service")
}

/// The service once `accept` says so.
async fn service_when(client: &Client, id: &str, accept: impl Fn(&Service) -> bool) -> Service {
    eventually(id, || async { client.service(id).await.ok().filter(|service| accept(service)) }).await
}

fn serving(service: &Service) -> Vec<&ServiceReplica> {
    service.replicas.iter().filter(|replica| replica.ready && !replica.draining).collect()
}

fn settled(service: &Service, count: usize) -> bool {
    serving(service).len() == count && service.replicas.len() == count
}

fn status(error: &lathe_api::client::ClientError) -> u16 {
    error.status().expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_follow_what_is_in_flight_up_at_once_and_down_after_a_while() {
    let mut cluster = Cluster::start().await;
    let node = cluster.node("n1", 8).await;
    cluster.image().await;
    let user = cluster.user("red").await;
    let spec = service(r#""max": 4, "target_in_flight": 2, "scale_down_after": "2s""#);
    let web = user.submit_service(&spec).await.expect("accepted");
    assert!((30_000..=32_767).contains(&web.listen) && web.state == ServiceState::Active);
    let one = service_when(&user, &web.id, |service| settled(service, 1)).await;
    let first = one.replicas[0].job.clone();
    let sandbox = node.seen()[0].clone();
    assert_eq!((sandbox.port, sandbox.job.as_str()), (Some(8080), first.as_str()));
    assert!(sandbox.env.contains(&("PORT".to_owned(), "8080".to_owned())));

    node.load_with(|service| in_flight(service, 6));
    let three = service_when(&user, &web.id, |service| settled(service, 3)).await;
    assert_eq!((three.wanted, three.ready, three.in_flight), (3, 3, 6));
    let told = eventually("the node to be told", || async {
        node.services().into_iter().find(|told| told.replicas.iter().filter(|one| one.accepts).count() == 3)
    })
    .await;
    assert_eq!((told.id.as_str(), told.listen, told.replicas[0].port), (web.id.as_str(), web.listen, 8080));
    let scaled = three.decisions.last().expect("a decision");
    assert_eq!((scaled.kind, scaled.by), (DecisionKind::Scaled, DecidedBy::Service));
    // One after the other or at once: averages rise while what came is new.
    assert!(scaled.why.starts_with("3 replicas instead of "), "{}", scaled.why);
    assert!(scaled.why.ends_with(" replicas, 2.0 wanted at each"), "{}", scaled.why);
    let jobs = user.jobs().await.expect("listed");
    assert!(jobs.len() == 3 && jobs.iter().all(|job| job.service.as_ref() == Some(&web.id)));

    // What is in flight is known only when nodes have reported again: nothing is given up until then.
    cluster.restart().await;
    let still = service_when(&user, &web.id, |service| service.in_flight == 6).await;
    assert!(settled(&still, 3), "{still:?}");

    node.load_with(|service| in_flight(service, 0));
    let back = service_when(&user, &web.id, |service| settled(service, 1)).await;
    assert!(back.decisions.last().expect("one").why.contains("for 2 s"), "{:?}", back.decisions);
    assert_eq!(back.replicas[0].job, first, "the oldest of equals stays");
    let ended: Vec<_> =
        user.jobs().await.expect("listed").into_iter().filter(|job| job.state.is_terminal()).collect();
    assert_eq!(ended.len(), 2);
    for job in ended {
        assert_eq!((job.state, job.tasks[0].exit), (JobState::Cancelled, Some(TaskExit::Signal(15))));
        let why = user.job_why(&job.id).await.expect("its history");
        let last = why.decisions.last().expect("a decision");
        assert!(last.by == DecidedBy::Service && last.why.contains("nothing is in flight"), "{last:?}");
    }
    assert_eq!(node.seen().len(), 3, "nothing was started twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_given_up_ends_what_it_has_first() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 4).await;
    cluster.image().await;
    let admin = cluster.admin();
    let spec =
        service(r#""min": 1, "max": 2, "target_in_flight": 4, "scale_down_after": "1s", "drain": "1h""#);
    let web = admin.submit_service(&spec).await.expect("accepted");
    node.load_with(|service| in_flight(service, 8));
    service_when(&admin, &web.id, |service| settled(service, 2)).await;
    // Long requests: one for each replica, whatever becomes of it.
    node.load_with(|service| {
        let mut load = in_flight(service, 2);
        load.replicas.iter_mut().for_each(|replica| replica.in_flight = 1);
        load
    });
    let drains = |service: &Service| service.replicas.iter().filter(|one| one.draining).count() == 1;
    let draining = service_when(&admin, &web.id, drains).await;
    let leaves = draining.replicas.iter().find(|one| one.draining).expect("one").job.clone();
    eventually("the node to send it nothing", || async {
        let told = node.services().pop()?;
        let replica = told.replicas.iter().find(|one| one.sandbox.starts_with(&leaves))?.clone();
        (!replica.accepts).then_some(())
    })
    .await;
    assert_eq!(node.running().len(), 2, "its request has not ended");
    // What came since needs it again: it is there.
    node.load_with(|service| in_flight(service, 8));
    let kept = service_when(&admin, &web.id, |service| settled(service, 2)).await;
    assert!(kept.replicas.iter().any(|one| one.job == leaves));
    assert_eq!(node.seen().len(), 2, "no third was started");
    node.load_with(|service| in_flight(service, 0));
    service_when(&admin, &web.id, |service| settled(service, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_request_starts_a_service_that_has_no_replica() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 4).await;
    cluster.image().await;
    let admin = cluster.admin();
    let web = admin
        .submit_service(&service(r#""min": 0, "max": 4, "scale_down_after": "1s""#))
        .await
        .expect("accepted");
    eventually("the node to listen", || async { node.services().pop() }).await;
    let idle = admin.service(&web.id).await.expect("known");
    assert_eq!((idle.wanted, idle.replicas.len()), (0, 0));
    node.load_with(|service| in_flight(service, 1));
    service_when(&admin, &web.id, |service| settled(service, 1) && service.waiting == 0).await;
    node.load_with(|service| in_flight(service, 0));
    service_when(&admin, &web.id, |service| service.wanted == 0 && service.replicas.is_empty()).await;
}

/// The sandboxes that run on a node, as the service's replicas.
fn on(agent: &FakeAgent, service: &Service) -> BTreeSet<String> {
    let replicas: BTreeSet<&str> = service.replicas.iter().map(|one| one.job.as_str()).collect();
    let jobs = agent.running().into_iter().filter_map(|sandbox| {
        let job = sandbox.rsplitn(3, '-').nth(2)?.to_owned();
        replicas.contains(job.as_str()).then_some(job)
    });
    jobs.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_end_or_lose_their_node_come_back_by_themselves() {
    let cluster = Cluster::start_with_expiry(Duration::from_millis(1500)).await;
    let (one, two) = (cluster.node("n1", 4).await, cluster.node("n2", 4).await);
    cluster.image().await;
    let admin = cluster.admin();
    eventually("two nodes", || async {
        let nodes = admin.nodes().await.ok()?;
        (nodes.iter().filter(|node| node.state == NodeState::Ready).count() == 2).then_some(())
    })
    .await;
    let web = admin.submit_service(&service(r#""min": 4, "max": 4"#)).await.expect("accepted");
    let up = service_when(&admin, &web.id, |service| settled(service, 4)).await;
    let ends = up.replicas[0].clone();
    let agent = if ends.node.as_deref() == Some("n1") { &one } else { &two };
    agent.exit(&format!("{}-0-1", ends.job), TaskExit::Code(0));
    let held = cluster.job_when(&ends.job, |job| job.state == JobState::Pending || job.attempt > 1).await;
    let reason = held.reason.expect("why");
    assert!(reason.contains("exited with code 0") && reason.contains("starts again after 1 s"), "{reason}");
    let again = service_when(&admin, &web.id, |service| settled(service, 4)).await;
    let same = again.replicas.iter().find(|replica| replica.job == ends.job).expect("the same replica");
    assert_eq!(same.attempt, 2);
    assert!(again.replicas.iter().all(|one| one.job == ends.job || one.attempt == 1), "{again:?}");

    let (lost, left) = if on(&one, &again).is_empty() { (&two, &one) } else { (&one, &two) };
    let moved = on(lost, &again);
    lost.kill();
    let elsewhere = eventually("all replicas on the other node", || async {
        let service = admin.service(&web.id).await.ok()?;
        (settled(&service, 4) && on(left, &service).len() == 4).then_some(service)
    })
    .await;
    for replica in elsewhere.replicas.iter().filter(|one| moved.contains(&one.job)) {
        assert!(replica.attempt >= 2 && replica.state == TaskState::Running, "{replica:?}");
    }
    let told = eventually("the balancer to know them", || async {
        left.services().pop().filter(|told| told.replicas.iter().filter(|one| one.accepts).count() == 4)
    })
    .await;
    assert_eq!(told.replicas.len(), 4, "nothing of the lost node is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_all_of_it_and_frees_its_port() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 4).await;
    cluster.image().await;
    let admin = cluster.admin();
    let spec = service(r#""min": 2, "max": 2, "listen": 30123"#);
    let web = admin.submit_service(&spec).await.expect("accepted");
    service_when(&admin, &web.id, |service| settled(service, 2)).await;
    let error = admin.submit_service(&spec).await.expect_err("the port is taken").to_string();
    assert!(
        error.contains("service.listen") && error.contains(&format!("30123: service {}", web.id)),
        "{error}"
    );
    let replica = admin.service(&web.id).await.expect("known").replicas[0].job.clone();
    admin.cancel_job(&replica).await.expect("cancelled");
    let replaced =
        |service: &Service| settled(service, 2) && !service.replicas.iter().any(|r| r.job == replica);
    service_when(&admin, &web.id, replaced).await;

    assert_eq!(admin.cancel_service(&web.id).await.expect("asked").state, ServiceState::Cancelling);
    let gone = service_when(&admin, &web.id, |service| service.state == ServiceState::Cancelled).await;
    assert!(gone.replicas.is_empty() && gone.finished_ms.is_some());
    assert_eq!(admin.cancel_service(&web.id).await.expect("again").state, ServiceState::Cancelled);
    eventually("the node to stop listening", || async { node.services().is_empty().then_some(()) }).await;
    assert!(admin.jobs().await.expect("listed").iter().all(|job| job.state == JobState::Cancelled));
    let next = admin.submit_service(&spec).await.expect("its port is free");
    assert_eq!(next.listen, 30123);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_their_tenants_and_obey_quotas_pools_and_drains_as_jobs_do() {
    let cluster = Cluster::start().await;
    let (one, two) = (cluster.node("n1", 4).await, cluster.node("n2", 4).await);
    cluster.image().await;
    let (admin, red, blue) = (cluster.admin(), cluster.user("red").await, cluster.user("blue").await);
    let label = |set: &str| NodeOperation::Label {
        set: [("zone".to_owned(), set.to_owned())].into(),
        remove: Vec::new(),
    };
    admin.operate_node("n1", &label("a")).await.expect("labelled");
    admin.operate_node("n2", &label("b")).await.expect("labelled");
    let pool: Pool = serde_json::from_str(
        r#"{"name": "zone-b", "selector": [{"label": "zone", "operator": "in", "values": ["b"]}]}"#,
    )
    .expect("a pool");
    admin.set_pool(&pool).await.expect("set");
    let tenant: Tenant = serde_json::from_str(r#"{"name": "red", "limit": {"tasks": 1}}"#).expect("a tenant");
    admin.set_tenant(&tenant).await.expect("set");
    let spec = JobSpec { pool: "zone-b".to_owned(), ..service(r#""min": 2, "max": 2, "listen": 30001"#) };
    let planned = red.plan_job(&spec).await.expect("planned");
    assert!(planned.starts && planned.tasks[0].node == "n2", "{planned:?}");
    let web = red.submit_service(&spec).await.expect("accepted");
    let limited = service_when(&red, &web.id, |service| {
        serving(service).len() == 1 && service.replicas.iter().any(|one| one.reason.is_some())
    })
    .await;
    let waits = limited.replicas.iter().find(|one| !one.ready).expect("the other waits");
    assert!(waits.reason.as_ref().expect("why").contains("limit"), "{waits:?}");
    assert_eq!(serving(&limited)[0].node.as_deref(), Some("n2"));
    // The pool's nodes take requests for it, and others do not.
    eventually("n2 to listen", || async { two.services().pop() }).await;
    assert!(one.services().is_empty());

    assert_eq!(status(&blue.service(&web.id).await.expect_err("hidden")), 404);
    assert_eq!(status(&blue.cancel_service(&web.id).await.expect_err("hidden")), 404);
    assert!(blue.services().await.expect("listed").is_empty());
    let taken = blue.submit_service(&service(r#""max": 1, "listen": 30001"#)).await.expect_err("taken");
    assert!(taken.to_string().contains("another service has it"), "{taken}");
    assert!(!taken.to_string().contains(&web.id), "{taken}");
    let error = admin.remove_pool("zone-b").await.expect_err("in use").to_string();
    assert!(error.contains("zone-b"), "{error}");

    let error = red.submit_job(&spec).await.expect_err("no job").to_string();
    assert!(error.contains("lathe service run"), "{error}");
    let error = red.submit_service(&crate::harness::spec(1)).await.expect_err("no service").to_string();
    assert!(error.contains("service") && error.contains("port"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_services_hears_nothing_of_them() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    cluster.admin().submit_job(&spec(1)).await.expect("accepted");
    node.running_when(1).await;
    assert_eq!(node.desired().expect("told").services, Some(Vec::new()));
    assert!(node.seen()[0].port.is_none());
}
