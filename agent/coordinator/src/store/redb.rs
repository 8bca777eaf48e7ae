//! The embedded store: one redb file, one process.
//!
//! Every commit is flushed to disk before it is acknowledged (redb's `Durability::Immediate`, its
//! default). Flushing is what costs: one thread writes, and what came while it waited for the disk
//! goes with the next flush together (group commit: DeWitt et al., "Implementation techniques for
//! main memory database systems", SIGMOD'84). Reads see redb's own snapshots. What redb lacks is
//! added here: revisions, a bounded history for watchers, and leases. A lease's time left is kept in
//! memory only: keeping one alive costs no disk write, and after a restart each starts afresh.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    Change, Entry, Event, LeaseId, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch,
    WatchError, Write,
};

/// Key to (revision, lease or 0, value).
const ENTRIES: TableDefinition<'_, &str, (u64, u64, &[u8])> = TableDefinition::new("entries");
/// Lease to its time to live in milliseconds.
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
/// `revision` and `next_lease`.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

const REVISION: &str = "revision";
const NEXT_LEASE: &str = "next_lease";

/// Commits that watchers can catch up with. A watcher further behind lists again.
const HISTORY: usize = 4096;
/// What the history holds at most, so that it stays small beside what is stored; bytes.
const HISTORY_BYTES: usize = 32 << 20;
/// Transactions that are flushed together at most: the first of them waits for the last.
const GROUP: usize = 256;
/// How often leases are looked at: a small part of the shortest one in use (seconds).
const LEASE_CHECK: Duration = Duration::from_millis(200);

/// A handle; clones share the file.
#[derive(Clone)]
pub struct RedbStore {
    inner: Arc<Inner>,
    writer: mpsc::UnboundedSender<Pending>,
}

/// A transaction that waits for the writer.
struct Pending {
    work: Transaction,
    answer: oneshot::Sender<Result<Outcome, StoreError>>,
}

struct Inner {
    database: Database,
    /// One writer at a time, so that watchers see commits in their order.
    watchers: Mutex<Watchers>,
    leases: Mutex<HashMap<LeaseId, Lease>>,
}

struct Watchers {
    history: VecDeque<Arc<Event>>,
    history_bytes: usize,
    /// The last commit before the history begins.
    before_history: Revision,
    live: broadcast::Sender<Arc<Event>>,
}

#[derive(Clone)]
struct Lease {
    ttl: Duration,
    expires: Instant,
    /// Keys written under it; some may have been written without it since.
    keys: BTreeSet<String>,
}

impl Lease {
    fn new(ttl: Duration) -> Self {
        Self { ttl, expires: Instant::now() + ttl, keys: BTreeSet::new() }
    }
}

impl RedbStore {
    /// Opens the file, or makes it. Call within a Tokio runtime: leases end in the background.
    ///
    /// # Errors
    /// When another process has it open, or it is not a store.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| open_error(path, error))?;
        let (revision, leases) = prepare(&database)?;
        let inner = Arc::new(Inner {
            database,
            watchers: Mutex::new(Watchers {
                history: VecDeque::new(),
                history_bytes: 0,
                before_history: revision,
                live: broadcast::channel(HISTORY).0,
            }),
            leases: Mutex::new(leases),
        });
        let (writer, queue) = mpsc::unbounded_channel();
        let writing = Arc::clone(&inner);
        std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || write_groups(&writing, queue))
            .map_err(|error| StoreError::Open {
                path: path.display().to_string(),
                reason: error.to_string(),
            })?;
        tokio::spawn(end_leases(Arc::downgrade(&inner)));
        Ok(Self { inner, writer })
    }

    /// Runs a writer off the async threads: it waits for the disk.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(StoreError::Corrupt { key: "(runtime)".into(), reason: error.to_string() }),
            },
        }
    }
}

/// The writer's thread: ends when the last handle is gone.
fn write_groups(inner: &Inner, mut queue: mpsc::UnboundedReceiver<Pending>) {
    let mut group = Vec::new();
    while let Some(first) = queue.blocking_recv() {
        group.push(first);
        while group.len() < GROUP
            && let Ok(next) = queue.try_recv()
        {
            group.push(next);
        }
        let (works, answers): (Vec<_>, Vec<_>) =
            group.drain(..).map(|pending| (pending.work, pending.answer)).unzip();
        match inner.commit_group(works) {
            // Who no longer waits has lost nothing: what was asked has happened or not all the same.
            Ok(outcomes) => {
                answers.into_iter().zip(outcomes).for_each(|(answer, outcome)| drop(answer.send(outcome)))
            }
            Err(error) => {
                let text = error.to_string();
                for answer in answers {
                    let again = ::redb::Error::Io(std::io::Error::other(text.clone()));
                    drop(answer.send(Err(StoreError::Failed(Box::new(again)))));
                }
            }
        }
    }
}

fn open_error(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.display().to_string();
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path },
        other => StoreError::Open { path, reason: other.to_string() },
    }
}

/// Makes the tables and reads where the last run stopped.
fn prepare(database: &Database) -> Result<(Revision, HashMap<LeaseId, Lease>), StoreError> {
    let transaction = database.begin_write().map_err(failed)?;
    let mut leases = HashMap::new();
    let revision;
    {
        let entries = transaction.open_table(ENTRIES).map_err(failed)?;
        let counters = transaction.open_table(COUNTERS).map_err(failed)?;
        revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
        let table = transaction.open_table(LEASES).map_err(failed)?;
        for row in table.iter().map_err(failed)? {
            let (id, ttl) = row.map_err(failed)?;
            leases.insert(id.value(), Lease::new(Duration::from_millis(ttl.value())));
        }
        if !leases.is_empty() {
            for row in entries.iter().map_err(failed)? {
                let (key, row) = row.map_err(failed)?;
                if let Some(lease) = leases.get_mut(&row.value().1) {
                    lease.keys.insert(key.value().to_owned());
                }
            }
        }
    }
    transaction.commit().map_err(failed)?;
    Ok((revision, leases))
}

fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Failed(Box::new(error.into()))
}

/// A panic while one of these was held leaves them whole: every change is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(ENTRIES).map_err(failed)?;
        let found = table.get(key).map_err(failed)?;
        Ok(found.map(|row| {
            let (revision, _, value) = row.value();
            Entry { key: key.to_owned(), value: value.to_vec(), revision }
        }))
    }

    fn list(&self, prefixes: &[&str]) -> Result<Listing, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(ENTRIES).map_err(failed)?;
        let counters = transaction.open_table(COUNTERS).map_err(failed)?;
        let revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
        let mut entries = Vec::new();
        for prefix in prefixes {
            for row in table.range(*prefix..).map_err(failed)? {
                let (key, row) = row.map_err(failed)?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                let (revision, _, value) = row.value();
                entries.push(Entry { key: key.value().to_owned(), value: value.to_vec(), revision });
            }
        }
        Ok(Listing { revision, entries })
    }

    fn page(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Listing, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(ENTRIES).map_err(failed)?;
        let counters = transaction.open_table(COUNTERS).map_err(failed)?;
        let revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
        let from = after.map_or(Bound::Included(prefix), Bound::Excluded);
        let mut entries = Vec::new();
        for row in table.range::<&str>((from, Bound::Unbounded)).map_err(failed)?.take(limit) {
            let (key, row) = row.map_err(failed)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (revision, _, value) = row.value();
            entries.push(Entry { key: key.value().to_owned(), value: value.to_vec(), revision });
        }
        Ok(Listing { revision, entries })
    }

    /// Decides on each transaction in turn, and makes those that hold durable with one flush.
    fn commit_group(&self, works: Vec<Transaction>) -> Result<Vec<Result<Outcome, StoreError>>, StoreError> {
        // Held until the watchers know, so that they learn of commits in order.
        let mut watchers = lock(&self.watchers);
        let transaction = self.database.begin_write().map_err(failed)?;
        let mut outcomes = Vec::with_capacity(works.len());
        let mut events = Vec::new();
        let mut leased = Vec::new();
        {
            let mut group = Group {
                entries: transaction.open_table(ENTRIES).map_err(failed)?,
                leases: transaction.open_table(LEASES).map_err(failed)?,
                leased: &mut leased,
            };
            let mut counters = transaction.open_table(COUNTERS).map_err(failed)?;
            let mut revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
            for work in works {
                if let Some(refused) = group.refuse(&work)? {
                    outcomes.push(refused);
                    continue;
                }
                revision += 1;
                let changes = group.apply(work.writes, revision)?;
                events.push(Event { revision, changes });
                outcomes.push(Ok(Outcome::Committed(revision)));
            }
            if !events.is_empty() {
                counters.insert(REVISION, revision).map_err(failed)?;
            }
        }
        if events.is_empty() {
            return Ok(outcomes);
        }
        transaction.commit().map_err(failed)?;
        {
            let mut leases = lock(&self.leases);
            for (lease, key) in leased {
                if let Some(lease) = leases.get_mut(&lease) {
                    lease.keys.insert(key);
                }
            }
        }
        events.into_iter().for_each(|event| watchers.tell(event));
        Ok(outcomes)
    }

    fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        let id;
        {
            let mut counters = transaction.open_table(COUNTERS).map_err(failed)?;
            // From 1: 0 means "no lease" in the table.
            id = counters.get(NEXT_LEASE).map_err(failed)?.map_or(1, |value| value.value());
            counters.insert(NEXT_LEASE, id + 1).map_err(failed)?;
            let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            let mut leases = transaction.open_table(LEASES).map_err(failed)?;
            leases.insert(id, ttl_ms).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        lock(&self.leases).insert(id, Lease::new(ttl));
        Ok(id)
    }

    fn keep_alive(&self, id: LeaseId) -> Result<(), StoreError> {
        let mut leases = lock(&self.leases);
        let lease = leases.get_mut(&id).ok_or(StoreError::NoLease(id))?;
        lease.expires = Instant::now() + lease.ttl;
        Ok(())
    }

    /// Deletes the lease and its keys in one commit; with `only_expired`, unless it was kept alive
    /// since the caller looked.
    fn end_lease(&self, id: LeaseId, only_expired: bool) -> Result<(), StoreError> {
        let mut watchers = lock(&self.watchers);
        let lease = {
            let mut leases = lock(&self.leases);
            if only_expired && leases.get(&id).is_none_or(|lease| lease.expires > Instant::now()) {
                return Ok(());
            }
            leases.remove(&id)
        };
        let transaction = self.database.begin_write().map_err(failed)?;
        let mut changes = Vec::new();
        let revision;
        {
            let mut table = transaction.open_table(ENTRIES).map_err(failed)?;
            for key in lease.into_iter().flat_map(|lease| lease.keys) {
                let under = table.get(key.as_str()).map_err(failed)?.is_some_and(|row| row.value().1 == id);
                if under {
                    table.remove(key.as_str()).map_err(failed)?;
                    changes.push(Change { key, value: None });
                }
            }
            let mut leases = transaction.open_table(LEASES).map_err(failed)?;
            leases.remove(id).map_err(failed)?;
            let mut counters = transaction.open_table(COUNTERS).map_err(failed)?;
            revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value()) + 1;
            counters.insert(REVISION, revision).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        watchers.tell(Event { revision, changes });
        Ok(())
    }

    fn expired(&self) -> Vec<LeaseId> {
        let now = Instant::now();
        lock(&self.leases).iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect()
    }
}

/// The tables while a group is written.
struct Group<'a, 't> {
    entries: redb::Table<'t, &'static str, (u64, u64, &'static [u8])>,
    leases: redb::Table<'t, u64, u64>,
    /// Keys written under leases.
    leased: &'a mut Vec<(LeaseId, String)>,
}

impl Group<'_, '_> {
    /// Why a transaction cannot happen now; nothing is written before that is known.
    fn refuse(&self, work: &Transaction) -> Result<Option<Result<Outcome, StoreError>>, StoreError> {
        for (key, expected) in &work.expect {
            let actual = self.entries.get(key.as_str()).map_err(failed)?.map(|row| row.value().0);
            if actual != *expected {
                return Ok(Some(Ok(Outcome::Conflict { key: key.clone() })));
            }
        }
        for write in &work.writes {
            if let Write::Put { lease: Some(lease), .. } = write
                && self.leases.get(lease).map_err(failed)?.is_none()
            {
                return Ok(Some(Err(StoreError::NoLease(*lease))));
            }
        }
        Ok(None)
    }

    fn apply(&mut self, writes: Vec<Write>, revision: Revision) -> Result<Vec<Change>, StoreError> {
        let mut changes = Vec::with_capacity(writes.len());
        for write in writes {
            changes.push(match write {
                Write::Put { key, value, lease } => {
                    let row = (revision, lease.unwrap_or(0), value.as_slice());
                    self.entries.insert(key.as_str(), row).map_err(failed)?;
                    self.leased.extend(lease.map(|lease| (lease, key.clone())));
                    Change { key, value: Some(value) }
                }
                Write::Delete { key } => {
                    self.entries.remove(key.as_str()).map_err(failed)?;
                    Change { key, value: None }
                }
            });
        }
        Ok(changes)
    }
}

impl Event {
    /// What it holds, roughly; bytes.
    fn size(&self) -> usize {
        let of = |change: &Change| change.key.len() + change.value.as_ref().map_or(0, Vec::len);
        self.changes.iter().map(of).sum()
    }
}

impl Watchers {
    fn tell(&mut self, event: Event) {
        let event = Arc::new(event);
        self.history_bytes += event.size();
        self.history.push_back(Arc::clone(&event));
        while self.history.len() > HISTORY || self.history_bytes > HISTORY_BYTES {
            let Some(oldest) = self.history.pop_front() else { break };
            self.history_bytes -= oldest.size();
            self.before_history = oldest.revision;
        }
        // No receiver is no error: nobody watches now.
        let _ = self.live.send(event);
    }
}

async fn end_leases(inner: Weak<Inner>) {
    let mut timer = tokio::time::interval(LEASE_CHECK);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        for lease in inner.expired() {
            let inner = Arc::clone(&inner);
            let ended = tokio::task::spawn_blocking(move || inner.end_lease(lease, true)).await;
            if let Ok(Err(error)) = ended {
                // The lease cannot be kept alive any more, so its holder will write its keys anew; a
                // failing disk shows itself to every other writer too.
                tracing::error!(lease, %error, "cannot end a lease");
            }
        }
    }
}

impl Store for RedbStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        async move { self.inner.get(key) }.boxed()
    }

    fn list<'a>(&'a self, prefixes: &'a [&'a str]) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move { self.inner.list(prefixes) }.boxed()
    }

    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Listing, StoreError>> {
        async move { self.inner.page(prefix, after, limit) }.boxed()
    }

    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        async move {
            let gone = || StoreError::Corrupt { key: "(writer)".into(), reason: "it has ended".into() };
            let (answer, outcome) = oneshot::channel();
            self.writer.send(Pending { work: transaction, answer }).map_err(|_| gone())?;
            outcome.await.map_err(|_| gone())?
        }
        .boxed()
    }

    fn watch(&self, from: Revision) -> Result<Watch, WatchError> {
        let watchers = lock(&self.inner.watchers);
        if from < watchers.before_history {
            return Err(WatchError::Behind);
        }
        let missed = watchers.history.iter().filter(|event| event.revision > from).cloned().collect();
        Ok(Watch { missed, live: watchers.live.subscribe(), at: from })
    }

    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        self.write(move |inner| inner.grant(ttl)).boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        async move { self.inner.keep_alive(lease) }.boxed()
    }

    fn revoke_lease(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.write(move |inner| inner.end_lease(lease, false)).boxed()
    }
}
