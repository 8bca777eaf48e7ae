//! Whether a BAR has a place among guest addresses: below what the CPU and the IOMMU can address, and
//! off what the IOMMU keeps for itself.

use std::fmt;

use super::gpus::Function;

/// A guest's memory and its 32-bit BARs begin at 0.
const FIRST: u64 = 4 << 30;

/// Addresses that a guest's device can have.
pub(super) struct AddressSpace {
    cpu_bits: Option<u32>,
    iommu_bits: Option<u32>,
    /// First and last addresses of what is not to be used.
    pub(super) reserved: Vec<(u64, u64)>,
}

impl AddressSpace {
    pub(super) fn read(function: &Function<'_>) -> Self {
        let info = function.host.text("proc/cpuinfo");
        let sizes = info.lines().find_map(|line| line.strip_prefix("address sizes")?.split_once(':'));
        let cpu_bits = sizes.and_then(|(_, sizes)| sizes.split_whitespace().next()?.parse().ok());
        Self { cpu_bits, iommu_bits: iommu_bits(function), reserved: reserved(function) }
    }

    /// The narrower of the two; what is not known limits nothing.
    pub(super) fn bits(&self) -> u32 {
        self.cpu_bits.unwrap_or(64).min(self.iommu_bits.unwrap_or(64)).min(64)
    }
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |bits: Option<u32>| bits.map_or("?".to_owned(), |bits| bits.to_string());
        write!(f, "{} bits in the CPU, {} in the IOMMU", name(self.cpu_bits), name(self.iommu_bits))
    }
}

/// The width of the IOMMU in front of a function, where its driver shows its registers.
fn iommu_bits(function: &Function<'_>) -> Option<u32> {
    let register = |name: &str| {
        let text = function.text(&format!("iommu/{name}"));
        // AMD's driver prints its second register behind a colon.
        u64::from_str_radix(text.split(':').next()?.trim_start_matches("0x"), 16).ok()
    };
    if let Some(capability) = register("intel-iommu/cap") {
        // VT-d 4.1 §11.4.2: maximum guest address width, and depths of page tables.
        let width = (capability >> 16 & 0x3f) as u32 + 1;
        let depth = match capability >> 8 & 0x1f {
            sagaw if sagaw & 1 << 3 != 0 => 57,
            sagaw if sagaw & 1 << 2 != 0 => 48,
            sagaw if sagaw & 1 << 1 != 0 => 39,
            // Scalable mode without second stage tables does not say.
            _ => width,
        };
        return Some(width.min(depth));
    }
    // AMD IOMMU 3.08 §3.4.13: host address translation size, in levels beyond four of nine bits.
    let features = register("amd-iommu/features")?;
    Some(match features >> 10 & 3 {
        0 => 48,
        1 => 57,
        _ => 64,
    })
}

fn reserved(function: &Function<'_>) -> Vec<(u64, u64)> {
    let Some(group) = function.iommu_group() else { return Vec::new() };
    let text = function.host.text(format!("sys/kernel/iommu_groups/{group}/reserved_regions"));
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let regions = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((hex(words.next()?)?, hex(words.next()?)?))
    });
    regions.collect()
}

/// Whether there is an aligned place for `size` bytes above 4 GiB and below 2^`bits`.
pub(super) fn room_for(size: u64, bits: u32, reserved: &[(u64, u64)]) -> bool {
    let limit = 1_u128 << bits;
    let Some(size) = size.checked_next_power_of_two().map(u128::from) else { return false };
    let mut at = u128::from(FIRST).next_multiple_of(size).max(size);
    // Each turn leaves one region behind for good.
    for _ in 0..=reserved.len() {
        if at + size > limit {
            return false;
        }
        let overlap = reserved
            .iter()
            .map(|(first, last)| (u128::from(*first), u128::from(*last)))
            .find(|(first, last)| *first < at + size && at <= *last);
        match overlap {
            Some((_, last)) => at = (last + 1).next_multiple_of(size),
            None => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_bar_needs_an_aligned_place_below_the_limit() {
        assert!(room_for(128 * GIB, 48, &[]));
        assert!(room_for(256 * GIB, 39, &[]), "in the upper half");
        assert!(!room_for(512 * GIB, 39, &[]));
        // AMD's HyperTransport hole at the end of the first TiB.
        let hole = (0xfd_0000_0000, 0xff_ffff_ffff);
        assert!(room_for(256 * GIB, 40, &[hole]));
        assert!(!room_for(512 * GIB, 40, &[hole]));
        assert!(room_for(512 * GIB, 41, &[hole]));
        assert!(!room_for(1 << 63, 64, &[(1 << 63, u64::MAX)]));
        assert!(!room_for(u64::MAX, 64, &[]));
    }

    proptest! {
        #[test]
        fn any_regions_are_answered(
            size in any::<u64>(),
            bits in 0_u32..65,
            reserved in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..8),
        ) {
            let fits = room_for(size, bits, &reserved);
            prop_assert!(!fits || u128::from(size) <= 1 << bits);
        }
    }
}
