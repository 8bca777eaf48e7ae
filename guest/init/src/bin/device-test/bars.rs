//! Where each device's regions are: `bar ADDRESS REGION START SIZE FLAGS`, numbers in hexadecimal.
//!
//! REGION is `0` to `5`, `rom`, `vf0` to `vf5` (of a device's virtual functions), or a bridge's `window0`
//! (I/O), `window1` (memory) and `window2` (prefetchable). FLAGS is `io` or `mem`, then `64` and `prefetch`.

use crate::Failure;
use crate::sysfs::{self, Device, Region};

/// Bits of `struct resource`'s flags (include/linux/ioport.h).
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCH: u64 = 0x2000;
const MEMORY_64: u64 = 0x10_0000;

/// Lines of the file: BARs, expansion ROM, virtual functions' BARs (where the kernel knows SR-IOV), windows.
const ROM: usize = 6;
const VIRTUAL_FUNCTIONS: std::ops::Range<usize> = 7..13;
const WINDOWS: usize = 13;

/// Prints them all.
pub fn print() -> Result<(), Failure> {
    for device in sysfs::devices()? {
        let text =
            device.text("resource").map_err(Failure::at(format!("resources of {}", device.address)))?;
        for region in sysfs::parse_resources(&text) {
            println!("{}", render(&device, &region));
        }
    }
    Ok(())
}

fn render(device: &Device, region: &Region) -> String {
    let name = match region.index {
        index if index < ROM => index.to_string(),
        ROM => "rom".into(),
        index if VIRTUAL_FUNCTIONS.contains(&index) => format!("vf{}", index - VIRTUAL_FUNCTIONS.start),
        index => format!("window{}", index.saturating_sub(WINDOWS)),
    };
    let mut flags = String::new();
    for (bit, word) in [(IO, "io"), (MEMORY, "mem"), (MEMORY_64, " 64"), (PREFETCH, " prefetch")] {
        if region.flags & bit != 0 {
            flags.push_str(word);
        }
    }
    format!("bar {} {name} {:#x} {:#x} {flags}", device.address, region.start, region.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_by_name() {
        let device = Device {
            address: "0000:01:00.0".into(),
            path: "/".into(),
            id: (0x1af4, 0x1110),
            class: 0x050000,
        };
        let line = |index, flags| render(&device, &Region { index, start: 0x1000, size: 0x100, flags });
        assert_eq!(line(2, 0x14_220c), "bar 0000:01:00.0 2 0x1000 0x100 mem 64 prefetch");
        assert_eq!(line(6, 0x4_6200), "bar 0000:01:00.0 rom 0x1000 0x100 mem prefetch");
        assert_eq!(line(7, 0x14_0204), "bar 0000:01:00.0 vf0 0x1000 0x100 mem 64");
        assert_eq!(line(13, 0x101), "bar 0000:01:00.0 window0 0x1000 0x100 io");
    }
}
