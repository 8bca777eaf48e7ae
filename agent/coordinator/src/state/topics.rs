//! Who waits for what: a thousand agents that each wait for their own node must not all wake for
//! each commit.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic<'a> {
    /// What a node is told.
    Desired(&'a str),
    /// A job.
    Job(&'a str),
}

/// Those who wait, by topic.
#[derive(Debug, Default)]
pub struct Topics {
    desired: Mutex<HashMap<String, watch::Sender<()>>>,
    jobs: Mutex<HashMap<String, watch::Sender<()>>>,
}

impl Topics {
    fn of(&self, topic: Topic<'_>) -> MutexGuard<'_, HashMap<String, watch::Sender<()>>> {
        let map = match topic {
            Topic::Desired(_) => &self.desired,
            Topic::Job(_) => &self.jobs,
        };
        map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on.
    pub fn subscribe(&self, topic: Topic<'_>) -> watch::Receiver<()> {
        let (Topic::Desired(name) | Topic::Job(name)) = topic;
        self.of(topic).entry(name.to_owned()).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    /// Wakes those who wait for it; forgets the topic if nobody does.
    pub fn tell(&self, topic: Topic<'_>) {
        let (Topic::Desired(name) | Topic::Job(name)) = topic;
        let mut map = self.of(topic);
        if map.get(name).is_some_and(|sender| sender.send(()).is_err()) {
            map.remove(name);
        }
    }

    /// Wakes all who wait for jobs.
    pub fn tell_jobs(&self) {
        self.of(Topic::Job("")).retain(|_, sender| sender.send(()).is_ok());
    }

    /// Wakes all who wait for what nodes are told.
    pub fn tell_nodes(&self) {
        self.of(Topic::Desired("")).retain(|_, sender| sender.send(()).is_ok());
    }

    /// Wakes all.
    pub fn tell_all(&self) {
        self.tell_jobs();
        self.tell_nodes();
    }
}
