//! Walks of capability lists in bytes that a device wrote: bounded, without trust.

use super::config::{CAPABILITIES, FIRST_CAPABILITY, STATUS, STATUS_CAPABILITIES};

/// Conventional capabilities lie in 0x40..0x100 on dwords: no list is longer.
const MOST: usize = 48;
/// Extended capabilities lie in 0x100..0x1000 on dwords, of 8 bytes at least.
const MOST_EXTENDED: usize = (4096 - 256) / 8;
const FIRST_EXTENDED: usize = 0x100;

/// A capability: what it is and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its ID (PCI Code and ID Assignment 1.16 §2, §3).
    pub id: u16,
    /// Its offset.
    pub offset: u16,
    /// Version (extended capabilities only).
    pub version: u8,
}

/// The two bytes at `offset`; zero past the end.
pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes.get(offset..offset + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

/// The four bytes at `offset`; zero past the end.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

/// The list in the first 256 bytes (PCI 3.0 §6.7). Ends at a pointer that is out of place or was seen.
pub fn conventional(config: &[u8]) -> Vec<Capability> {
    let mut list: Vec<Capability> = Vec::new();
    if u16_at(config, STATUS) & STATUS_CAPABILITIES == 0 {
        return list;
    }
    let mut next = config.get(CAPABILITIES).copied().unwrap_or(0);
    while list.len() < MOST {
        // The two low bits are reserved and have to be masked.
        let offset = usize::from(next & !3);
        let seen = list.iter().any(|capability| usize::from(capability.offset) == offset);
        if offset < FIRST_CAPABILITY || seen || offset + 4 > config.len() {
            break;
        }
        list.push(Capability { id: u16::from(config[offset]), offset: offset as u16, version: 0 });
        next = config[offset + 1];
    }
    list
}

/// The list beyond the first 256 bytes (PCIe 6.0 §7.6). Ends as above.
pub fn extended(config: &[u8]) -> Vec<Capability> {
    let mut list: Vec<Capability> = Vec::new();
    let mut offset = FIRST_EXTENDED;
    while list.len() < MOST_EXTENDED && offset + 4 <= config.len() {
        let header = u32_at(config, offset);
        // All zeros: no list at all. All ones: the device has gone.
        if header == 0 || header == u32::MAX {
            break;
        }
        let capability =
            Capability { id: header as u16, offset: offset as u16, version: (header >> 16) as u8 & 0xf };
        list.push(capability);
        offset = (header >> 20) as usize & !3;
        let seen = list.iter().any(|capability| usize::from(capability.offset) == offset);
        if offset < FIRST_EXTENDED || seen {
            break;
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_are_followed_in_order() {
        let mut config = vec![0; 4096];
        config[STATUS] = STATUS_CAPABILITIES as u8;
        config[CAPABILITIES] = 0x43;
        config[0x40..0x42].copy_from_slice(&[5, 0x60]);
        config[0x60..0x62].copy_from_slice(&[0x10, 0]);
        config[0x100..0x104].copy_from_slice(&(0x1501_0001_u32).to_le_bytes());
        config[0x150..0x154].copy_from_slice(&(0x0002_0003_u32).to_le_bytes());
        let ids = |list: &[Capability]| list.iter().map(|c| (c.id, c.offset)).collect::<Vec<_>>();
        assert_eq!(ids(&conventional(&config)), [(5, 0x40), (0x10, 0x60)]);
        assert_eq!(ids(&extended(&config)), [(1, 0x100), (3, 0x150)]);
        assert_eq!(extended(&config[..256]), []);
    }

    #[test]
    fn loops_end() {
        let mut config = vec![0; 256];
        config[STATUS] = STATUS_CAPABILITIES as u8;
        config[CAPABILITIES] = 0x40;
        config[0x41] = 0x44;
        config[0x45] = 0x40;
        assert_eq!(conventional(&config).len(), 2);
    }

    proptest! {
        #[test]
        fn hostile_lists_are_bounded_and_inside(
            bytes in proptest::collection::vec(any::<u8>(), 0..=4096)
        ) {
            for capability in conventional(&bytes) {
                prop_assert!((0x40..0x100).contains(&capability.offset));
            }
            let list = extended(&bytes);
            prop_assert!(list.len() <= MOST_EXTENDED);
            prop_assert!(list.iter().all(|c| usize::from(c.offset) + 4 <= bytes.len()));
        }
    }
}
