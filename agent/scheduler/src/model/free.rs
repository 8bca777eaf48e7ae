//! What is free of a node, and who is there.

use std::sync::Arc;

use super::{Amount, Gang, GpuFree, GpuPlace, Isolation, Node, NumaNode, Share, TakeError, TaskPlace};

/// What is free of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Free {
    /// What adds up.
    pub amount: Amount,
    /// By GPU, in the node's order.
    pub gpus: Vec<GpuFree>,
    /// By NUMA node; empty where they do not matter. A task that takes from none of them in
    /// particular takes from the freest first.
    pub numa: Vec<Amount>,
    /// Tasks by tenant: name and number, in the order of the names.
    pub tenants: Vec<(Arc<str>, u32)>,
    /// Tenants that demand the node for themselves, with the number of tasks that do.
    pub alone: Vec<(Arc<str>, u32)>,
    /// Who uses GPUs below which PCIe switch.
    pub switches: Vec<SwitchUse>,
    /// Tasks by how they use GPUs: the number of whole devices, or 0 for a share of one; and how many.
    pub uses: Vec<(u32, u32)>,
}

/// A tenant's tasks with GPUs below one PCIe switch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SwitchUse {
    /// The switch, as [`super::Gpu::switch`] numbers it.
    pub switch: Option<u8>,
    /// Whose.
    pub tenant: Arc<str>,
    /// How many.
    pub tasks: u32,
    /// How many of them demand the switch for themselves.
    pub alone: u32,
}

/// Each GPU's switch, with the GPU's position in the task's list.
fn switches<'a>(node: &'a Node, place: &'a TaskPlace) -> impl Iterator<Item = (usize, Option<u8>)> + 'a {
    let switch = |index: u8| node.gpus.get(usize::from(index)).and_then(|gpu| gpu.switch);
    place.gpus.iter().map(move |gpu| switch(gpu.index)).enumerate()
}

/// How a task uses GPUs: the number of whole devices, or 0 for a share of one.
fn use_of(gang: &Gang) -> Option<u32> {
    let request = gang.task.gpus.as_ref()?;
    Some(if request.share == Share::Whole { request.count } else { 0 })
}

impl Free {
    /// All of a node.
    pub fn all(node: &Node) -> Self {
        Self {
            amount: node.total,
            gpus: vec![GpuFree::ALL; node.gpus.len()],
            numa: node.numa.iter().map(|numa| numa.total).collect(),
            tenants: Vec::new(),
            alone: Vec::new(),
            switches: Vec::new(),
            uses: Vec::new(),
        }
    }

    /// Thousandths of GPUs that are free.
    pub fn gpu_milli(&self) -> u64 {
        self.gpus.iter().map(|gpu| u64::from(gpu.milli)).sum()
    }

    /// GPUs that nobody uses.
    pub fn whole_gpus(&self) -> u32 {
        u32::try_from(self.gpus.iter().filter(|gpu| gpu.is_whole()).count()).unwrap_or(u32::MAX)
    }

    /// Whether a gang's isolation, and that of those that run, let a task of it onto the node.
    pub fn admits(&self, tenant: &str, isolation: Isolation) -> bool {
        self.alone.iter().all(|(name, _)| **name == *tenant)
            && (isolation != Isolation::Node || self.tenants.iter().all(|(name, _)| **name == *tenant))
    }

    /// The same for a GPU below this switch. GPUs whose switch is not known count as below one.
    pub fn switch_admits(&self, switch: Option<u8>, tenant: &str, isolation: Isolation) -> bool {
        self.switches.iter().all(|user| {
            user.switch != switch
                || *user.tenant == *tenant
                || (user.alone == 0 && isolation != Isolation::Switch)
        })
    }

    /// Whether a task that runs does not share the node or a switch with all.
    pub fn is_isolated(&self) -> bool {
        !self.alone.is_empty() || self.switches.iter().any(|user| user.alone > 0)
    }

    pub(crate) fn take(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) -> Result<(), TakeError> {
        let amount = gang.taken();
        if !self.amount.fits(&amount) {
            return Err(TakeError::Amount { node: node.name.clone() });
        }
        let switch = |index: u8| node.gpus.get(usize::from(index)).and_then(|gpu| gpu.switch);
        let isolated = self.admits(&gang.tenant, gang.isolation)
            && (self.switches.is_empty()
                || place
                    .gpus
                    .iter()
                    .all(|gpu| self.switch_admits(switch(gpu.index), &gang.tenant, gang.isolation)));
        if !isolated {
            return Err(TakeError::Isolation { node: node.name.clone(), tenant: gang.tenant.clone() });
        }
        for (at, &GpuPlace { index, part }) in place.gpus.iter().enumerate() {
            let twice = place.gpus[..at].iter().any(|other| other.index == index);
            let free = self.gpus.get(usize::from(index)).filter(|_| !twice);
            let enough = free.is_some_and(|free| {
                free.milli >= part.milli
                    && free.slots & part.slots == part.slots
                    && free.compute >= part.compute
            });
            if !enough {
                return Err(TakeError::Gpu { node: node.name.clone(), index });
            }
        }
        for &GpuPlace { index, part } in &place.gpus {
            let free = &mut self.gpus[usize::from(index)];
            free.milli -= part.milli;
            free.slots &= !part.slots;
            free.compute -= part.compute;
        }
        self.amount = self.amount.less(&amount);
        self.take_numa(place.numa, amount);
        self.enter(node, gang, place);
        Ok(())
    }

    pub(crate) fn give(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) {
        for &GpuPlace { index, part } in &place.gpus {
            if let Some(free) = self.gpus.get_mut(usize::from(index)) {
                // No more than all: what is given back may have been withheld only in part.
                free.milli = free.milli.saturating_add(part.milli).min(GpuFree::ALL.milli);
                free.slots |= part.slots;
                free.compute = free.compute.saturating_add(part.compute).min(GpuFree::ALL.compute);
            }
        }
        self.amount = self.amount.plus(&gang.taken());
        self.give_numa(&node.numa, place.numa, gang.taken());
        self.leave(node, gang, place);
        // Which NUMA node a task took from that wanted none in particular is not remembered: where
        // nothing is left, the accounts are right again.
        if self.tenants.is_empty() && self.amount == node.total {
            self.numa.clear();
            self.numa.extend(node.numa.iter().map(|numa| numa.total));
        }
    }

    /// Less what a task will have, as far as that is there: for times other than now.
    pub(crate) fn withhold(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) {
        for &GpuPlace { index, part } in &place.gpus {
            if let Some(free) = self.gpus.get_mut(usize::from(index)) {
                free.milli = free.milli.saturating_sub(part.milli);
                free.slots &= !part.slots;
                free.compute = free.compute.saturating_sub(part.compute);
            }
        }
        self.amount = self.amount.less(&gang.taken());
        self.take_numa(place.numa, gang.taken());
        self.enter(node, gang, place);
    }

    /// What is free both here and there, beside whoever is here or there.
    pub(crate) fn limit(&mut self, other: &Self) {
        self.amount = self.amount.least(&other.amount);
        for (one, other) in self.gpus.iter_mut().zip(&other.gpus) {
            one.milli = one.milli.min(other.milli);
            one.slots &= other.slots;
            one.compute = one.compute.min(other.compute);
        }
        for (one, other) in self.numa.iter_mut().zip(&other.numa) {
            *one = one.least(other);
        }
        for (tenant, tasks) in &other.tenants {
            match self.tenants.binary_search_by(|(name, _)| name.cmp(tenant)) {
                Ok(at) => self.tenants[at].1 = self.tenants[at].1.max(*tasks),
                Err(at) => self.tenants.insert(at, (Arc::clone(tenant), *tasks)),
            }
        }
        for (tenant, tasks) in &other.alone {
            if self.alone.iter().all(|(name, _)| name != tenant) {
                self.alone.push((Arc::clone(tenant), *tasks));
            }
        }
        for user in &other.switches {
            let same = |one: &&mut SwitchUse| one.switch == user.switch && one.tenant == user.tenant;
            match self.switches.iter_mut().find(same) {
                Some(one) => one.alone = one.alone.max(user.alone),
                None => self.switches.push(user.clone()),
            }
        }
        self.switches.sort_unstable();
    }

    /// Counts a task among those of its tenant.
    fn enter(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) {
        let tenant = gang.tenant.as_str();
        let name = match self.tenants.binary_search_by(|(name, _)| (**name).cmp(tenant)) {
            Ok(at) => {
                self.tenants[at].1 += 1;
                Arc::clone(&self.tenants[at].0)
            }
            Err(at) => {
                let name: Arc<str> = tenant.into();
                self.tenants.insert(at, (Arc::clone(&name), 1));
                name
            }
        };
        if gang.isolation == Isolation::Node {
            match self.alone.iter_mut().find(|(other, _)| *other == name) {
                Some((_, tasks)) => *tasks += 1,
                None => self.alone.push((Arc::clone(&name), 1)),
            }
        }
        let alone = u32::from(gang.isolation == Isolation::Switch);
        for (at, switch) in switches(node, place) {
            if switches(node, place).take(at).any(|(_, other)| other == switch) {
                continue;
            }
            let same = |user: &&mut SwitchUse| user.switch == switch && user.tenant == name;
            match self.switches.iter_mut().find(same) {
                Some(user) => {
                    user.tasks += 1;
                    user.alone += alone;
                }
                None => {
                    let user = SwitchUse { switch, tenant: Arc::clone(&name), tasks: 1, alone };
                    let at = self.switches.partition_point(|other| *other < user);
                    self.switches.insert(at, user);
                }
            }
        }
        if let Some(gpus) = use_of(gang) {
            match self.uses.binary_search_by_key(&gpus, |(gpus, _)| *gpus) {
                Ok(at) => self.uses[at].1 += 1,
                Err(at) => self.uses.insert(at, (gpus, 1)),
            }
        }
    }

    /// Undoes [`Self::enter`].
    fn leave(&mut self, node: &Node, gang: &Gang, place: &TaskPlace) {
        let tenant = gang.tenant.as_str();
        if let Ok(at) = self.tenants.binary_search_by(|(name, _)| (**name).cmp(tenant)) {
            self.tenants[at].1 -= 1;
            if self.tenants[at].1 == 0 {
                self.tenants.remove(at);
            }
        }
        if gang.isolation == Isolation::Node {
            for (_, tasks) in self.alone.iter_mut().filter(|(name, _)| **name == *tenant) {
                *tasks = tasks.saturating_sub(1);
            }
            self.alone.retain(|(_, tasks)| *tasks > 0);
        }
        let alone = u32::from(gang.isolation == Isolation::Switch);
        for (at, switch) in switches(node, place) {
            if switches(node, place).take(at).any(|(_, other)| other == switch) {
                continue;
            }
            let same = |user: &&mut SwitchUse| user.switch == switch && *user.tenant == *tenant;
            for user in self.switches.iter_mut().filter(same) {
                user.tasks = user.tasks.saturating_sub(1);
                user.alone = user.alone.saturating_sub(alone);
            }
        }
        self.switches.retain(|user| user.tasks > 0);
        if let Some(gpus) = use_of(gang)
            && let Ok(at) = self.uses.binary_search_by_key(&gpus, |(gpus, _)| *gpus)
        {
            self.uses[at].1 -= 1;
            if self.uses[at].1 == 0 {
                self.uses.remove(at);
            }
        }
    }

    /// NUMA accounts are a preference, not a promise: what one lacks comes from the freest others.
    fn take_numa(&mut self, preferred: Option<u8>, mut amount: Amount) {
        amount.sandboxes = 0;
        if let Some(one) = preferred.and_then(|numa| self.numa.get_mut(usize::from(numa))) {
            let rest = amount.less(one);
            *one = one.less(&amount);
            amount = rest;
        }
        while amount != Amount::default() {
            let Some(one) = self.numa.iter_mut().max_by_key(|one| (one.cpu_milli, one.memory_bytes)) else {
                return;
            };
            let rest = amount.less(one);
            if rest == amount {
                return;
            }
            *one = one.less(&amount);
            amount = rest;
        }
    }

    fn give_numa(&mut self, nodes: &[NumaNode], preferred: Option<u8>, mut amount: Amount) {
        amount.sandboxes = 0;
        let preferred = preferred.map(usize::from);
        let order = preferred.into_iter().chain((0..self.numa.len()).filter(|&one| Some(one) != preferred));
        for at in order {
            let (Some(one), Some(node)) = (self.numa.get_mut(at), nodes.get(at)) else { continue };
            let room = node.total.less(one);
            let rest = amount.less(&room);
            *one = one.plus(&amount.less(&rest));
            amount = rest;
        }
    }
}
