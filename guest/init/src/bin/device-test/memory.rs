//! Memory that devices reach, and devices' memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};

/// What x86-64's first level of page tables maps.
pub const PAGE: usize = 4096;

/// A shared mapping, accessed word by word because a device reads and writes it too.
pub struct Mapping {
    start: NonNull<u64>,
    len: usize,
}

impl Mapping {
    /// Maps a file of `len` bytes, such as a region of a PCI device.
    pub fn of_file(path: &Path, len: usize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, which nothing else refers to.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { start: start.cast(), len })
    }

    /// A page of memory that stays where it is.
    pub fn page() -> io::Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        let size = NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, size, access, flags) }?;
        let page = Self { start: start.cast(), len: PAGE };
        // SAFETY: the range is the mapping just made.
        unsafe { mlock(start, PAGE) }?;
        Ok(page)
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn word(&self, offset: usize) -> NonNull<u64> {
        assert!(offset.is_multiple_of(8) && offset < self.len, "{offset:#x} is no word of the mapping");
        // SAFETY: inside the mapping, as was just checked; a mapping's length is a multiple of the page size.
        unsafe { self.start.byte_add(offset) }
    }

    /// The word at an offset in bytes, a multiple of 8.
    pub fn read(&self, offset: usize) -> u64 {
        // SAFETY: `word` gives aligned addresses inside the mapping, which lives as long as `self`.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Sets the word at an offset in bytes, a multiple of 8.
    pub fn write(&self, offset: usize, value: u64) {
        // SAFETY: as in `read`; any bits are a valid word.
        unsafe { self.word(offset).write_volatile(value) }
    }

    /// The address by which devices know the first page, where no IOMMU is in between.
    pub fn physical_address(&self) -> io::Result<u64> {
        let mut entry = [0; 8];
        let number = self.start.addr().get() / PAGE;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, number as u64 * 8)?;
        physical(u64::from_le_bytes(entry))
            .ok_or_else(|| io::Error::other("the kernel does not say where a page is; run this as root"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// The address in an entry of pagemap (Documentation/admin-guide/mm/pagemap.rst): bit 63 says that the page is
/// there, bits 0 to 54 its number, which is 0 for those who may not know.
fn physical(entry: u64) -> Option<u64> {
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let number = entry & NUMBER;
    (entry & PRESENT != 0 && number != 0).then_some(number * PAGE as u64)
}

/// CPUs that are online.
pub fn online_cpus() -> Vec<usize> {
    parse_list(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// `0-3,8` as the kernel writes sets.
fn parse_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_the_page_map() {
        assert_eq!(physical(1 << 63 | 0x1234), Some(0x123_4000));
        assert_eq!(physical(0x1234), None);
        assert_eq!(physical(1 << 63), None);
    }

    #[test]
    fn sets_of_cpus() {
        assert_eq!(parse_list("0-2,8\n"), [0, 1, 2, 8]);
        assert_eq!(parse_list("0"), [0]);
        assert_eq!(parse_list(""), []);
    }

    #[test]
    fn a_page_holds_what_is_written() {
        let page = Mapping::page().unwrap();
        page.write(PAGE - 8, 7);
        assert_eq!((page.read(0), page.read(PAGE - 8)), (0, 7));
    }
}
