//! The guest's address map.
//!
//! ```text
//! 0x0000_0000_0500  GDT                      64-bit Linux protocol only
//! 0x0000_0000_6000  PVH start info, its module list and memory map
//! 0x0000_0000_7000  zero page                64-bit Linux protocol only
//! 0x0000_0000_9000  page tables (3 pages)    64-bit Linux protocol only
//! 0x0000_0002_0000  kernel command line
//! 0x0000_0009_fc00  end of low RAM           where a PC's EBDA and video memory start
//! 0x0000_000e_0000  ACPI tables              RSDP first, also found by a scan of the BIOS area
//! 0x0000_000f_fff0  reset vector             where a PC's BIOS would start again
//! 0x0000_0010_0000  RAM, the kernel first, the initramfs last
//! 0x0000_c000_0000  PCI 32-bit MMIO window
//! 0x0000_e000_0000  ECAM, 256 buses
//! 0x0000_f000_0000  nothing
//! 0x0000_fec0_0000  I/O APIC
//! 0x0000_fee0_0000  local APICs, MSI target
//! 0x0000_fffb_c000  KVM's identity map and TSS (4 pages)
//! 0x0001_0000_0000  RAM beyond 3 GiB
//! above RAM         PCI 64-bit MMIO window, see `pci_mmio64`
//! ```

use std::ops::Range;

/// GDT for the 64-bit Linux boot protocol.
pub const GDT: u64 = 0x500;
/// Stack pointer at a 64-bit kernel's entry; it grows down towards the GDT.
pub const BOOT_STACK: u64 = 0x5ff0;
/// PVH start info.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list: one entry of 32 bytes.
pub const PVH_MODULES: u64 = 0x6080;
/// PVH memory map: 24 bytes an entry.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// The 64-bit Linux protocol's zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, PDPT and one page directory: the first GiB, identity-mapped.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line, zero-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line without its terminator: Linux's COMMAND_LINE_SIZE on x86 less one.
pub const CMDLINE_MAX: usize = 2047;
/// First address that low RAM does not reach.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// RSDP and the tables it leads to.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Where a jump to the BIOS arrives (f000:fff0); the last 16 bytes of [`ACPI`].
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address kernels may occupy.
pub const HIGH_RAM: u64 = 0x10_0000;
/// RAM up to here sits below the 32-bit hole, the rest above 4 GiB.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// 32-bit BARs.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space: 256 buses of 1 MiB (PCIe 6.0 §7.2.2).
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The in-kernel I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// The in-kernel local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page in which KVM keeps an identity map (real mode on older Intel CPUs).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's TSS (the same CPUs).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// First serial port, 8 ports.
pub const COM1: u16 = 0x3f8;
/// Keyboard controller: its only function here is the CPU reset line.
pub const I8042: Range<u16> = 0x60..0x65;
/// pvpanic's event port.
pub const PVPANIC: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers, one byte each.
pub const ACPI_POWER: u16 = 0x600;

/// I/O APIC pin, which is also the GSI, of the first serial port.
pub const COM1_GSI: u32 = 4;
/// GSI of the generic event device, which carries the power button.
pub const EVENT_GSI: u32 = 5;
/// Pins of the in-kernel I/O APIC; MSI vectors take GSIs from here up.
pub const IO_APIC_PINS: u32 = 24;

const GIB: u64 = 1 << 30;
/// AMD reserves 12 GiB below 1 TiB for HyperTransport; its IOMMU does not translate them.
const HYPERTRANSPORT: u64 = 0xfd_0000_0000;
/// Enough for a board full of today's GPUs, whose largest BARs are 256 GiB, and for slots with room for more.
const PCI_MMIO64_MAX: u64 = 16 << 40;

/// The pieces of guest RAM: below the hole, and above 4 GiB if there is more.
pub fn ram_ranges(size: u64) -> Vec<Range<u64>> {
    let below = size.min(HOLE.start);
    let mut ranges = Vec::with_capacity(2);
    ranges.push(0..below);
    if size > below {
        ranges.push(HOLE.end..HOLE.end + (size - below));
    }
    ranges
}

/// First address above all RAM and the hole.
pub fn ram_end(size: u64) -> u64 {
    HOLE.end + size.saturating_sub(HOLE.start)
}

/// The largest memory that fits below the guest's physical address width, or AMD's hole.
pub fn max_ram(physical_bits: u32) -> u64 {
    let end = (1_u64 << physical_bits.clamp(33, 52)).min(HYPERTRANSPORT);
    end - (HOLE.end - HOLE.start) - GIB
}

/// 64-bit BARs: above RAM, aligned to 1 GiB so that large BARs stay aligned, below the guest's physical
/// address width and below `limit`, where what else has to reach them ends (the IOMMU), and on one side of AMD's
/// HyperTransport hole. Empty if nothing is left.
pub fn pci_mmio64(ram: u64, physical_bits: u32, limit: u64) -> Range<u64> {
    let limit = (1_u64 << physical_bits.clamp(33, 52)).min(limit);
    let start = ram_end(ram).next_multiple_of(GIB);
    let low = start..limit.min(HYPERTRANSPORT).max(start);
    let high = (1 << 40)..limit.min((1 << 40) + PCI_MMIO64_MAX);
    if limit > 1 << 40 && high.end - high.start > low.end - low.start { high } else { low }
}

/// What firmware would say of a range of memory, in e820's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable.
    Ram = 1,
    /// Not usable.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// The memory map given to the kernel, in address order.
pub fn memory_map(ram: u64) -> Vec<(Range<u64>, MemoryKind)> {
    let mut map = vec![
        (0..LOW_RAM_END, MemoryKind::Ram),
        (ACPI, MemoryKind::Acpi),
        (HIGH_RAM..ram.min(HOLE.start), MemoryKind::Ram),
        (ECAM, MemoryKind::Reserved),
    ];
    map.extend(ram_ranges(ram).into_iter().skip(1).map(|range| (range, MemoryKind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(16 << 20).first(), Some(&(0..16 << 20)));
        assert_eq!(ram_ranges(3 << 30).len(), 1);
        assert_eq!(ram_ranges(5 << 30), [0..3 << 30, 4 << 30..6 << 30]);
        assert_eq!(ram_end(5 << 30), 6 << 30);
        assert_eq!(ram_end(1 << 30), 4 << 30);
    }

    proptest! {
        #[test]
        fn windows_never_meet_ram_or_leave_the_address_space(mib in 16_u64..1 << 20, bits in 36_u32..=52) {
            let ram = (mib << 20).min(max_ram(bits));
            let window = pci_mmio64(ram, bits, u64::MAX);
            prop_assert!(window.start >= ram_end(ram) && window.start < window.end);
            prop_assert!(window.end <= 1 << bits);
            prop_assert!(window.end <= HYPERTRANSPORT || window.start >= 1 << 40);
            let total: u64 = ram_ranges(ram).iter().map(|r| r.end - r.start).sum();
            prop_assert_eq!(total, ram);
        }

        #[test]
        fn windows_end_where_the_iommu_does(mib in 16_u64..1 << 20, bits in 36_u32..=52, limit in 32_u32..=57) {
            let window = pci_mmio64(mib << 20, bits, 1 << limit);
            prop_assert!(window.is_empty() || window.end <= 1 << limit);
        }

        #[test]
        fn memory_maps_are_sorted_and_disjoint(mib in 16_u64..1 << 20) {
            let map = memory_map(mib << 20);
            for pair in map.windows(2) {
                prop_assert!(pair[0].0.end <= pair[1].0.start);
            }
        }
    }
}
