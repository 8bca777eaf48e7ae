//! The view is what a fresh listing would be, whatever was committed.

use std::sync::Arc;

use lathe_api::artefact::Digest;
use lathe_api::node::{Inventory, NodeState};
use lathe_api::sandbox::{Desired, NetworkChanges, NodeNetwork};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

use super::{Contents, View, contents};
use crate::desired::{self, NetworkKnown};
use crate::records::{Allocations, Assignment, NodeRecord, Operations, put};
use crate::store::redb::RedbStore;
use crate::store::{Outcome, Store, Transaction, Write};

const JOB: &str = r#"{"job": {"id": "ID", "tenant": "TENANT", "spec": {"name": "a", "class": "container",
    "image": "i"}, "image_digest": "sha256:0000000000000000000000000000000000000000000000000000000000000000",
    "state": "running", "attempt": 1, "submitted_ms": 1, "tasks": [{"rank": 0, "sandbox": "s", "node": "n",
    "address": "10.0.0.ADDRESS", "state": "running"}]}, "sequence": 1, "image": {"name": "i", "digest":
    "sha256:0000000000000000000000000000000000000000000000000000000000000000", "size_bytes": 1},
    "datasets": [], "failures": 0, "losses": 0, "cancelled": false, "stopping": null}"#;

/// A commit that something in the view depends on: what, which one, and whether it goes.
fn write((kind, which, gone): (u8, u8, bool)) -> Write {
    let (node, job) = (format!("n{}", which % 2), format!("j{}", which % 3));
    let key = match kind {
        0 => format!("jobs/active/{job}"),
        1 => format!("assignments/{node}/{job}-0-1"),
        2 => format!("allocations/{node}"),
        3 => format!("operations/{node}"),
        4 => format!("alive/{node}"),
        5 => format!("images/{which}"),
        _ => format!("nodes/{node}"),
    };
    if gone {
        return Write::Delete { key };
    }
    let assignment = Assignment { job: job.clone(), rank: 0, desired: Desired::Running, observed: false };
    let text = JOB.replace("ID", &job).replace("TENANT", &format!("t{}", which % 2));
    let value = match kind {
        0 => text.replace("ADDRESS", &which.to_string()).into_bytes(),
        1 => return put(key, &assignment).expect("encodes"),
        2 => return put(key, &Allocations::default()).expect("encodes"),
        3 => return put(key, &Operations::default()).expect("encodes"),
        6 => return put(key, &node_record(&node, which)).expect("encodes"),
        _ => b"null".to_vec(),
    };
    Write::Put { key, value, lease: None }
}

/// A node that was not heard of yet, or is at one of a few addresses.
fn node_record(name: &str, which: u8) -> NodeRecord {
    NodeRecord {
        name: name.to_owned(),
        certificate: Digest::of(b""),
        subnet: format!("10.0.{}.0/24", name.trim_start_matches('n')),
        address: if which < 2 { String::new() } else { format!("192.168.0.{which}") },
        state: NodeState::Ready,
        inventory: Inventory::default(),
        joined_ms: 0,
        last_heartbeat_ms: 0,
        lease: None,
    }
}

/// What a node was told of its network, line by line.
#[derive(Default)]
struct Told(Option<(NodeNetwork, NetworkKnown)>);

impl Told {
    /// Tells it what changed, after which it knows what one that is told all knows.
    fn tell(&mut self, contents: &Contents, node: &str) {
        let Some(whole) = desired::network(contents, node) else { return };
        let changes = self.0.as_ref().and_then(|(_, known)| known.changes(contents, node));
        let network = match (self.0.take(), changes) {
            (Some((mut network, known)), Some(changes)) => {
                if known.is_current(contents, node) {
                    assert_eq!(changes, NetworkChanges::default());
                }
                network.apply(changes);
                network
            }
            _ => whole.clone(),
        };
        assert_eq!(network, whole, "what {node} knows");
        self.0 = Some((network, NetworkKnown::now(contents, node)));
    }
}

fn same(one: &Contents, other: &Contents) {
    assert_eq!(one.revision, other.revision);
    assert_eq!(one.nodes, other.nodes);
    assert_eq!(one.alive, other.alive);
    assert_eq!(one.allocations, other.allocations);
    assert_eq!(one.assignments, other.assignments);
    assert_eq!(one.jobs, other.jobs);
    assert_eq!(one.operations, other.operations);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_any_commits_the_view_is_what_a_fresh_listing_is() {
    let one = (0..7_u8, 0..8_u8, prop::bool::weighted(0.3));
    let strategy = prop::collection::vec(prop::collection::vec(one, 1..5), 1..40);
    let mut runner = TestRunner::new(Config::with_cases(12));
    for _ in 0..12 {
        let commits = strategy.new_tree(&mut runner).expect("a case").current();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store: Arc<dyn Store> = Arc::new(RedbStore::open(&dir.path().join("s.redb")).expect("a store"));
        let view = Arc::new(View::load(&*store).await.expect("loaded"));
        let (following, of) = (Arc::clone(&view), Arc::clone(&store));
        let follower = tokio::spawn(async move { following.follow(of).await });
        let (mut often, mut seldom) = (Told::default(), Told::default());
        for (number, writes) in commits.into_iter().enumerate() {
            let writes = writes.into_iter().map(write).collect();
            let outcome = store.commit(Transaction { expect: vec![], writes }).await.expect("works");
            let Outcome::Committed(revision) = outcome else { panic!("nothing was expected") };
            view.reached(revision).await;
            let fresh = Contents::of(&store.list(&contents::PREFIXES).await.expect("listed"));
            view.read(|contents| {
                same(contents, &fresh);
                often.tell(contents, "n0");
                if number % 5 == 0 {
                    seldom.tell(contents, "n1");
                }
                // A job that took over the address of another's old assignment is the store's own
                // inconsistency, which placements never write: addresses are compared where there is none.
                let told = contents.addresses.values().flatten().count();
                let assigned = contents.assignments.values().flatten().count();
                assert!(told <= assigned);
            });
        }
        follower.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_fell_behind_lists_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store: Arc<dyn Store> = Arc::new(RedbStore::open(&dir.path().join("s.redb")).expect("a store"));
    let view = Arc::new(View::load(&*store).await.expect("loaded"));
    assert!(view.take_unseen().all);
    // More than the store remembers, before anybody follows.
    let mut last = 0;
    for chunk in 0..20 {
        let commits = (0..256).map(|number| {
            let write = write((4, (number % 2) as u8, (number + chunk) % 3 == 0));
            store.commit(Transaction { expect: vec![], writes: vec![write] })
        });
        for outcome in futures_util::future::join_all(commits).await {
            let Ok(Outcome::Committed(revision)) = outcome else { panic!("nothing was expected") };
            last = last.max(revision);
        }
    }
    let (following, of) = (Arc::clone(&view), Arc::clone(&store));
    let follower = tokio::spawn(async move { following.follow(of).await });
    view.reached(last).await;
    let fresh = Contents::of(&store.list(&contents::PREFIXES).await.expect("listed"));
    view.read(|contents| same(contents, &fresh));
    assert!(view.take_unseen().all, "whoever saw the changes before is told to look at everything");
    follower.abort();
}
