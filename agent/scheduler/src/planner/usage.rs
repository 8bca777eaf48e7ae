//! What tenants had, by name: to be kept where a planner is not, and given to the next.

use super::Planner;
use crate::queue::fair::Fractions;

/// What tenants had of pools, fading with the planner's half-life: what fair shares go by beside what
/// they have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// The time that it was counted to.
    pub at_ms: u64,
    /// By pool, then tenant.
    pub had: Vec<TenantUsage>,
}

/// What one tenant had of one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantUsage {
    /// The pool.
    pub pool: String,
    /// The tenant; those below it count for it, too.
    pub tenant: String,
    /// On average over time that fades.
    pub had: Fractions,
}

impl Planner {
    /// What tenants had until the last cycle.
    pub fn usage(&self) -> Usage {
        let (at_ms, had) = self.ledger.all();
        let named = had.filter_map(|((pool, tenant), had)| {
            let pool = self.settings.pools.get(pool as usize)?.name.clone();
            let tenant = self.known.tenants.get(tenant as usize)?.name.clone();
            Some(TenantUsage { pool, tenant, had })
        });
        let mut had: Vec<TenantUsage> = named.collect();
        had.sort_by(|one, other| (&one.pool, &one.tenant).cmp(&(&other.pool, &other.tenant)));
        Usage { at_ms, had }
    }

    /// Goes on from there, with what is said of pools that there are. Since then nobody had anything.
    pub fn restore(&mut self, usage: &Usage) {
        let mut had = Vec::with_capacity(usage.had.len());
        for one in &usage.had {
            let Some(&pool) = self.pools.by_name.get(&one.pool) else { continue };
            let key = (u32::try_from(pool).unwrap_or(u32::MAX), self.known.tenant(&one.tenant));
            had.push((key, one.had));
        }
        self.ledger.restore(usage.at_ms, had);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Amount, Cluster, Gang, Node, TaskRequest};
    use crate::policy::{Pool, Queue, Settings};

    fn gang(id: &str, tenant: &str) -> Arc<Gang> {
        let amount = Amount { cpu_milli: 1000, sandboxes: 1, ..Amount::default() };
        Arc::new(Gang {
            id: id.to_owned(),
            tenant: tenant.to_owned(),
            pool: "p".to_owned(),
            task: TaskRequest { amount, gpus: None },
            ..Gang::default()
        })
    }

    #[test]
    fn the_next_planner_goes_on_with_what_tenants_had() {
        let pool = Pool { name: "p".to_owned(), queue: Queue::FairShare, ..Pool::default() };
        let planner = || Planner::new(Settings { pools: vec![pool.clone()], ..Settings::default() }, 1);
        let total = Amount { cpu_milli: 1000, sandboxes: 9, ..Amount::default() };
        let node = Node { total, classes: vec![Gang::default().class], ..Node::default() };
        let mut cluster = Cluster::new(vec![node]);
        let mut first = planner();
        assert_eq!(first.cycle(&mut cluster, &[gang("a", "red")], 1000).starts.len(), 1);
        cluster.end("a");
        first.cycle(&mut cluster, &[], 3_601_000);
        let usage = first.usage();
        assert_eq!((usage.at_ms, usage.had.len()), (3_601_000, 1));
        assert!(usage.had[0].had.dominant() > 0.02, "{usage:?}");

        let waiting = [gang("b", "red"), gang("c", "blue")];
        let starts = |planner: &mut Planner| {
            let plan = planner.cycle(&mut cluster.clone(), &waiting, 3_602_000);
            plan.starts.iter().map(|start| start.gang.id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(starts(&mut planner()), ["b"], "who knows nothing goes by arrival");
        let mut next = planner();
        next.restore(&usage);
        assert_eq!(starts(&mut next), ["c"]);
        // Pools that are gone are forgotten.
        let mut other = Planner::new(Settings::default(), 1);
        other.restore(&usage);
        assert_eq!(other.usage().had, []);
    }
}
