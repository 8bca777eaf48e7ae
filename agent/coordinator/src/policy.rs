//! Pools and tenants as they were set. How the planner sees them is in
//! [`crate::reconcile::model::settings`].

use std::collections::BTreeMap;

use lathe_api::pool::{DEFAULT_POOL, Pool, Tenant};

use crate::reconcile::model::settings::constraint;
use crate::records::{POOLS, TENANTS, of_prefix};
use crate::store::{Entry, StoreError};

/// Pools by name, the default one included.
pub type Pools = BTreeMap<String, Pool>;
/// Tenants that were set, by name.
pub type Tenants = BTreeMap<String, Tenant>;

/// All pools of a listing, with the default one if nobody has set it.
///
/// # Errors
/// When a record does not decode.
pub fn pools(entries: &[Entry]) -> Result<Pools, StoreError> {
    let mut pools: Pools = of_prefix::<Pool>(entries, POOLS)
        .map(|record| record.map(|(name, record)| (name, record.value)))
        .collect::<Result<_, _>>()?;
    pools.entry(DEFAULT_POOL.to_owned()).or_insert_with(|| Pool::named(DEFAULT_POOL));
    Ok(pools)
}

/// All tenants of a listing that were set.
///
/// # Errors
/// When a record does not decode.
pub fn tenants(entries: &[Entry]) -> Result<Tenants, StoreError> {
    of_prefix::<Tenant>(entries, TENANTS)
        .map(|record| record.map(|(name, record)| (name, record.value)))
        .collect()
}

/// Whether a pool has a node of this name and these labels: its own selector and its parents' admit it.
pub fn has_node(pools: &Pools, pool: &Pool, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let mut next = Some(pool);
    // Parents form no cycle: none that does is stored. The bound is for stores that somebody edited.
    for _ in 0..=pools.len() {
        let Some(one) = next else { return true };
        if !one.selector.iter().all(|selector| constraint(selector).holds(name, labels)) {
            return false;
        }
        next = one.parent.as_ref().and_then(|parent| pools.get(parent));
    }
    false
}

#[cfg(test)]
mod tests {
    use lathe_api::pool::Queue;

    use super::*;

    #[test]
    fn the_default_pool_is_there_unless_it_was_set() {
        let none = pools(&[]).expect("nothing to decode");
        assert_eq!(none, Pools::from([("default".to_owned(), Pool::named("default"))]));
        let value = br#"{"name":"default","queue":"fair_share"}"#.to_vec();
        let entry = Entry { key: "pools/default".to_owned(), value, revision: 1 };
        let pools = pools(&[entry]).expect("it decodes");
        assert_eq!((pools.len(), pools["default"].queue), (1, Queue::FairShare));
    }

    #[test]
    fn a_part_has_the_nodes_that_its_parents_have_too() {
        let set = |json: &str| serde_json::from_str::<Pool>(json).expect("a pool");
        let rule = |label: &str| format!(r#"[{{"label":"{label}","operator":"exists"}}]"#);
        let whole = set(&format!(r#"{{"name":"whole","selector":{}}}"#, rule("gpu")));
        let part = set(&format!(r#"{{"name":"part","parent":"whole","selector":{}}}"#, rule("new")));
        let pools: Pools = [whole, part].map(|pool| (pool.name.clone(), pool)).into();
        let labels = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), String::new())).collect();
        let has = |pool: &str, names: &[&str]| has_node(&pools, &pools[pool], "n1", &labels(names));
        assert!(has("whole", &["gpu"]) && has("part", &["gpu", "new"]));
        assert!(!has("part", &["new"]) && !has("part", &["gpu"]));
    }
}
