//! Gangs with what does not change of them between cycles: their pool, tenant, shape and group of
//! similar gangs, as indices.

use std::collections::HashMap;
use std::sync::Arc;

use lathe_api::job::IsolationClass;

use crate::model::{
    Amount, Cluster, Constraint, Fold, Gang, GpuRequest, Isolation, Quick, Scope, Share as GpuShare, Size,
};
use crate::policy::{Quota, Settings, Share};
use crate::queue::estimate::{Estimator, Similar};

/// Families and shapes that are numbered before counting begins anew: what users ask for does not end.
const MOST_NUMBERS: usize = 100_000;

/// A gang, waiting or running, as indices.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub gang: Arc<Gang>,
    /// None if there is no such pool.
    pub pool: Option<usize>,
    pub tenant: u32,
    /// Gangs of one family differ in their numbers alone.
    pub family: u32,
    /// Of a family those with the same numbers: one finds room where and when another does.
    pub shape: u32,
    pub size: Hardness,
    pub similar: Similar,
    /// GPUs of one task, in thousandths.
    pub gpu_milli: u64,
    /// Of its ID.
    pub print: u64,
}

impl Item {
    /// What so many tasks use.
    pub fn share(&self, tasks: u32) -> Share {
        Share {
            amount: self.gang.taken().times(tasks),
            gpu_milli: self.gpu_milli.saturating_mul(tasks.into()),
        }
    }
}

/// What makes one gang of a family harder to place than another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Hardness {
    pub amount: Amount,
    pub gpus: u32,
    pub tasks: u32,
}

impl Hardness {
    fn of(gang: &Gang) -> Self {
        Self { amount: gang.taken(), gpus: gang.task.gpu_count(), tasks: gang.tasks.min }
    }

    /// Whether this one finds no room where the other found none.
    pub fn at_least(&self, other: &Self) -> bool {
        self.tasks >= other.tasks && self.gpus >= other.gpus && self.amount.fits(&other.amount)
    }
}

#[derive(Clone, Debug)]
pub(super) struct TenantInfo {
    pub name: String,
    /// Itself, then its ancestors.
    pub line: Vec<u32>,
    pub weight: f64,
    pub quota: Quota,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Family {
    pool: String,
    class: IsolationClass,
    gpus: Option<GpuRequest>,
    constraints: Vec<Constraint>,
    tolerations: Vec<(String, Option<String>)>,
    scope: Scope,
    isolation: Isolation,
    /// Tenants differ where they keep each other away.
    tenant: Option<u32>,
    elastic: bool,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub tenants: Vec<TenantInfo>,
    by_name: HashMap<String, u32>,
    families: HashMap<Family, u32>,
    shapes: HashMap<(u32, Hardness), u32>,
    /// By the gang's address, which stays the gang's while the item holds it.
    items: HashMap<usize, Arc<Item>, Quick>,
    profiles: HashMap<String, u64>,
    isolated: bool,
}

impl Known {
    pub fn new(settings: &Settings) -> Self {
        let mut known = Self::default();
        for tenant in &settings.tenants {
            known.tenant(&tenant.name);
        }
        for tenant in &settings.tenants {
            let index = known.by_name[&tenant.name] as usize;
            let mut line = vec![known.by_name[&tenant.name]];
            let mut at = tenant;
            while let Some(parent) = &at.parent {
                let parent_index = known.tenant(parent);
                if line.contains(&parent_index) {
                    break;
                }
                line.push(parent_index);
                let Some(next) = settings.tenants.iter().find(|other| other.name == *parent) else { break };
                at = next;
            }
            let info = &mut known.tenants[index];
            (info.line, info.weight, info.quota) = (line, tenant.weight.0, tenant.quota.clone());
        }
        known
    }

    /// A tenant's number.
    pub fn tenant(&mut self, name: &str) -> u32 {
        if let Some(&index) = self.by_name.get(name) {
            return index;
        }
        let index = u32::try_from(self.tenants.len()).unwrap_or(u32::MAX);
        self.by_name.insert(name.to_owned(), index);
        self.tenants.push(TenantInfo {
            name: name.to_owned(),
            line: vec![index],
            weight: 1.0,
            quota: Quota::default(),
        });
        index
    }

    /// To be called before a cycle's gangs are looked up; `isolated` says whether any gang keeps
    /// other tenants away. True if families and shapes have other numbers from now on.
    pub fn begin(&mut self, estimator: &mut Estimator, isolated: bool) -> bool {
        let anew = estimator.prune()
            || isolated != self.isolated
            || self.families.len() > MOST_NUMBERS
            || self.shapes.len() > MOST_NUMBERS;
        if anew {
            self.items.clear();
            self.families.clear();
            self.shapes.clear();
        }
        self.isolated = isolated;
        anew
    }

    /// To be called when a cycle is over, with how many gangs there are: those that nobody holds are
    /// forgotten.
    pub fn end(&mut self, alive: usize) {
        if self.items.len() > 2 * alive + 1024 {
            self.items.retain(|_, item| Arc::strong_count(item) > 1);
        }
    }

    /// How many shapes there are: their numbers are below it.
    pub fn shapes(&self) -> usize {
        self.shapes.len()
    }

    /// What is known of a gang.
    pub fn item(
        &mut self,
        gang: &Arc<Gang>,
        pools: &HashMap<String, usize>,
        estimator: &mut Estimator,
        cluster: &Cluster,
    ) -> Arc<Item> {
        let address = Arc::as_ptr(gang) as usize;
        if let Some(item) = self.items.get(&address) {
            return Arc::clone(item);
        }
        let tenant = self.tenant(&gang.tenant);
        let family = Family {
            pool: gang.pool.clone(),
            class: gang.class,
            gpus: gang.task.gpus.clone().map(|gpus| GpuRequest { count: 0, ..gpus }),
            constraints: gang.constraints.clone(),
            tolerations: gang.tolerations.clone(),
            scope: gang.scope,
            isolation: gang.isolation,
            tenant: self.isolated.then_some(tenant),
            elastic: gang.tasks != Size::exactly(gang.tasks.min),
        };
        let next = u32::try_from(self.families.len()).unwrap_or(u32::MAX);
        let family = *self.families.entry(family).or_insert(next);
        let size = Hardness::of(gang);
        let next = u32::try_from(self.shapes.len()).unwrap_or(u32::MAX);
        let item = Arc::new(Item {
            gang: Arc::clone(gang),
            pool: pools.get(&gang.pool).copied(),
            tenant,
            family,
            shape: *self.shapes.entry((family, size)).or_insert(next),
            size,
            similar: estimator.similar(gang),
            gpu_milli: self.gpu_milli(gang, cluster),
            print: Fold::of(&gang.id),
        });
        self.items.insert(address, Arc::clone(&item));
        item
    }

    fn gpu_milli(&mut self, gang: &Gang, cluster: &Cluster) -> u64 {
        let Some(gpus) = &gang.task.gpus else { return 0 };
        let each = match &gpus.share {
            GpuShare::Whole => 1000,
            GpuShare::Milli(milli) => u64::from(*milli),
            GpuShare::Profile(name) => match self.profiles.get(name) {
                Some(&milli) => milli,
                None => {
                    let mut all = cluster.nodes().iter().flat_map(|node| &node.gpus);
                    let slots = all.find_map(|gpu| gpu.profile(name)).map(|profile| profile.slots);
                    // Until a device has such instances, none can start.
                    let milli = slots.map_or(0, |slots| u64::from(slots) * 125);
                    if milli > 0 {
                        self.profiles.insert(name.clone(), milli);
                    }
                    milli
                }
            },
        };
        each * u64::from(gpus.count)
    }
}
