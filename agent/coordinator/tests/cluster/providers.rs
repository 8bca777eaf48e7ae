//! Pools whose jobs need nodes that are not there: a real program makes them, and takes them back.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use lathe_api::job::{Job, JobSpec, JobState, TaskExit};
use lathe_api::node::{NodeOffer, NodeOperation, NodeState};
use lathe_api::pool::Pool;
use lathe_api::provider::{ProvidedState, ProviderStatus};
use lathe_coordinator::provider::commit;

use crate::harness::{Cluster, FakeAgent, eventually, spec};

/// A provider as an operator may write one. It keeps its machines as files; what a test puts beside it
/// as `grow`, `release` or `list` is done first, and instead if it exits.
const SCRIPT: &str = r#"#!/bin/bash
dir=${0%/*}
input=$(cat)
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p" <<< "$input"; }
answer() { while read -r name; do printf '%s{"name":"%s","request":"%s"}' "$comma" "$name" "$(cat "$dir/nodes/$name" 2> /dev/null)"; comma=,; done; }
action=$(field action)
echo "$input" >> "$dir/asked"
[ -e "$dir/$action" ] && . "$dir/$action"
case $action in
grow)
    request=$(field request) count=$(field count)
    made() { cd "$dir/nodes" && grep -lx -- "$request" * 2> /dev/null; }
    while [ "$(made | wc -l)" -lt "$count" ]; do
        number=$(($(cat "$dir/last") + 1))
        echo "$number" > "$dir/last"
        echo "$request" > "$dir/nodes/cloud-$number"
    done
    printf '{"nodes":[%s]}' "$(made | answer)"
    ;;
release)
    names=$(grep -o '"name":"[^"]*"' <<< "$input" | cut -d'"' -f4)
    printf '{"nodes":[%s]}' "$(answer <<< "$names")"
    for name in $names; do rm -f "$dir/nodes/$name"; done
    ;;
list)
    printf '{"nodes":[%s]}' "$(ls "$dir/nodes" | answer)"
    ;;
esac
"#;

struct Cloud(tempfile::TempDir);

impl Cloud {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cloud = Self(dir);
        std::fs::create_dir(cloud.file("nodes")).expect("made");
        cloud.put("last", "0");
        cloud.put("provider", SCRIPT);
        std::fs::set_permissions(cloud.file("provider"), std::fs::Permissions::from_mode(0o755))
            .expect("executable");
        cloud
    }

    async fn cluster(&self) -> Cluster {
        let providers = [("cloud".to_owned(), self.file("provider"))].into();
        let cluster = Cluster::start_with(Duration::from_secs(3600), providers).await;
        cluster.image().await;
        cluster
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        // Whole or not at all: the program may read it now.
        std::fs::write(self.file(".new"), text).expect("written");
        std::fs::rename(self.file(".new"), self.file(name)).expect("put");
    }

    fn take(&self, name: &str) {
        std::fs::remove_file(self.file(name)).expect("removed");
    }

    fn machines(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.file("nodes")).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect()
    }

    /// What it was asked to do.
    fn asked(&self, action: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.file("asked")).unwrap_or_default();
        // The last line may be half written.
        let requests = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        requests.filter(|request| request["action"] == action).collect()
    }

    async fn machines_when(&self, count: usize) -> BTreeSet<String> {
        eventually("machines", || async { Some(self.machines()).filter(|all| all.len() == count) }).await
    }
}

/// Of nodes like those of the harness, with the rest of the settings as given.
fn pool(settings: &str) -> Pool {
    let json = format!(
        r#"{{"name": "default", "provider": {{"name": "cloud", {settings},
            "shape": {{"cpus": 2, "memory": "2 GiB", "labels": {{"zone": "cloud"}}}}}}}}"#
    );
    serde_json::from_str(&json).expect(&json)
}

/// A gang of tasks that each fill a node.
fn whole(tasks: u32) -> JobSpec {
    let mut spec = spec(tasks);
    spec.resources.cpus = 2;
    spec
}

async fn status(cluster: &Cluster) -> ProviderStatus {
    cluster.admin().pool("default").await.expect("shown").provider.expect("it has a provider")
}

async fn failure(cluster: &Cluster) -> String {
    eventually("a failure", || async { status(cluster).await.failure?.reason }).await
}

async fn why(cluster: &Cluster, job: &Job, words: &str) {
    let admin = cluster.admin();
    eventually(words, || async {
        let why = admin.job_why(&job.id).await.ok()?;
        why.provider.filter(|line| line.contains(words))
    })
    .await;
}

fn running(job: &Job) -> bool {
    job.state == JobState::Running
}

async fn end(agent: &FakeAgent) {
    let sandboxes = agent.running_when(1).await;
    agent.exit(&sandboxes[0], TaskExit::Code(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_asked_for_as_a_job_needs_them_and_once() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let admin = cluster.admin();
    admin.set_pool(&pool(r#""max_nodes": 8, "cooldown": "0s""#)).await.expect("set");
    let never = admin.submit_job(&whole(9)).await.expect("accepted");
    let job = admin.submit_job(&whole(2)).await.expect("accepted");
    let names = cloud.machines_when(2).await;
    assert_eq!(names, ["cloud-1", "cloud-2"].map(str::to_owned).into());
    why(&cluster, &job, "2 nodes of pool default's provider, named").await;
    why(&cluster, &never, "no more nodes of pool default's provider would let it start").await;
    let grown = cloud.asked("grow");
    assert_eq!((grown.len(), &grown[0]["count"], &grown[0]["version"]), (1, &2.into(), &1.into()));
    assert_eq!(grown[0]["shape"]["cpus"], 2);
    assert!(grown[0]["why"].as_str().is_some_and(|why| why.contains(&job.id)), "{grown:?}");

    let _one = cluster.node("cloud-1", 2).await;
    cluster.job_when(&job.id, |job| job.state == JobState::Pending).await;
    let _two = cluster.node("cloud-2", 2).await;
    cluster.job_when(&job.id, running).await;
    let node = admin.node("cloud-1").await.expect("it joined");
    assert_eq!(node.labels["zone"], "cloud");
    assert_eq!(node.labels["lathe.provided"], "default");
    let joined = eventually("both to have joined", || async {
        let nodes = status(&cluster).await.nodes;
        nodes.iter().all(|node| node.state == ProvidedState::Joined).then_some(nodes)
    })
    .await;
    assert_eq!(joined.iter().map(|node| &node.name).collect::<Vec<_>>(), ["cloud-1", "cloud-2"]);
    assert_eq!(cloud.asked("grow").len(), 1, "what is coming is not asked for again");
    let told: Vec<(String, String)> =
        admin.audit().await.expect("an admin may").into_iter().map(|e| (e.who, e.action)).collect();
    for action in ["provider grow", "provider gave", "provider joined"] {
        assert!(told.contains(&("provider:cloud".to_owned(), action.to_owned())), "{action}: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_caller_can_name_a_program() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let (admin, red) = (cluster.admin(), cluster.user("red").await);
    let good = pool(r#""max_nodes": 1"#);
    assert_eq!(red.set_pool(&good).await.expect_err("no admin").status(), Some(403));
    for name in ["/bin/sh", "other", "cloud=/bin/sh", ""] {
        let mut bad = good.clone();
        bad.provider.as_mut().expect("one").name = name.to_owned();
        let error = admin.set_pool(&bad).await.expect_err(name);
        assert_eq!(error.status(), Some(422), "{error}");
        assert!(error.to_string().contains("provider.name") && !error.to_string().contains('\n'), "{error}");
    }
    admin.set_pool(&good).await.expect("this one is the operator's");
    assert!(cloud.machines().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_fails_is_asked_again_later_and_says_why_to_admins_alone() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let (admin, red) = (cluster.admin(), cluster.user("red").await);
    admin.set_pool(&pool(r#""max_nodes": 4, "cooldown": "0s""#)).await.expect("set");
    cloud.put("grow", "echo not json; exit 0");
    let job = red.submit_job(&whole(1)).await.expect("accepted");
    assert!(failure(&cluster).await.contains("did not answer with a document of the contract"));
    why(&cluster, &job, "it is asked again in").await;
    let seen = red.pool("default").await.expect("shown").provider.expect("one").failure.expect("it failed");
    assert_eq!(seen.reason, None, "that is not a tenant's to know");
    for (script, words) in [
        ("echo no quota in zone a >&2; exit 7", "exit status: 7: no quota in zone a"),
        ("echo '{\"error\":\"no capacity\"}'; exit 0", "0 of 1 nodes: no capacity"),
    ] {
        cloud.put("grow", script);
        eventually(words, || async { Some(failure(&cluster).await).filter(|f| f.contains(words)) }).await;
    }
    assert!(cloud.machines().is_empty());
    cloud.take("grow");
    cloud.machines_when(1).await;
    let node = cluster.node("cloud-1", 2).await;
    cluster.job_when(&job.id, running).await;
    assert_eq!(status(&cluster).await.failure, None);
    assert!(status(&cluster).await.asked.is_none());
    end(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_stops_in_the_middle_goes_on_with_what_it_asked_for() {
    let cloud = Cloud::new();
    let mut cluster = cloud.cluster().await;
    cluster.admin().set_pool(&pool(r#""max_nodes": 4, "cooldown": "0s""#)).await.expect("set");
    // It makes one of two, and does not come to say so.
    cloud.put("grow", "echo \"$(field request)\" > \"$dir/nodes/cloud-early\"; sleep 1000");
    let job = cluster.admin().submit_job(&whole(2)).await.expect("accepted");
    cloud.machines_when(1).await;
    let asked = eventually("what was asked", || async { status(&cluster).await.asked }).await;
    cluster.stop().await;
    cloud.take("grow");
    cluster.restart_stopped().await;

    let machines = cloud.machines_when(2).await;
    assert_eq!(machines, ["cloud-1", "cloud-early"].map(str::to_owned).into(), "none is made twice");
    let requests: BTreeSet<String> =
        cloud.asked("grow").iter().map(|of| of["request"].as_str().expect("text").to_owned()).collect();
    assert_eq!(requests, [asked.request].into());
    let _agents = [cluster.node("cloud-1", 2).await, cluster.node("cloud-early", 2).await];
    cluster.job_when(&job.id, running).await;
    assert_eq!(cloud.machines().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_nodes_of_the_provider_are_given_back_and_no_others() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let admin = cluster.admin();
    let settings = r#""max_nodes": 4, "cooldown": "0s", "idle": "1s""#;
    admin.set_pool(&pool(settings)).await.expect("set");
    let own = cluster.node("n1", 2).await;
    eventually("n1", || async { admin.node("n1").await.ok().filter(|node| node.state == NodeState::Ready) })
        .await;
    let first = admin.submit_job(&whole(1)).await.expect("accepted");
    cluster.job_when(&first.id, running).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(admin.submit_job(&whole(1)).await.expect("accepted").id);
    }
    cloud.machines_when(2).await;
    let (one, two) = (cluster.node("cloud-1", 2).await, cluster.node("cloud-2", 2).await);
    for id in &ids {
        cluster.job_when(id, running).await;
    }
    let error = admin.remove_pool("default").await.expect_err("it has nodes");
    assert!(error.status() == Some(409) && error.to_string().contains("2 nodes of provider"), "{error}");

    // Whoever decides to close one under a task, because he looked before it came, finds it there.
    let (pool, node) = ("default", "cloud-2".to_owned());
    let keys = commit::keys_of([&node]);
    let closed = commit::change(cluster.coordinator(), pool, &keys, |draft| {
        commit::close(draft, &node, ProvidedState::Closing, 1).map(Some)
    });
    assert_eq!(closed.await.expect("the store works"), Some(false));
    assert_eq!(admin.node(&node).await.expect("shown").offer, NodeOffer::Open);

    end(&one).await;
    end(&own).await;
    let left = cloud.machines_when(1).await;
    assert!(left.contains("cloud-2"), "{left:?}: what runs there goes on");
    eventually("its records to be gone", || async {
        let names: Vec<String> = admin.nodes().await.ok()?.into_iter().map(|node| node.name).collect();
        (names == ["cloud-2", "n1"]).then_some(())
    })
    .await;
    drop(one);
    let released = cloud.asked("release");
    let names: Vec<&str> = released.iter().filter_map(|of| of["nodes"][0]["name"].as_str()).collect();
    assert!(names.iter().all(|name| *name == "cloud-1"), "{names:?}");
    assert_eq!(two.running().len(), 1);

    // One that an operator wants to have stays; one that it drains goes.
    let cordon = NodeOperation::Cordon { reason: "to look at".to_owned() };
    admin.operate_node("cloud-2", &cordon).await.expect("cordoned");
    end(&two).await;
    // Whoever needs two gets n1 and a new one.
    let pair = admin.submit_job(&whole(2)).await.expect("accepted");
    let all = cloud.machines_when(2).await;
    let new = all.iter().find(|name| *name != "cloud-2").expect("another").clone();
    assert_eq!(new, "cloud-3");
    let three = cluster.node(&new, 2).await;
    cluster.job_when(&pair.id, running).await;
    end(&own).await;
    end(&three).await;
    let left = cloud.machines_when(1).await;
    assert!(left.contains("cloud-2"), "{left:?}");
    let drain = NodeOperation::Drain { reason: "seen enough".to_owned() };
    admin.operate_node("cloud-2", &drain).await.expect("drained");
    cloud.machines_when(0).await;
    eventually("all to be forgotten", || async { status(&cluster).await.nodes.is_empty().then_some(()) })
        .await;
    admin.remove_pool("default").await.expect("nothing holds it now");
    assert_eq!(admin.nodes().await.expect("listed").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_while_nodes_go_is_never_on_one_that_goes() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let admin = cluster.admin();
    // Whatever is empty goes at once, while jobs come all the time.
    admin.set_pool(&pool(r#""max_nodes": 3, "cooldown": "0s", "idle": "0s""#)).await.expect("set");
    let mut agents: BTreeMap<String, FakeAgent> = BTreeMap::new();
    let (mut ids, mut done) = (Vec::new(), 0);
    while done < 12 {
        while ids.len() < 12 && ids.len() < done + 2 {
            ids.push(admin.submit_job(&whole(1)).await.expect("accepted").id);
        }
        // Machines that come have an agent, and those that go lose it with all that it runs.
        let machines = cloud.machines();
        agents.retain(|name, _| machines.contains(name));
        for name in machines {
            if !agents.contains_key(&name) {
                agents.insert(name.clone(), cluster.node(&name, 2).await);
            }
        }
        for agent in agents.values() {
            agent.running().iter().for_each(|sandbox| agent.exit(sandbox, TaskExit::Code(0)));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        let ended = admin.jobs().await.expect("listed").into_iter().filter(|job| job.state.is_terminal());
        done = ended.count();
    }
    for id in ids {
        let job = cluster.job(&id).await;
        assert_eq!((job.state, job.attempt), (JobState::Succeeded, 1), "{job:?}");
    }
    cloud.machines_when(0).await;
    assert!(!cloud.asked("release").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_keeps_its_least_and_nodes_that_were_there_before_are_never_the_providers() {
    let cloud = Cloud::new();
    let cluster = cloud.cluster().await;
    let admin = cluster.admin();
    let _own = cluster.node("n1", 2).await;
    eventually("n1", || async { admin.node("n1").await.ok() }).await;
    // It claims n1, when asked for nodes and when asked what it has.
    cloud.put("grow", "echo '{\"nodes\":[{\"name\":\"n1\"}]}'; exit 0");
    cloud.put("list", "echo '{\"nodes\":[{\"name\":\"n1\"}]}'; exit 0");
    let settings = r#""min_nodes": 1, "max_nodes": 1, "cooldown": "0s", "idle": "0s""#;
    admin.set_pool(&pool(settings)).await.expect("set");
    let words = "node n1 was there before it was asked for: it is left alone";
    assert!(failure(&cluster).await.contains(words));
    assert!(status(&cluster).await.nodes.is_empty());
    cloud.take("grow");
    cloud.take("list");
    cloud.machines_when(1).await;
    let _node = cluster.node("cloud-1", 2).await;
    eventually("it to join", || async {
        let nodes = status(&cluster).await.nodes;
        nodes.iter().any(|node| node.state == ProvidedState::Joined).then_some(())
    })
    .await;
    assert!(cloud.asked("release").is_empty(), "the pool keeps one");
    // What nobody keeps any more goes.
    let settings = r#""max_nodes": 0, "cooldown": "0s", "idle": "0s""#;
    admin.set_pool(&pool(settings)).await.expect("set");
    cloud.machines_when(0).await;
    assert!(admin.node("n1").await.is_ok());
}
