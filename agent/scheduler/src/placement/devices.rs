//! Which devices of a node a task takes, and the NUMA node of its CPUs.
//!
//! Whole devices: the tightest group that holds them, by NVLink peers below one switch, then NVLink
//! peers, then switch, then NUMA node. NVSwitch partitions are given together or not at all: a request
//! gets partitions whose devices are exactly as many as it asks for. Shares: a device of each state is
//! offered to the score, which chooses.

use super::shape::Shape;
use crate::model::{Amount, Free, Gpu, GpuPlace, GpuRequest, Isolation, Node, Share};

/// Sets of devices that one task could take: `count` devices each, one after the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Choices {
    parts: Vec<GpuPlace>,
    count: usize,
    free: Vec<u8>,
    sizes: Vec<(u64, u8)>,
    /// Devices in the same state are all offered, not only the first.
    all: bool,
}

impl Choices {
    /// With `all`, devices in the same state are all offered.
    pub(super) fn new(all: bool) -> Self {
        Self { all, ..Self::default() }
    }

    /// The sets; a single empty one for tasks without GPUs.
    pub(super) fn sets(&self) -> impl Iterator<Item = &[GpuPlace]> {
        let none = (self.count == 0).then_some(&self.parts[..0]);
        none.into_iter().chain(self.parts.chunks_exact(self.count.max(1)))
    }

    /// Finds them. With `switch` only devices below that one count. False if there is none.
    pub(super) fn find(
        &mut self,
        node: &Node,
        free: &Free,
        shape: &Shape,
        switch: Option<Option<u8>>,
    ) -> bool {
        self.parts.clear();
        let Some(request) = &shape.task.gpus else {
            self.count = 0;
            return true;
        };
        self.count = request.count as usize;
        self.usable(node, free, shape, request, switch);
        if self.free.len() < self.count || self.count == 0 {
            return false;
        }
        match &request.share {
            Share::Whole => self.whole(node, request.count),
            share => self.shares(node, free, share),
        }
        !self.parts.is_empty()
    }

    /// Devices with room for what is asked of each.
    fn usable(
        &mut self,
        node: &Node,
        free: &Free,
        shape: &Shape,
        request: &GpuRequest,
        switch: Option<Option<u8>>,
    ) {
        self.free.clear();
        // Who is below which switch matters only where somebody minds.
        let minds = !free.switches.is_empty()
            && (shape.isolation == Isolation::Switch || free.switches.iter().any(|user| user.alone > 0));
        let tenant = shape.tenant.as_deref().unwrap_or("");
        for (index, (gpu, left)) in (0_u8..).zip(node.gpus.iter().zip(&free.gpus)) {
            let room = match &request.share {
                Share::Whole => left.is_whole(),
                Share::Milli(milli) => left.milli >= *milli,
                share @ Share::Profile(_) => gpu.part(*left, share).is_some(),
            };
            if room
                && switch.is_none_or(|switch| gpu.switch == switch)
                && request.accepts(gpu)
                && (!minds || free.switch_admits(gpu.switch, tenant, shape.isolation))
            {
                self.free.push(index);
            }
        }
    }

    fn shares(&mut self, node: &Node, free: &Free, share: &Share) {
        for (at, &index) in self.free.iter().enumerate() {
            let gpu = &node.gpus[usize::from(index)];
            let left = free.gpus[usize::from(index)];
            // A part of a partition is not given away.
            let shared = gpu.partition.is_some_and(|partition| partition_size(node, partition) > 1);
            let mut before = self.free[..at].iter().filter(|_| !self.all);
            let seen = before.any(|&other| {
                let other = usize::from(other);
                free.gpus[other] == left && alike(&node.gpus[other], gpu)
            });
            if shared || seen {
                continue;
            }
            if let Some(part) = gpu.part(left, share) {
                self.parts.push(GpuPlace { index, part });
            }
        }
    }

    fn whole(&mut self, node: &Node, count: u32) {
        if self.free.iter().any(|&index| node.gpus[usize::from(index)].partition.is_some()) {
            self.partitions(node, count as usize);
        } else {
            self.align(node, count as usize);
        }
        let part = crate::model::GpuFree::ALL;
        self.parts.extend(self.free.iter().map(|&index| GpuPlace { index, part }));
    }

    /// Leaves `count` of the free devices: those closest to each other, from the tightest group.
    fn align(&mut self, node: &Node, count: usize) {
        let flat = |gpu: &Gpu| gpu.switch.is_none() && gpu.link.is_none() && gpu.numa.is_none();
        if self.free.len() == count || self.free.iter().all(|&index| flat(&node.gpus[usize::from(index)])) {
            self.free.truncate(count);
            return;
        }
        // From the tightest kind of group to the widest.
        for level in 0..LEVELS {
            self.sizes.clear();
            for &index in &self.free {
                let Some(group) = group(&node.gpus[usize::from(index)], level) else { continue };
                match self.sizes.iter_mut().find(|(other, _)| *other == group) {
                    Some((_, size)) => *size += 1,
                    None => self.sizes.push((group, 1)),
                }
            }
            let enough = self.sizes.iter().filter(|(_, size)| usize::from(*size) >= count);
            let Some(&(chosen, _)) = enough.min_by_key(|(_, size)| *size) else { continue };
            self.free.retain(|&index| group(&node.gpus[usize::from(index)], level) == Some(chosen));
            break;
        }
        self.fill(node, count);
    }

    /// Takes whole small groups of what is left, the largest first, so that the fewest are split.
    fn fill(&mut self, node: &Node, count: usize) {
        if self.free.len() == count {
            return;
        }
        let finest = |index: u8| group(&node.gpus[usize::from(index)], 2).unwrap_or(u64::MAX);
        let size = |of: u64, free: &[u8]| free.iter().filter(|&&index| finest(index) == of).count();
        let mut chosen: u64 = 0;
        let mut missing = count;
        while missing > 0 {
            let left = self.free.iter().filter(|&&index| chosen >> index & 1 == 0);
            // A group that fits and is largest; if none fits, one that is smallest.
            let best = left.min_by_key(|&&index| {
                let size = size(finest(index), &self.free);
                if size <= missing { (0, usize::MAX - size, index) } else { (1, size, index) }
            });
            let Some(&first) = best else { break };
            let of = finest(first);
            for &index in &self.free {
                if missing > 0 && finest(index) == of && chosen >> index & 1 == 0 {
                    chosen |= 1 << index;
                    missing -= 1;
                }
            }
        }
        self.free.retain(|&index| chosen >> index & 1 == 1);
    }

    /// Leaves devices of whole partitions, and single ones, that are `count` together, of the fewest
    /// partitions; or none.
    fn partitions(&mut self, node: &Node, count: usize) {
        // Units: partitions of which all devices are free, and devices that are in none.
        let mut units: Vec<(usize, u64)> = Vec::new();
        for &index in &self.free {
            let Some(partition) = node.gpus[usize::from(index)].partition else {
                units.push((1, 1 << index));
                continue;
            };
            let members =
                self.free.iter().filter(|&&other| node.gpus[usize::from(other)].partition == Some(partition));
            let bits = members.fold(0_u64, |bits, &other| bits | 1 << other);
            let size = bits.count_ones() as usize;
            if size == partition_size(node, partition) && units.iter().all(|(_, other)| *other != bits) {
                units.push((size, bits));
            }
        }
        // For each sum, the fewest units that make it: a knapsack over at most 64 devices.
        let mut best: Vec<Option<(u32, u64)>> = vec![None; count + 1];
        best[0] = Some((0, 0));
        for (size, bits) in units {
            for sum in (size..=count).rev() {
                if let Some((used, chosen)) = best[sum - size]
                    && best[sum].is_none_or(|(fewest, _)| used + 1 < fewest)
                {
                    best[sum] = Some((used + 1, chosen | bits));
                }
            }
        }
        let chosen = best[count].map_or(0, |(_, chosen)| chosen);
        self.free.retain(|&index| chosen >> index & 1 == 1);
    }
}

/// How many tasks of a shape the devices of a node hold, amounts left aside.
pub(super) fn holds(node: &Node, free: &Free, shape: &Shape, switch: Option<Option<u8>>) -> u32 {
    let Some(request) = &shape.task.gpus else { return u32::MAX };
    let mut choices = Choices { count: request.count as usize, ..Choices::default() };
    choices.usable(node, free, shape, request, switch);
    let sum =
        |count: &dyn Fn(usize) -> u32| choices.free.iter().map(|&index| count(usize::from(index))).sum();
    match &request.share {
        Share::Whole
            if choices.free.iter().any(|&index| node.gpus[usize::from(index)].partition.is_some()) =>
        {
            by_partitions(&mut choices, node, request.count as usize)
        }
        Share::Whole => u32::try_from(choices.free.len()).unwrap_or(u32::MAX) / request.count.max(1),
        Share::Milli(milli) => sum(&|index| u32::from(free.gpus[index].milli / (*milli).max(1))),
        share @ Share::Profile(_) => {
            sum(&|index| super::fragmentation::instances(&node.gpus[index], free.gpus[index], share))
        }
    }
}

/// Takes one task's devices after the other.
fn by_partitions(choices: &mut Choices, node: &Node, count: usize) -> u32 {
    let mut all = std::mem::take(&mut choices.free);
    let mut tasks = 0;
    while all.len() >= count && count > 0 {
        choices.free.clone_from(&all);
        choices.partitions(node, count);
        if choices.free.is_empty() {
            break;
        }
        all.retain(|index| !choices.free.contains(index));
        tasks += 1;
    }
    tasks
}

/// Kinds of groups of devices, the tightest first.
const LEVELS: u8 = 4;

/// The group of a device; none if it is not known.
fn group(gpu: &Gpu, level: u8) -> Option<u64> {
    match level {
        0 => Some(u64::from(gpu.link?) << 8 | u64::from(gpu.switch?)),
        1 => gpu.link.map(u64::from),
        2 => gpu.switch.map(u64::from),
        _ => gpu.numa.map(u64::from),
    }
}

fn partition_size(node: &Node, partition: u8) -> usize {
    node.gpus.iter().filter(|gpu| gpu.partition == Some(partition)).count()
}

/// Whether it makes no difference to a share which of two devices it is on, if as much is free of both.
fn alike(one: &Gpu, two: &Gpu) -> bool {
    one.model == two.model
        && one.numa == two.numa
        && one.switch == two.switch
        && one.memory_bytes == two.memory_bytes
        && one.sharing == two.sharing
}

/// How far apart the devices of a task are: 0 if they are NVLink peers or below one switch, 1 if on one
/// NUMA node, 2 if not. What is not known counts as close.
pub(super) fn distance(node: &Node, gpus: &[GpuPlace]) -> u32 {
    let Some((first, others)) = gpus.split_first() else { return 0 };
    let gpu = |place: &GpuPlace| &node.gpus[usize::from(place.index)];
    let first = gpu(first);
    let same = |of: fn(&Gpu) -> Option<u8>| others.iter().all(|other| of(gpu(other)) == of(first));
    if first.link.is_some() && same(|gpu| gpu.link) || same(|gpu| gpu.switch) {
        0
    } else if same(|gpu| gpu.numa) {
        1
    } else {
        2
    }
}

/// The NUMA node that has room for the task's CPUs and memory: that of its devices; without devices the
/// one where least is left.
pub(super) fn numa(node: &Node, free: &Free, taken: &Amount, gpus: &[GpuPlace]) -> Option<u8> {
    let mut need = *taken;
    need.sandboxes = 0;
    if let Some((first, others)) = gpus.split_first() {
        let of = |place: &GpuPlace| node.gpus[usize::from(place.index)].numa;
        let numa = of(first)?;
        let fits = free.numa.get(usize::from(numa)).is_some_and(|free| free.fits(&need));
        return (fits && others.iter().all(|other| of(other) == Some(numa))).then_some(numa);
    }
    let fitting = (0_u8..).zip(&free.numa).filter(|(_, free)| free.fits(&need));
    fitting.min_by_key(|(index, free)| (free.cpu_milli, free.memory_bytes, *index)).map(|(index, _)| index)
}
