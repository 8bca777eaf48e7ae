//! What devices reach by DMA: guest memory, and each other's BARs.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::VfioError;
use super::iommu::Iommu;
use crate::bus::lock;
use crate::config::MemorySize;

/// The machine's I/O address space with guest memory in it. Unmapped when dropped, before the memory goes.
pub struct Dma {
    iommu: Arc<dyn Iommu>,
    /// Holds the mapped memory.
    memory: GuestMemoryMmap,
    mapped: Mutex<Vec<Range<u64>>>,
    /// Devices' BARs are mapped as well, until the kernel refuses one.
    peer_to_peer: AtomicBool,
}

/// How long the two parts of mapping guest memory took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapTimes {
    /// Having the kernel provide and clear the pages.
    pub populate: Duration,
    /// Pinning them and writing the IOMMU's tables.
    pub map: Duration,
}

impl Dma {
    /// Maps all of `memory`, each region as one piece: the IOMMU then uses its largest pages. The first
    /// device is in `iommu` already.
    ///
    /// # Errors
    /// When limits do not allow it, with the number that is needed.
    pub fn map(
        iommu: Arc<dyn Iommu>,
        memory: &GuestMemoryMmap,
        peer_to_peer: bool,
    ) -> Result<(Self, MapTimes), VfioError> {
        check_locked_memory(memory)?;
        check_mappings(&*iommu, memory)?;
        check_apertures(&*iommu, memory)?;
        let start = Instant::now();
        populate(memory);
        let populated = Instant::now();
        let dma = Self {
            iommu,
            memory: memory.clone(),
            mapped: Mutex::default(),
            peer_to_peer: AtomicBool::new(peer_to_peer),
        };
        for region in dma.memory.iter() {
            let range = region.start_addr().raw_value()..region.start_addr().raw_value() + region.len();
            let Some(host) = NonNull::new(region.as_ptr()) else { continue };
            // SAFETY: the region is mapped as long as `memory` lives, which this value holds; the VMM touches
            // guest memory only by volatile accesses and system calls.
            unsafe { dma.iommu.map(range.start, host, region.len()) }.map_err(VfioError::kernel(format!(
                "mapping guest memory {:#x}..{:#x} for DMA",
                range.start, range.end
            )))?;
            lock(&dma.mapped).push(range);
        }
        Ok((dma, MapTimes { populate: populated - start, map: populated.elapsed() }))
    }

    /// The address space.
    pub fn iommu(&self) -> &Arc<dyn Iommu> {
        &self.iommu
    }

    /// Lets other devices reach a part of a BAR at guest address `guest`. Returns whether they do: where the
    /// kernel cannot map device memory, peers do without, which is said once.
    ///
    /// # Safety
    /// The memory stays mapped until [`unmap_bar`](Self::unmap_bar).
    pub unsafe fn map_bar(&self, guest: u64, host: NonNull<u8>, size: u64) -> bool {
        if !self.peer_to_peer.load(Ordering::Relaxed) {
            return false;
        }
        // SAFETY: as the caller promises.
        match unsafe { self.iommu.map(guest, host, size) } {
            Ok(()) => true,
            Err(error) => {
                if self.peer_to_peer.swap(false, Ordering::Relaxed) {
                    crate::notice(format_args!(
                        "devices reach guest memory but not each other: {} cannot map the BAR at {guest:#x} \
                         ({error})",
                        self.iommu.name()
                    ));
                }
                false
            }
        }
    }

    /// Undoes [`map_bar`](Self::map_bar).
    pub fn unmap_bar(&self, guest: u64, size: u64) {
        // It was mapped; and a device whose peers still reach an address that no longer answers reads ones.
        let _ = self.iommu.unmap(guest, size);
    }

    /// Whether peers reach each other.
    pub fn peer_to_peer(&self) -> bool {
        self.peer_to_peer.load(Ordering::Relaxed)
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        for range in lock(&self.mapped).drain(..) {
            // Without devices the kernel has unmapped it already.
            let _ = self.iommu.unmap(range.start, range.end - range.start);
        }
    }
}

/// Has all pages provided and cleared by several threads: pinning alone would do it page by page on one.
fn populate(memory: &GuestMemoryMmap) {
    /// Enough to share evenly, and large enough for 1 GiB pages.
    const PIECE: u64 = 1 << 30;
    let pieces: Vec<(usize, usize)> = memory
        .iter()
        .flat_map(|region| {
            let (start, length) = (region.as_ptr() as usize, region.len());
            (0..length.div_ceil(PIECE)).map(move |index| {
                let offset = index * PIECE;
                (start + offset as usize, (length - offset).min(PIECE) as usize)
            })
        })
        .collect();
    let pieces = Mutex::new(split_for_threads(pieces));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        while let Some((start, length)) = { lock(&pieces).pop() } {
            populate_piece(start, length);
        }
    };
    if threads == 1 {
        return work();
    }
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
}

/// Small machines' memory too is worth sharing out: at least 64 MiB a piece.
fn split_for_threads(pieces: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    const SMALLEST: usize = 64 << 20;
    if pieces.len() > 8 {
        return pieces;
    }
    let split = |(start, length): (usize, usize)| {
        (0..length.div_ceil(SMALLEST)).map(move |index| {
            let offset = index * SMALLEST;
            (start + offset, (length - offset).min(SMALLEST))
        })
    };
    pieces.into_iter().flat_map(split).collect()
}

fn populate_piece(start: usize, length: usize) {
    // SAFETY: the range is guest memory, which stays mapped; populating does not change what is in it.
    // A kernel before 5.14 refuses, and pins the pages one by one afterwards.
    unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_POPULATE_WRITE) };
}

fn check_locked_memory(memory: &GuestMemoryMmap) -> Result<(), VfioError> {
    const CAP_IPC_LOCK: u32 = 14;
    let needed: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return Ok(()) };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    if needed > limit && capabilities & 1 << CAP_IPC_LOCK == 0 {
        let (needed, limit) = (MemorySize::from_bytes(needed), MemorySize::from_bytes(limit));
        return Err(VfioError::LockedMemory { needed, limit });
    }
    Ok(())
}

fn check_mappings(iommu: &dyn Iommu, memory: &GuestMemoryMmap) -> Result<(), VfioError> {
    let needed = memory.num_regions();
    match iommu.mappings_left() {
        Some(limit) if (limit as usize) < needed => Err(VfioError::Mappings { needed, limit }),
        _ => Ok(()),
    }
}

fn check_apertures(iommu: &dyn Iommu, memory: &GuestMemoryMmap) -> Result<(), VfioError> {
    let apertures =
        iommu.apertures().map_err(VfioError::kernel("asking what addresses the IOMMU translates"))?;
    if apertures.is_empty() {
        return Ok(());
    }
    for region in memory.iter() {
        let (start, end) = (region.start_addr().raw_value(), region.start_addr().raw_value() + region.len());
        if !apertures.iter().any(|range| range.start <= start && end <= range.end) {
            let aperture = describe(&apertures);
            return Err(VfioError::Aperture { start, end, aperture });
        }
    }
    Ok(())
}

fn describe(ranges: &[Range<u64>]) -> String {
    ranges.iter().map(|r| format!("{:#x}..{:#x}", r.start, r.end)).collect::<Vec<_>>().join(", ")
}
