//! Numbers of jobs, in the order of their submission.
//!
//! Submissions would all compare and swap one counter, and lose to each other. So numbers are taken
//! from the store a block at a time and given out from memory: a job that was acknowledged before
//! another one came has the lower number. What is left of a block when the coordinator ends is lost.

use tokio::sync::Mutex;

use crate::records::{JOB_SEQUENCE, load, put};
use crate::store::{Outcome, Store, StoreError, Transaction};

/// Numbers taken at once.
const BLOCK: u64 = 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Sequence(Mutex<Block>);

#[derive(Debug, Default)]
struct Block {
    last: u64,
    end: u64,
}

impl Sequence {
    /// The next number, above all that were given, over restarts too.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn next(&self, store: &dyn Store) -> Result<u64, StoreError> {
        let mut block = self.0.lock().await;
        while block.last == block.end {
            let known = load::<u64>(store, JOB_SEQUENCE).await?;
            let from = known.as_ref().map_or(0, |known| known.value);
            let transaction = Transaction {
                expect: vec![(JOB_SEQUENCE.to_owned(), known.map(|known| known.revision))],
                writes: vec![put(JOB_SEQUENCE, &(from + BLOCK))?],
            };
            if let Outcome::Committed(_) = store.commit(transaction).await? {
                *block = Block { last: from, end: from + BLOCK };
            }
        }
        block.last += 1;
        Ok(block.last)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::redb::RedbStore;

    #[tokio::test(flavor = "multi_thread")]
    async fn numbers_only_rise_over_restarts_and_none_is_given_twice() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Arc::new(RedbStore::open(&dir.path().join("store.redb")).expect("a new store"));
        let mut given = Vec::new();
        for _ in 0..2 {
            let sequence = Arc::new(Sequence::default());
            let take = |sequence: Arc<Sequence>, store: Arc<RedbStore>| async move {
                let mut own = Vec::new();
                for _ in 0..300 {
                    own.push(sequence.next(&*store).await.expect("works"));
                }
                own
            };
            let before = given.iter().copied().max().unwrap_or(0);
            let tasks: Vec<_> =
                (0..4).map(|_| tokio::spawn(take(Arc::clone(&sequence), Arc::clone(&store)))).collect();
            for task in tasks {
                let own = task.await.expect("no panic");
                assert!(own.windows(2).all(|pair| pair[0] < pair[1]) && own[0] > before);
                given.extend(own);
            }
        }
        let count = given.len();
        given.sort_unstable();
        given.dedup();
        assert_eq!(given.len(), count);
    }
}
