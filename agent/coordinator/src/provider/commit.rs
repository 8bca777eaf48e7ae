//! Changes of fleets in the store: each with what it means for nodes, in one transaction that expects
//! all that it was decided from, and with its entry in the audit log where it is a decision.

use std::collections::BTreeMap;

use lathe_api::node::NodeOffer;
use lathe_api::pool::Pool;
use lathe_api::provider::{NodeShape, PROVIDED_LABEL, PoolProvider, ProvidedState};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::fleet::{Fault, Fleet};
use super::{Judgement, one_line};
use crate::audit;
use crate::coordinator::Coordinator;
use crate::records::{
    ALIVE, ALLOCATIONS, AUDIT_SEQUENCE, Allocations, FLEETS, NODES, NodeRecord, OPERATIONS, Operations,
    POOLS, Versioned, decode, of_prefix, put,
};
use crate::store::{Listing, Outcome, StoreError, Transaction, Write};

/// How often a change is tried again when others change the same.
const ATTEMPTS: usize = 16;
/// Longest entry in the audit log, characters.
const MAX_DETAIL_CHARS: usize = 500;

/// A change that is being prepared.
pub struct Draft {
    listing: Listing,
    /// The pool, as it is set now; none if there is none.
    pub pool: Option<Pool>,
    /// The pool's fleet, to be changed.
    pub fleet: Fleet,
    /// Other pools' fleets.
    pub others: BTreeMap<String, Fleet>,
    transaction: Transaction,
    told: Option<(&'static str, String)>,
}

impl Draft {
    /// What the pool says of its provider, if that is the one that the fleet is of.
    pub fn provider(&self) -> Option<&PoolProvider> {
        let provider = self.pool.as_ref()?.provider.as_ref()?;
        (provider.name == self.fleet.provider).then_some(provider)
    }

    /// A record of those that were read, which must not change until the commit.
    pub fn get<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, StoreError> {
        let entry = self.listing.entries.iter().find(|entry| entry.key == key);
        self.transaction.expect.push((key.to_owned(), entry.map(|entry| entry.revision)));
        let found = entry.map(|entry| decode(key, &entry.value, entry.revision)).transpose()?;
        Ok(found.map(|found: Versioned<T>| found.value))
    }

    /// Writes a record; it should have been looked at.
    pub fn put(&mut self, key: String, record: &impl Serialize) -> Result<(), StoreError> {
        self.transaction.writes.push(put(key, record)?);
        Ok(())
    }

    fn delete(&mut self, key: String) {
        self.transaction.writes.push(Write::Delete { key });
    }

    /// What the audit log is to say; once.
    pub fn tell(&mut self, action: &'static str, detail: impl AsRef<str>) {
        self.told = Some((action, one_line(detail.as_ref(), MAX_DETAIL_CHARS)));
    }

    /// The provider gave no answer: said in the audit log when it did before, or for another reason.
    pub fn fail(&mut self, fault: Fault, reason: &str, now_ms: u64) {
        if self.fleet.failure.as_ref().is_none_or(|before| before.reason != reason) {
            self.tell("provider fail", reason);
        }
        self.fleet.fail(fault, reason.to_owned(), now_ms);
    }
}

/// Keys of what is known of nodes, to be read for a draft.
pub fn keys_of<'a>(nodes: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let prefixes = [NODES, OPERATIONS, ALLOCATIONS];
    nodes.into_iter().flat_map(|name| prefixes.map(|prefix| format!("{prefix}{name}"))).collect()
}

/// Prepares a change from what the store holds until one is committed. What `prepare` says comes back;
/// nothing is written where it says none.
pub async fn change<T>(
    coordinator: &Coordinator,
    pool: &str,
    keys: &[String],
    prepare: impl Fn(&mut Draft) -> Result<Option<T>, StoreError>,
) -> Result<Option<T>, StoreError> {
    let fleet_key = format!("{FLEETS}{pool}");
    let pool_key = format!("{POOLS}{pool}");
    for _ in 0..ATTEMPTS {
        let mut listing = coordinator.store.list(&[AUDIT_SEQUENCE, FLEETS, &pool_key]).await?;
        for key in keys {
            // Later than the rest, which does no harm: each is expected as it was read.
            listing.entries.extend(coordinator.store.get(key).await?);
        }
        let mut draft = draft(listing, pool)?;
        let before = draft.get::<Fleet>(&fleet_key)?;
        let Some(done) = prepare(&mut draft)? else { return Ok(None) };
        if before.as_ref() != Some(&draft.fleet) {
            let fleet = draft.fleet.clone();
            draft.put(fleet_key.clone(), &fleet)?;
        }
        let Draft { listing, fleet, mut transaction, told, .. } = draft;
        if transaction.writes.is_empty() {
            return Ok(Some(done));
        }
        if let Some((action, detail)) = &told {
            let who = format!("provider:{}", fleet.provider);
            audit::append(&mut transaction, &listing, &who, action, pool, detail.clone())?;
        }
        if let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? {
            coordinator.view.reached(revision).await;
            if let Some((action, detail)) = told {
                tracing::info!(pool, provider = fleet.provider, detail, "{action}");
            }
            return Ok(Some(done));
        }
    }
    Err(StoreError::Contended(fleet_key))
}

fn draft(listing: Listing, pool: &str) -> Result<Draft, StoreError> {
    let mut others: BTreeMap<String, Fleet> = of_prefix::<Fleet>(&listing.entries, FLEETS)
        .map(|record| record.map(|(name, record)| (name, record.value)))
        .collect::<Result<_, _>>()?;
    let set = of_prefix::<Pool>(&listing.entries, POOLS)
        // A pool's name may begin another's.
        .filter_map(|record| record.map(|(name, set)| (name == pool).then_some(set.value)).transpose())
        .next()
        .transpose()?;
    let provider = set.as_ref().and_then(|set| set.provider.as_ref()).map(|provider| provider.name.as_str());
    let mut fleet = others.remove(pool).unwrap_or_default();
    if fleet.is_empty() && fleet.provider != provider.unwrap_or_default() {
        fleet = Fleet::of(provider.unwrap_or_default());
    }
    Ok(Draft { listing, pool: set, fleet, others, transaction: Transaction::default(), told: None })
}

/// Takes a node that the provider named into the fleet, with the labels and taints of its shape; says
/// why not if it is not the provider's.
pub fn adopt(
    draft: &mut Draft,
    name: &str,
    request: &str,
    pool: &str,
    shape: &NodeShape,
    now_ms: u64,
) -> Result<Judgement, StoreError> {
    if draft.fleet.nodes.contains_key(name) {
        return Ok(Judgement::Known);
    }
    if let Some((other, _)) = draft.others.iter().find(|(_, fleet)| fleet.nodes.contains_key(name)) {
        return Ok(Judgement::Foreign(format!("node {name} is one of pool {other}'s")));
    }
    if let Some(node) = draft.get::<NodeRecord>(&format!("{NODES}{name}"))? {
        // One that joined before it was asked for is somebody else's, whatever the provider says: it would
        // be given back.
        let requested = draft.fleet.requested_ms(request);
        if requested.is_none_or(|at_ms| node.joined_ms < at_ms) {
            return Ok(Judgement::Foreign(format!("node {name} was there before it was asked for")));
        }
    }
    let key = format!("{OPERATIONS}{name}");
    let mut operations = draft.get::<Operations>(&key)?.unwrap_or_default();
    operations.labels.extend(shape.labels.clone());
    operations.labels.insert(PROVIDED_LABEL.to_owned(), pool.to_owned());
    for taint in &shape.taints {
        operations.taints.retain(|known| known.key != taint.key);
        operations.taints.push(taint.clone());
    }
    operations.taints.sort_unstable();
    draft.put(key, &operations)?;
    draft.fleet.add(name, request, now_ms);
    Ok(Judgement::New)
}

/// What a closed node says of itself.
pub fn closing(provider: &str) -> NodeOffer {
    NodeOffer::Cordoned(format!("to be given back to provider {provider}"))
}

/// Closes a node, or keeps it closed while it is given back; false if something was placed there meanwhile, and nothing is changed then. What is
/// placed at the same time finds another record than it expects, or this does.
pub fn close(draft: &mut Draft, name: &str, state: ProvidedState, now_ms: u64) -> Result<bool, StoreError> {
    if !is_empty(draft, name)? || !draft.fleet.nodes.contains_key(name) {
        return Ok(false);
    }
    let key = format!("{OPERATIONS}{name}");
    let mut operations = draft.get::<Operations>(&key)?.unwrap_or_default();
    let closed = closing(&draft.fleet.provider);
    if operations.offer != closed {
        operations.offer = closed;
        draft.put(key, &operations)?;
    }
    draft.fleet.set(name, state, now_ms);
    Ok(true)
}

/// Opens a closed node again.
pub fn reopen(draft: &mut Draft, name: &str, now_ms: u64) -> Result<(), StoreError> {
    let key = format!("{OPERATIONS}{name}");
    if let Some(mut operations) = draft.get::<Operations>(&key)?
        && operations.offer == closing(&draft.fleet.provider)
    {
        operations.offer = NodeOffer::Open;
        draft.put(key, &operations)?;
    }
    draft.fleet.set(name, ProvidedState::Joined, now_ms);
    Ok(())
}

/// Whether nothing is, or is to be, on a node.
pub fn is_empty(draft: &mut Draft, name: &str) -> Result<bool, StoreError> {
    let allocations = draft.get::<Allocations>(&format!("{ALLOCATIONS}{name}"))?;
    Ok(allocations.is_none_or(|of| of.sandboxes.is_empty()))
}

/// Forgets a node that is gone: all its records. False if something is there, and nothing is changed.
pub fn remove(draft: &mut Draft, name: &str) -> Result<bool, StoreError> {
    if !is_empty(draft, name)? {
        return Ok(false);
    }
    for prefix in [NODES, ALIVE, ALLOCATIONS, OPERATIONS] {
        draft.delete(format!("{prefix}{name}"));
    }
    draft.fleet.nodes.remove(name);
    Ok(true)
}
