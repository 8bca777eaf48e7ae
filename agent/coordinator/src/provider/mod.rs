//! Nodes on demand: pools whose jobs wait ask a provider for nodes, and give back those that nobody needs.
//!
//! A provider is a program of the operator's. Callers of the API name it and never say what it is.
//!
//! - [`registry`]: which programs there are. [`check`]: whether what a pool says of its provider makes
//!   sense.
//! - [`contract`]: what a program is told and answers. [`command`]: running it.
//! - [`fleet`]: what a pool's provider was asked for and made: the record in the store.
//! - [`need`]: how many nodes would help, by the planner itself. [`decide`]: what is done next.
//! - [`commit`]: the changes in the store. `steps`: each step, from its record to its answer.
//! - `turn`: one pool's turn: what is known, what is decided. [`status`]: what people are told.
//!
//! Level-triggered like the reconciler: a turn takes nothing but what is stored, what the nodes report
//! and what the provider answers, and does one step. What it keeps in memory ([`turn::Memory`]) only
//! makes a provider be asked less often, and nodes be given back later after a restart. A request that
//! was not answered for sure is made again under its name; what a provider has beyond what is stored is
//! found when it lists it: at the start, after every failure, and from time to time.

pub mod check;
pub mod command;
pub mod commit;
pub mod contract;
pub mod decide;
pub mod fleet;
pub mod need;
pub mod registry;
pub mod status;
mod steps;
mod turn;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::coordinator::Coordinator;
use turn::Memory;

/// A pool has its turn at least this often.
const INTERVAL: Duration = Duration::from_secs(1);
/// No oftener than this, although much changes.
const PAUSE: Duration = Duration::from_millis(20);

/// What is known of a node that a provider names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is in the fleet.
    Known,
    /// It is in the fleet from now on.
    New,
    /// It is somebody else's; why, one line.
    Foreign(String),
}

/// The jobs that nodes of each pool's provider would help, as the planner said last: for people.
#[derive(Debug, Default)]
pub struct Helped(Mutex<HashMap<String, Arc<BTreeSet<String>>>>);

impl Helped {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<BTreeSet<String>>>> {
        // Whole whatever panicked while holding it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, pool: &str, jobs: BTreeSet<String>) {
        self.all().insert(pool.to_owned(), Arc::new(jobs));
    }

    /// Whether the planner was asked since this process started, and what it said of a job.
    pub fn of(&self, pool: &str, job: &str) -> Option<bool> {
        self.all().get(pool).map(|jobs| jobs.contains(job))
    }
}

/// Gives every pool that has a provider its turns, until the coordinator shuts down.
pub async fn run(coordinator: Arc<Coordinator>) {
    let mut serving: HashMap<String, JoinHandle<()>> = HashMap::new();
    loop {
        // One that panicked begins anew with what is stored.
        serving.retain(|_, pool| !pool.is_finished());
        let pools: Vec<String> = coordinator.view.read(|contents| {
            let with = contents.pools.iter().filter(|(_, pool)| pool.value.provider.is_some());
            with.map(|(name, _)| name.clone()).collect()
        });
        for name in pools {
            let start = || tokio::spawn(serve(Arc::clone(&coordinator), name.clone()));
            serving.entry(name.clone()).or_insert_with(start);
        }
        tokio::select! {
            () = coordinator.shutdown.cancelled() => break,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
    // Their programs are killed.
    for (_, pool) in serving {
        let _ = pool.await;
    }
}

/// Gives one pool its turns, one at a time, as long as it has a provider.
async fn serve(coordinator: Arc<Coordinator>, name: String) {
    let mut memory = Memory::new();
    loop {
        let pool = coordinator.view.read(|contents| contents.pools.get(&name).map(|pool| pool.value.clone()));
        let Some(pool) = pool.filter(|pool| pool.provider.is_some()) else { return };
        let did = turn::turn(&coordinator, &pool, &mut memory).await.unwrap_or_else(|error| {
            tracing::error!(pool = name, %error, "a turn of a pool's provider failed; the next one tries again");
            false
        });
        // Where something was done there may be more to do.
        tokio::select! {
            () = coordinator.shutdown.cancelled() => return,
            () = tokio::time::sleep(if did { PAUSE } else { INTERVAL }) => {}
        }
    }
}

/// A text of somebody else's, in one line of bounded length.
pub fn one_line(text: &str, most: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect()
}
