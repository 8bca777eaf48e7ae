//! Names of what is compared, as people type them.

use super::scenario::Estimates;
use crate::policy::{Backfill, Queue, Strategy};

/// Something with a name for each of its values.
pub trait Named: Copy + PartialEq + 'static {
    /// What it is, for messages.
    const WHAT: &'static str;
    /// All values.
    const NAMES: &'static [(&'static str, Self)];

    /// Its name.
    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, value)| *value == self).map_or("", |(name, _)| name)
    }

    /// The value of that name.
    fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
}

impl Named for Queue {
    const WHAT: &'static str = "queue policy";
    const NAMES: &'static [(&'static str, Self)] = &[
        ("fcfs", Self::FirstComeFirstServed),
        ("sjf", Self::ShortestJobFirst),
        ("hrrn", Self::HighestResponseRatioNext),
        ("fair", Self::FairShare),
        ("priority", Self::Priority),
    ];
}

impl Named for Backfill {
    const WHAT: &'static str = "backfill";
    const NAMES: &'static [(&'static str, Self)] =
        &[("none", Self::None), ("easy", Self::Easy), ("conservative", Self::Conservative)];
}

impl Named for Strategy {
    const WHAT: &'static str = "placement policy";
    const NAMES: &'static [(&'static str, Self)] = &[
        ("random", Self::Random),
        ("dot-product", Self::DotProduct),
        ("gpu-clustering", Self::GpuClustering),
        ("gpu-packing", Self::GpuPacking),
        ("best-fit", Self::BestFit),
        ("fgd", Self::FragmentationGradientDescent),
        ("balanced", Self::Balanced),
        ("spread", Self::Spread),
    ];
}

impl Named for Estimates {
    const WHAT: &'static str = "kind of estimates";
    const NAMES: &'static [(&'static str, Self)] =
        &[("perfect", Self::Perfect), ("user", Self::User), ("history", Self::History)];
}
