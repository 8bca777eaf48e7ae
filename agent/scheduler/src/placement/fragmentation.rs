//! How much of a node's free GPUs the typical tasks could not use.
//!
//! - *Stranded*, for one more task: the measure of Weng et al., "Beware of Fragmentation: Scheduling
//!   GPU-Sharing Workloads with Fragmentation Gradient Descent", ATC'23, section 4: for each typical
//!   task the free GPU thousandths that it cannot use (all, where CPUs, memory, model or number do not
//!   suffice; otherwise those of devices with too little left), weighted by its part of the demand.
//! - *Starved*, for as many tasks as the devices hold: the first measure calls eight free GPUs usable as
//!   long as the node has CPUs for one task. This one counts how many of them the CPUs and the memory
//!   are enough for, which sees the balance of a node tip long before its last CPU is gone.
//!
//! - *Worth* and *reach*: what the rests of the devices are worth at the prices of [`super::cutting`],
//!   and how much of that can be reached: worth times the part of the tasks that fit on the device for
//!   which the CPUs, memory and model suffice, to a power below one, because a node that only every tenth
//!   task can use is filled by those, as long as there are enough of them.
//!
//! All are in GPU thousandths, and are measured in one pass.

use std::collections::HashMap;

use super::cutting;
use super::demand::Demand;
use crate::model::{Amount, Fold, Gpu, GpuFree, GpuRequest, Node, Profile, Share, Sharing, WHOLE};

/// Part of the tasks that can use a rest, to this power, is the part of its worth that is in reach.
const REACH_POWER: f64 = 0.3;

/// The measures of a node's state.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Fragments {
    /// For one more task.
    pub(super) stranded: f64,
    /// For as many tasks as the devices hold.
    pub(super) starved: f64,
    /// Of the rests of the devices.
    pub(super) worth: f64,
    /// How much of that is in reach.
    pub(super) reach: f64,
}

/// Typical tasks that ask the same of devices.
#[derive(Clone, Debug)]
struct Class {
    request: GpuRequest,
    /// Bits of the node's devices that it accepts.
    accepted: u64,
    /// Weight of all its tasks, and of those that fit now.
    weight: f64,
    fitting: f64,
}

/// A typical task.
#[derive(Clone, Debug)]
struct Item {
    class: usize,
    amount: Amount,
    per_cpu: f64,
    per_byte: f64,
    weight: f64,
    /// Its part of the demand.
    part: f64,
}

/// Measures states of nodes that have the same devices.
#[derive(Clone, Debug)]
pub(super) struct Measure {
    classes: Vec<Class>,
    items: Vec<Item>,
    /// By class, for the state at hand: tasks that the devices hold, thousandths that they can use.
    holds: Vec<(u32, f64)>,
    /// Weight of tasks that can never run here: all that is free is lost for them.
    never: f64,
    /// Worth of what can be left of a device.
    prices: Prices,
    /// By kind of rest, for the state at hand: its state and what is in reach of its worth.
    rests: Vec<(GpuFree, f64)>,
    /// The devices can be divided in different ways.
    mixed: bool,
}

impl Measure {
    /// For a node's devices. `importance`: a task's weight in the first two measures is its part of the
    /// demand times the GPUs of one task to that power. Tasks without GPUs count only in
    /// [`Self::published`].
    pub(super) fn new(node: &Node, demand: &Demand, importance: f64, prices: Prices) -> Self {
        Self::with(node, demand, importance, prices, 0.0)
    }

    /// The published measure: free GPUs are of no use for tasks without GPUs. That is the same for all
    /// nodes, but makes growth smaller, and its truncation to integers coarser.
    pub(super) fn published(node: &Node, demand: &Demand) -> Self {
        let without = demand.typical().filter(|(task, _)| task.gpus.is_none());
        let without = without.map(|(_, weight)| weight).sum();
        Self::with(node, demand, 0.0, Prices::default(), without)
    }

    fn with(node: &Node, demand: &Demand, importance: f64, prices: Prices, without: f64) -> Self {
        let (mut classes, mut items): (Vec<Class>, Vec<Item>) = (Vec::new(), Vec::new());
        let (mut total, mut never) = (without, without);
        for (task, part) in demand.typical() {
            let Some(request) = &task.gpus else { continue };
            let weight = part * gpus_of(request, &node.gpus).powf(importance);
            total += weight;
            let accepted = (0..).zip(&node.gpus).filter(|(_, gpu)| request.accepts(gpu));
            let accepted = accepted.fold(0_u64, |bits, (at, _)| bits | 1_u64.checked_shl(at).unwrap_or(0));
            let accepted = if accepted.count_ones() < request.count { 0 } else { accepted };
            let same = |class: &Class| {
                class.accepted == accepted
                    && class.request.count == request.count
                    && class.request.share == request.share
            };
            let class = classes.iter().position(same).unwrap_or_else(|| {
                classes.push(Class { request: request.clone(), accepted, weight: 0.0, fitting: 0.0 });
                classes.len() - 1
            });
            classes[class].weight += part;
            if accepted == 0 {
                never += weight;
                continue;
            }
            items.push(Item {
                class,
                amount: task.amount,
                per_cpu: 1.0 / task.amount.cpu_milli.max(1) as f64,
                per_byte: 1.0 / task.amount.memory_bytes.max(1) as f64,
                weight,
                part,
            });
        }
        let total = if total > 0.0 { total } else { 1.0 };
        for item in &mut items {
            item.weight /= total;
        }
        let holds = vec![(0, 0.0); classes.len()];
        let mixed = node.gpus.iter().any(|gpu| gpu.sharing != node.gpus[0].sharing);
        Self { classes, items, holds, never: never / total, prices, rests: Vec::new(), mixed }
    }

    /// Of this state of it.
    pub(super) fn of(&mut self, gpus: &[Gpu], amount: &Amount, free: &[GpuFree]) -> Fragments {
        let total: f64 = free.iter().map(|gpu| f64::from(gpu.milli)).sum();
        if total == 0.0 {
            return Fragments::default();
        }
        for (class, holds) in self.classes.iter_mut().zip(&mut self.holds) {
            *holds = class.holds(gpus, free);
            class.fitting = 0.0;
        }
        let (cpu, memory) = (amount.cpu_milli as f64, amount.memory_bytes as f64);
        let (mut stranded, mut starved) = (self.never * total, self.never * total);
        for item in &self.items {
            let fits = amount.fits(&item.amount);
            let (holds, usable) = self.holds[item.class];
            if fits {
                self.classes[item.class].fitting += item.part;
            }
            if holds == 0 || !fits {
                stranded += item.weight * total;
                starved += item.weight * total;
                continue;
            }
            stranded += item.weight * (total - usable);
            let served = (cpu * item.per_cpu).min(memory * item.per_byte) / f64::from(holds);
            starved += item.weight * (total - usable * served.min(1.0));
        }
        let (worth, reach) = self.worth(gpus, free);
        Fragments { stranded, starved, worth, reach }
    }

    /// What the rests are worth, and how much of that is in reach.
    fn worth(&mut self, gpus: &[Gpu], free: &[GpuFree]) -> (f64, f64) {
        let whole = free.iter().filter(|gpu| gpu.is_whole()).count();
        let (mut sum, mut in_reach) = (0.0, 0.0);
        self.rests.clear();
        for (gpu, &rest) in gpus.iter().zip(free) {
            let worth = self.prices.of(gpu, rest);
            if worth <= 0.0 {
                continue;
            }
            sum += worth;
            // Most devices of a node are alike: what was found for one holds for the others.
            if let Some((_, reach)) = self.rests.iter().find(|(other, _)| *other == rest && !self.mixed) {
                in_reach += reach;
                continue;
            }
            let (mut all, mut fitting) = (0.0, 0.0);
            for class in self.classes.iter().filter(|class| class.cut_from(gpu, rest, whole)) {
                all += class.weight;
                fitting += class.fitting;
            }
            let reach = if all > 0.0 { worth * (fitting / all).powf(REACH_POWER) } else { 0.0 };
            self.rests.push((rest, reach));
            in_reach += reach;
        }
        (sum, in_reach)
    }
}

impl Class {
    /// How many such tasks the free devices hold, and the thousandths of devices that one could use.
    fn holds(&self, gpus: &[Gpu], free: &[GpuFree]) -> (u32, f64) {
        let (mut holds, mut usable) = (0, 0.0);
        if self.accepted == 0 {
            return (0, 0.0);
        }
        for (at, (gpu, free)) in gpus.iter().zip(free).enumerate() {
            if self.accepted >> at & 1 == 0 {
                continue;
            }
            let count = match &self.request.share {
                Share::Whole => u32::from(free.is_whole()),
                Share::Milli(milli) => u32::from(free.milli / (*milli).max(1)),
                share @ Share::Profile(_) => instances(gpu, *free, share),
            };
            if count > 0 {
                holds += count;
                usable += f64::from(free.milli);
            }
        }
        let holds = holds / self.request.count.max(1);
        if holds == 0 { (0, 0.0) } else { (holds, usable) }
    }

    /// Whether such a task could be cut from a rest, whatever its model; `whole` devices are free.
    fn cut_from(&self, gpu: &Gpu, rest: GpuFree, whole: usize) -> bool {
        match &self.request.share {
            Share::Whole => rest.is_whole() && whole >= self.request.count as usize,
            Share::Milli(milli) => rest.milli >= *milli,
            share @ Share::Profile(_) => gpu.part(rest, share).is_some(),
        }
    }
}

/// What rests of devices are worth, in thousandths of a device.
#[derive(Clone, Debug, Default)]
pub(super) struct Prices {
    /// Of freely divided devices, by cells of [`UNIT`] thousandths.
    milli: Vec<f64>,
    /// Of partitioned ones: by profiles, and then by free slots and compute slices.
    mig: Vec<(Vec<Profile>, Vec<f64>)>,
}

/// Cells of this many thousandths: finer ones cost time, published shares are multiples of ten.
const UNIT: u16 = 10;

impl Prices {
    /// For this mix, and the partitioned devices of a node.
    pub(super) fn new(demand: &Demand) -> Self {
        let mut pieces: Vec<(u16, f64)> = Vec::new();
        for (share, weight) in shares(demand) {
            let Share::Milli(milli) = share else { continue };
            match pieces.iter_mut().find(|(other, _)| other == milli) {
                Some((_, sum)) => *sum += weight,
                None => pieces.push((*milli, weight)),
            }
        }
        pieces.sort_by(|(one, first), (two, second)| second.total_cmp(first).then(one.cmp(two)));
        pieces.truncate(cutting::MOST_PIECES);
        pieces.sort_unstable_by_key(|(milli, _)| *milli);
        Self { milli: cutting::rests(&pieces, UNIT), mig: Vec::new() }
    }

    /// The same, and those of the node's partitioned devices.
    #[must_use]
    pub(super) fn with_partitions_of(mut self, node: &Node, demand: &Demand) -> Self {
        for gpu in &node.gpus {
            let Sharing::Mig(profiles) = &gpu.sharing else { continue };
            if self.mig.iter().all(|(known, _)| known != profiles) {
                let weight = |profile: &Profile| {
                    let of = |share: &Share| matches!(share, Share::Profile(name) if *name == profile.name);
                    shares(demand).filter(|(share, _)| of(share)).map(|(_, weight)| weight).sum()
                };
                let demand: Vec<f64> = profiles.iter().map(weight).collect();
                self.mig.push((profiles.clone(), cutting::partitions(profiles, &demand)));
            }
        }
        self
    }

    fn of(&self, gpu: &Gpu, rest: GpuFree) -> f64 {
        match &gpu.sharing {
            _ if rest.is_whole() => f64::from(WHOLE),
            Sharing::Whole => 0.0,
            Sharing::Milli => self.milli.get(usize::from(rest.milli / UNIT)).copied().unwrap_or(0.0),
            Sharing::Mig(profiles) => {
                let known = self.mig.iter().find(|(known, _)| known == profiles);
                let at = usize::from(rest.slots) * cutting::COMPUTE + usize::from(rest.compute);
                known.and_then(|(_, table)| table.get(at)).copied().unwrap_or(0.0)
            }
        }
    }
}

/// Shares that are asked for, with their parts of the demand.
fn shares(demand: &Demand) -> impl Iterator<Item = (&Share, f64)> {
    demand.typical().filter_map(|(task, weight)| Some((&task.gpus.as_ref()?.share, weight)))
}

/// How many MIG instances of one profile fit.
pub(super) fn instances(gpu: &Gpu, mut free: GpuFree, share: &Share) -> u32 {
    let mut count = 0;
    while let Some(part) = gpu.part(free, share) {
        free.milli = free.milli.saturating_sub(part.milli);
        free.slots &= !part.slots;
        free.compute -= part.compute;
        count += 1;
    }
    count
}

/// Whole GPUs, or the part of one, that a task takes.
fn gpus_of(request: &GpuRequest, gpus: &[Gpu]) -> f64 {
    match &request.share {
        Share::Whole => f64::from(request.count),
        Share::Milli(milli) => f64::from(*milli) / 1000.0,
        Share::Profile(name) => {
            let slots = gpus.iter().find_map(|gpu| gpu.profile(name)).map_or(1, |profile| profile.slots);
            f64::from(slots) / 8.0
        }
    }
}

/// Nodes by their devices: those of one kind are measured by the same tables.
#[derive(Clone, Debug, Default)]
pub(super) struct Kinds {
    by_devices: HashMap<u64, Kind>,
    /// By node: its fingerprint when it was last looked at, and its kind.
    nodes: Vec<(u64, Kind)>,
}

/// A kind of node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kind {
    /// Its number, from 0 on.
    pub(super) number: u32,
    /// Its devices are not all alike: it matters which of them is free.
    pub(super) mixed: bool,
}

impl Kinds {
    /// The kind of a node, which has this fingerprint.
    pub(super) fn of(&mut self, index: u32, node: &Node, fingerprint: u64) -> Kind {
        let index = index as usize;
        if self.nodes.len() <= index {
            // No node has this fingerprint: it is that of nothing.
            self.nodes.resize(index + 1, (!fingerprint, Kind::default()));
        }
        let (known, kind) = self.nodes[index];
        if known == fingerprint {
            return kind;
        }
        let print = |gpu: &Gpu| Fold::of(&(&gpu.model, gpu.memory_bytes, &gpu.sharing));
        let devices = node.gpus.iter().fold(0, |hash, gpu| Fold::mix(hash, print(gpu)));
        let mixed = node.gpus.iter().any(|gpu| print(gpu) != print(&node.gpus[0]));
        let number = u32::try_from(self.by_devices.len()).unwrap_or(u32::MAX);
        let kind = *self.by_devices.entry(devices).or_insert(Kind { number, mixed });
        self.nodes[index] = (fingerprint, kind);
        kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TaskRequest;

    fn node(gpus: usize) -> Node {
        let gpu = Gpu {
            id: String::new(),
            model: "T4".to_owned(),
            memory_bytes: 16 << 30,
            numa: None,
            switch: None,
            link: None,
            partition: None,
            sharing: Sharing::Milli,
        };
        Node { gpus: vec![gpu; gpus], ..Node::default() }
    }

    fn task(cpu_milli: u64, share: Share, count: u32) -> TaskRequest {
        let amount = Amount { cpu_milli, ..Amount::default() };
        TaskRequest { amount, gpus: Some(GpuRequest { share, ..GpuRequest::whole(count) }) }
    }

    fn free(milli: u16) -> GpuFree {
        if milli == 1000 { GpuFree::ALL } else { GpuFree { milli, slots: 0xff, compute: 7 } }
    }

    #[test]
    fn what_typical_tasks_cannot_use_is_stranded() {
        let node = node(2);
        let (half, whole) = (task(1000, Share::Milli(500), 1), task(4000, Share::Whole, 1));
        let demand = Demand::of([(&half, 1.0), (&whole, 1.0)]);
        let mut measure = Measure::new(&node, &demand, 0.0, Prices::new(&demand));
        let cpus = |cpu_milli| Amount { cpu_milli, ..Amount::default() };
        // The half device is lost for whole tasks, the rest is not.
        let state = [free(500), free(1000)];
        assert_eq!(measure.of(&node.gpus, &cpus(8000), &state).stranded, 250.0);
        // With two CPUs no whole task runs: all is lost for them.
        assert_eq!(measure.of(&node.gpus, &cpus(2000), &state).stranded, 750.0);
        assert_eq!(measure.of(&node.gpus, &cpus(0), &[free(0), free(0)]).stranded, 0.0);
    }

    #[test]
    fn cpus_that_are_enough_for_one_task_starve_the_others() {
        let node = node(8);
        let demand = Demand::of([(&task(4000, Share::Whole, 1), 1.0)]);
        let mut measure = Measure::new(&node, &demand, 0.0, Prices::new(&demand));
        let at = |measure: &mut Measure, cpu_milli| {
            measure.of(
                &node.gpus,
                &Amount { cpu_milli, memory_bytes: 1 << 40, ..Amount::default() },
                &[free(1000); 8],
            )
        };
        let few = at(&mut measure, 16_000);
        assert_eq!((few.stranded, few.starved), (0.0, 4000.0));
        assert_eq!((few.worth, few.reach), (8000.0, 8000.0));
        assert_eq!(at(&mut measure, 32_000).starved, 0.0);
        assert_eq!(at(&mut measure, 3_999).reach, 0.0);
    }
}
