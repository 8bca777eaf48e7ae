//! The store's records, decoded and in memory: a cache of the store that can be made anew at any
//! time, so that nobody lists and decodes everything to learn what one commit changed.
//!
//! - [`contents`]: the records, and how a commit changes them. [`changes`]: what changed of a set lately.
//! - [`topics`]: who waits for what.
//!
//! [`View`] follows the store's watch, commit by commit, so what it holds is what the store held at
//! [`Contents::revision`]. Whoever writes on the ground of it compares and swaps with the revisions it
//! holds: a view that is behind costs a second try and never a wrong write. A view that fell too far
//! behind lists again.

pub mod changes;
pub mod contents;
#[cfg(test)]
mod tests;
mod topics;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::{Notify, oneshot, watch};

pub use contents::{Contents, Touched};
use topics::Topics;

use crate::store::{Event, Revision, Store, StoreError, Watch, WatchError};

/// Commits that are taken in together at most: whoever looks at the records waits meanwhile.
const TOGETHER: usize = 256;

/// See the module. Shared by handlers and the reconciler.
#[derive(Debug, Default)]
pub struct View {
    contents: RwLock<Contents>,
    reached: Mutex<Reached>,
    topics: Topics,
    unseen: Mutex<Unseen>,
    news: Notify,
}

/// How far the view is, and who waits until it is further.
#[derive(Debug, Default)]
struct Reached {
    revision: Revision,
    /// By the commit that they wait for: each is woken once, however many commits come before.
    waiting: BTreeMap<Revision, Vec<oneshot::Sender<()>>>,
}

/// What changed since the reconciler last asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Everything may have changed.
    pub all: bool,
    /// Nodes of which a record changed.
    pub nodes: BTreeSet<String>,
    /// Jobs of which the record changed.
    pub jobs: BTreeSet<String>,
    /// Pools or tenants.
    pub settings: bool,
}

impl Unseen {
    /// Whether nothing did.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl View {
    /// What the store holds now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let view = Self::default();
        view.list(store).await?;
        Ok(view)
    }

    /// Reads everything again; the moment it was read.
    async fn list(&self, store: &dyn Store) -> Result<Revision, StoreError> {
        let listing = store.list(&contents::PREFIXES).await?;
        let revision = listing.revision;
        let contents = Contents::of(&listing);
        *self.contents.write().unwrap_or_else(PoisonError::into_inner) = contents;
        self.unseen().all = true;
        self.arrive(revision);
        self.topics.tell_all();
        self.news.notify_one();
        Ok(revision)
    }

    /// Follows the store until it is closed; the view must have been loaded from it.
    pub async fn follow(&self, store: Arc<dyn Store>) {
        loop {
            let from = self.lock_reached().revision;
            if let Ok(mut watch) = store.watch(from) {
                match self.follow_watch(&mut watch).await {
                    WatchError::Behind => {}
                    WatchError::Closed => return,
                }
            }
            while let Err(error) = self.list(&*store).await {
                tracing::error!(%error, "cannot read the store");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    async fn follow_watch(&self, watch: &mut Watch) -> WatchError {
        loop {
            let mut next = Some(watch.next().await);
            // What was made durable together is taken in together.
            let mut events = Vec::new();
            while let Some(Ok(event)) = next {
                events.push(event);
                next = if events.len() < TOGETHER { watch.try_next() } else { None };
            }
            self.apply(&events);
            if let Some(Err(error)) = next {
                return error;
            }
        }
    }

    fn apply(&self, events: &[Arc<Event>]) {
        let Some(last) = events.last() else { return };
        let mut touched = Touched::default();
        {
            let mut contents = self.contents.write().unwrap_or_else(PoisonError::into_inner);
            events.iter().for_each(|event| touched.extend(contents.apply(event)));
        }
        let Touched { nodes, jobs, desired, settings, services } = touched;
        let news = !nodes.is_empty() || !jobs.is_empty() || settings || services;
        desired.iter().for_each(|node| self.topics.tell(topics::Topic::Desired(node)));
        if services {
            self.topics.tell_nodes();
        }
        jobs.iter().for_each(|job| self.topics.tell(topics::Topic::Job(job)));
        {
            let mut unseen = self.unseen();
            unseen.nodes.extend(nodes);
            unseen.jobs.extend(jobs);
            unseen.settings |= settings;
        }
        self.arrive(last.revision);
        if news {
            self.news.notify_one();
        }
    }

    /// The view is at this commit now.
    fn arrive(&self, revision: Revision) {
        let mut reached = self.lock_reached();
        reached.revision = revision;
        let later = reached.waiting.split_off(&(revision + 1));
        let arrived = std::mem::replace(&mut reached.waiting, later);
        drop(reached);
        // Whoever does not wait any more has no use for it.
        for waiting in arrived.into_values().flatten() {
            let _ = waiting.send(());
        }
    }

    fn lock_reached(&self) -> MutexGuard<'_, Reached> {
        // Whole whatever panicked while holding it: every change is a single step.
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the records. Writers wait meanwhile: keep it short, and never across an await.
    pub fn read<T>(&self, look: impl FnOnce(&Contents) -> T) -> T {
        look(&self.contents.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns once the view is at a commit or past it.
    pub async fn reached(&self, revision: Revision) {
        let arrived = {
            let mut reached = self.lock_reached();
            if reached.revision >= revision {
                return;
            }
            let (sender, arrived) = oneshot::channel();
            reached.waiting.entry(revision).or_default().push(sender);
            arrived
        };
        // The sender is dropped unused only with this view.
        let _ = arrived.await;
    }

    /// Returns once the view holds all that the store does now: after a lost race.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn catch_up(&self, store: &dyn Store) -> Result<(), StoreError> {
        let revision = store.list(&[]).await?.revision;
        self.reached(revision).await;
        Ok(())
    }

    /// Wakes when what a node is told may have changed.
    pub fn watch_desired(&self, node: &str) -> watch::Receiver<()> {
        self.topics.subscribe(topics::Topic::Desired(node))
    }

    /// Wakes when a job's record, or the reason why it waits, may have changed.
    pub fn watch_job(&self, job: &str) -> watch::Receiver<()> {
        self.topics.subscribe(topics::Topic::Job(job))
    }

    /// The reasons why jobs wait may all have changed.
    pub fn reasons_changed(&self) {
        self.topics.tell_jobs();
    }

    /// What is known of a node beside its records changed.
    pub fn touch(&self, node: &str) {
        self.unseen().nodes.insert(node.to_owned());
        self.news.notify_one();
    }

    /// What changed since this was last called, for the reconciler alone.
    pub fn take_unseen(&self) -> Unseen {
        std::mem::take(&mut *self.unseen())
    }

    /// These are to be looked at again.
    pub fn unsee(&self, again: Unseen) {
        let mut unseen = self.unseen();
        unseen.all |= again.all;
        unseen.nodes.extend(again.nodes);
        unseen.jobs.extend(again.jobs);
        unseen.settings |= again.settings;
        drop(unseen);
        self.news.notify_one();
    }

    /// Everything is to be looked at again.
    pub fn forget_seen(&self) {
        self.unseen().all = true;
    }

    /// Returns when something changed that [`Self::take_unseen`] will tell.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    fn unseen(&self) -> MutexGuard<'_, Unseen> {
        // Whole whatever panicked while holding it: every change is a single step.
        self.unseen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
