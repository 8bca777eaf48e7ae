//! Parts of a BAR in the VMM's address space, from where memory slots lead the guest to them.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// The largest page that the kernel builds page tables from.
const LARGEST_PAGE: u64 = 1 << 30;

/// Mapped device memory. Nothing here is ever read or written by the VMM: only the guest's slots and the
/// IOMMU lead to it.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<c_void>,
    length: NonZeroUsize,
}

// SAFETY: the address is only handed to the kernel; unmapping works from any thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `device` from its descriptor's `offset` on, at an address that is aligned
    /// with the largest page that fits: then one page-table entry, and one step of the IOMMU's mapping,
    /// covers up to 1 GiB, where unaligned ones take 4 KiB each.
    ///
    /// # Errors
    /// What the kernel said; lengths are multiples of 4096.
    pub fn new(device: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<Self> {
        let bad = || io::Error::from(io::ErrorKind::InvalidInput);
        let alignment = alignment(length);
        let length = usize::try_from(length).ok().and_then(NonZeroUsize::new).ok_or_else(bad)?;
        let room = length.checked_add(alignment).ok_or_else(bad)?;
        let reserve = ProtFlags::PROT_NONE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe { mmap_anonymous(None, room, reserve, flags) }?;
        let start = reserved.as_ptr() as usize;
        let aligned = start.next_multiple_of(alignment);
        release(start, aligned - start);
        release(aligned + length.get(), start + room.get() - aligned - length.get());
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let shared = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let at = NonZeroUsize::new(aligned);
        // SAFETY: replaces the part of the reservation that was kept; nobody else knows of it.
        match unsafe { mmap(at, length, access, shared, device, offset as i64) } {
            Ok(address) => Ok(Self { address, length }),
            Err(errno) => {
                release(aligned, length.get());
                Err(errno.into())
            }
        }
    }

    /// Where it begins.
    pub fn address(&self) -> NonNull<u8> {
        self.address.cast()
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length.get() as u64
    }

    /// Never: a mapping has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }
}

fn alignment(length: u64) -> usize {
    let largest = if length.is_power_of_two() { length } else { length.next_power_of_two() / 2 };
    largest.clamp(4096, LARGEST_PAGE) as usize
}

/// Gives back a part of the reservation.
fn release(start: usize, length: usize) {
    if let (Some(address), true) = (NonNull::new(start as *mut c_void), length > 0) {
        // SAFETY: the range belongs to the reservation just made, which nothing refers to.
        let _ = unsafe { munmap(address, length) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours; slots and DMA mappings of it were removed by whoever added them.
        let _ = unsafe { munmap(self.address, self.length.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn mappings_are_aligned_with_the_largest_page_that_fits() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        for (length, alignment) in
            [(4096, 4096), (12 << 10, 8 << 10), (2 << 20, 2 << 20), (48 << 20, 32 << 20)]
        {
            let mapping = Mapping::new(file.as_fd(), 0, length).unwrap();
            assert_eq!(mapping.address().as_ptr() as usize % alignment, 0, "{length:#x}");
            assert_eq!(mapping.len(), length);
        }
        assert_eq!(alignment(1 << 36), 1 << 30);
        assert!(Mapping::new(file.as_fd(), 0, 0).is_err());
    }
}
