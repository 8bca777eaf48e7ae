//! What operators do to nodes, pools and tenants. Each is checked, written together with its entry in
//! the audit log, and done again if somebody else did something at the same time.

use std::collections::BTreeMap;

use lathe_api::node::{MaintenanceWindow, NodeOffer, NodeOperation};
use lathe_api::pool::{DEFAULT_POOL, Pool, Tenant};
use lathe_api::scheduling::Taint;
use lathe_api::token::TokenInfo;

use crate::api::error::ApiError;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::provider::{self, fleet::Fleet};
use crate::quotas::{self, QuotaError};
use crate::records::{
    ACTIVE_JOBS, ACTIVE_SERVICES, AUDIT_SEQUENCE, FLEETS, JobRecord, NODES, OPERATIONS, Operations, POOLS,
    TENANTS, of_prefix, put,
};
use crate::services::ServiceRecord;
use crate::store::{Listing, Outcome, StoreError, Transaction, Write};
use crate::{audit, check, policy};

/// How often something is tried again when other operators do something too.
const ATTEMPTS: usize = 16;
const MAX_WINDOWS: usize = 16;
const MAX_LABELS: usize = 64;
const MAX_TAINTS: usize = 16;
/// Longer is not maintenance.
const MAX_WINDOW_MS: u64 = 366 * 86_400_000;

impl From<QuotaError> for ApiError {
    fn from(error: QuotaError) -> Self {
        Self::field(error.field(), error.to_string())
    }
}

/// What is to be written, and what to say of it in the audit log.
struct Change {
    writes: Vec<Write>,
    action: &'static str,
    detail: String,
}

/// Prepares a change from a listing of `prefixes` and the audit log's sequence until one is committed.
async fn change(
    coordinator: &Coordinator,
    who: &TokenInfo,
    subject: &str,
    prefixes: &[&str],
    prepare: impl Fn(&Listing) -> Result<Change, ApiError>,
) -> Result<(), ApiError> {
    let mut listed = prefixes.to_vec();
    listed.push(AUDIT_SEQUENCE);
    for _ in 0..ATTEMPTS {
        let listing = coordinator.store.list(&listed).await?;
        let Change { writes, action, detail } = prepare(&listing)?;
        let mut transaction = Transaction { expect: Vec::new(), writes };
        audit::append(&mut transaction, &listing, &who.id, action, subject, detail.clone())?;
        if let Outcome::Committed(revision) = coordinator.store.commit(transaction).await? {
            // Who is told that it is done finds it done: submissions look at the view.
            coordinator.view.reached(revision).await;
            tracing::info!(who = who.id, subject, detail, "{action}");
            return Ok(());
        }
    }
    Err(StoreError::Contended(AUDIT_SEQUENCE.to_owned()).into())
}

/// Sets a pool.
///
/// # Errors
/// When it does not fit to the others.
pub async fn set_pool(coordinator: &Coordinator, who: &TokenInfo, pool: &Pool) -> Result<(), ApiError> {
    change(coordinator, who, &pool.name, &[POOLS, FLEETS], |listing| {
        let pools = policy::pools(&listing.entries)?;
        quotas::check_pool(&pools, pool)?;
        let fleet = fleet(listing, &pool.name)?;
        provider::check::check_pool(&pools, pool, fleet.as_ref(), &coordinator.options.providers)?;
        let detail = serde_json::to_string(pool).unwrap_or_default();
        let writes = vec![put(format!("{POOLS}{}", pool.name), pool)?];
        Ok(Change { writes, action: "pool set", detail })
    })
    .await
}

/// Removes a pool; the default one becomes what it was before anybody set it.
///
/// # Errors
/// When there is none, it has parts, or jobs or services are in it.
pub async fn remove_pool(coordinator: &Coordinator, who: &TokenInfo, name: &str) -> Result<(), ApiError> {
    change(coordinator, who, name, &[POOLS, FLEETS, ACTIVE_JOBS, ACTIVE_SERVICES], |listing| {
        let key = format!("{POOLS}{name}");
        if !listing.entries.iter().any(|entry| entry.key == key) {
            return Err(ApiError::not_found("pool", name));
        }
        let pools = policy::pools(&listing.entries)?;
        if let Some(fleet) = fleet(listing, name)?.filter(|fleet| !fleet.is_empty()) {
            return Err(provider::check::in_use(name, &fleet).into());
        }
        if name != DEFAULT_POOL {
            if let Some(part) = pools.values().find(|pool| pool.parent.as_deref() == Some(name)) {
                let detail = format!("pool {:?} is a part of {name:?}; remove or move it first", part.name);
                return Err(ApiError::conflict(detail));
            }
            let mut jobs = 0;
            for record in of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS) {
                jobs += u32::from(record?.1.value.job.spec.pool == name);
            }
            if jobs > 0 {
                let detail =
                    format!("jobs that have not ended are in pool {name:?}: {jobs}; cancel them first");
                return Err(ApiError::conflict(detail));
            }
            // One without replicas has no job.
            for record in of_prefix::<ServiceRecord>(&listing.entries, ACTIVE_SERVICES) {
                let (id, record) = record?;
                if record.value.spec.pool == name {
                    let detail = format!("service {id} is in pool {name:?}; cancel it first");
                    return Err(ApiError::conflict(detail));
                }
            }
        }
        let writes = vec![Write::Delete { key }, Write::Delete { key: format!("{FLEETS}{name}") }];
        Ok(Change { writes, action: "pool remove", detail: String::new() })
    })
    .await
}

/// What a pool's provider made, if it ever had one.
fn fleet(listing: &Listing, pool: &str) -> Result<Option<Fleet>, StoreError> {
    let mut fleets = of_prefix::<Fleet>(&listing.entries, FLEETS);
    let found = fleets.find(|record| record.as_ref().map_or(true, |(name, _)| name == pool));
    Ok(found.transpose()?.map(|(_, record)| record.value))
}

/// Sets a tenant.
///
/// # Errors
/// When it does not fit to the others.
pub async fn set_tenant(coordinator: &Coordinator, who: &TokenInfo, tenant: &Tenant) -> Result<(), ApiError> {
    change(coordinator, who, &tenant.name, &[TENANTS], |listing| {
        quotas::check_tenant(&policy::tenants(&listing.entries)?, tenant)?;
        let detail = serde_json::to_string(tenant).unwrap_or_default();
        let writes = vec![put(format!("{TENANTS}{}", tenant.name), tenant)?];
        Ok(Change { writes, action: "tenant set", detail })
    })
    .await
}

/// Forgets what was set of a tenant. Its jobs and tokens stay.
///
/// # Errors
/// When nothing was set, or other tenants are in its group.
pub async fn remove_tenant(coordinator: &Coordinator, who: &TokenInfo, name: &str) -> Result<(), ApiError> {
    change(coordinator, who, name, &[TENANTS], |listing| {
        let tenants = policy::tenants(&listing.entries)?;
        if !tenants.contains_key(name) {
            return Err(ApiError::not_found("tenant", name));
        }
        if let Some(member) = tenants.values().find(|tenant| tenant.parent.as_deref() == Some(name)) {
            let detail = format!("tenant {:?} is in the group {name:?}; set it without first", member.name);
            return Err(ApiError::conflict(detail));
        }
        let writes = vec![Write::Delete { key: format!("{TENANTS}{name}") }];
        Ok(Change { writes, action: "tenant remove", detail: String::new() })
    })
    .await
}

/// Does something to a node.
///
/// # Errors
/// When there is no such node, or the operation is not possible.
pub async fn operate(
    coordinator: &Coordinator,
    who: &TokenInfo,
    node: &str,
    operation: &NodeOperation,
) -> Result<(), ApiError> {
    let name_ok = check::check_name(node).is_ok();
    if !name_ok || coordinator.store.get(&format!("{NODES}{node}")).await?.is_none() {
        return Err(ApiError::not_found("node", node));
    }
    check_operation(operation, now_ms())?;
    let key = format!("{OPERATIONS}{node}");
    change(coordinator, who, node, &[&key], |listing| {
        let known = of_prefix::<Operations>(&listing.entries, &key).find(|record| {
            // `operations/n1` is also a prefix of `operations/n10`.
            record.as_ref().map_or(true, |(rest, _)| rest.is_empty())
        });
        let mut operations = known.transpose()?.map(|(_, record)| record.value).unwrap_or_default();
        let (action, detail) = apply(&mut operations, operation, now_ms());
        bounds(&operations)?;
        let writes = vec![put(&key, &operations)?];
        Ok(Change { writes, action, detail })
    })
    .await
}

fn check_operation(operation: &NodeOperation, now_ms: u64) -> Result<(), ApiError> {
    let field = |field: String| move |detail: String| ApiError::field(field, detail);
    match operation {
        NodeOperation::Cordon { reason } | NodeOperation::Drain { reason } => {
            check::reason(reason).map_err(field("reason".to_owned()))
        }
        NodeOperation::Maintain(window) => check_window(window, now_ms),
        NodeOperation::Uncordon | NodeOperation::EndMaintenance => Ok(()),
        NodeOperation::Label { set, .. } => set.iter().try_for_each(|(name, value)| {
            let at = format!("set.{name}");
            if name == "name" {
                return Err(field(at)("\"name\": is the node's own name; choose another".to_owned()));
            }
            check::label(name).and_then(|()| check::label_value(value)).map_err(field(at))
        }),
        NodeOperation::Taint { set, .. } => set.iter().enumerate().try_for_each(|(index, taint)| {
            check::label(&taint.key).map_err(field(format!("set.{index}.key")))?;
            check::label_value(&taint.value).map_err(field(format!("set.{index}.value")))
        }),
    }
}

fn check_window(window: &MaintenanceWindow, now_ms: u64) -> Result<(), ApiError> {
    let MaintenanceWindow { from_ms, until_ms, reason } = window;
    check::reason(reason).map_err(|detail| ApiError::field("reason", detail))?;
    if until_ms <= from_ms || *until_ms <= now_ms {
        let detail = format!("{until_ms}: must be after from_ms ({from_ms}) and after now ({now_ms})");
        return Err(ApiError::field("until_ms", detail));
    }
    if until_ms - from_ms > MAX_WINDOW_MS {
        return Err(ApiError::field("until_ms", format!("{until_ms}: at most a year after from_ms")));
    }
    Ok(())
}

/// What an operation makes of what operators wanted before; and how the audit log tells it.
fn apply(operations: &mut Operations, operation: &NodeOperation, now_ms: u64) -> (&'static str, String) {
    // Windows that are over are nobody's concern any more.
    operations.maintenance.retain(|window| window.until_ms > now_ms);
    match operation {
        NodeOperation::Cordon { reason } => {
            operations.offer = NodeOffer::Cordoned(reason.clone());
            ("node cordon", reason.clone())
        }
        NodeOperation::Drain { reason } => {
            operations.offer = NodeOffer::Draining(reason.clone());
            ("node drain", reason.clone())
        }
        NodeOperation::Uncordon => {
            operations.offer = NodeOffer::Open;
            ("node uncordon", String::new())
        }
        NodeOperation::Maintain(window) => {
            operations.maintenance.push(window.clone());
            operations.maintenance.sort_by_key(|window| (window.from_ms, window.until_ms));
            let MaintenanceWindow { from_ms, until_ms, reason } = window;
            ("node maintain", format!("from {from_ms} ms until {until_ms} ms: {reason}"))
        }
        NodeOperation::EndMaintenance => {
            operations.maintenance.clear();
            ("node end maintenance", String::new())
        }
        NodeOperation::Label { set, remove } => {
            operations.labels.extend(set.clone());
            operations.labels.retain(|name, _| !remove.contains(name));
            ("node label", told(set, remove))
        }
        NodeOperation::Taint { set, remove } => {
            let mut taints: BTreeMap<String, String> =
                operations.taints.drain(..).map(|taint| (taint.key, taint.value)).collect();
            let set: BTreeMap<_, _> =
                set.iter().map(|taint| (taint.key.clone(), taint.value.clone())).collect();
            taints.extend(set.clone());
            taints.retain(|key, _| !remove.contains(key));
            operations.taints = taints.into_iter().map(|(key, value)| Taint { key, value }).collect();
            ("node taint", told(&set, remove))
        }
    }
}

/// As the command line takes it: `key=value other-`.
fn told(set: &BTreeMap<String, String>, remove: &[String]) -> String {
    let set = set.iter().map(|(name, value)| format!("{name}={value}"));
    // Names to remove were not checked: they need not exist.
    let plain = |name: &&String| check::label(name).is_ok();
    let remove = remove.iter().filter(plain).map(|name| format!("{name}-"));
    set.chain(remove).collect::<Vec<_>>().join(" ")
}

fn bounds(operations: &Operations) -> Result<(), ApiError> {
    for (what, length, most) in [
        ("labels", operations.labels.len(), MAX_LABELS),
        ("taints", operations.taints.len(), MAX_TAINTS),
        ("maintenance windows", operations.maintenance.len(), MAX_WINDOWS),
    ] {
        if length > most {
            return Err(ApiError::conflict(format!("a node has at most {most} {what}; remove some first")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(json: &str) -> NodeOperation {
        serde_json::from_str(json).expect(json)
    }

    #[test]
    fn operations_are_applied_one_upon_the_other() {
        let mut operations = Operations::default();
        for (json, action, detail) in [
            (r#"{"operation":"label","set":{"zone":"a","old":"1"}}"#, "node label", "old=1 zone=a"),
            (
                r#"{"operation":"label","set":{"zone":"b"},"remove":["old","x y"]}"#,
                "node label",
                "zone=b old-",
            ),
            (
                r#"{"operation":"taint","set":[{"key":"gpu","value":"h100"},{"key":"t"}]}"#,
                "node taint",
                "gpu=h100 t=",
            ),
            (r#"{"operation":"taint","set":[{"key":"gpu"}],"remove":["t"]}"#, "node taint", "gpu= t-"),
            (
                r#"{"operation":"maintain","from_ms":50,"until_ms":60,"reason":"r"}"#,
                "node maintain",
                "from 50 ms until 60 ms: r",
            ),
            (
                r#"{"operation":"maintain","from_ms":20,"until_ms":30,"reason":"q"}"#,
                "node maintain",
                "from 20 ms until 30 ms: q",
            ),
            (r#"{"operation":"drain","reason":"new disks"}"#, "node drain", "new disks"),
        ] {
            let told = apply(&mut operations, &operation(json), 10);
            assert_eq!(told, (action, detail.to_owned()));
        }
        assert_eq!(operations.offer, NodeOffer::Draining("new disks".to_owned()));
        assert_eq!(operations.labels, BTreeMap::from([("zone".to_owned(), "b".to_owned())]));
        assert_eq!(operations.taints, [Taint { key: "gpu".to_owned(), value: String::new() }]);
        let from =
            |operations: &Operations| operations.maintenance.iter().map(|w| w.from_ms).collect::<Vec<_>>();
        assert_eq!(from(&operations), [20, 50]);
        apply(&mut operations, &operation(r#"{"operation":"uncordon"}"#), 40);
        assert_eq!(operations.offer, NodeOffer::Open);
        assert_eq!(from(&operations), [50], "what is over is forgotten");
        apply(&mut operations, &operation(r#"{"operation":"end_maintenance"}"#), 40);
        assert!(operations.maintenance.is_empty());
    }

    #[test]
    fn bodies_with_unknown_or_missing_parts_are_refused() {
        for json in [
            r#"{"operation":"cordon"}"#,
            r#"{"operation":"cordon","reason":"r","x":1}"#,
            r#"{"operation":"maintain","from_ms":1,"reason":"r"}"#,
            r#"{"operation":"explode"}"#,
        ] {
            assert!(serde_json::from_str::<NodeOperation>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn operations_that_make_no_sense_are_refused() {
        for (json, now_ms) in [
            (r#"{"operation":"cordon","reason":" "}"#, 0),
            (r#"{"operation":"drain","reason":"a\nb"}"#, 0),
            (r#"{"operation":"maintain","from_ms":10,"until_ms":10,"reason":"r"}"#, 0),
            (r#"{"operation":"maintain","from_ms":10,"until_ms":20,"reason":"r"}"#, 20),
            (r#"{"operation":"maintain","from_ms":0,"until_ms":99999999999999,"reason":"r"}"#, 0),
            (r#"{"operation":"label","set":{"name":"n2"}}"#, 0),
            (r#"{"operation":"label","set":{"a b":"c"}}"#, 0),
            (r#"{"operation":"taint","set":[{"key":""}]}"#, 0),
        ] {
            assert!(check_operation(&operation(json), now_ms).is_err(), "{json}");
        }
    }
}
