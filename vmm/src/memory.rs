//! Guest memory, mapped once, in pieces around the 32-bit hole.
//!
//! Hugepages are a memfd's, taken from the host's pool. Plain pages are anonymous, because Linux gives
//! anonymous memory transparent hugepages and, unless told otherwise, a memfd none
//! (`transparent_hugepage/shmem_enabled` is `never`). On an emulated host a memfd made the boot of
//! Debian's cloud kernel take 3.3 s instead of 3.0, for its page faults alone.
//! What shares memory with another process (vhost-user) will need the memfd for plain pages too.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::arch::native::{cpuid, layout};
use crate::config::{HugepageSize, MemoryConfig, MemorySize};

/// Memory that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error("memory.size: {0} is more than this host's {1}")]
    BeyondHost(MemorySize, MemorySize),
    /// More than the guest can address.
    #[error("memory.size: {0} is more than a guest can address on this host, {1}")]
    BeyondAddresses(MemorySize, MemorySize),
    /// The pool of hugepages is too small.
    #[error(
        "memory.hugepages: {needed} free hugepages of {size} are needed, the host has {free}; \
         reserve them with: echo {total} > {pool}/nr_hugepages"
    )]
    Hugepages {
        /// Their size.
        size: MemorySize,
        /// How many.
        needed: u64,
        /// How many are free.
        free: u64,
        /// What the pool must hold.
        total: u64,
        /// The pool's directory.
        pool: String,
    },
    /// The host has no hugepages of that size at all.
    #[error("memory.hugepages: this host has no hugepages of {0}")]
    NoPool(MemorySize),
    /// A system call failed.
    #[error("guest memory: {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Checks what can be checked before anything is allocated.
///
/// # Errors
/// When the host has less memory, or fewer free hugepages.
pub fn check_host(config: &MemoryConfig) -> Result<(), MemoryError> {
    let info = nix::sys::sysinfo::sysinfo()
        .map_err(|errno| MemoryError::Host { what: "sysinfo", source: errno.into() })?;
    let host = MemorySize::from_bytes(info.ram_total());
    if config.size > host {
        return Err(MemoryError::BeyondHost(config.size, host));
    }
    let addressable = MemorySize::from_bytes(layout::max_ram(cpuid::host_physical_bits()));
    if config.size > addressable {
        return Err(MemoryError::BeyondAddresses(config.size, addressable));
    }
    config.hugepages.map_or(Ok(()), |page| check_pool(config, page))
}

fn check_pool(config: &MemoryConfig, page: HugepageSize) -> Result<(), MemoryError> {
    let size = MemorySize::from_bytes(page.bytes());
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page.bytes() >> 10);
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("{pool}/{name}")).ok()?.trim().parse().ok()
    };
    let counts = (read("free_hugepages"), read("resv_hugepages"), read("nr_hugepages"));
    let (Some(free), Some(reserved), Some(present)) = counts else {
        return Err(MemoryError::NoPool(size));
    };
    // Reserved pages are still counted as free, but belong to mappings of others.
    let free = free.saturating_sub(reserved);
    let needed = config.size.bytes() / page.bytes();
    if needed > free {
        let total = present + (needed - free);
        return Err(MemoryError::Hugepages { size, needed, free, total, pool });
    }
    Ok(())
}

/// Allocates guest memory. Plain pages are taken when touched; hugepages are reserved at once.
///
/// # Errors
/// When the host refuses.
pub fn allocate(config: &MemoryConfig) -> Result<GuestMemoryMmap, MemoryError> {
    let pool = config.hugepages.map(|page| hugepage_file(page, config.size.bytes())).transpose()?;
    let mut offset = 0;
    let mut regions = Vec::with_capacity(2);
    for range in layout::ram_ranges(config.size.bytes()) {
        let size = range.end - range.start;
        let mapping = match &pool {
            Some(file) => map_hugepages(FileOffset::from_arc(Arc::clone(file), offset), size)?,
            None => map_plain(size)?,
        };
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or_else(|| {
            MemoryError::Host { what: "guest address", source: io::ErrorKind::InvalidInput.into() }
        })?;
        regions.push(region);
        offset += size;
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|error| MemoryError::Host { what: "memory map", source: io::Error::other(error) })
}

fn hugepage_file(page: HugepageSize, size: u64) -> Result<Arc<File>, MemoryError> {
    let which = match page {
        HugepageSize::TwoMiB => MFdFlags::MFD_HUGE_2MB,
        HugepageSize::OneGiB => MFdFlags::MFD_HUGE_1GB,
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | which;
    let file = memfd_create(c"lathe-guest", flags)
        .map_err(|errno| MemoryError::Host { what: "memfd_create", source: errno.into() })?;
    let file = File::from(file);
    file.set_len(size).map_err(|source| MemoryError::Host { what: "ftruncate of the memfd", source })?;
    Ok(Arc::new(file))
}

/// Without MAP_NORESERVE, mmap takes the pages from the pool now: a guest that touched memory
/// which is not there would be killed by SIGBUS.
fn map_hugepages(file: FileOffset, size: u64) -> Result<MmapRegion, MemoryError> {
    MmapRegion::build(Some(file), size as usize, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
        .map_err(map_failed)
}

fn map_plain(size: u64) -> Result<MmapRegion, MemoryError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapping: MmapRegion =
        MmapRegion::build(None, size as usize, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(map_failed)?;
    // Below 2 MiB are tables of a few bytes, and whole guests that fit: small pages keep them small.
    let low = (2 << 20).min(size as usize);
    advise(&mapping, 0..low, MmapAdvise::MADV_NOHUGEPAGE);
    advise(&mapping, low..size as usize, MmapAdvise::MADV_HUGEPAGE);
    Ok(mapping)
}

/// Kernels without transparent hugepages refuse the advice, and do without.
fn advise(mapping: &MmapRegion, range: std::ops::Range<usize>, advice: MmapAdvise) {
    let Some(start) = NonNull::new(mapping.as_ptr().wrapping_add(range.start).cast::<c_void>()) else {
        return;
    };
    // SAFETY: the range lies in the mapping, which is borrowed; neither advice changes its contents.
    let _ = unsafe { madvise(start, range.len(), advice) };
}

fn map_failed(error: MmapRegionError) -> MemoryError {
    let source = match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    };
    MemoryError::Host { what: "mmap", source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_beyond_the_hole_is_reachable_and_the_hole_is_not() {
        let config = MemoryConfig { size: MemorySize::from_mib(5 << 10), hugepages: None };
        let memory = allocate(&config).unwrap();
        for address in [0, (3 << 30) - 8, 4 << 30, (6 << 30) - 8] {
            memory.write_obj(address, GuestAddress(address)).unwrap();
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress(4 << 30)).unwrap(), 4 << 30);
        assert!(!memory.address_in_range(GuestAddress(3 << 30)));
        assert!(!memory.address_in_range(GuestAddress(6 << 30)));
    }

    #[test]
    fn refusals_name_the_field_the_value_and_the_limit() {
        let config = MemoryConfig { size: MemorySize::from_mib(64 << 20), hugepages: None };
        let message = check_host(&config).unwrap_err().to_string();
        assert!(message.starts_with("memory.size: 64 TiB is more than"), "{message}");
        let config =
            MemoryConfig { size: MemorySize::from_mib(4 << 10), hugepages: Some(HugepageSize::OneGiB) };
        if let Err(error) = check_host(&config) {
            assert!(error.to_string().starts_with("memory.hugepages: "), "{error}");
        }
    }
}
