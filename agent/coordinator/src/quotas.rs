//! Whether pools and tenants fit together: names, parents, and quotas that add up. Pure.

use std::collections::BTreeMap;

use lathe_api::MemorySize;
use lathe_api::pool::{Pool, Quota, Tenant};

use crate::check::check_name;
use crate::policy::{Pools, Tenants};

/// Deepest nesting: more means a mistake.
const MAX_DEPTH: usize = 8;
/// Weights beyond this are mistakes too, and shares of siblings vanish beside them.
const MAX_WEIGHT: f64 = 1e6;
const MAX_SELECTORS: usize = 64;
const MAX_TENANTS: usize = 1024;

/// A pool or tenant that does not fit. The message names the value and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// A field by itself.
    #[error("{reason}")]
    Field {
        /// Its dotted path.
        field: String,
        /// The value, and what is possible.
        reason: String,
    },
    /// The parent is none.
    #[error("{parent:?}: there is no such {what}; set it first")]
    NoParent {
        /// `pool` or `tenant`.
        what: &'static str,
        /// The name.
        parent: String,
    },
    /// The parents form a ring.
    #[error("{parent:?}: it is a part of {name:?} itself")]
    Cycle {
        /// Who was set.
        name: String,
        /// The parent.
        parent: String,
    },
    /// Too deep.
    #[error("{parent:?}: at most {MAX_DEPTH} levels are possible")]
    Deep {
        /// The parent.
        parent: String,
    },
    /// More is guaranteed than may be used.
    #[error("{guaranteed}: more {resource} than the limit of {limit}; raise limit.{resource}, or lower this")]
    OverLimit {
        /// Of what.
        resource: &'static str,
        /// The guarantee.
        guaranteed: String,
        /// The limit.
        limit: String,
    },
    /// The parts of one are guaranteed more than it has.
    #[error(
        "the parts of {parent:?} would be guaranteed {children} of {resource} together, and it has {own}; \
         raise its {of}.{resource}, or lower theirs"
    )]
    OverParent {
        /// Whose parts.
        parent: String,
        /// Of what.
        resource: &'static str,
        /// Theirs together.
        children: String,
        /// Its own.
        own: String,
        /// `guaranteed` or `limit`: which of its amounts bounds them.
        of: &'static str,
    },
}

impl QuotaError {
    /// The field at fault.
    pub fn field(&self) -> String {
        match self {
            Self::Field { field, .. } => field.clone(),
            Self::NoParent { .. } | Self::Cycle { .. } | Self::Deep { .. } => "parent".to_owned(),
            Self::OverLimit { resource, .. } | Self::OverParent { resource, .. } => {
                format!("guaranteed.{resource}")
            }
        }
    }
}

/// Checks a pool that is to be set beside the others.
///
/// # Errors
/// What does not fit.
pub fn check_pool(pools: &Pools, pool: &Pool) -> Result<(), QuotaError> {
    let field = |field: &str, reason: String| QuotaError::Field { field: field.to_owned(), reason };
    check_name(&pool.name).map_err(|reason| field("name", reason))?;
    if pool.selector.len() > MAX_SELECTORS {
        return Err(field("selector", format!("at most {MAX_SELECTORS} conditions")));
    }
    for (index, selector) in pool.selector.iter().enumerate() {
        crate::check::constraint(&format!("selector.{index}"), selector)
            .map_err(|(at, reason)| QuotaError::Field { field: at, reason })?;
    }
    if pool.tenants.len() > MAX_TENANTS {
        return Err(field("tenants", format!("at most {MAX_TENANTS}")));
    }
    for (index, tenant) in pool.tenants.iter().enumerate() {
        check_name(tenant).map_err(|reason| field(&format!("tenants.{index}"), reason))?;
    }
    let mut shapes: BTreeMap<&str, Shape<'_>> =
        pools.iter().map(|(name, pool)| (name.as_str(), Shape::of_pool(pool))).collect();
    shapes.insert(&pool.name, Shape::of_pool(pool));
    check_shape("pool", &shapes, &pool.name)
}

/// Checks a tenant that is to be set beside the others.
///
/// # Errors
/// What does not fit.
pub fn check_tenant(tenants: &Tenants, tenant: &Tenant) -> Result<(), QuotaError> {
    check_name(&tenant.name).map_err(|reason| QuotaError::Field { field: "name".to_owned(), reason })?;
    let mut shapes: BTreeMap<&str, Shape<'_>> =
        tenants.iter().map(|(name, tenant)| (name.as_str(), Shape::of_tenant(tenant))).collect();
    shapes.insert(&tenant.name, Shape::of_tenant(tenant));
    check_shape("tenant", &shapes, &tenant.name)
}

/// What pools and tenants have in common.
#[derive(Clone, Copy)]
struct Shape<'a> {
    parent: Option<&'a str>,
    weight: f64,
    guaranteed: Option<&'a Quota>,
    limit: Option<&'a Quota>,
}

impl<'a> Shape<'a> {
    fn of_pool(pool: &'a Pool) -> Self {
        Self {
            parent: pool.parent.as_deref(),
            weight: pool.weight,
            guaranteed: pool.guaranteed.as_ref(),
            limit: pool.limit.as_ref(),
        }
    }

    fn of_tenant(tenant: &'a Tenant) -> Self {
        Self {
            parent: tenant.parent.as_deref(),
            weight: tenant.weight,
            guaranteed: tenant.guaranteed.as_ref(),
            limit: tenant.limit.as_ref(),
        }
    }
}

fn check_shape(what: &'static str, shapes: &BTreeMap<&str, Shape<'_>>, name: &str) -> Result<(), QuotaError> {
    let shape = shapes[name];
    if !(shape.weight > 0.0 && shape.weight <= MAX_WEIGHT) {
        let reason = format!("{}: more than 0, and at most {MAX_WEIGHT}", shape.weight);
        return Err(QuotaError::Field { field: "weight".to_owned(), reason });
    }
    check_parents(what, shapes, name)?;
    for (resource, of) in RESOURCES {
        if let (Some(guaranteed), Some(limit)) = (shape.guaranteed.and_then(of), shape.limit.and_then(of))
            && guaranteed > limit
        {
            let (guaranteed, limit) = (shown(resource, guaranteed), shown(resource, limit));
            return Err(QuotaError::OverLimit { resource, guaranteed, limit });
        }
    }
    // Its own parts, and the parts of its parent, of which it is one.
    for parent in std::iter::once(name).chain(shape.parent) {
        check_parts(shapes, parent)?;
    }
    Ok(())
}

fn check_parents(
    what: &'static str,
    shapes: &BTreeMap<&str, Shape<'_>>,
    name: &str,
) -> Result<(), QuotaError> {
    let Some(parent) = shapes[name].parent else { return Ok(()) };
    if !shapes.contains_key(parent) {
        return Err(QuotaError::NoParent { what, parent: parent.to_owned() });
    }
    let ancestors = |from: &str| {
        let mut next = shapes.get(from).and_then(|shape| shape.parent);
        let mut found = Vec::new();
        while let Some(one) = next
            && found.len() <= MAX_DEPTH
        {
            found.push(one);
            next = shapes.get(one).and_then(|shape| shape.parent);
        }
        found
    };
    if parent == name || ancestors(parent).contains(&name) {
        return Err(QuotaError::Cycle { name: name.to_owned(), parent: parent.to_owned() });
    }
    // Also its own parts sink deeper with it.
    let deepest = shapes.keys().map(|one| ancestors(one).len()).max().unwrap_or(0);
    if deepest >= MAX_DEPTH {
        return Err(QuotaError::Deep { parent: parent.to_owned() });
    }
    Ok(())
}

/// What is guaranteed to parts comes out of what their parent is guaranteed, or, where it is guaranteed
/// nothing, must at least be within its limit.
fn check_parts(shapes: &BTreeMap<&str, Shape<'_>>, parent: &str) -> Result<(), QuotaError> {
    let shape = shapes[parent];
    for (resource, amount) in RESOURCES {
        let (own, of) = match (shape.guaranteed, shape.limit.and_then(amount)) {
            (Some(guaranteed), _) => (amount(guaranteed).unwrap_or(0), "guaranteed"),
            (None, Some(limit)) => (limit, "limit"),
            (None, None) => continue,
        };
        let parts = shapes.values().filter(|part| part.parent == Some(parent));
        let children = parts
            .filter_map(|part| part.guaranteed.and_then(amount))
            .fold(0_u64, |sum, one| sum.saturating_add(one));
        if children > own {
            let (children, own) = (shown(resource, children), shown(resource, own));
            return Err(QuotaError::OverParent { parent: parent.to_owned(), resource, children, own, of });
        }
    }
    Ok(())
}

/// A resource's name in a quota, and how much of it there is in one; memory in bytes.
type Resource = (&'static str, fn(&Quota) -> Option<u64>);

const RESOURCES: [Resource; 4] = [
    ("cpus", |quota| quota.cpus),
    ("memory", |quota| quota.memory.map(|memory| memory.bytes())),
    ("gpus", |quota| quota.gpus),
    ("tasks", |quota| quota.tasks.map(u64::from)),
];

/// An amount as people write it.
fn shown(resource: &str, amount: u64) -> String {
    match resource {
        "memory" => MemorySize::from_bytes(amount).to_string(),
        _ => amount.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(json: &str) -> Pool {
        serde_json::from_str(json).expect("a pool")
    }

    fn with(json: &[&str]) -> Pools {
        json.iter().map(|json| pool(json)).map(|pool| (pool.name.clone(), pool)).collect()
    }

    fn refusal(pools: &Pools, json: &str) -> (String, String) {
        let error = check_pool(pools, &pool(json)).expect_err(json);
        assert!(!error.to_string().contains('\n'), "{error}");
        (error.field(), error.to_string())
    }

    #[test]
    fn parents_are_there_and_form_no_ring() {
        let pools =
            with(&[r#"{"name":"a"}"#, r#"{"name":"b","parent":"a"}"#, r#"{"name":"c","parent":"b"}"#]);
        assert_eq!(check_pool(&pools, &pool(r#"{"name":"d","parent":"c"}"#)), Ok(()));
        for (json, words) in [
            (r#"{"name":"d","parent":"x"}"#, "\"x\": there is no such pool"),
            (r#"{"name":"a","parent":"c"}"#, "\"c\": it is a part of \"a\" itself"),
            (r#"{"name":"a","parent":"a"}"#, "\"a\": it is a part of \"a\" itself"),
        ] {
            let (field, text) = refusal(&pools, json);
            assert!(field == "parent" && text.contains(words), "{text}");
        }
    }

    #[test]
    fn a_tree_is_not_deeper_than_people_can_follow_also_when_it_is_moved_as_a_whole() {
        let mut pools = with(&[r#"{"name":"p0"}"#, r#"{"name":"x0"}"#, r#"{"name":"x1","parent":"x0"}"#]);
        for level in 1..MAX_DEPTH - 1 {
            let next = pool(&format!(r#"{{"name":"p{level}","parent":"p{}"}}"#, level - 1));
            assert_eq!(check_pool(&pools, &next), Ok(()));
            pools.insert(next.name.clone(), next);
        }
        let last = format!("p{}", MAX_DEPTH - 2);
        let (field, text) = refusal(&pools, &format!(r#"{{"name":"x0","parent":"{last}"}}"#));
        assert!(field == "parent" && text.contains("levels"), "{text}");
        assert_eq!(check_pool(&pools, &pool(&format!(r#"{{"name":"y","parent":"{last}"}}"#))), Ok(()));
    }

    #[test]
    fn guarantees_are_within_limits_and_parts_within_the_whole() {
        let pools = with(&[
            r#"{"name":"a","guaranteed":{"gpus":8}}"#,
            r#"{"name":"b","parent":"a","guaranteed":{"gpus":6}}"#,
            r#"{"name":"open","limit":{"gpus":4}}"#,
        ]);
        assert_eq!(check_pool(&pools, &pool(r#"{"name":"c","parent":"a","guaranteed":{"gpus":2}}"#)), Ok(()));
        for (json, field, words) in [
            (
                r#"{"name":"c","guaranteed":{"gpus":3},"limit":{"gpus":2}}"#,
                "guaranteed.gpus",
                "more gpus than the limit of 2",
            ),
            (r#"{"name":"c","parent":"a","guaranteed":{"gpus":3}}"#, "guaranteed.gpus", "9 of gpus together"),
            // Something that the whole is not guaranteed at all.
            (r#"{"name":"c","parent":"a","guaranteed":{"cpus":1}}"#, "guaranteed.cpus", "it has 0"),
            (r#"{"name":"c","parent":"open","guaranteed":{"gpus":5}}"#, "guaranteed.gpus", "limit.gpus"),
            // The whole may not shrink below its parts either.
            (r#"{"name":"a","guaranteed":{"gpus":5}}"#, "guaranteed.gpus", "it has 5"),
            (r#"{"name":"c","weight":0}"#, "weight", "more than 0"),
            (r#"{"name":"c","weight":-1}"#, "weight", "more than 0"),
            (r#"{"name":"C"}"#, "name", "1 to 63"),
            (r#"{"name":"c","tenants":["Red"]}"#, "tenants.0", "1 to 63"),
        ] {
            let (at, text) = refusal(&pools, json);
            assert!(at == field && text.contains(words), "{json}: {at}: {text}");
        }
    }

    #[test]
    fn sums_of_guarantees_do_not_wrap() {
        let max = u64::MAX;
        let pools = with(&[
            r#"{"name":"a","guaranteed":{"gpus":8}}"#,
            &format!(r#"{{"name":"b","parent":"a","guaranteed":{{"gpus":{max}}}}}"#),
        ]);
        let (_, text) = refusal(&pools, r#"{"name":"c","parent":"a","guaranteed":{"gpus":9}}"#);
        assert!(text.contains("together"), "{text}");
    }

    #[test]
    fn tenants_obey_the_same_rules() {
        let group: Tenant =
            serde_json::from_str(r#"{"name":"lab","guaranteed":{"gpus":4}}"#).expect("a tenant");
        let tenants: Tenants = [("lab".to_owned(), group)].into();
        let set = |json: &str| check_tenant(&tenants, &serde_json::from_str(json).expect("a tenant"));
        assert_eq!(set(r#"{"name":"red","parent":"lab","guaranteed":{"gpus":4}}"#), Ok(()));
        let error = set(r#"{"name":"red","parent":"lab","guaranteed":{"gpus":5}}"#).expect_err("too much");
        assert!(error.to_string().contains("5 of gpus together"), "{error}");
        let error = set(r#"{"name":"red","parent":"nobody"}"#).expect_err("no parent");
        assert!(error.to_string().contains("there is no such tenant"), "{error}");
    }
}
