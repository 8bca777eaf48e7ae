//! What operators did, in a ring: the latest are kept.
//!
//! An entry is written in the same transaction as what it tells of, and every such transaction expects
//! the sequence to be where it was when the decision was made: what operators do happens one after the
//! other, and a check over several records (do the quotas still add up?) holds when it is committed.

use lathe_api::scheduling::AuditEntry;

use crate::clock::now_ms;
use crate::records::{AUDIT, AUDIT_SEQUENCE, load_all, of_prefix, put};
use crate::store::{Listing, Store, StoreError, Transaction};

/// Entries kept. At 300 bytes each a bit more than a megabyte.
pub const KEPT: u64 = 4096;

/// Adds an entry to the transaction, which was prepared from `listing`, in which [`AUDIT_SEQUENCE`] was
/// listed too.
///
/// # Errors
/// When the sequence does not decode.
pub fn append(
    transaction: &mut Transaction,
    listing: &Listing,
    who: &str,
    action: &str,
    subject: &str,
    detail: String,
) -> Result<(), StoreError> {
    let last = of_prefix::<u64>(&listing.entries, AUDIT_SEQUENCE).next().transpose()?;
    let sequence = last.as_ref().map_or(0, |(_, last)| last.value) + 1;
    let entry = AuditEntry {
        sequence,
        time_ms: now_ms(),
        who: who.to_owned(),
        action: action.to_owned(),
        subject: subject.to_owned(),
        detail,
    };
    transaction.expect.push((AUDIT_SEQUENCE.to_owned(), last.map(|(_, last)| last.revision)));
    transaction.writes.push(put(AUDIT_SEQUENCE, &sequence)?);
    transaction.writes.push(put(format!("{AUDIT}{:04}", sequence % KEPT), &entry)?);
    Ok(())
}

/// What is kept, oldest first.
///
/// # Errors
/// When the store fails or an entry does not decode.
pub async fn entries(store: &dyn Store) -> Result<Vec<AuditEntry>, StoreError> {
    let records = load_all::<AuditEntry>(store, AUDIT).await?;
    let mut entries: Vec<_> = records.into_iter().map(|(_, record)| record.value).collect();
    entries.sort_by_key(|entry| entry.sequence);
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Outcome;
    use crate::store::redb::RedbStore;

    #[tokio::test(flavor = "multi_thread")]
    async fn the_ring_keeps_the_latest_and_only_one_of_two_at_once_gets_in() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = RedbStore::open(&dir.path().join("s")).expect("a store");
        // As if so many had been before: the slot of the next one is in use.
        let before = KEPT + 2;
        let old = AuditEntry {
            sequence: 3,
            time_ms: 1,
            who: "a".into(),
            action: "x".into(),
            subject: "y".into(),
            detail: String::new(),
        };
        let writes =
            vec![put(AUDIT_SEQUENCE, &before).expect("put"), put(format!("{AUDIT}0003"), &old).expect("put")];
        let _ = store.commit(Transaction { expect: vec![], writes }).await.expect("works");

        let listing = store.list(&[AUDIT_SEQUENCE]).await.expect("works");
        let prepare = |subject: &str| {
            let mut transaction = Transaction::default();
            append(&mut transaction, &listing, "b", "pool set", subject, "d".into()).expect("it decodes");
            transaction
        };
        let (one, two) = (prepare("one"), prepare("two"));
        assert!(matches!(store.commit(one).await.expect("works"), Outcome::Committed(_)));
        assert!(matches!(store.commit(two).await.expect("works"), Outcome::Conflict { .. }));
        let entries = entries(&store).await.expect("works");
        assert_eq!(entries.len(), 1, "the old one's slot was used again");
        assert_eq!((entries[0].sequence, entries[0].subject.as_str()), (before + 1, "one"));
    }
}
