//! What the kernel's files say of PCI functions: the [inventory](crate::inventory) reads it to tell, [`crate::gpus`] to
//! act.

use std::fs;
use std::path::Path;

use lathe_api::HostPciAddress;

/// The driver that lends functions to processes; not one that a device goes back to.
pub const VFIO_PCI: &str = "vfio-pci";

/// Base address registers of a type 0 header (PCIe 6.0 §7.5.1.2.1).
const BARS: u8 = 6;

// include/linux/ioport.h: resource flags as the file `resource` prints them.
const IORESOURCE_IO: u64 = 0x100;
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_PREFETCH: u64 = 0x2000;
const IORESOURCE_MEM_64: u64 = 0x0010_0000;
const IORESOURCE_UNSET: u64 = 0x2000_0000;

/// The class code in a function's file `class`; 0 where it has none.
pub fn class(text: &str) -> u32 {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0) & 0x00ff_ffff
}

/// Whether a class code is a GPU's: display controllers (base class 0x03) and processing accelerators (0x1200).
pub fn is_gpu(class: u32) -> bool {
    class >> 16 == 0x03 || class >> 8 == 0x1200
}

/// A BAR as the kernel sees it.
pub struct Resource {
    /// 0 to 5.
    pub index: u8,
    /// Its address; 0 where it has none.
    pub start: u64,
    /// Bytes.
    pub size_bytes: u64,
    flags: u64,
}

impl Resource {
    /// Whether it is in the space of I/O ports.
    pub fn is_io(&self) -> bool {
        self.flags & IORESOURCE_IO != 0
    }

    /// Whether its address has 64 bits.
    pub fn is_wide(&self) -> bool {
        self.flags & IORESOURCE_MEM_64 != 0
    }

    /// Whether it is memory that reading does not change.
    pub fn is_prefetchable(&self) -> bool {
        self.flags & IORESOURCE_MEM != 0 && self.flags & IORESOURCE_PREFETCH != 0
    }

    /// Whether the kernel found no room for it.
    pub fn is_unset(&self) -> bool {
        self.flags & IORESOURCE_UNSET != 0
    }
}

/// The BARs in a function's file `resource`, which has a line of first address, last address and flags for each.
/// Registers that no BAR uses are left out, and so is nonsense.
pub fn resources(text: &str) -> impl Iterator<Item = Resource> + '_ {
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    (0..BARS).zip(text.lines()).filter_map(move |(index, line)| {
        let mut words = line.split_whitespace().map_while(hex);
        let (start, last, flags) = (words.next()?, words.next()?, words.next()?);
        let size_bytes = last.checked_sub(start)?.checked_add(1)?;
        let used = flags & (IORESOURCE_IO | IORESOURCE_MEM) != 0;
        used.then_some(Resource { index, start, size_bytes, flags })
    })
}

/// The bridges above a function, the one at the root first: its place in sysfs, to which the link `directory` leads,
/// is its place in the tree.
pub fn bridges_above(directory: &Path, function: HostPciAddress) -> Vec<HostPciAddress> {
    let place = fs::canonicalize(directory).unwrap_or_default();
    let functions = place.components().filter_map(|part| part.as_os_str().to_str()?.parse().ok());
    functions.filter(|bridge| *bridge != function).collect()
}
