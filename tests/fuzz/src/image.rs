//! What is in images and datasets that somebody else made.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use lathe_agent::images::manifest::{Compression, parse_config, parse_manifest};
use lathe_agent::images::unpack::{Limits, Unpacker};
use lathe_vmm::boot::{self, KernelImage};
use least_squares::data::{DataError, Dataset, Part, Share};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Where short-lived files go.
const MEMORY: &str = "/dev/shm";

/// A kernel, loaded into a guest of 32 MiB.
pub fn kernel(bytes: &[u8]) {
    const RAM: usize = 32 << 20;
    static GUEST: OnceLock<GuestMemoryMmap> = OnceLock::new();
    let guest =
        GUEST.get_or_init(|| GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("guest memory"));
    let file = tempfile::NamedTempFile::new_in(MEMORY).expect("a file");
    fs::write(file.path(), bytes).expect("a file");
    let Ok(mut image) = KernelImage::open(file.path()) else { return };
    let _ = image.is_linux();
    let _ = boot::load(guest, RAM as u64, &mut image, None, "console=ttyS0");
}

/// A manifest, and a configuration.
pub fn documents(bytes: &[u8]) {
    if let Ok((_, layers)) = parse_manifest(bytes) {
        assert!(layers.len() <= 128, "{} layers", layers.len());
    }
    let _ = parse_config(bytes);
}

/// A layer, unpacked beside a folder that must stay as it is. The first byte chooses the compression, and
/// whether the headers' checksums are mended, without which hardly any archive would be read.
pub fn layer(bytes: &[u8]) {
    let (choice, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let compression = match choice & 3 {
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        _ => Compression::None,
    };
    let mut archive = rest.to_vec();
    if choice & 4 == 0 && compression == Compression::None {
        archive.chunks_exact_mut(512).for_each(mend_checksum);
    }
    let directory = tempfile::tempdir_in(MEMORY).expect("a directory");
    let (root, outside) = (directory.path().join("root"), directory.path().join("outside"));
    fs::create_dir(&root).expect("a directory");
    fs::create_dir(&outside).expect("a directory");
    fs::write(outside.join("file"), "untouched").expect("a file");
    let limits = Limits { entries: 64, bytes: 1 << 20, ratio: 200, depth: 16 };
    let mut unpacker = Unpacker::new(&root, limits).expect("an empty folder");
    let _ = unpacker.layer(archive.as_slice(), archive.len() as u64, compression);
    assert_eq!(names(directory.path()), ["outside", "root"], "something was made beside the root");
    assert_eq!(names(&outside), ["file"]);
    assert_eq!(fs::read(outside.join("file")).expect("the file"), b"untouched");
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("the directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The sum of all bytes with the field itself as spaces (POSIX ustar), where the block looks like a header.
fn mend_checksum(block: &mut [u8]) {
    const FIELD: std::ops::Range<usize> = 148..156;
    if block[0] == 0 || !block[257..262].eq(b"ustar") {
        return;
    }
    block[FIELD].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[FIELD].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A table, read by two ranks: each row belongs to exactly one.
pub fn csv(bytes: &[u8]) {
    let file = tempfile::Builder::new().suffix(".csv").tempfile_in(MEMORY).expect("a file");
    fs::write(file.path(), bytes).expect("a file");
    let Ok(dataset) = Dataset::open(file.path(), "y", None) else { return };
    let read = |rank, of| -> Result<u64, DataError> {
        Share::new(dataset.clone(), Part { rank, of }, 0).for_each_block(|block| {
            assert!((0..block.columns()).all(|column| block.column(column).iter().all(|v| v.is_finite())));
            Ok(())
        })
    };
    if let (Ok(all), Ok(first), Ok(second)) = (read(0, 1), read(0, 2), read(1, 2)) {
        assert_eq!(first + second, all, "rows were read twice or not at all");
    }
}
