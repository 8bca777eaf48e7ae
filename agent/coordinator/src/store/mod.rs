//! The store: everything the coordinator must not forget, behind one trait.
//!
//! - [`Store`]: get, list by prefix, compare-and-swap transactions, watch from a revision, leases.
//! - [`redb`]: the embedded implementation.
//!
//! The trait is what etcd offers too, so that several coordinators can share one later: keys are
//! text, every commit gets the next revision, a key carries the revision that last wrote it, watchers
//! get what was written, and one that fell too far behind is told so and lists again. Logs, metrics
//! and blobs never go in.

pub mod redb;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::broadcast;

/// Counts commits; never goes back, also not over a restart.
pub type Revision = u64;

/// Names a lease.
pub type LeaseId = u64;

/// A key with what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The commit that last wrote it.
    pub revision: Revision,
}

/// Entries read at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// That moment: a watch from here misses nothing.
    pub revision: Revision,
    /// In the order of the prefixes, then of the keys.
    pub entries: Vec<Entry>,
}

/// Writes that happen together, if nothing they depend on has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Keys and the revision each must still have; `None` for a key that must not exist.
    pub expect: Vec<(String, Option<Revision>)>,
    /// What to write, in order.
    pub writes: Vec<Write>,
}

/// One write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// Deletes the key when this lease ends.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing happens if it does not exist.
    Delete {
        /// The key.
        key: String,
    },
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It is durable.
    Committed(Revision),
    /// Nothing was written: this key was not as expected.
    Conflict {
        /// The key.
        key: String,
    },
}

/// A commit, as watchers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The commit.
    pub revision: Revision,
    /// What it wrote and deleted, in order.
    pub changes: Vec<Change>,
}

/// What a commit did to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// What it holds now; none if it was deleted.
    pub value: Option<Vec<u8>>,
}

/// Commits after a revision, in order.
#[derive(Debug)]
pub struct Watch {
    /// Commits that had already happened when the watch began.
    missed: std::collections::VecDeque<Arc<Event>>,
    live: broadcast::Receiver<Arc<Event>>,
    /// The last one returned, or where the watch began.
    at: Revision,
}

impl Watch {
    /// The next commit. Cancelling this loses nothing; an event is shared by all who watch.
    ///
    /// # Errors
    /// [`WatchError::Behind`] when commits were missed: list again and watch from there.
    /// [`WatchError::Closed`] when the store is gone.
    pub async fn next(&mut self) -> Result<Arc<Event>, WatchError> {
        loop {
            let event = match self.missed.pop_front() {
                Some(event) => event,
                None => match self.live.recv().await {
                    Ok(event) => event,
                    Err(broadcast::error::RecvError::Lagged(_)) => return Err(WatchError::Behind),
                    Err(broadcast::error::RecvError::Closed) => return Err(WatchError::Closed),
                },
            };
            // A commit may be both in the history and in the channel.
            if event.revision > self.at {
                self.at = event.revision;
                return Ok(event);
            }
        }
    }

    /// The next commit, if there is one already.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub fn try_next(&mut self) -> Option<Result<Arc<Event>, WatchError>> {
        self.next().now_or_never()
    }
}

/// Why a watch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// Commits were missed.
    #[error("the watch fell behind: list again")]
    Behind,
    /// The store is gone.
    #[error("the store was closed")]
    Closed,
}

/// The store failed; what was asked may or may not have happened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("the store {path} is in use by another coordinator")]
    InUse {
        /// Its file.
        path: String,
    },
    /// It cannot be opened.
    #[error("cannot open the store {path}: {reason}")]
    Open {
        /// Its file.
        path: String,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("the store failed: {0}")]
    Failed(#[from] Box<::redb::Error>),
    /// A value does not decode.
    #[error("the store holds something unreadable under {key}: {reason}")]
    Corrupt {
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// A lease ended before it was used.
    #[error("lease {0} has ended")]
    NoLease(LeaseId),
    /// Too many writers at once.
    #[error("{0} kept changing; try again")]
    Contended(String),
}

/// See the module. All methods may be called concurrently; what [`Store::commit`] acknowledged is
/// seen by every later call and survives a crash.
pub trait Store: Send + Sync + 'static {
    /// One key.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>>;

    /// All keys under each of the prefixes, read at one moment.
    fn list<'a>(&'a self, prefixes: &'a [&'a str]) -> BoxFuture<'a, Result<Listing, StoreError>>;

    /// At most `limit` keys under the prefix that come after `after`, for what is too long to be
    /// listed at once.
    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Listing, StoreError>>;

    /// Applies the transaction if its expectations hold; durable before it returns. Transactions that
    /// wait at once are made durable together, so many at once cost little more than one.
    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Outcome, StoreError>>;

    /// Commits after `from`.
    ///
    /// # Errors
    /// [`WatchError::Behind`] when that is further back than the store remembers.
    fn watch(&self, from: Revision) -> Result<Watch, WatchError>;

    /// A lease: keys written under it are deleted (by a commit that watchers see) once it was not
    /// kept alive for `ttl`. Survives a restart, which counts as keeping alive: time during which
    /// nobody could keep it alive is not held against the holder.
    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>>;

    /// Starts the lease's time again.
    ///
    /// # Errors
    /// [`StoreError::NoLease`] when it has ended.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Ends the lease now.
    fn revoke_lease(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;
}
