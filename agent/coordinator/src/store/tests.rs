//! What the coordinator relies on, checked on the real file.

use std::sync::Arc;
use std::time::Duration;

use super::redb::RedbStore;
use super::{Change, Outcome, Store, StoreError, Transaction, WatchError, Write};

fn put(key: &str, value: &str) -> Write {
    Write::Put { key: key.to_owned(), value: value.as_bytes().to_vec(), lease: None }
}

fn transaction(expect: &[(&str, Option<u64>)], writes: Vec<Write>) -> Transaction {
    let expect = expect.iter().map(|(key, revision)| ((*key).to_owned(), *revision)).collect();
    Transaction { expect, writes }
}

async fn committed(store: &RedbStore, work: Transaction) -> u64 {
    match store.commit(work).await.expect("a working store") {
        Outcome::Committed(revision) => revision,
        Outcome::Conflict { key } => panic!("conflict on {key}"),
    }
}

fn fresh() -> (tempfile::TempDir, RedbStore) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = RedbStore::open(&dir.path().join("store.redb")).expect("a new store");
    (dir, store)
}

/// Opens again once the last handle is gone: the lease task may hold one for an instant.
async fn reopen(dir: &tempfile::TempDir, store: RedbStore) -> RedbStore {
    drop(store);
    loop {
        match RedbStore::open(&dir.path().join("store.redb")) {
            Ok(store) => return store,
            Err(StoreError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_happens_whole_or_not_at_all() {
    let (_dir, store) = fresh();
    let first = committed(&store, transaction(&[("a", None)], vec![put("a", "1"), put("b", "1")])).await;
    for expect in [("a", None), ("a", Some(first + 1)), ("missing", Some(first))] {
        let outcome = store.commit(transaction(&[expect], vec![put("b", "2")])).await.expect("works");
        assert_eq!(outcome, Outcome::Conflict { key: expect.0.to_owned() });
    }
    let b = store.get("b").await.expect("works").expect("it is there");
    assert_eq!((b.value.as_slice(), b.revision), (&b"1"[..], first), "a refused one wrote something");
    let second = committed(
        &store,
        transaction(
            &[("a", Some(first)), ("c", None)],
            vec![put("c", "1"), Write::Delete { key: "a".into() }],
        ),
    )
    .await;
    assert_eq!(second, first + 1);
    assert!(store.get("a").await.expect("works").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_increments_are_all_counted() {
    let (_dir, store) = fresh();
    let store = Arc::new(store);
    let increment = |store: Arc<RedbStore>| async move {
        loop {
            let entry = store.get("n").await.expect("works");
            let value =
                entry.as_ref().map_or(0, |e| String::from_utf8_lossy(&e.value).parse::<u32>().expect("n"));
            let work =
                transaction(&[("n", entry.map(|e| e.revision))], vec![put("n", &(value + 1).to_string())]);
            if let Outcome::Committed(_) = store.commit(work).await.expect("works") {
                return;
            }
        }
    };
    let tasks: Vec<_> = (0..16).map(|_| tokio::spawn(increment(Arc::clone(&store)))).collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(store.get("n").await.expect("works").expect("there").value, b"16");
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_stays_within_its_prefixes_and_in_order() {
    let (_dir, store) = fresh();
    let keys = ["a/1", "a/2", "a0", "b/1", "b/2", "c"];
    let revision = committed(&store, transaction(&[], keys.map(|key| put(key, key)).to_vec())).await;
    let listing = store.list(&["b/", "a/"]).await.expect("works");
    let found: Vec<_> = listing.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(found, ["b/1", "b/2", "a/1", "a/2"]);
    assert_eq!(listing.revision, revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_reopening() {
    let (dir, store) = fresh();
    for round in 0..5 {
        committed(&store, transaction(&[], vec![put(&format!("k/{round}"), "v")])).await;
    }
    let before = store.list(&["k/"]).await.expect("works");
    let store = reopen(&dir, store).await;
    assert_eq!(store.list(&["k/"]).await.expect("works"), before);
    assert_eq!(committed(&store, transaction(&[], vec![put("k/5", "v")])).await, before.revision + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_taken_in_the_middle_of_writing_opens_with_every_acknowledged_commit() {
    // What a crash leaves: the file's bytes at some moment, without any of the closing steps.
    let (dir, store) = fresh();
    for round in 0..20_u32 {
        committed(&store, transaction(&[], vec![put(&format!("k/{round:02}"), "v")])).await;
        // Each its own: a store that was dropped lets go of its file a moment later.
        let copy = dir.path().join(format!("copy-{round}.redb"));
        std::fs::copy(dir.path().join("store.redb"), &copy).expect("copied");
        let crashed = RedbStore::open(&copy).expect("it opens after a crash");
        assert_eq!(crashed.list(&["k/"]).await.expect("works").entries.len(), round as usize + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_refused() {
    let (dir, _store) = fresh();
    let error = RedbStore::open(&dir.path().join("store.redb")).err().expect("it is in use");
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_sees_every_commit_after_its_revision_once_and_in_order() {
    let (dir, store) = fresh();
    let first = committed(&store, transaction(&[], vec![put("a", "1")])).await;
    committed(&store, transaction(&[], vec![put("b", "1")])).await;
    let mut watch = store.watch(first).expect("recent");
    committed(&store, transaction(&[], vec![put("c", "1"), Write::Delete { key: "a".into() }])).await;
    let (second, third) = (watch.next().await.expect("open"), watch.next().await.expect("open"));
    let change = |key: &str, value: Option<&str>| Change {
        key: key.to_owned(),
        value: value.map(|value| value.as_bytes().to_vec()),
    };
    assert_eq!((second.revision, &second.changes), (first + 1, &vec![change("b", Some("1"))]));
    let both = vec![change("c", Some("1")), change("a", None)];
    assert_eq!((third.revision, &third.changes), (first + 2, &both));

    drop(watch);
    let store = reopen(&dir, store).await;
    assert_eq!(store.watch(first).err(), Some(WatchError::Behind), "it cannot know what happened before");
    store.watch(first + 2).expect("nothing was missed");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_go_with_their_lease() {
    let (dir, store) = fresh();
    let long = store.grant_lease(Duration::from_secs(3600)).await.expect("works");
    let short = store.grant_lease(Duration::from_millis(50)).await.expect("works");
    let leased = |key: &str, lease| Write::Put { key: key.into(), value: vec![], lease: Some(lease) };
    let mut watch = store.watch(0).expect("new");
    committed(&store, transaction(&[], vec![leased("long", long), leased("short", short)])).await;
    watch.next().await.expect("the write");
    let gone =
        tokio::time::timeout(Duration::from_secs(30), watch.next()).await.expect("it ends").expect("open");
    assert_eq!(gone.changes, [Change { key: "short".to_owned(), value: None }]);
    assert!(matches!(store.keep_alive(short).await, Err(StoreError::NoLease(_))));
    let late = store.commit(transaction(&[], vec![leased("late", short)])).await;
    assert!(matches!(late, Err(StoreError::NoLease(_))), "a key outlived its lease");

    drop(watch);
    let store = reopen(&dir, store).await;
    store.keep_alive(long).await.expect("it survives a restart");
    store.revoke_lease(long).await.expect("works");
    assert!(store.get("long").await.expect("works").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_wait_together_are_each_decided_alone() {
    let (_dir, store) = fresh();
    let ended = store.grant_lease(Duration::from_secs(3600)).await.expect("works");
    store.revoke_lease(ended).await.expect("works");
    let leased = Write::Put { key: "leased".into(), value: vec![], lease: Some(ended) };
    let mut works: Vec<_> = (0..64)
        .map(|number: u32| {
            transaction(&[(&format!("k/{}", number / 2), None)], vec![put(&format!("k/{}", number / 2), "v")])
        })
        .collect();
    works.push(transaction(&[], vec![put("half", "v"), leased]));
    let revision = store.list(&[]).await.expect("works").revision;
    let mut watch = store.watch(revision).expect("recent");
    let outcomes = futures_util::future::join_all(works.into_iter().map(|work| store.commit(work))).await;
    let won = outcomes.iter().filter(|one| matches!(one, Ok(Outcome::Committed(_)))).count();
    let lost = outcomes.iter().filter(|one| matches!(one, Ok(Outcome::Conflict { .. }))).count();
    assert_eq!((won, lost), (32, 32), "of two that make the same key, one does");
    assert!(matches!(outcomes.last(), Some(Err(StoreError::NoLease(_)))));
    assert!(store.get("half").await.expect("works").is_none(), "a refused one wrote something");
    let mut revisions: Vec<_> = outcomes
        .iter()
        .filter_map(|one| match one {
            Ok(Outcome::Committed(revision)) => Some(*revision),
            _ => None,
        })
        .collect();
    revisions.sort_unstable();
    for revision in revisions {
        assert_eq!(watch.next().await.expect("open").revision, revision, "each has its own");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_together_are_the_listing() {
    let (_dir, store) = fresh();
    let keys: Vec<String> = (0..25).map(|number| format!("p/{number:02}")).collect();
    let mut writes: Vec<_> = keys.iter().map(|key| put(key, "v")).collect();
    writes.extend([put("o", "v"), put("q", "v")]);
    committed(&store, transaction(&[], writes)).await;
    let (mut found, mut after) = (Vec::new(), None::<String>);
    loop {
        let page = store.page("p/", after.as_deref(), 10).await.expect("works");
        let Some(last) = page.entries.last() else { break };
        after = Some(last.key.clone());
        assert!(page.entries.len() <= 10);
        found.extend(page.entries.into_iter().map(|entry| entry.key));
    }
    assert_eq!(found, keys);
}
