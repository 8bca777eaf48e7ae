//! Memory of a device: the largest BAR of a display controller or of ivshmem.
//!
//! ```text
//! vram_size ADDRESS BYTES
//! vram_zero yes | vram_zero no OFFSET WORD
//! vram_filled BYTES
//! vram_intact BYTES
//! ```
//!
//! BYTES are those that were looked at. All of it is, up to 64 MiB; of more, one page in every `stride` bytes,
//! by default so that 1024 pages are: who wants each byte of 16 GiB asks for `stride=4096`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::Failure;
use crate::direct::Random;
use crate::memory::{Mapping, PAGE};
use crate::options::Options;
use crate::sysfs::{self, Device};

/// The base class of display controllers.
const DISPLAY: u32 = 0x03;
/// ivshmem: shared memory as a BAR.
const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);
/// The command register, and its bit for memory decoding (PCIe 6.0 §7.5.1.1.3).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 2;
/// What is looked at whole.
const SMALL: usize = 64 << 20;
/// Pages looked at of what is larger.
const PAGES: usize = 1024;

/// Whether nothing is in it.
pub fn check_zero(options: &Options) -> Result<(), Failure> {
    let vram = Vram::open(options)?;
    for offset in vram.words() {
        let word = vram.mapping.read(offset);
        if word != 0 {
            println!("vram_zero no {offset:#x} {word:#018x}");
            return Ok(());
        }
    }
    println!("vram_zero yes");
    Ok(())
}

/// Writes a pattern.
pub fn fill(options: &Options) -> Result<(), Failure> {
    let vram = Vram::open(options)?;
    let mut random = seeded(options)?;
    vram.words().for_each(|offset| vram.mapping.write(offset, random.next()));
    println!("vram_filled {}", vram.bytes());
    Ok(())
}

/// Whether the pattern is there.
pub fn check(options: &Options) -> Result<(), Failure> {
    let vram = Vram::open(options)?;
    let mut random = seeded(options)?;
    for offset in vram.words() {
        let (found, expected) = (vram.mapping.read(offset), random.next());
        if found != expected {
            return Err(Failure::wrong(format!("at {offset:#x} is {found:#018x}, not {expected:#018x}")));
        }
    }
    println!("vram_intact {}", vram.bytes());
    Ok(())
}

fn seeded(options: &Options) -> Result<Random, Failure> {
    Ok(Random::new(options.number("seed")?.unwrap_or(1)))
}

struct Vram {
    mapping: Mapping,
    stride: usize,
}

impl Vram {
    fn open(options: &Options) -> Result<Self, Failure> {
        let device = sysfs::find(options, "display or ivshmem", |device| {
            device.base_class() == DISPLAY || device.id == IVSHMEM
        })?;
        let (region, size) = largest_region(&device)?;
        println!("vram_size {} {size}", device.address);
        // Lets the device decode its addresses; a driver has done so already. Not through `enable`, which takes
        // a capability that tasks lack.
        if fs::read_to_string(device.path.join("enable")).is_ok_and(|count| count.trim() == "0") {
            let config = device.path.join("config");
            let failed = || Failure::at(format!("writing {}", config.display()));
            let file = File::options().write(true).open(&config).map_err(failed())?;
            file.write_all_at(&COMMAND_MEMORY.to_le_bytes(), COMMAND).map_err(failed())?;
        }
        let path = device.path.join(format!("resource{region}"));
        let mapping =
            Mapping::of_file(&path, size).map_err(Failure::at(format!("mapping {}", path.display())))?;
        let stride = options.number("stride")?.unwrap_or_else(|| default_stride(size)).next_multiple_of(PAGE);
        Ok(Self { mapping, stride: stride.max(PAGE) })
    }

    fn words(&self) -> impl Iterator<Item = usize> {
        words(self.mapping.len(), self.stride)
    }

    fn bytes(&self) -> usize {
        self.mapping.len().div_ceil(self.stride) * PAGE
    }
}

fn largest_region(device: &Device) -> Result<(usize, usize), Failure> {
    let sizes = device.region_sizes().map_err(Failure::at(format!("regions of {}", device.address)))?;
    let bars = sizes.into_iter().filter(|(index, _)| *index < 6);
    let (index, size) = bars
        .max_by_key(|(_, size)| *size)
        .ok_or_else(|| Failure::wrong(format!("{} has no regions", device.address)))?;
    Ok((index, size as usize))
}

fn default_stride(size: usize) -> usize {
    if size <= SMALL { PAGE } else { size / PAGES }
}

/// Offsets of the words in one page of each stride.
fn words(size: usize, stride: usize) -> impl Iterator<Item = usize> {
    (0..size).step_by(stride).flat_map(move |page| (page..size.min(page + PAGE)).step_by(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_looked_at_whole() {
        let size = 16 << 20;
        assert_eq!(words(size, default_stride(size)).count(), size / 8);
    }

    #[test]
    fn large_memory_is_sampled_to_its_end() {
        let size = 16 << 30;
        let stride = default_stride(size);
        assert_eq!(words(size, stride).count(), PAGES * PAGE / 8);
        assert_eq!(words(size, stride).last(), Some(size - stride + PAGE - 8));
    }
}
