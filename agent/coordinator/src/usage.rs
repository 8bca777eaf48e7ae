//! What tenants had, kept over restarts: fair shares go by it.
//!
//! It changes with every round and is worth little each time, so it is one record that is written every
//! [`INTERVAL_MS`] and when the coordinator is told to stop. A crash forgets no more than that. What ran
//! while no coordinator did is not counted.

use std::collections::BTreeMap;

use lathe_scheduler::planner::{TenantUsage, Usage};
use lathe_scheduler::queue::fair::Fractions;
use serde::{Deserialize, Serialize};

use crate::records::{USAGE, Versioned, load, put};
use crate::store::{Outcome, Revision, Store, StoreError, Transaction};

/// How often it is written, milliseconds.
const INTERVAL_MS: u64 = 30_000;

/// What tenants had of pools, at a time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UsageRecord {
    /// That time, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// By pool, then tenant: parts of the pool's CPUs, memory and GPUs, on average over time that fades.
    pub pools: BTreeMap<String, BTreeMap<String, [f64; 3]>>,
}

impl UsageRecord {
    fn of(usage: Usage) -> Self {
        let mut pools: BTreeMap<String, BTreeMap<String, [f64; 3]>> = BTreeMap::new();
        for TenantUsage { pool, tenant, had } in usage.had {
            pools.entry(pool).or_default().insert(tenant, had.0);
        }
        Self { at_ms: usage.at_ms, pools }
    }

    fn usage(self) -> Usage {
        let had = self.pools.into_iter().flat_map(|(pool, tenants)| {
            tenants.into_iter().map(move |(tenant, had)| TenantUsage {
                pool: pool.clone(),
                tenant,
                had: Fractions(had),
            })
        });
        Usage { at_ms: self.at_ms, had: had.collect() }
    }
}

/// The record, and when it was written last.
#[derive(Debug, Default)]
pub struct Kept {
    revision: Option<Revision>,
    written_ms: u64,
    empty: bool,
}

impl Kept {
    /// What was kept, after a start.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn load(store: &dyn Store, now_ms: u64) -> Result<(Self, Usage), StoreError> {
        let found: Option<Versioned<UsageRecord>> = load(store, USAGE).await?;
        let kept = Self {
            revision: found.as_ref().map(|found| found.revision),
            written_ms: now_ms,
            empty: found.as_ref().is_none_or(|found| found.value.pools.is_empty()),
        };
        Ok((kept, found.map(|found| found.value.usage()).unwrap_or_default()))
    }

    /// Whether it is time to write it again.
    pub fn is_due(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.written_ms) >= INTERVAL_MS
    }

    /// Writes it, unless nobody had anything and nobody has.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn save(&mut self, store: &dyn Store, usage: Usage, now_ms: u64) -> Result<(), StoreError> {
        self.written_ms = now_ms;
        if self.empty && usage.had.is_empty() {
            return Ok(());
        }
        let record = UsageRecord::of(usage);
        let transaction = Transaction {
            expect: vec![(USAGE.to_owned(), self.revision)],
            writes: vec![put(USAGE, &record)?],
        };
        match store.commit(transaction).await? {
            Outcome::Committed(revision) => {
                self.revision = Some(revision);
                self.empty = record.pools.is_empty();
            }
            // Another coordinator's: the next time goes on from there.
            Outcome::Conflict { .. } => {
                self.revision = load::<UsageRecord>(store, USAGE).await?.map(|found| found.revision);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::redb::RedbStore;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_kept_is_what_was_had_and_nothing_is_written_for_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = RedbStore::open(&dir.path().join("s")).expect("a store");
        let (mut kept, none) = Kept::load(&store, 5).await.expect("works");
        assert_eq!(none, Usage::default());
        assert!(!kept.is_due(5 + INTERVAL_MS - 1) && kept.is_due(5 + INTERVAL_MS));
        kept.save(&store, none, 6).await.expect("works");
        assert!(store.get(USAGE).await.expect("works").is_none());

        let one = |pool: &str, tenant: &str, part| TenantUsage {
            pool: pool.to_owned(),
            tenant: tenant.to_owned(),
            had: Fractions([part, 0.0, 1.0 / 3.0]),
        };
        let usage = Usage { at_ms: 7, had: vec![one("a", "red", 0.1), one("b", "blue", 0.2)] };
        for _ in 0..2 {
            kept.save(&store, usage.clone(), 8).await.expect("works");
        }
        let (mut again, found) = Kept::load(&store, 9).await.expect("works");
        assert_eq!(found, usage);
        // What has faded is written once more.
        again.save(&store, Usage { at_ms: 10, had: Vec::new() }, 10).await.expect("works");
        assert_eq!(Kept::load(&store, 11).await.expect("works").1.had, []);
    }
}
