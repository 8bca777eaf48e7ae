//! Pools, tenants, what operators do to nodes, and what people are told of why their jobs wait.

use std::collections::BTreeMap;

use lathe_api::client::{Client, ClientError};
use lathe_api::job::{Job, JobSpec, JobState, TaskExit};
use lathe_api::node::{MaintenanceWindow, NodeOffer, NodeOperation};
use lathe_api::pool::{Pool, Tenant};
use lathe_api::scheduling::{DecidedBy, DecisionKind, Taint};

use crate::harness::{Cluster, add_image, eventually, spec};

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, status: u16, words: &str) {
    let error = result.expect_err("it should be refused");
    assert_eq!(error.status(), Some(status), "{error}");
    assert!(error.to_string().contains(words), "{error}");
    assert!(!error.to_string().contains('\n'), "one line: {error}");
}

fn pool(json: &str) -> Pool {
    serde_json::from_str(json).expect("a pool")
}

fn in_pool(pool: &str) -> JobSpec {
    JobSpec { pool: pool.to_owned(), ..spec(1) }
}

fn cordon(reason: &str) -> NodeOperation {
    NodeOperation::Cordon { reason: reason.to_owned() }
}

async fn waiting(cluster: &Cluster, job: &Job, words: &str) -> Job {
    let tells = |job: &Job| job.reason.as_ref().is_some_and(|reason| reason.contains(words));
    cluster.job_when(&job.id, |job| job.state == JobState::Pending && tells(job)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_a_tenants_own_does_not_exist_for_others() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let (admin, red, blue) = (cluster.admin(), cluster.user("red").await, cluster.user("blue").await);
    let own = pool(r#"{"name": "reds", "tenants": ["red"], "limit": {"cpus": 1}}"#);
    refused(red.set_pool(&own).await, 403, "admin token");
    admin.set_pool(&own).await.expect("an admin may");

    let names = |pools: Vec<lathe_api::pool::PoolStatus>| {
        pools.into_iter().map(|status| status.pool.name).collect::<Vec<_>>()
    };
    assert_eq!(names(red.pools().await.expect("listed")), ["default", "reds"]);
    assert_eq!(names(blue.pools().await.expect("listed")), ["default"]);
    refused(blue.pool("reds").await, 404, "there is no pool \"reds\"");
    let seen = eventually("the node", || async { blue.nodes().await.ok().filter(|n| !n.is_empty()) }).await;
    assert_eq!(seen[0].pools, ["default"], "not by way of the nodes either");
    let unknown = blue.submit_job(&in_pool("nowhere")).await.expect_err("no such pool").to_string();
    let hidden = blue.submit_job(&in_pool("reds")).await.expect_err("not for blue").to_string();
    assert_eq!(unknown.replace("nowhere", "reds"), hidden);
    assert!(hidden.contains("invalid field pool: there is no pool \"reds\""), "{hidden}");
    refused(blue.plan_job(&in_pool("reds")).await, 422, "there is no pool");

    red.submit_job(&in_pool("reds")).await.expect("red may");
    node.running_when(1).await;
    let second = red.submit_job(&in_pool("reds")).await.expect("red may");
    let second = waiting(&cluster, &second, "limit of 1 CPU in pool reds").await;
    let status = red.pool("reds").await.expect("shown");
    assert_eq!((status.running, status.pending, status.usage.cpus, status.nodes), (1, 1, 1, 1));
    let why = red.job_why(&second.id).await.expect("its own");
    assert_eq!((why.position, why.waiting), (Some(1), Some(1)));
    assert!(why.remedy.is_some_and(|remedy| remedy.contains("raises it")));
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_fit_together_and_are_not_removed_under_their_jobs() {
    let cluster = Cluster::start().await;
    cluster.image().await;
    let admin = cluster.admin();
    let orphan = pool(r#"{"name": "part", "parent": "whole"}"#);
    refused(admin.set_pool(&orphan).await, 422, "invalid field parent: \"whole\"");
    admin.set_pool(&pool(r#"{"name": "whole", "guaranteed": {"gpus": 4}}"#)).await.expect("set");
    let greedy = pool(r#"{"name": "part", "parent": "whole", "guaranteed": {"gpus": 5}}"#);
    refused(admin.set_pool(&greedy).await, 422, "invalid field guaranteed.gpus");
    admin.set_pool(&orphan).await.expect("it has a parent now");
    refused(admin.set_pool(&pool(r#"{"name": "whole", "parent": "part"}"#)).await, 422, "part of");
    refused(admin.remove_pool("whole").await, 409, "pool \"part\" is a part of");

    let job = admin.submit_job(&in_pool("part")).await.expect("accepted");
    refused(admin.remove_pool("part").await, 409, "1; cancel them first");
    admin.cancel_job(&job.id).await.expect("cancelled");
    cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    admin.remove_pool("part").await.expect("nothing is in it");
    refused(admin.remove_pool("part").await, 404, "there is no pool \"part\"");

    admin.set_pool(&pool(r#"{"name": "default", "queue": "priority"}"#)).await.expect("set");
    admin.remove_pool("default").await.expect("it becomes what it was");
    assert_eq!(admin.pool("default").await.expect("always there").pool, Pool::named("default"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_sees_itself_and_what_it_uses() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let (admin, red, blue) = (cluster.admin(), cluster.user("red").await, cluster.user("blue").await);
    let tenant = Tenant { weight: 2.0, ..Tenant::named("red") };
    refused(red.set_tenant(&tenant).await, 403, "admin token");
    admin.set_tenant(&tenant).await.expect("an admin may");
    red.submit_job(&spec(2)).await.expect("accepted");
    node.running_when(2).await;
    let seen = red.tenants().await.expect("listed");
    assert_eq!(seen.len(), 1);
    assert_eq!((&seen[0].tenant, seen[0].usage[0].amounts.cpus, seen[0].usage[0].running), (&tenant, 2, 1));
    assert_eq!(blue.tenants().await.expect("listed")[0].tenant, Tenant::named("blue"));
    refused(blue.tenant("red").await, 404, "there is no tenant \"red\"");
    refused(blue.audit().await, 403, "admin token");

    let member = Tenant { parent: Some("red".to_owned()), ..Tenant::named("pink") };
    admin.set_tenant(&member).await.expect("set");
    refused(admin.remove_tenant("red").await, 409, "\"pink\" is in the group");
    admin.remove_tenant("pink").await.expect("removed");
    admin.remove_tenant("red").await.expect("removed");
    assert_eq!(red.tenant("red").await.expect("still somebody").tenant, Tenant::named("red"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cordoned_node_takes_no_work_until_it_is_uncordoned() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let (admin, red) = (cluster.admin(), cluster.user("red").await);
    refused(red.operate_node("n1", &cordon("mine")).await, 403, "admin token");
    refused(admin.operate_node("n2", &cordon("x")).await, 404, "there is no node \"n2\"");
    refused(admin.operate_node("n1", &cordon("two\nlines")).await, 422, "invalid field reason");
    let shown = admin.operate_node("n1", &cordon("new disks")).await.expect("cordoned");
    assert_eq!(shown.offer, NodeOffer::Cordoned("new disks".to_owned()));
    let job = admin.submit_job(&spec(1)).await.expect("accepted");
    cluster.job_when(&job.id, |job| job.reason.is_some()).await;
    assert!(node.running().is_empty());
    let planned = admin.plan_job(&spec(1)).await.expect("planned");
    assert!(!planned.starts && planned.reason.is_some());

    let shown = admin.operate_node("n1", &NodeOperation::Uncordon).await.expect("uncordoned");
    assert_eq!(shown.offer, NodeOffer::Open);
    node.running_when(1).await;

    let entries = admin.audit().await.expect("an admin may");
    let token = std::fs::read_to_string(&cluster.made.admin_token).expect("a token");
    let id = token.split('-').nth(1).expect("an ID");
    let told: Vec<_> =
        entries.iter().map(|e| (e.sequence, e.who.as_str(), e.action.as_str(), e.detail.as_str())).collect();
    assert_eq!(told, [(1, id, "node cordon", "new disks"), (2, id, "node uncordon", "")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_and_taints_decide_where_jobs_go() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    cluster.image().await;
    let admin = cluster.admin();
    let zone = r#"[{"label": "zone", "operator": "in", "values": ["a"]}]"#;
    let job = JobSpec { constraints: serde_json::from_str(zone).expect("constraints"), ..spec(1) };
    let job = admin.submit_job(&job).await.expect("accepted");
    cluster.job_when(&job.id, |job| job.reason.is_some()).await;
    let set = BTreeMap::from([("zone".to_owned(), "a".to_owned())]);
    let label = NodeOperation::Label { set: set.clone(), remove: vec![] };
    assert_eq!(admin.operate_node("n1", &label).await.expect("labelled").labels, set);
    let first = node.running_when(1).await;
    node.exit(&first[0], TaskExit::Code(0));
    node.running_when(0).await;

    let taint = Taint { key: "team".to_owned(), value: "red".to_owned() };
    let tainted = NodeOperation::Taint { set: vec![taint.clone()], remove: vec![] };
    assert_eq!(admin.operate_node("n1", &tainted).await.expect("tainted").taints, [taint]);
    let kept_away = admin.submit_job(&spec(1)).await.expect("accepted");
    cluster.job_when(&kept_away.id, |job| job.reason.is_some()).await;
    let tolerations = serde_json::from_str(r#"[{"key": "team"}]"#).expect("tolerations");
    let tolerant = admin.submit_job(&JobSpec { tolerations, ..spec(1) }).await.expect("accepted");
    cluster.job_when(&tolerant.id, |job| job.state == JobState::Running).await;
    assert_eq!(cluster.job(&kept_away.id).await.state, JobState::Pending);

    let past = MaintenanceWindow { from_ms: 1, until_ms: 2, reason: "r".to_owned() };
    refused(admin.operate_node("n1", &NodeOperation::Maintain(past)).await, 422, "field until_ms");
    let far = MaintenanceWindow { from_ms: 1 << 45, until_ms: (1 << 45) + 1, reason: "r".to_owned() };
    let shown = admin.operate_node("n1", &NodeOperation::Maintain(far.clone())).await.expect("announced");
    assert_eq!(shown.maintenance, [far]);
    let shown = admin.operate_node("n1", &NodeOperation::EndMaintenance).await.expect("ended");
    assert!(shown.maintenance.is_empty() && !shown.taints.is_empty(), "only that");
}

/// A cluster of one node that red uses all of, with an estimate, so that others wait for that job.
async fn full_of_red(cluster: &Cluster, red: &Client) -> Job {
    add_image(&cluster.admin(), "test").await;
    let estimate = Some(lathe_api::TimeSpan::from_seconds(3600));
    let job = red.submit_job(&JobSpec { estimate, ..spec(2) }).await.expect("accepted");
    cluster.job_when(&job.id, |job| job.state == JobState::Running).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_told_why_its_job_waits_and_nothing_of_others() {
    let cluster = Cluster::start().await;
    let _node = cluster.node("n1", 2).await;
    let (admin, red, blue) = (cluster.admin(), cluster.user("red").await, cluster.user("blue").await);
    let running = full_of_red(&cluster, &red).await;
    let waits = blue.submit_job(&spec(2)).await.expect("accepted");
    cluster.job_when(&waits.id, |job| job.after.is_some()).await;

    let full = admin.job_why(&waits.id).await.expect("an admin sees all");
    assert_eq!(full.after.as_ref(), Some(&running.id));
    let own = blue.job_why(&waits.id).await.expect("its own");
    assert_eq!((own.state, own.after.as_ref()), (JobState::Pending, None));
    assert!(own.expected_start_ms.is_some() && own.remedy.is_some());
    for job in [blue.job(&waits.id).await.expect("its own"), blue.jobs().await.expect("listed").remove(0)] {
        let text = serde_json::to_string(&job).expect("JSON");
        assert!(job.reason.is_some() && !text.contains(&running.id), "{text}");
    }
    let behind = blue.submit_job(&spec(1)).await.expect("accepted");
    cluster.job_when(&behind.id, |job| job.reason.is_some()).await;
    let why = blue.job_why(&behind.id).await.expect("its own");
    assert_eq!((why.position, why.waiting), (Some(2), Some(2)));

    refused(blue.job_why(&running.id).await, 404, "there is no job");
    let placed = red.job_why(&running.id).await.expect("its own");
    let decisions: Vec<_> = placed.decisions.iter().map(|d| (d.kind, d.by, d.attempt)).collect();
    assert_eq!(decisions, [(DecisionKind::Placed, DecidedBy::Policy, 1)]);
    blue.cancel_job(&waits.id).await.expect("asked");
    let ended = eventually("the cancel", || async {
        blue.job_why(&waits.id).await.ok().filter(|why| why.state.is_terminal())
    })
    .await;
    assert_eq!(
        ended.decisions.last().map(|d| (d.kind, d.by)),
        Some((DecisionKind::Cancelled, DecidedBy::Owner))
    );
    assert_eq!((ended.position, ended.remedy), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_would_happen_and_changes_nothing() {
    let cluster = Cluster::start().await;
    let node = cluster.node("n1", 2).await;
    let (red, blue) = (cluster.user("red").await, cluster.user("blue").await);
    add_image(&cluster.admin(), "test").await;
    eventually("the node", || async {
        let planned = blue.plan_job(&spec(2)).await.expect("planned");
        planned.starts.then_some(planned)
    })
    .await;
    let planned = blue.plan_job(&spec(2)).await.expect("planned");
    assert_eq!(
        planned.tasks.iter().map(|t| (t.rank, t.node.as_str())).collect::<Vec<_>>(),
        [(0, "n1"), (1, "n1")]
    );
    assert!(blue.jobs().await.expect("listed").is_empty() && node.seen().is_empty());

    let running = full_of_red(&cluster, &red).await;
    let planned = blue.plan_job(&spec(1)).await.expect("planned");
    assert!(!planned.starts && planned.tasks.is_empty());
    let text = serde_json::to_string(&planned).expect("JSON");
    assert!(planned.reason.is_some() && !text.contains(&running.id), "{text}");
    refused(blue.plan_job(&JobSpec { priority: 2000, ..spec(1) }).await, 422, "invalid field priority: 2000");
    refused(blue.plan_job(&JobSpec { image: "none".to_owned(), ..spec(1) }).await, 422, "field image");
    assert!(blue.jobs().await.expect("listed").is_empty());
}
