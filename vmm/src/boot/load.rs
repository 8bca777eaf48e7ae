//! Loading: files are read straight into guest memory, never through a buffer of ours.

use std::fs::File;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{ImageError, Initramfs, KernelImage, KernelKind};
use crate::arch::native::layout;
use crate::arch::native::registers::Entry;
use crate::config::MemorySize;

/// A kernel that does not go into this machine.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Too little memory for the kernel.
    #[error("memory.size: {path} needs at least {needed}, the machine has {size}", path = path.display())]
    KernelTooLarge {
        /// Which kernel.
        path: PathBuf,
        /// What it needs.
        needed: MemorySize,
        /// What there is below the 32-bit hole.
        size: MemorySize,
    },
    /// Too little memory for the initramfs.
    #[error(
        "memory.size: {path} ({needed}) does not fit above the kernel, {free} is free", path = path.display()
    )]
    InitramfsTooLarge {
        /// Which initramfs.
        path: PathBuf,
        /// Its size.
        needed: MemorySize,
        /// What is free.
        free: MemorySize,
    },
    /// The loader refused it.
    #[error("boot.kernel: {path} is not a kernel: {source}", path = path.display())]
    Kernel {
        /// Which kernel.
        path: PathBuf,
        /// What the loader said.
        source: linux_loader::loader::Error,
    },
    /// The file changed or cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory is not where it should be.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// How to enter it.
    pub entry: Entry,
    /// A bzImage's own header, for the zero page.
    pub header: Option<setup_header>,
    /// The initramfs, if there is one.
    pub initramfs: Option<Initramfs>,
}

/// Loads `image`, the initramfs and the command line.
///
/// # Errors
/// When memory is too small for them, or a file cannot be read.
pub fn load(
    memory: &GuestMemoryMmap,
    ram: u64,
    image: &mut KernelImage,
    initramfs: Option<(&Path, &mut File)>,
    cmdline: &str,
) -> Result<LoadedKernel, LoadError> {
    let low = ram.min(layout::HOLE.start);
    if image.end > low {
        return Err(LoadError::KernelTooLarge {
            path: image.path.clone(),
            needed: MemorySize::from_bytes(image.end.next_multiple_of(2 << 20)),
            size: MemorySize::from_bytes(low),
        });
    }
    let failed = |source| LoadError::Kernel { path: image.path.clone(), source };
    let (entry, header, top) = match image.kind {
        KernelKind::Elf => {
            let loaded = Elf::load(memory, None, &mut image.file, None).map_err(failed)?;
            let entry = match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh { address: address.0 },
                _ => Entry::Linux64 { address: loaded.kernel_load.0 },
            };
            (entry, None, low)
        }
        KernelKind::BzImage { initramfs_max, .. } => {
            let at = Some(GuestAddress(layout::HIGH_RAM));
            let loaded = BzImage::load(memory, at, &mut image.file, at).map_err(failed)?;
            // The 64-bit entry point is 0x200 into the protected-mode kernel.
            let entry = Entry::Linux64 { address: loaded.kernel_load.0 + 0x200 };
            (entry, loaded.setup_header, low.min(initramfs_max + 1))
        }
    };
    let initramfs = match initramfs {
        Some((path, file)) => Some(load_initramfs(memory, image.end..top, path, file)?),
        None => None,
    };
    let mut text = Vec::with_capacity(cmdline.len() + 1);
    text.extend_from_slice(cmdline.as_bytes());
    text.push(0);
    memory.write_slice(&text, GuestAddress(layout::CMDLINE))?;
    Ok(LoadedKernel { entry, header, initramfs })
}

/// As high as it may be: kernels unpack upwards from where they are.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    free: std::ops::Range<u64>,
    path: &Path,
    file: &mut File,
) -> Result<Initramfs, LoadError> {
    const PAGE: u64 = 4096;
    let unreadable = |source| ImageError::Unreadable { field: "initramfs", path: path.to_owned(), source };
    let size = file.metadata().map_err(unreadable)?.len();
    let address = free.end.checked_sub(size).map(|start| start / PAGE * PAGE);
    let Some(address) = address.filter(|address| *address >= free.start) else {
        return Err(LoadError::InitramfsTooLarge {
            path: path.to_owned(),
            needed: MemorySize::from_bytes(size),
            free: MemorySize::from_bytes(free.end.saturating_sub(free.start)),
        });
    };
    memory.read_exact_volatile_from(GuestAddress(address), file, size as usize)?;
    Ok(Initramfs { address, size })
}
