//! Pools and tenants: what holds where, and what is chosen there.

use crate::model::{Amount, Constraint};

/// All pools and tenants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Pools; a gang names one.
    pub pools: Vec<Pool>,
    /// Tenants that are not like [`Tenant::default`].
    pub tenants: Vec<Tenant>,
}

impl Settings {
    /// Whether anybody has a limit.
    pub fn limits(&self) -> bool {
        let quotas = self.pools.iter().map(|pool| &pool.quota);
        quotas.chain(self.tenants.iter().map(|tenant| &tenant.quota)).any(|quota| quota.limit.is_some())
    }
}

/// A named part of the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pool {
    /// Unique.
    pub name: String,
    /// The pool that it is a part of: it has that pool's nodes that its own selector admits.
    pub parent: Option<String>,
    /// Conditions on its nodes' labels; all nodes (of the parent) if empty.
    pub selector: Vec<Constraint>,
    /// Which gang goes next.
    pub queue: Queue,
    /// What may go before a gang that waits.
    pub backfill: Backfill,
    /// Where a gang goes.
    pub placement: Strategy,
    /// Whether gangs of higher priority, and owners of quota that others borrowed, stop others.
    pub preemption: bool,
    /// What is its own, and how much it may use.
    pub quota: Quota,
    /// Its share beside its siblings.
    pub weight: Weight,
    /// A gang that waited so long goes next, whatever the policy says: nothing starves. Milliseconds;
    /// 0 for never.
    pub starvation_ms: u64,
}

/// Who work belongs to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tenant {
    /// Unique.
    pub name: String,
    /// The group of tenants whose share it has a share of.
    pub parent: Option<String>,
    /// Its share beside its siblings.
    pub weight: Weight,
    /// What is its own, and how much it may use, in each pool.
    pub quota: Quota,
}

/// A share's weight; 1 unless said.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Weight(pub f64);

impl Default for Weight {
    fn default() -> Self {
        Self(1.0)
    }
}

/// What is somebody's own, and how much he may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Had back when asked for, whoever borrowed it.
    pub guaranteed: Option<Share>,
    /// Never more than this; no limit without. [`Share::UNLIMITED`] in what is not limited: a zero
    /// means that none is allowed.
    pub limit: Option<Share>,
}

/// An amount, and GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// What adds up.
    pub amount: Amount,
    /// GPUs, in thousandths.
    pub gpu_milli: u64,
}

impl Share {
    /// No limit in anything.
    pub const UNLIMITED: Self = Self {
        amount: Amount {
            cpu_milli: u64::MAX,
            memory_bytes: u64::MAX,
            hugepage_bytes: u64::MAX,
            sandboxes: u32::MAX,
        },
        gpu_milli: u64::MAX,
    };
}

/// Which gang goes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Queue {
    /// The one that came first.
    #[default]
    FirstComeFirstServed,
    /// The one that will run shortest, by its estimate.
    ShortestJobFirst,
    /// The one whose response ratio (waiting plus running, by running) is highest.
    HighestResponseRatioNext,
    /// One of the tenant that had least of its weighted dominant share.
    FairShare,
    /// The one of highest priority, then the one that came first.
    Priority,
}

impl Queue {
    /// Whether the order depends on how long gangs will run.
    pub fn looks_at_estimates(self) -> bool {
        matches!(self, Self::ShortestJobFirst | Self::HighestResponseRatioNext)
    }
}

/// What may go before a gang that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backfill {
    /// Nothing.
    None,
    /// What does not delay the first gang that waits.
    #[default]
    Easy,
    /// What delays no gang that waits.
    Conservative,
}

/// Where a gang goes, among the places that are possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Where it leaves most room for what typically comes: the default.
    #[default]
    Balanced,
    /// Anywhere (with a seed).
    Random,
    /// The alignment of request and room (Grandl et al., "Multi-resource packing", SIGCOMM'14).
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
