//! Pools, tenants and jobs as the scheduler's library knows them. Pure.

use std::collections::BTreeMap;

use lathe_api::artefact::{Dataset, Image};
use lathe_api::job::JobSpec;
use lathe_api::node::{MaintenanceWindow, NodeOffer};
use lathe_api::pool::{self, DEFAULT_POOL};
use lathe_api::scheduling as api;
use lathe_scheduler::model::{
    Amount, Communication, Constraint, Gang, GpuRequest, Input, Isolation, Offer, Operator, Preference,
    Scope, Share as GpuShare, Size, Taint, TaskRequest, Window,
};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Quota, Settings, Share, Strategy, Tenant, Weight};

use crate::records::{JobRecord, POOLS, TENANTS, of_prefix};
use crate::state::Contents;
use crate::store::{Entry, StoreError};

/// Pools by name, the default one included.
pub type Pools = BTreeMap<String, pool::Pool>;
/// Tenants that were set, by name.
pub type Tenants = BTreeMap<String, pool::Tenant>;

/// What a limit leaves out is not limited.
const NO_LIMIT: Share = Share {
    amount: Amount {
        cpu_milli: u64::MAX,
        memory_bytes: u64::MAX,
        hugepage_bytes: u64::MAX,
        sandboxes: u32::MAX,
    },
    gpu_milli: u64::MAX,
};

/// What [`pools`] and [`tenants`] need listed.
pub const PREFIXES: [&str; 2] = [POOLS, TENANTS];

/// All pools of a listing, with the default one if nobody has set it.
///
/// # Errors
/// When a record does not decode.
pub fn pools(entries: &[Entry]) -> Result<Pools, StoreError> {
    let mut pools: Pools = of_prefix::<pool::Pool>(entries, POOLS)
        .map(|record| record.map(|(name, record)| (name, record.value)))
        .collect::<Result<_, _>>()?;
    pools.entry(DEFAULT_POOL.to_owned()).or_insert_with(|| pool::Pool::named(DEFAULT_POOL));
    Ok(pools)
}

/// All tenants of a listing that were set.
///
/// # Errors
/// When a record does not decode.
pub fn tenants(entries: &[Entry]) -> Result<Tenants, StoreError> {
    of_prefix::<pool::Tenant>(entries, TENANTS)
        .map(|record| record.map(|(name, record)| (name, record.value)))
        .collect()
}

/// What the planner works with, from a listing of [`PREFIXES`].
///
/// # Errors
/// When a record does not decode.
pub fn settings(entries: &[Entry]) -> Result<Settings, StoreError> {
    Ok(Settings {
        pools: pools(entries)?.values().map(pool).collect(),
        tenants: tenants(entries)?.values().map(tenant).collect(),
    })
}

/// The same, from the records in memory.
pub fn settings_of(contents: &Contents) -> Settings {
    let mut pools: Vec<Pool> = contents.pools.values().map(|record| pool(&record.value)).collect();
    if !contents.pools.contains_key(DEFAULT_POOL) {
        pools.push(pool(&pool::Pool::named(DEFAULT_POOL)));
    }
    Settings { pools, tenants: contents.tenants.values().map(|record| tenant(&record.value)).collect() }
}

/// A pool.
pub fn pool(pool: &pool::Pool) -> Pool {
    Pool {
        name: pool.name.clone(),
        parent: pool.parent.clone(),
        selector: pool.selector.iter().map(constraint).collect(),
        queue: match pool.queue {
            pool::Queue::FirstComeFirstServed => Queue::FirstComeFirstServed,
            pool::Queue::ShortestJobFirst => Queue::ShortestJobFirst,
            pool::Queue::HighestResponseRatioNext => Queue::HighestResponseRatioNext,
            pool::Queue::FairShare => Queue::FairShare,
            pool::Queue::Priority => Queue::Priority,
        },
        backfill: match pool.backfill {
            pool::Backfill::None => Backfill::None,
            pool::Backfill::Easy => Backfill::Easy,
            pool::Backfill::Conservative => Backfill::Conservative,
        },
        placement: match pool.placement {
            pool::Placement::Balanced => Strategy::Balanced,
            pool::Placement::Random => Strategy::Random,
            pool::Placement::DotProduct => Strategy::DotProduct,
            pool::Placement::GpuClustering => Strategy::GpuClustering,
            pool::Placement::GpuPacking => Strategy::GpuPacking,
            pool::Placement::BestFit => Strategy::BestFit,
            pool::Placement::FragmentationGradientDescent => Strategy::FragmentationGradientDescent,
            pool::Placement::Spread => Strategy::Spread,
        },
        preemption: pool.preemption,
        quota: quota(pool.guaranteed.as_ref(), pool.limit.as_ref()),
        weight: Weight(pool.weight),
        starvation_ms: pool.starvation.milliseconds(),
    }
}

/// A tenant.
pub fn tenant(tenant: &pool::Tenant) -> Tenant {
    Tenant {
        name: tenant.name.clone(),
        parent: tenant.parent.clone(),
        weight: Weight(tenant.weight),
        quota: quota(tenant.guaranteed.as_ref(), tenant.limit.as_ref()),
    }
}

fn quota(guaranteed: Option<&pool::Quota>, limit: Option<&pool::Quota>) -> Quota {
    Quota {
        guaranteed: guaranteed.map(|quota| share(quota, Share::default())),
        limit: limit.map(|quota| share(quota, NO_LIMIT)),
    }
}

/// A quota with what it leaves out taken from `rest`.
fn share(quota: &pool::Quota, rest: Share) -> Share {
    let milli = |count: Option<u64>, rest| count.map_or(rest, |count| count.saturating_mul(1000));
    Share {
        amount: Amount {
            cpu_milli: milli(quota.cpus, rest.amount.cpu_milli),
            memory_bytes: quota.memory.map_or(rest.amount.memory_bytes, |memory| memory.bytes()),
            // No task has any.
            hugepage_bytes: rest.amount.hugepage_bytes,
            sandboxes: quota.tasks.unwrap_or(rest.amount.sandboxes),
        },
        gpu_milli: milli(quota.gpus, rest.gpu_milli),
    }
}

/// What a job asks for.
pub fn gang(record: &JobRecord) -> Gang {
    let (job, spec) = (&record.job, &record.job.spec);
    Gang {
        id: job.id.clone(),
        submitted_ms: job.submitted_ms,
        inputs: inputs(&record.image, &record.datasets),
        ..gang_of(&job.tenant, spec)
    }
}

/// What a job would ask for, before it is one: without an ID, a time and what its names mean.
pub fn gang_of(tenant: &str, spec: &JobSpec) -> Gang {
    Gang {
        id: String::new(),
        tenant: tenant.to_owned(),
        pool: spec.pool.clone(),
        class: spec.class,
        tasks: Size { min: spec.tasks_min.unwrap_or(spec.tasks), max: spec.tasks },
        task: task_request(spec),
        constraints: spec.constraints.iter().map(constraint).collect(),
        tolerations: spec.tolerations.iter().map(|one| (one.key.clone(), one.value.clone())).collect(),
        preferences: spec.preferences.iter().map(preference).collect(),
        scope: match spec.topology {
            api::Topology::Switch => Scope::Switch,
            api::Topology::Node => Scope::Node,
            api::Topology::Leaf => Scope::Leaf,
            api::Topology::Rack => Scope::Rack,
            api::Topology::Any => Scope::Any,
        },
        isolation: match spec.isolation {
            api::Isolation::Shared => Isolation::Shared,
            api::Isolation::Cores => Isolation::Cores,
            api::Isolation::Switch => Isolation::Switch,
            api::Isolation::Node => Isolation::Node,
        },
        inputs: Vec::new(),
        communication: match spec.communication {
            api::Communication::None => Communication::None,
            api::Communication::Ring => Communication::Ring,
            api::Communication::AllToAll => Communication::AllToAll,
        },
        priority: spec.priority,
        preemptible: spec.preemptible,
        grace_ms: u64::from(spec.grace_seconds) * 1000,
        submitted_ms: 0,
        estimate_ms: spec.estimate.map(|estimate| estimate.milliseconds()),
        kind: kind(tenant, &spec.name),
    }
}

/// What makes jobs alike: their tenant, and their name without the number that counts runs.
fn kind(tenant: &str, name: &str) -> String {
    let word = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    format!("{tenant}/{}", if word.is_empty() { name } else { word })
}

fn task_request(spec: &JobSpec) -> TaskRequest {
    let resources = &spec.resources;
    let gpus = (resources.gpus > 0).then(|| GpuRequest {
        count: resources.gpus,
        share: match &resources.gpu_profile {
            Some(profile) => GpuShare::Profile(profile.clone()),
            None => GpuShare::Whole,
        },
        models: resources.gpu_models.clone(),
        memory_bytes: resources.gpu_memory.map_or(0, |memory| memory.bytes()),
    });
    TaskRequest {
        amount: Amount {
            cpu_milli: u64::from(resources.cpus) * 1000,
            memory_bytes: resources.memory.bytes(),
            hugepage_bytes: 0,
            sandboxes: 1,
        },
        gpus,
    }
}

/// What a job reads, as nodes name what is in their caches: images by the digest of their manifest,
/// datasets by that of their list of files.
pub fn inputs(image: &Image, datasets: &[Dataset]) -> Vec<Input> {
    let image = Input { digest: image.digest.to_string(), bytes: image.size_bytes };
    let datasets = datasets
        .iter()
        .map(|dataset| Input { digest: dataset.digest.to_string(), bytes: dataset.size().bytes() });
    std::iter::once(image).chain(datasets).collect()
}

/// A condition.
pub fn constraint(constraint: &api::Constraint) -> Constraint {
    condition(&constraint.label, constraint.operator, &constraint.values)
}

fn preference(preference: &api::Preference) -> Preference {
    Preference {
        constraint: condition(&preference.label, preference.operator, &preference.values),
        weight: preference.weight,
    }
}

fn condition(label: &str, operator: api::Operator, values: &[String]) -> Constraint {
    let operator = match operator {
        api::Operator::In => Operator::In(values.to_vec()),
        api::Operator::NotIn => Operator::NotIn(values.to_vec()),
        api::Operator::Exists => Operator::Exists,
        api::Operator::Absent => Operator::Absent,
    };
    Constraint { label: label.to_owned(), operator }
}

/// Whether a node takes new work.
pub fn offer(offer: &NodeOffer) -> Offer {
    match offer {
        NodeOffer::Open => Offer::Open,
        NodeOffer::Cordoned(reason) => Offer::Cordoned { reason: reason.clone() },
        NodeOffer::Draining(reason) => Offer::Draining { reason: reason.clone() },
        NodeOffer::Suspected(reason) => Offer::Suspected { reason: reason.clone() },
    }
}

/// Taints.
pub fn taints(taints: &[api::Taint]) -> Vec<Taint> {
    taints.iter().map(|taint| Taint { key: taint.key.clone(), value: taint.value.clone() }).collect()
}

/// Maintenance windows.
pub fn windows(windows: &[MaintenanceWindow]) -> Vec<Window> {
    let window = |one: &MaintenanceWindow| Window {
        from_ms: one.from_ms,
        until_ms: one.until_ms,
        reason: one.reason.clone(),
    };
    windows.iter().map(window).collect()
}

/// Whether a pool has a node of this name and these labels: its own selector and its parents' admit it.
pub fn has_node(pools: &Pools, pool: &pool::Pool, name: &str, labels: &BTreeMap<String, String>) -> bool {
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
    use super::*;

    fn spec(json: &str) -> JobSpec {
        serde_json::from_str(json).expect("a job")
    }

    #[test]
    fn an_old_job_asks_for_what_it_always_did() {
        let gang = gang_of("red", &spec(r#"{"name":"fit-12","class":"container","image":"i","tasks":2}"#));
        let expected = Gang {
            tenant: "red".to_owned(),
            pool: "default".to_owned(),
            tasks: Size::exactly(2),
            task: TaskRequest {
                amount: Amount { cpu_milli: 1000, memory_bytes: 256 << 20, hugepage_bytes: 0, sandboxes: 1 },
                gpus: None,
            },
            grace_ms: 10_000,
            kind: "red/fit".to_owned(),
            ..Gang::default()
        };
        assert_eq!(gang, expected);
    }

    #[test]
    fn all_that_a_job_asks_for_reaches_the_planner() {
        let gang = gang_of(
            "red",
            &spec(
                r#"{"name":"7","class":"microvm","image":"i","tasks":8,"tasks_min":4,"pool":"train",
                "priority":-3,"preemptible":true,"estimate":"90m","topology":"leaf","isolation":"switch",
                "communication":"all_to_all","grace_seconds":60,
                "resources":{"gpus":2,"gpu_models":["H100"],"gpu_memory":"80 GiB"},
                "constraints":[{"label":"zone","operator":"in","values":["a","b"]},
                               {"label":"old","operator":"absent"}],
                "preferences":[{"label":"ssd","operator":"exists","weight":-5}],
                "tolerations":[{"key":"gpu"},{"key":"team","value":"red"}]}"#,
            ),
        );
        assert_eq!((gang.tasks, gang.priority, gang.preemptible), (Size { min: 4, max: 8 }, -3, true));
        assert_eq!((gang.estimate_ms, gang.grace_ms), (Some(5_400_000), 60_000));
        assert_eq!((gang.scope, gang.isolation), (Scope::Leaf, Isolation::Switch));
        assert_eq!((gang.communication, gang.pool.as_str()), (Communication::AllToAll, "train"));
        let gpus = gang.task.gpus.expect("GPUs");
        assert_eq!((gpus.count, gpus.memory_bytes), (2, 80 << 30));
        assert_eq!(gpus.models, ["H100"]);
        let labels = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let holds = |pairs| gang.constraints.iter().all(|one| one.holds("n1", &labels(pairs)));
        assert!(holds(&[("zone", "b")]) && !holds(&[("zone", "c")]) && !holds(&[("zone", "a"), ("old", "")]));
        assert_eq!(gang.preferences[0].weight, -5);
        assert_eq!(gang.tolerations[1], ("team".to_owned(), Some("red".to_owned())));
        // A name that is a number only is not cut to nothing: all such jobs would be alike.
        assert_eq!(gang.kind, "red/7");
    }

    #[test]
    fn what_a_quota_leaves_out_guarantees_nothing_and_limits_nothing() {
        let set: pool::Pool = serde_json::from_str(
            r#"{"name":"a","guaranteed":{"gpus":4},"limit":{"gpus":8,"memory":"1 GiB"},"starvation":"1h"}"#,
        )
        .expect("a pool");
        let pool = pool(&set);
        let guaranteed = pool.quota.guaranteed.expect("one");
        assert_eq!((guaranteed.gpu_milli, guaranteed.amount), (4000, Amount::default()));
        let limit = pool.quota.limit.expect("one");
        assert_eq!((limit.gpu_milli, limit.amount.memory_bytes), (8000, 1 << 30));
        assert_eq!((limit.amount.cpu_milli, limit.amount.sandboxes), (u64::MAX, u32::MAX));
        assert_eq!(pool.starvation_ms, 3_600_000);
        // However large a number somebody writes.
        let huge = pool::Quota { cpus: Some(u64::MAX), ..pool::Quota::default() };
        assert_eq!(share(&huge, Share::default()).amount.cpu_milli, u64::MAX);
    }

    #[test]
    fn the_default_pool_is_there_unless_it_was_set() {
        let settings = settings(&[]).expect("nothing to decode");
        assert_eq!(settings.pools.len(), 1);
        assert_eq!((settings.pools[0].name.as_str(), settings.pools[0].queue), ("default", Queue::default()));
        let value = br#"{"name":"default","queue":"fair_share"}"#.to_vec();
        let entry = Entry { key: "pools/default".to_owned(), value, revision: 1 };
        let pools = pools(&[entry]).expect("it decodes");
        assert_eq!((pools.len(), pools["default"].queue), (1, pool::Queue::FairShare));
    }

    #[test]
    fn a_part_has_the_nodes_that_its_parents_have_too() {
        let set = |json| serde_json::from_str::<pool::Pool>(json).expect("a pool");
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
