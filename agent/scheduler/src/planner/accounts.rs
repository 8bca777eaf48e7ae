//! What pools and tenants use, may use, and have a right to.

use std::collections::HashMap;

use super::known::{Item, TenantInfo};
use crate::model::{Constraint, Node, Quick, TaskPlace};
use crate::plan::{LimitReached, Resource};
use crate::policy::{Pool, Quota, Settings, Share};
use crate::queue::fair::Fractions;

impl Share {
    pub(super) fn plus(&self, other: &Self) -> Self {
        Self {
            amount: self.amount.plus(&other.amount),
            gpu_milli: self.gpu_milli.saturating_add(other.gpu_milli),
        }
    }

    pub(super) fn less(&self, other: &Self) -> Self {
        Self {
            amount: self.amount.less(&other.amount),
            gpu_milli: self.gpu_milli.saturating_sub(other.gpu_milli),
        }
    }

    fn each(&self) -> [(Resource, u64); 5] {
        [
            (Resource::Gpus, self.gpu_milli),
            (Resource::Cpus, self.amount.cpu_milli),
            (Resource::Memory, self.amount.memory_bytes),
            (Resource::Hugepages, self.amount.hugepage_bytes),
            (Resource::Sandboxes, self.amount.sandboxes.into()),
        ]
    }
}

/// What tasks use that run.
pub(super) fn used_by(item: &Item, tasks: &[TaskPlace]) -> Share {
    let gpu_milli = tasks.iter().flat_map(|task| &task.gpus).map(|gpu| u64::from(gpu.part.milli)).sum();
    Share { gpu_milli, ..item.share(u32::try_from(tasks.len()).unwrap_or(u32::MAX)) }
}

/// Pools with their ancestors.
#[derive(Clone, Debug, Default)]
pub(super) struct Pools {
    pub by_name: HashMap<String, usize>,
    /// Itself, then its ancestors.
    pub lines: Vec<Vec<usize>>,
    selectors: Vec<Vec<Constraint>>,
}

impl Pools {
    pub fn new(settings: &Settings) -> Self {
        let pools = &settings.pools;
        let by_name: HashMap<String, usize> =
            pools.iter().enumerate().map(|(index, pool)| (pool.name.clone(), index)).collect();
        let line = |index: usize| {
            let mut line = vec![index];
            let parent = |pool: &Pool| pool.parent.as_ref().and_then(|name| by_name.get(name)).copied();
            while let Some(next) = parent(&pools[line[line.len() - 1]]).filter(|next| !line.contains(next)) {
                line.push(next);
            }
            line
        };
        let lines: Vec<Vec<usize>> = (0..pools.len()).map(line).collect();
        let selectors = lines
            .iter()
            .map(|line| line.iter().flat_map(|&pool| pools[pool].selector.iter().cloned()).collect())
            .collect();
        Self { by_name, lines, selectors }
    }

    /// Whether the node is one of the pool's.
    pub fn admits(&self, pool: usize, node: &Node) -> bool {
        self.selectors[pool].iter().all(|constraint| constraint.holds(&node.name, &node.labels))
    }

    /// All that each pool's nodes have.
    pub fn capacity(&self, nodes: &[Node]) -> Vec<Share> {
        let mut capacity = vec![Share::default(); self.lines.len()];
        for node in nodes {
            let share = Share { amount: node.total, gpu_milli: 1000 * node.gpus.len() as u64 };
            for (pool, capacity) in capacity.iter_mut().enumerate() {
                if self.admits(pool, node) {
                    *capacity = capacity.plus(&share);
                }
            }
        }
        capacity
    }
}

/// What is used in a cycle; see the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Accounts {
    capacity: Vec<Share>,
    pools: Vec<Share>,
    tenants: HashMap<(u32, u32), Share, Quick>,
}

impl Accounts {
    /// Of pools in which nothing runs.
    pub fn new(capacity: Vec<Share>) -> Self {
        let pools = vec![Share::default(); capacity.len()];
        Self { capacity, pools, tenants: HashMap::default() }
    }

    /// All that a pool's nodes have.
    pub fn capacity(&self, pool: usize) -> &Share {
        &self.capacity[pool]
    }

    pub fn add(&mut self, pools: &[usize], tenants: &[u32], share: &Share) {
        self.change(pools, tenants, |used| *used = used.plus(share));
    }

    pub fn remove(&mut self, pools: &[usize], tenants: &[u32], share: &Share) {
        self.change(pools, tenants, |used| *used = used.less(share));
    }

    fn change(&mut self, pools: &[usize], tenants: &[u32], change: impl Fn(&mut Share)) {
        for &pool in pools {
            change(&mut self.pools[pool]);
            for &tenant in tenants {
                change(self.tenants.entry((pool as u32, tenant)).or_default());
            }
        }
    }

    /// What a pool uses.
    pub fn pool(&self, pool: usize) -> Share {
        self.pools[pool]
    }

    /// What a tenant uses of a pool, with all below it.
    pub fn tenant(&self, pool: usize, tenant: u32) -> Share {
        self.tenants.get(&(pool as u32, tenant)).copied().unwrap_or_default()
    }

    /// What everybody has of each pool, as parts of it.
    pub fn fractions(&self) -> impl Iterator<Item = ((u32, u32), Fractions)> {
        self.tenants.iter().map(|(&(pool, tenant), used)| {
            ((pool, tenant), Fractions::of(used, &self.capacity[pool as usize]))
        })
    }

    /// The first limit that this much more would pass, nearest first.
    pub fn limit(
        &self,
        settings: &Settings,
        tenants: &[TenantInfo],
        line: &[usize],
        item: &Item,
        share: &Share,
    ) -> Option<(LimitKey, LimitReached)> {
        for &pool in line {
            for &tenant in &tenants[item.tenant as usize].line {
                let info = &tenants[tenant as usize];
                if info.quota.limit.is_some() {
                    let used = self.tenant(pool, tenant);
                    if let Some((resource, limit, used, needed)) = passed(&info.quota, &used, share) {
                        let (tenant_name, pool_name) =
                            (Some(info.name.clone()), settings.pools[pool].name.clone());
                        let reached = LimitReached {
                            tenant: tenant_name,
                            pool: pool_name,
                            resource,
                            limit,
                            used,
                            needed,
                        };
                        return Some(((pool, Some(tenant)), reached));
                    }
                }
            }
            let quota = &settings.pools[pool].quota;
            if let Some((resource, limit, used, needed)) = passed(quota, &self.pools[pool], share) {
                let pool_name = settings.pools[pool].name.clone();
                let reached = LimitReached { tenant: None, pool: pool_name, resource, limit, used, needed };
                return Some(((pool, None), reached));
            }
        }
        None
    }
}

/// Whose limit: a pool's, or a tenant's in it.
pub(super) type LimitKey = (usize, Option<u32>);

/// What a limit has no room for.
fn passed(quota: &Quota, used: &Share, more: &Share) -> Option<(Resource, u64, u64, u64)> {
    let limit = quota.limit.as_ref()?;
    let each = limit.each().into_iter().zip(used.each()).zip(more.each());
    each.filter(|((_, _), (_, more))| *more > 0)
        .find(|(((_, limit), (_, used)), (_, more))| used.saturating_add(*more) > *limit)
        .map(|(((resource, limit), (_, used)), (_, more))| (resource, limit, used, more))
}

/// Whether a guarantee covers what is used and this much more, in all that it names: what it has
/// nothing of does not count unless it has nothing at all.
pub(super) fn covers(quota: &Quota, used: &Share, more: &Share) -> bool {
    let Some(guaranteed) = &quota.guaranteed else { return false };
    let named = guaranteed.each().into_iter().zip(used.each()).zip(more.each());
    let mut named = named.filter(|((own, _), _)| own.1 > 0).peekable();
    named.peek().is_some() && named.all(|(((_, own), (_, used)), (_, more))| used.saturating_add(more) <= own)
}

/// Whether somebody uses more than his guarantee in anything it names; without a guarantee all is
/// borrowed.
pub(super) fn borrows(quota: &Quota, used: &Share) -> bool {
    let Some(guaranteed) = &quota.guaranteed else { return true };
    guaranteed.each().into_iter().zip(used.each()).any(|((_, own), (_, used))| own > 0 && used > own)
}
