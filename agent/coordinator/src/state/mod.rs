//! The store's records, decoded and in memory: a cache of the store that can be made anew at any
//! time, so that nobody lists and decodes everything to learn what one commit changed.
//!
//! - [`contents`]: the records, and how a commit changes them.
//! - [`topics`]: who waits for what.
//!
//! [`View`] follows the store's watch, commit by commit, so what it holds is what the store held at
//! [`Contents::revision`]. Whoever writes on the ground of it compares and swaps with the revisions it
//! holds: a view that is behind costs a second try and never a wrong write. A view that fell too far
//! behind lists again.

pub mod contents;
#[cfg(test)]
mod tests;
mod topics;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, watch};

pub use contents::{Contents, Touched};
use topics::Topics;

use crate::store::{Revision, Store, StoreError, WatchError};

/// See the module. Shared by handlers and the reconciler.
#[derive(Debug, Default)]
pub struct View {
    contents: RwLock<Contents>,
    revision: watch::Sender<Revision>,
    topics: Topics,
    unseen: Mutex<Unseen>,
    news: Notify,
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
        self.revision.send_replace(revision);
        self.topics.tell_all();
        self.news.notify_one();
        Ok(revision)
    }

    /// Follows the store until it is closed; the view must have been loaded from it.
    pub async fn follow(&self, store: Arc<dyn Store>) {
        loop {
            let from = *self.revision.borrow();
            if let Ok(mut watch) = store.watch(from) {
                loop {
                    match watch.next().await {
                        Ok(event) => self.apply(&event),
                        Err(WatchError::Behind) => break,
                        Err(WatchError::Closed) => return,
                    }
                }
            }
            while let Err(error) = self.list(&*store).await {
                tracing::error!(%error, "cannot read the store");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    fn apply(&self, event: &crate::store::Event) {
        let touched = self.contents.write().unwrap_or_else(PoisonError::into_inner).apply(event);
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
        self.revision.send_replace(event.revision);
        if news {
            self.news.notify_one();
        }
    }

    /// Looks at the records. Writers wait meanwhile: keep it short, and never across an await.
    pub fn read<T>(&self, look: impl FnOnce(&Contents) -> T) -> T {
        look(&self.contents.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns once the view is at a commit or past it.
    pub async fn reached(&self, revision: Revision) {
        let mut at = self.revision.subscribe();
        // The sender lives as long as this view.
        let _ = at.wait_for(|at| *at >= revision).await;
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

    fn unseen(&self) -> std::sync::MutexGuard<'_, Unseen> {
        // Whole whatever panicked while holding it: every change is a single step.
        self.unseen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
