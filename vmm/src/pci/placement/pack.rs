//! Packing aligned items: into a window of their own, and into what is free.

use std::cmp::Reverse;
use std::ops::Range;

/// Something that takes `size` bytes at a multiple of `align`, a power of two.
#[derive(Clone, Debug)]
pub(in crate::pci) struct Item<T> {
    pub(in crate::pci) size: u64,
    pub(in crate::pci) align: u64,
    pub(in crate::pci) content: T,
}

impl<T> Item<T> {
    /// Largest alignment first leaves the fewest gaps.
    pub(in crate::pci) fn order(&self) -> (Reverse<u64>, Reverse<u64>) {
        (Reverse(self.align), Reverse(self.size))
    }
}

/// An item and where it lies: from the start of what contains it, or, upside down, from its end.
#[derive(Clone, Debug)]
pub(in crate::pci) struct Placed<T> {
    pub(in crate::pci) item: Item<T>,
    offset: u64,
    /// `offset` is that of the item's end, counted downwards from the container's end.
    upside_down: bool,
}

impl<T: Clone> Placed<T> {
    /// The addresses, of an item whose offset is an address.
    pub(in crate::pci) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.item.size
    }

    /// The item with its address, in a container that has one. What is in an upside-down container is upside down.
    pub(in crate::pci) fn within(&self, container: &Self) -> Self {
        let range = container.range();
        let offset = match container.upside_down {
            false => range.start + self.offset,
            true => range.end - self.offset - self.item.size,
        };
        Self { item: self.item.clone(), offset, upside_down: container.upside_down }
    }
}

/// Items packed together.
pub(in crate::pci) struct Block<T> {
    pub(in crate::pci) items: Vec<Placed<T>>,
    /// From the first item's start to the last one's end.
    pub(in crate::pci) size: u64,
    /// The largest alignment.
    pub(in crate::pci) align: u64,
}

impl<T> Block<T> {
    /// Packs `items`; `None` if there are none.
    pub(in crate::pci) fn pack(mut items: Vec<Item<T>>) -> Option<Self> {
        items.sort_by_key(Item::order);
        let align = items.first()?.align;
        // No more than this is ever needed; the sum of sizes and gaps fits, or nothing would.
        let end =
            items.iter().fold(0_u64, |sum, item| sum.saturating_add(item.size).saturating_add(item.align));
        let whole = 0..end;
        let mut free = Free(vec![whole]);
        let mut size = 0;
        let mut placed = Vec::with_capacity(items.len());
        for item in items {
            let offset = free.0.iter().find_map(|gap| lowest(gap, &item))?;
            cut(&mut free.0, offset..offset + item.size);
            size = size.max(offset + item.size);
            placed.push(Placed { item, offset, upside_down: false });
        }
        Some(Self { items: placed, size, align })
    }
}

/// Ranges of which parts are taken.
pub(in crate::pci) struct Free(Vec<Range<u64>>);

impl Free {
    pub(in crate::pci) fn new(ranges: &[Range<u64>]) -> Self {
        Self(ranges.to_vec())
    }

    /// Puts an item where it ends lowest, either way up.
    pub(in crate::pci) fn take<T>(&mut self, item: Item<T>) -> Option<Placed<T>> {
        let upright = self.0.iter().find_map(|range| lowest(range, &item)).map(|start| (start, false));
        let turned = self.0.iter().find_map(|range| lowest_turned(range, &item)).map(|start| (start, true));
        let (offset, upside_down) = [upright, turned].into_iter().flatten().min()?;
        cut(&mut self.0, offset..offset + item.size);
        Some(Placed { item, offset, upside_down })
    }
}

/// The lowest aligned start in `gap`.
fn lowest<T>(gap: &Range<u64>, item: &Item<T>) -> Option<u64> {
    let start = gap.start.checked_next_multiple_of(item.align)?;
    start.checked_add(item.size).filter(|end| *end <= gap.end).map(|_| start)
}

/// The lowest start in `gap` for which the end is aligned.
fn lowest_turned<T>(gap: &Range<u64>, item: &Item<T>) -> Option<u64> {
    let end = gap.start.checked_add(item.size)?.checked_next_multiple_of(item.align)?;
    (end <= gap.end).then(|| end - item.size)
}

/// Takes `range`, which lies in one of them, out of `gaps`.
fn cut(gaps: &mut Vec<Range<u64>>, range: Range<u64>) {
    let Some(index) = gaps.iter().position(|gap| gap.start <= range.start && range.end <= gap.end) else {
        return;
    };
    let gap = gaps[index].clone();
    let parts = [gap.start..range.start, range.end..gap.end];
    gaps.splice(index..=index, parts.into_iter().filter(|part| !part.is_empty()));
}
