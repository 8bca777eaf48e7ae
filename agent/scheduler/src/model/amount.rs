//! Amounts of what adds up.

/// An amount of what a task is carved from, and of what a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Amount {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Memory in bytes, hugepages left out.
    pub memory_bytes: u64,
    /// Memory in hugepages, bytes.
    pub hugepage_bytes: u64,
    /// Sandboxes: bounded by the addresses in a node's subnet. A task takes one.
    pub sandboxes: u32,
}

impl Amount {
    /// Whether one task of this size fits.
    #[inline]
    pub const fn fits(&self, task: &Self) -> bool {
        self.cpu_milli >= task.cpu_milli
            && self.memory_bytes >= task.memory_bytes
            && self.hugepage_bytes >= task.hugepage_bytes
            && self.sandboxes >= task.sandboxes
    }

    /// How many tasks of this size fit.
    pub fn holds(&self, task: &Self) -> u32 {
        let by = |have: u64, need: u64| have.checked_div(need).unwrap_or(u64::MAX);
        let count = by(self.cpu_milli, task.cpu_milli)
            .min(by(self.memory_bytes, task.memory_bytes))
            .min(by(self.hugepage_bytes, task.hugepage_bytes))
            .min(by(self.sandboxes.into(), task.sandboxes.into()));
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The sum; what is beyond counting stays at the largest number.
    #[must_use]
    pub const fn plus(&self, other: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            hugepage_bytes: self.hugepage_bytes.saturating_add(other.hugepage_bytes),
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
        }
    }

    /// The difference, or zero in what there is too little of.
    #[must_use]
    pub const fn less(&self, other: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            hugepage_bytes: self.hugepage_bytes.saturating_sub(other.hugepage_bytes),
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
        }
    }

    /// The smaller of each.
    #[must_use]
    pub fn least(&self, other: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.min(other.cpu_milli),
            memory_bytes: self.memory_bytes.min(other.memory_bytes),
            hugepage_bytes: self.hugepage_bytes.min(other.hugepage_bytes),
            sandboxes: self.sandboxes.min(other.sandboxes),
        }
    }

    /// The product; what is beyond counting stays at the largest number.
    #[must_use]
    pub fn times(&self, count: u32) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_mul(count.into()),
            memory_bytes: self.memory_bytes.saturating_mul(count.into()),
            hugepage_bytes: self.hugepage_bytes.saturating_mul(count.into()),
            sandboxes: self.sandboxes.saturating_mul(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_holds_as_many_tasks_as_its_scarcest_amount_allows() {
        let amount = |cpu_milli, memory_bytes| Amount { cpu_milli, memory_bytes, ..Amount::default() };
        assert_eq!(amount(4000, 10).holds(&amount(1000, 3)), 3);
        assert_eq!(amount(4000, 10).holds(&amount(1500, 0)), 2);
        assert_eq!(amount(0, 0).holds(&amount(0, 0)), u32::MAX);
        assert!(!amount(999, 10).fits(&amount(1000, 3)) && amount(1000, 3).fits(&amount(1000, 3)));
    }
}
