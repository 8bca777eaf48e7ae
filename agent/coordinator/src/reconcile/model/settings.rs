//! Pools and tenants, as the planner knows them.

use lathe_api::pool::{self, DEFAULT_POOL};
use lathe_api::scheduling;
use lathe_scheduler::Amount;
use lathe_scheduler::model::{Constraint, Operator};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Quota, Settings, Share, Strategy, Tenant, Weight};

use crate::state::Contents;

/// All pools and tenants that were set, and the pool that is always there.
pub fn settings(contents: &Contents) -> Settings {
    let mut pools: Vec<Pool> = contents.pools.values().map(|record| pool(&record.value)).collect();
    if !contents.pools.contains_key(DEFAULT_POOL) {
        pools.push(pool(&pool::Pool::named(DEFAULT_POOL)));
    }
    let tenants = contents.tenants.values().map(|record| tenant(&record.value)).collect();
    Settings { pools, tenants }
}

/// A pool.
pub fn pool(set: &pool::Pool) -> Pool {
    Pool {
        name: set.name.clone(),
        parent: set.parent.clone(),
        selector: set.selector.iter().map(constraint).collect(),
        queue: match set.queue {
            pool::Queue::FirstComeFirstServed => Queue::FirstComeFirstServed,
            pool::Queue::ShortestJobFirst => Queue::ShortestJobFirst,
            pool::Queue::HighestResponseRatioNext => Queue::HighestResponseRatioNext,
            pool::Queue::FairShare => Queue::FairShare,
            pool::Queue::Priority => Queue::Priority,
        },
        backfill: match set.backfill {
            pool::Backfill::None => Backfill::None,
            pool::Backfill::Easy => Backfill::Easy,
            pool::Backfill::Conservative => Backfill::Conservative,
        },
        placement: match set.placement {
            pool::Placement::Balanced => Strategy::Balanced,
            pool::Placement::Random => Strategy::Random,
            pool::Placement::DotProduct => Strategy::DotProduct,
            pool::Placement::GpuClustering => Strategy::GpuClustering,
            pool::Placement::GpuPacking => Strategy::GpuPacking,
            pool::Placement::BestFit => Strategy::BestFit,
            pool::Placement::FragmentationGradientDescent => Strategy::FragmentationGradientDescent,
            pool::Placement::Spread => Strategy::Spread,
        },
        preemption: set.preemption,
        quota: quota(set.guaranteed, set.limit),
        weight: Weight(set.weight),
        starvation_ms: set.starvation.milliseconds(),
    }
}

/// A tenant.
pub fn tenant(set: &pool::Tenant) -> Tenant {
    Tenant {
        name: set.name.clone(),
        parent: set.parent.clone(),
        weight: Weight(set.weight),
        quota: quota(set.guaranteed, set.limit),
    }
}

/// What is left out is nothing of a guarantee, and no bound of a limit.
fn quota(guaranteed: Option<pool::Quota>, limit: Option<pool::Quota>) -> Quota {
    Quota {
        guaranteed: guaranteed.map(|set| share(&set, 0, 0)),
        limit: limit.map(|set| share(&set, u64::MAX, u32::MAX)),
    }
}

fn share(set: &pool::Quota, rest: u64, tasks: u32) -> Share {
    Share {
        amount: Amount {
            cpu_milli: set.cpus.map_or(rest, |cpus| cpus.saturating_mul(1000)),
            memory_bytes: set.memory.map_or(rest, |memory| memory.bytes()),
            hugepage_bytes: rest,
            sandboxes: set.tasks.unwrap_or(tasks),
        },
        gpu_milli: set.gpus.map_or(rest, |gpus| gpus.saturating_mul(1000)),
    }
}

/// A condition on labels.
pub fn constraint(set: &scheduling::Constraint) -> Constraint {
    Constraint { label: set.label.clone(), operator: operator(set.operator, &set.values) }
}

/// What must hold of a label.
pub fn operator(operator: scheduling::Operator, values: &[String]) -> Operator {
    match operator {
        scheduling::Operator::In => Operator::In(values.to_vec()),
        scheduling::Operator::NotIn => Operator::NotIn(values.to_vec()),
        scheduling::Operator::Exists => Operator::Exists,
        scheduling::Operator::Absent => Operator::Absent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(share(&huge, 0, 0).amount.cpu_milli, u64::MAX);
    }

    #[test]
    fn the_default_pool_is_there_unless_it_was_set() {
        let settings = settings(&Contents::default());
        let names: Vec<&str> = settings.pools.iter().map(|pool| pool.name.as_str()).collect();
        assert_eq!((names, settings.pools[0].queue), (vec![DEFAULT_POOL], Queue::FirstComeFirstServed));
    }
}
