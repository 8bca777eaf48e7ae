//! Pools and tenants: parts of the cluster, who may have how much of them, and the policies there.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::provider::{PoolProvider, ProviderStatus};
use crate::scheduling::Constraint;
use crate::{MemorySize, TimeSpan};

/// The pool of jobs that name none. It is there without anybody having made it.
pub const DEFAULT_POOL: &str = "default";

/// A named part of the cluster, as TOML or JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Unique; `[a-z0-9-]`, 1 to 63 characters.
    pub name: String,
    /// The pool that it is a part of: it has those of that pool's nodes that its own selector admits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Conditions on its nodes' labels; all nodes (of the parent) if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub selector: Vec<Constraint>,
    /// Which job goes next.
    #[serde(default)]
    pub queue: Queue,
    /// What may go before a job that waits.
    #[serde(default)]
    pub backfill: Backfill,
    /// Where a job goes.
    #[serde(default)]
    pub placement: Placement,
    /// Whether jobs of higher priority, and owners of quota that others borrowed, stop preemptible jobs.
    #[serde(default)]
    pub preemption: bool,
    /// Its own: had back when asked for, whoever borrowed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guaranteed: Option<Quota>,
    /// The most that its jobs may use; no limit without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Quota>,
    /// Its share beside the other parts of its parent.
    #[serde(default = "one")]
    pub weight: f64,
    /// A job that waited so long goes next whatever the policy says: nothing starves. `0s` for never.
    #[serde(default = "a_day")]
    pub starvation: TimeSpan,
    /// Tenants whose jobs it takes; everybody's if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<String>,
    /// Where it gets more nodes when its jobs need them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<PoolProvider>,
}

fn one() -> f64 {
    1.0
}

const fn a_day() -> TimeSpan {
    TimeSpan::from_seconds(86_400)
}

impl Pool {
    /// All nodes and everybody's jobs, first come first served: what the pool `default` is until
    /// somebody sets it.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            parent: None,
            selector: Vec::new(),
            queue: Queue::default(),
            backfill: Backfill::default(),
            placement: Placement::default(),
            preemption: false,
            guaranteed: None,
            limit: None,
            weight: one(),
            starvation: a_day(),
            tenants: Vec::new(),
            provider: None,
        }
    }

    /// Whether it takes this tenant's jobs.
    pub fn admits(&self, tenant: &str) -> bool {
        self.tenants.is_empty() || self.tenants.iter().any(|one| one == tenant)
    }
}

/// Which job goes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Queue {
    /// The one that came first.
    #[default]
    FirstComeFirstServed,
    /// The one that will run shortest, by its estimate and the history of jobs like it.
    ShortestJobFirst,
    /// The one whose response ratio (waiting plus running, by running) is highest.
    HighestResponseRatioNext,
    /// One of the tenant that had least of its weighted dominant share.
    FairShare,
    /// The one of highest priority, then the one that came first.
    Priority,
}

/// What may go before a job that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backfill {
    /// Nothing.
    None,
    /// What does not delay the first job that waits.
    #[default]
    Easy,
    /// What delays no job that waits.
    Conservative,
}

/// Where a job goes, among the places that are possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Where it leaves most room for what typically comes.
    #[default]
    Balanced,
    /// Anywhere.
    Random,
    /// Where request and room are most alike (Grandl et al., "Multi-resource packing", SIGCOMM'14).
    DotProduct,
    /// Beside what shares GPUs in the same way.
    GpuClustering,
    /// On GPUs, then nodes, that are used already.
    GpuPacking,
    /// Where least is left.
    BestFit,
    /// Where fragmentation grows least (Weng et al., "Beware of Fragmentation", ATC'23).
    FragmentationGradientDescent,
    /// Away from what runs: failures take less with them.
    Spread,
}

/// An amount of the cluster. What is left out is nothing of a guarantee, and no bound of a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u64>,
    /// Memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemorySize>,
    /// GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u64>,
    /// Tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks: Option<u32>,
}

/// Who work belongs to, or a group of such tenants, as TOML or JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Unique; `[a-z0-9-]`, 1 to 63 characters. Tokens name it.
    pub name: String,
    /// The group of tenants whose share it has a share of; a tenant too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Its share beside its siblings.
    #[serde(default = "one")]
    pub weight: f64,
    /// Its own in each pool: had back when asked for, whoever borrowed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guaranteed: Option<Quota>,
    /// The most that it may use in each pool; no limit without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Quota>,
}

impl Tenant {
    /// One that nobody has set: no quota, the weight of any other.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), parent: None, weight: one(), guaranteed: None, limit: None }
    }
}

/// A pool as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// As it was set.
    pub pool: Pool,
    /// How many nodes it has, those included that take no work now.
    pub nodes: u32,
    /// What those nodes have.
    pub capacity: Amounts,
    /// What its jobs use, those of its parts left out.
    pub usage: Amounts,
    /// Jobs that run in it.
    pub running: u32,
    /// Jobs that wait in it.
    pub pending: u32,
    /// How it stands with its provider, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<ProviderStatus>,
}

/// A tenant as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TenantStatus {
    /// As it was set.
    pub tenant: Tenant,
    /// What its jobs use in each pool where it has any.
    pub usage: Vec<TenantUsage>,
}

/// What a tenant uses of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TenantUsage {
    /// The pool.
    pub pool: String,
    /// What its jobs use there.
    pub amounts: Amounts,
    /// Its jobs that run there.
    pub running: u32,
    /// Its jobs that wait there.
    pub pending: u32,
}

/// How much there is, or is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Amounts {
    /// CPUs.
    pub cpus: u64,
    /// Memory.
    pub memory: MemorySize,
    /// GPUs.
    pub gpus: u64,
    /// Tasks.
    pub tasks: u32,
}

impl Default for Amounts {
    fn default() -> Self {
        Self { cpus: 0, memory: MemorySize::from_bytes(0), gpus: 0, tasks: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_leaves_out_is_what_the_default_pool_is() {
        let pool: Pool = serde_json::from_str(r#"{"name": "default"}"#).unwrap();
        assert_eq!(pool, Pool::named(DEFAULT_POOL));
        assert!(pool.admits("anybody"));
        let own: Pool = serde_json::from_str(r#"{"name": "a", "tenants": ["red"]}"#).unwrap();
        assert!(own.admits("red") && !own.admits("blue"));
        let tenant: Tenant = serde_json::from_str(r#"{"name": "red"}"#).unwrap();
        assert_eq!(tenant, Tenant::named("red"));
    }

    #[test]
    fn a_misspelt_field_is_not_ignored() {
        let error = serde_json::from_str::<Pool>(r#"{"name": "a", "limits": {}}"#).unwrap_err().to_string();
        assert!(error.contains("limits"), "{error}");
        let error =
            serde_json::from_str::<Tenant>(r#"{"name": "a", "limit": {"gpu": 1}}"#).unwrap_err().to_string();
        assert!(error.contains("gpu"), "{error}");
    }
}
