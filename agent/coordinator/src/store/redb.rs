//! The embedded store: one redb file, one process.
//!
//! Every commit is flushed to disk before it is acknowledged (redb's `Durability::Immediate`, its
//! default). Reads see redb's own snapshots. What redb lacks is added here: revisions, a bounded
//! history for watchers, and leases. A lease's time left is kept in memory only: keeping one alive
//! costs no disk write, and after a restart each starts afresh.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::broadcast;

use super::{
    Entry, Event, LeaseId, Listing, Outcome, Revision, Store, StoreError, Transaction, Watch, WatchError,
    Write,
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
/// How often leases are looked at: a small part of the shortest one in use (seconds).
const LEASE_CHECK: Duration = Duration::from_millis(200);

/// A handle; clones share the file.
#[derive(Clone)]
pub struct RedbStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    /// One writer at a time, so that watchers see commits in their order.
    watchers: Mutex<Watchers>,
    leases: Mutex<HashMap<LeaseId, Lease>>,
}

struct Watchers {
    history: VecDeque<Event>,
    /// The last commit before the history begins.
    before_history: Revision,
    live: broadcast::Sender<Event>,
}

#[derive(Clone, Copy)]
struct Lease {
    ttl: Duration,
    expires: Instant,
}

impl RedbStore {
    /// Opens the file, or makes it. Call within a Tokio runtime: leases end in the background.
    ///
    /// # Errors
    /// When another process has it open, or it is not a store.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| open_error(path, error))?;
        let (revision, leases) = prepare(&database)?;
        let now = Instant::now();
        let leases = leases
            .into_iter()
            .map(|(id, ttl_ms)| {
                let ttl = Duration::from_millis(ttl_ms);
                (id, Lease { ttl, expires: now + ttl })
            })
            .collect();
        let inner = Arc::new(Inner {
            database,
            watchers: Mutex::new(Watchers {
                history: VecDeque::new(),
                before_history: revision,
                live: broadcast::channel(HISTORY).0,
            }),
            leases: Mutex::new(leases),
        });
        tokio::spawn(end_leases(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// Runs a writer off the async threads: a commit waits for the disk.
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

fn open_error(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.display().to_string();
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path },
        other => StoreError::Open { path, reason: other.to_string() },
    }
}

/// Makes the tables and reads where the last run stopped.
fn prepare(database: &Database) -> Result<(Revision, Vec<(LeaseId, u64)>), StoreError> {
    let transaction = database.begin_write().map_err(failed)?;
    let mut leases = Vec::new();
    let revision;
    {
        transaction.open_table(ENTRIES).map_err(failed)?;
        let counters = transaction.open_table(COUNTERS).map_err(failed)?;
        revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
        let table = transaction.open_table(LEASES).map_err(failed)?;
        for row in table.iter().map_err(failed)? {
            let (id, ttl) = row.map_err(failed)?;
            leases.push((id.value(), ttl.value()));
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

    fn commit(&self, work: &Transaction) -> Result<Outcome, StoreError> {
        // Held until the watchers know, so that they learn of commits in order.
        let mut watchers = lock(&self.watchers);
        let transaction = self.database.begin_write().map_err(failed)?;
        let mut keys = Vec::with_capacity(work.writes.len());
        let revision;
        {
            let mut table = transaction.open_table(ENTRIES).map_err(failed)?;
            for (key, expected) in &work.expect {
                let actual = table.get(key.as_str()).map_err(failed)?.map(|row| row.value().0);
                if actual != *expected {
                    return Ok(Outcome::Conflict { key: key.clone() });
                }
            }
            let leases = transaction.open_table(LEASES).map_err(failed)?;
            let mut counters = transaction.open_table(COUNTERS).map_err(failed)?;
            revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value()) + 1;
            counters.insert(REVISION, revision).map_err(failed)?;
            for write in &work.writes {
                let key = match write {
                    Write::Put { key, value, lease } => {
                        if let Some(lease) = lease
                            && leases.get(lease).map_err(failed)?.is_none()
                        {
                            return Err(StoreError::NoLease(*lease));
                        }
                        let row = (revision, lease.unwrap_or(0), value.as_slice());
                        table.insert(key.as_str(), row).map_err(failed)?;
                        key
                    }
                    Write::Delete { key } => {
                        table.remove(key.as_str()).map_err(failed)?;
                        key
                    }
                };
                keys.push(key.clone());
            }
        }
        transaction.commit().map_err(failed)?;
        watchers.tell(Event { revision, keys });
        Ok(Outcome::Committed(revision))
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
        lock(&self.leases).insert(id, Lease { ttl, expires: Instant::now() + ttl });
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
        {
            let mut leases = lock(&self.leases);
            if only_expired && leases.get(&id).is_none_or(|lease| lease.expires > Instant::now()) {
                return Ok(());
            }
            leases.remove(&id);
        }
        let transaction = self.database.begin_write().map_err(failed)?;
        let mut keys = Vec::new();
        let revision;
        {
            let mut table = transaction.open_table(ENTRIES).map_err(failed)?;
            for row in table.iter().map_err(failed)? {
                let (key, row) = row.map_err(failed)?;
                if row.value().1 == id {
                    keys.push(key.value().to_owned());
                }
            }
            for key in &keys {
                table.remove(key.as_str()).map_err(failed)?;
            }
            let mut leases = transaction.open_table(LEASES).map_err(failed)?;
            leases.remove(id).map_err(failed)?;
            let mut counters = transaction.open_table(COUNTERS).map_err(failed)?;
            revision = counters.get(REVISION).map_err(failed)?.map_or(0, |value| value.value()) + 1;
            counters.insert(REVISION, revision).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        watchers.tell(Event { revision, keys });
        Ok(())
    }

    fn expired(&self) -> Vec<LeaseId> {
        let now = Instant::now();
        lock(&self.leases).iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect()
    }
}

impl Watchers {
    fn tell(&mut self, event: Event) {
        if self.history.len() == HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.before_history = oldest.revision;
        }
        self.history.push_back(event.clone());
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

    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        self.write(move |inner| inner.commit(&transaction)).boxed()
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
