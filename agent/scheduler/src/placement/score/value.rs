//! States of nodes, with and without a task, and a memory of what they are worth.

use std::collections::HashMap;

use super::super::fragmentation::Kind;
use super::Ask;
use crate::model::{Amount, Fold, GpuFree, GpuPlace, Printed};

/// More values than this are forgotten all at once: a larger map is slower than measuring again.
const MOST_VALUES: usize = 1 << 17;

/// Values by state. States of nodes with the same kind of devices share them; which of the devices is
/// free does not matter where all are alike.
#[derive(Clone, Debug, Default)]
pub(super) struct Values<T> {
    values: HashMap<u64, T, Printed>,
    /// By node: its state when it was last looked at, and what that is worth. Most nodes are as they
    /// were, and this is nearer than the map.
    nodes: Vec<(u64, Option<T>)>,
    /// What is free of the devices once the task is there; kept only to save allocations.
    after: Vec<GpuFree>,
}

impl<T: Copy> Values<T> {
    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.nodes.clear();
    }

    /// The value of the node as it is, and as it is once the task took these devices. `value` is asked
    /// for those that are not known.
    pub(super) fn before_and_after(
        &mut self,
        ask: &Ask<'_>,
        kind: Kind,
        gpus: &[GpuPlace],
        mut value: impl FnMut(&Amount, &[GpuFree]) -> T,
    ) -> (T, T) {
        if self.values.len() > MOST_VALUES {
            self.values.clear();
        }
        let number = |at: usize| if kind.mixed { at } else { 0 };
        let all = ask.free.gpus.iter().enumerate();
        let devices = all.fold(0_u64, |sum, (at, gpu)| sum.wrapping_add(device(*gpu, number(at))));
        let key = state(kind, &ask.free.amount, devices);
        let index = ask.index as usize;
        if self.nodes.len() <= index {
            self.nodes.resize(index + 1, (0, None));
        }
        let before = match self.nodes[index] {
            (known, Some(before)) if known == key => before,
            _ => {
                let value = || value(&ask.free.amount, &ask.free.gpus);
                let before = *self.values.entry(key).or_insert_with(value);
                self.nodes[index] = (key, Some(before));
                before
            }
        };
        let amount = ask.free.amount.less(&ask.taken);
        let mut changed = devices;
        for place in gpus {
            let at = usize::from(place.index);
            let (free, number) = (ask.free.gpus[at], number(at));
            changed = changed.wrapping_sub(device(free, number));
            changed = changed.wrapping_add(device(without(free, place.part), number));
        }
        let key = state(kind, &amount, changed);
        if let Some(after) = self.values.get(&key) {
            return (before, *after);
        }
        self.after.clone_from(&ask.free.gpus);
        for place in gpus {
            let free = &mut self.after[usize::from(place.index)];
            *free = without(*free, place.part);
        }
        let after = value(&amount, &self.after);
        self.values.insert(key, after);
        (before, after)
    }
}

/// What is left of a device.
#[inline]
pub(super) fn without(free: GpuFree, part: GpuFree) -> GpuFree {
    GpuFree {
        milli: free.milli.saturating_sub(part.milli),
        slots: free.slots & !part.slots,
        compute: free.compute.saturating_sub(part.compute),
    }
}

#[inline]
fn device(free: GpuFree, number: usize) -> u64 {
    let state = u64::from(free.milli) | u64::from(free.slots) << 16 | u64::from(free.compute) << 24;
    Fold::mix(state, number as u64)
}

#[inline]
fn state(kind: Kind, amount: &Amount, devices: u64) -> u64 {
    let amounts = Fold::mix(amount.cpu_milli, amount.memory_bytes.rotate_left(17) ^ amount.hugepage_bytes);
    // Addresses matter to no value but when they are gone.
    Fold::mix(amounts ^ u64::from(amount.sandboxes == 0), devices ^ (u64::from(kind.number) << 32))
}
