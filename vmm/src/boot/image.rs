//! Recognising kernels, and refusing what is none before anything is started.
//!
//! Images may come from tenants: every offset and length is checked against the file here, so
//! that the loader behind meets no value that could wrap.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An image that will not do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("boot.{field}: {path}: {source}", path = path.display())]
    Unreadable {
        /// `kernel` or `initramfs`.
        field: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is not one.
    #[error("boot.kernel: {path} is not a kernel: {why}", path = path.display())]
    NotAKernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file holds nothing.
    #[error("boot.initramfs: {path} is empty", path = .0.display())]
    EmptyInitramfs(PathBuf),
}

/// How an image is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// An ELF executable: entered through its PVH note, or by the 64-bit Linux protocol.
    Elf,
    /// A bzImage with a 64-bit entry point.
    BzImage {
        /// First address that the kernel leaves alone once it has unpacked itself.
        end: u64,
        /// Highest address an initramfs may occupy.
        initramfs_max: u64,
    },
}

/// A kernel's file, recognised and checked.
#[derive(Debug)]
pub struct KernelImage {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) kind: KernelKind,
    /// First address after everything the image loads or clears.
    pub(super) end: u64,
}

/// The first page holds an ELF header, its program headers, and a bzImage's setup header.
const HEAD: usize = 4096;

impl KernelImage {
    /// Opens and recognises `path`.
    ///
    /// # Errors
    /// When it cannot be read, or is not a kernel; the message names the file.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let unreadable = |source| ImageError::Unreadable { field: "kernel", path: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let not_a_kernel = |why: String| ImageError::NotAKernel { path: path.to_owned(), why };
        if !metadata.is_file() {
            return Err(not_a_kernel("not a regular file".to_owned()));
        }
        let mut head = [0; HEAD];
        let length = read_up_to(&file, &mut head).map_err(unreadable)?;
        let (kind, end) = recognise(&head[..length], metadata.len()).map_err(not_a_kernel)?;
        Ok(Self { file, path: path.to_owned(), kind, end })
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For errors of a later read.
    pub fn unreadable(&self, source: io::Error) -> ImageError {
        ImageError::Unreadable { field: "kernel", path: self.path.clone(), source }
    }

    /// How the image is packed.
    pub fn kind(&self) -> KernelKind {
        self.kind
    }

    /// Whether this is Linux, or packed like it: every bzImage, and ELF files with Linux's banner.
    ///
    /// Reads the whole file if it must.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn is_linux(&self) -> io::Result<bool> {
        const BANNER: &[u8] = b"Linux version ";
        if matches!(self.kind, KernelKind::BzImage { .. }) {
            return Ok(true);
        }
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        loop {
            let length = self.file.read_at(&mut buffer, offset)?;
            if buffer[..length].windows(BANNER.len()).any(|window| window == BANNER) {
                return Ok(true);
            }
            if length < BANNER.len() {
                return Ok(false);
            }
            // Pieces overlap, for a banner across their border.
            offset += (length - BANNER.len() + 1) as u64;
        }
    }
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            length => filled += length,
        }
    }
    Ok(filled)
}

/// The kind of the image that starts with `head` and is `file_size` bytes long, and the first
/// address it leaves free.
pub(crate) fn recognise(head: &[u8], file_size: u64) -> Result<(KernelKind, u64), String> {
    /// Physical addresses have 52 bits at most; later arithmetic relies on a bound.
    const ADDRESSES_END: u64 = 1 << 52;
    let (kind, end) = parse(head, file_size)?;
    if end > ADDRESSES_END { Err(format!("it reaches up to address {end:#x}")) } else { Ok((kind, end)) }
}

fn parse(head: &[u8], file_size: u64) -> Result<(KernelKind, u64), String> {
    if head.starts_with(b"\x7fELF") {
        return check_elf(head, file_size).map(|end| (KernelKind::Elf, end));
    }
    if head.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
        return check_bzimage(head, file_size);
    }
    let hint = match head {
        [0x1f, 0x8b, ..] => ": it is gzip-compressed, unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ": it is zstd-compressed, unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ": it is xz-compressed, unpack it first",
        [] => ": it is empty",
        _ => "",
    };
    Err(format!("neither ELF nor bzImage{hint}"))
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u64> {
    field(bytes, offset).map(|field| u16::from_le_bytes(field).into())
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u64> {
    field(bytes, offset).map(|field| u32::from_le_bytes(field).into())
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    field(bytes, offset).map(u64::from_le_bytes)
}

/// ELF-64 object file format, version 1.5: file header and program headers.
fn check_elf(head: &[u8], file_size: u64) -> Result<u64, String> {
    const MACHINE_X86_64: u64 = 62;
    const PROGRAM_HEADER_SIZE: u64 = 56;
    let truncated = || "its ELF header is cut off".to_owned();
    if head.get(4..6).ok_or_else(truncated)? != [2, 1] {
        return Err("not a 64-bit little-endian ELF file".to_owned());
    }
    if u16_at(head, 18).ok_or_else(truncated)? != MACHINE_X86_64 {
        return Err("an ELF file for another processor".to_owned());
    }
    if !matches!(u16_at(head, 16).ok_or_else(truncated)?, 2 | 3) {
        return Err("an ELF file, but not an executable".to_owned());
    }
    let table = u64_at(head, 32).ok_or_else(truncated)?;
    let count = u16_at(head, 56).ok_or_else(truncated)?;
    if u16_at(head, 54).ok_or_else(truncated)? != PROGRAM_HEADER_SIZE {
        return Err("its ELF program headers have an unknown size".to_owned());
    }
    // Kernels have a handful, right behind the file header; so they are in the first page.
    let table = usize::try_from(table).ok().and_then(|start| head.get(start..)).ok_or_else(truncated)?;
    let headers: Vec<&[u8]> = table.chunks_exact(PROGRAM_HEADER_SIZE as usize).take(count as usize).collect();
    if headers.len() as u64 != count {
        return Err("its ELF program headers are not in its first 4096 bytes".to_owned());
    }
    let mut end = 0;
    for header in headers {
        end = end.max(check_program_header(header, file_size)?);
    }
    if end == 0 { Err("an ELF file with nothing to load".to_owned()) } else { Ok(end) }
}

/// Checks one program header; returns the first address after the segment, 0 if it is not loaded.
fn check_program_header(header: &[u8], file_size: u64) -> Result<u64, String> {
    const LOAD: u64 = 1;
    const NOTE: u64 = 4;
    /// The notes are walked one by one: this bounds the walk.
    const NOTES_MAX: u64 = 64 << 10;
    let broken = || "an ELF program header is out of bounds".to_owned();
    let kind = u32_at(header, 0).ok_or_else(broken)?;
    let word = |offset| u64_at(header, offset).ok_or_else(broken);
    let (offset, address, in_file, in_memory) = (word(8)?, word(24)?, word(32)?, word(40)?);
    if kind != LOAD && kind != NOTE {
        return Ok(0);
    }
    if offset.checked_add(in_file).is_none_or(|end| end > file_size) {
        return Err("an ELF segment reaches past the end of the file".to_owned());
    }
    if kind == NOTE {
        return if in_file <= NOTES_MAX { Ok(0) } else { Err(broken()) };
    }
    if in_memory == 0 {
        return Ok(0);
    }
    let end = address.checked_add(in_memory).filter(|_| in_file <= in_memory).ok_or_else(broken)?;
    if address < crate::arch::native::layout::HIGH_RAM {
        return Err(format!("an ELF segment loads at {address:#x}, below 1 MiB"));
    }
    Ok(end)
}

/// Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
fn check_bzimage(head: &[u8], file_size: u64) -> Result<(KernelKind, u64), String> {
    const LOADED_HIGH: u8 = 1;
    const KERNEL_64: u64 = 1;
    /// Protocol 2.12, Linux 3.8: the first with `xloadflags`.
    const VERSION_MIN: u64 = 0x20c;
    let truncated = || "its bzImage header is cut off".to_owned();
    let version = u16_at(head, 0x206).ok_or_else(truncated)?;
    let loadflags = head.get(0x211).ok_or_else(truncated)?;
    let xloadflags = u16_at(head, 0x236).ok_or_else(truncated)?;
    if version < VERSION_MIN || loadflags & LOADED_HIGH == 0 || xloadflags & KERNEL_64 == 0 {
        return Err("a bzImage without a 64-bit entry point".to_owned());
    }
    let sectors = match *head.get(0x1f1).ok_or_else(truncated)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup = (sectors + 1) * 512;
    let payload = file_size.checked_sub(setup).filter(|size| *size > 0).ok_or_else(truncated)?;
    let preferred = u64_at(head, 0x258).ok_or_else(truncated)?;
    let init_size = u32_at(head, 0x260).ok_or_else(truncated)?;
    let initramfs_max = u32_at(head, 0x22c).ok_or_else(truncated)?;
    // Loaded below its preferred address, the kernel moves there to unpack itself.
    let start = crate::arch::native::layout::HIGH_RAM;
    let unpacked = preferred.max(start).checked_add(init_size).ok_or_else(truncated)?;
    let end = unpacked.max(start.checked_add(payload).ok_or_else(truncated)?);
    Ok((KernelKind::BzImage { end, initramfs_max }, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn elf(offset: u64, address: u64, in_file: u64, in_memory: u64) -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        for (at, value) in [(72, offset), (88, address), (96, in_file), (104, in_memory)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn an_elf_kernel_ends_where_its_bss_does() {
        let image = elf(0, 1 << 20, 120, 0x3000);
        assert_eq!(recognise(&image, 120), Ok((KernelKind::Elf, 0x10_3000)));
    }

    #[test]
    fn what_is_not_a_kernel_is_told_apart() {
        let why = |bytes: &[u8]| recognise(bytes, bytes.len() as u64).unwrap_err();
        assert_eq!(why(b"#!/bin/sh\n"), "neither ELF nor bzImage");
        assert!(why(b"\x1f\x8b\x08").contains("gzip"));
        assert!(why(b"").contains("empty"));
        assert!(why(&elf(0, 0x1000, 120, 120)).contains("below 1 MiB"));
        assert!(why(&elf(100, 1 << 20, 120, 120)).contains("past the end"));
        assert!(why(&elf(u64::MAX, 1 << 20, 2, 2)).contains("past the end"));
        assert!(why(&elf(0, u64::MAX, 120, 120)).contains("out of bounds"));
        assert!(why(&elf(0, 1 << 20, 120, 60)).contains("out of bounds"));
        assert!(why(&elf(0, 0, 0, 0)).contains("nothing to load"));
        let mut arm = elf(0, 1 << 20, 120, 120);
        arm[18] = 183;
        assert!(why(&arm).contains("another processor"));
    }

    proptest! {
        #[test]
        fn no_input_panics_and_accepted_ones_are_bounded(
            magic in 0..3, mut bytes in proptest::collection::vec(any::<u8>(), 0..1024), size in any::<u64>(),
        ) {
            match magic {
                0 if bytes.len() >= 64 => bytes[..64].copy_from_slice(&elf(0, 0, 0, 0)[..64]),
                1 if bytes.len() >= 0x206 => bytes[0x202..0x206].copy_from_slice(b"HdrS"),
                _ => {}
            }
            if let Ok((_, end)) = recognise(&bytes, size) {
                prop_assert!(end > crate::arch::native::layout::HIGH_RAM);
            }
        }

        #[test]
        fn elf_headers_of_any_content_are_judged_without_wrapping(
            offset in any::<u64>(), address in any::<u64>(), in_file in any::<u64>(), in_memory in any::<u64>(),
        ) {
            let image = elf(offset, address, in_file, in_memory);
            if recognise(&image, 120).is_ok() {
                prop_assert!(offset + in_file <= 120 && in_file <= in_memory && address >= 1 << 20);
            }
        }
    }
}
