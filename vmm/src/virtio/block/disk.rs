//! The file behind a disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use super::request::Extent;
use crate::config::DiskConfig;

/// The unit of virtio-blk, whatever the block size (virtio 1.2 §5.2.4).
pub const SECTOR: u64 = 512;
/// What the serial number has room for (`VIRTIO_BLK_ID_BYTES`).
pub const ID_BYTES: usize = 20;

/// A disk that cannot be used; nothing has changed.
#[derive(Debug, thiserror::Error)]
#[error("disk {id:?}: {path}: {problem}", path = path.display())]
pub struct DiskError {
    /// The disk's ID in the machine description.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub problem: DiskProblem,
}

/// What can be wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskProblem {
    /// The ID is also the serial number.
    #[error("the disk's id must be 1 to 20 printable ASCII characters")]
    BadId,
    /// It does not exist, or may not be opened.
    #[error("{}", reason(.0))]
    Open(#[source] io::Error),
    /// A directory, a socket, a terminal.
    #[error("neither a file nor a block device")]
    NotADisk,
    /// Another process holds a lock.
    #[error("in use by another process (a writable disk has one user, a read-only one no writer)")]
    InUse,
    /// The host does not support locks there.
    #[error("cannot be locked: {0}")]
    Lock(#[source] io::Error),
    /// The size is unknown.
    #[error("its size cannot be found: {0}")]
    Size(#[source] io::Error),
    /// The size is not a disk's.
    #[error("{0} bytes are not a disk: the size must be a multiple of 512, and not 0")]
    BadSize(u64),
    /// io_uring was asked for.
    #[error("the host refuses io_uring ({0}); use \"io\": \"auto\" or \"sync\"")]
    IoUring(#[source] io::Error),
}

/// The usual errors in words, without error numbers.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

/// An open and locked disk.
#[derive(Debug)]
pub struct Disk {
    /// Opened read-only if the disk is: the host enforces it (Kata CVE-2026-24834).
    pub file: File,
    /// Size in sectors.
    pub sectors: u64,
    /// The smallest unit that the host stores without reading first, a power of two.
    pub physical_block: u32,
    /// Whether writes fail.
    pub read_only: bool,
    /// The file's contents are in memory anyway, so reading them never waits.
    pub in_memory: bool,
    /// The serial number, padded with zeros.
    pub serial: [u8; ID_BYTES],
}

impl Disk {
    /// Opens and locks what `config` names.
    ///
    /// # Errors
    /// When it is missing, in use, or no disk.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        Self::try_open(config).map_err(|problem| DiskError {
            id: config.id.clone(),
            path: config.path.clone(),
            problem,
        })
    }

    fn try_open(config: &DiskConfig) -> Result<Self, DiskProblem> {
        let serial = serial(&config.id)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            // A FIFO would block the open, a terminal would become ours.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&config.path)
            .map_err(DiskProblem::Open)?;
        let kind = file.metadata().map_err(DiskProblem::Size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskProblem::NotADisk);
        }
        // io_uring takes the flag as a wish for EAGAIN instead of waiting.
        set_blocking(&file).map_err(DiskProblem::Open)?;
        lock(&file, !config.read_only)?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(DiskProblem::Size)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskProblem::BadSize(bytes));
        }
        let physical_block = if kind.is_block_device() { physical_block(&file) } else { 4096 };
        let in_memory = kind.is_file() && on_tmpfs(&file);
        let (sectors, read_only) = (bytes / SECTOR, config.read_only);
        Ok(Self { file, sectors, physical_block, read_only, in_memory, serial })
    }

    /// Gives a range back to the host; it reads as zeros or as before. A hint, so a host that
    /// cannot do it does nothing.
    ///
    /// # Errors
    /// When the host fails at what it can do.
    pub fn discard(&self, extent: &Extent) -> io::Result<()> {
        match self.fallocate(PUNCH, extent) {
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// What the host said, a full disk for one.
    pub fn write_zeroes(&self, extent: &Extent) -> io::Result<()> {
        let mode = if extent.unmap { PUNCH } else { libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE };
        match self.fallocate(mode, extent) {
            Err(error) if unsupported(&error) => self.write_zero_bytes(extent),
            result => result,
        }
    }

    fn write_zero_bytes(&self, extent: &Extent) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let end = extent.offset + extent.length;
        let mut offset = extent.offset;
        while offset < end {
            let length = (end - offset).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..length as usize], offset)?;
            offset += length;
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, extent: &Extent) -> io::Result<()> {
        if extent.length == 0 {
            return Ok(());
        }
        let (Ok(offset), Ok(length)) = (extent.offset.try_into(), extent.length.try_into()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: plain integers; the descriptor is open.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

fn unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

fn on_tmpfs(file: &File) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: fstatfs writes one `struct statfs`, for which there is room.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) };
    if result != 0 {
        return false;
    }
    // SAFETY: fstatfs succeeded, so it filled the structure.
    let stat = unsafe { stat.assume_init() };
    stat.f_type == libc::TMPFS_MAGIC
}

fn serial(id: &str) -> Result<[u8; ID_BYTES], DiskProblem> {
    let bytes = id.as_bytes();
    let mut serial = [0; ID_BYTES];
    let printable = bytes.iter().all(u8::is_ascii_graphic);
    match serial.get_mut(..bytes.len()) {
        Some(target) if printable && !bytes.is_empty() => target.copy_from_slice(bytes),
        _ => return Err(DiskProblem::BadId),
    }
    Ok(serial)
}

fn set_blocking(file: &File) -> io::Result<()> {
    // SAFETY: F_SETFL takes an int and `file` is open; O_NONBLOCK was the only flag it can change.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Locks the whole file until it is closed: exclusively for a writer, shared for readers. Open
/// file description locks, which QEMU takes too, and which no other descriptor's `close` drops.
fn lock(file: &File, exclusive: bool) -> Result<(), DiskProblem> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads one `struct flock`, which lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(DiskProblem::InUse),
        _ => Err(DiskProblem::Lock(error)),
    }
}

/// A block device's physical block size; 4096 if it does not say.
fn physical_block(file: &File) -> u32 {
    /// `_IO(0x12, 123)`: `BLKPBSZGET` of linux/fs.h, which libc does not have.
    const BLKPBSZGET: libc::c_ulong = 0x127b;
    let mut size: libc::c_uint = 0;
    // SAFETY: BLKPBSZGET writes one unsigned int, which lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKPBSZGET as libc::Ioctl, &raw mut size) };
    if result == 0 && size.is_power_of_two() && u64::from(size) >= SECTOR { size } else { 4096 }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{DiskFormat, DiskIo};

    fn config(path: &Path, read_only: bool) -> DiskConfig {
        DiskConfig {
            id: "data".to_owned(),
            path: path.to_owned(),
            format: DiskFormat::Raw,
            read_only,
            io: DiskIo::Sync,
        }
    }

    fn error(path: &Path, read_only: bool) -> String {
        Disk::open(&config(path, read_only)).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_the_disk_and_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        assert_eq!(error(&path, false), format!("disk \"data\": {}: no such file", path.display()));
        std::fs::write(&path, [0; 700]).unwrap();
        assert!(error(&path, false).contains("700 bytes are not a disk"));
        std::fs::write(&path, []).unwrap();
        assert!(error(&path, true).contains("0 bytes are not a disk"));
        assert!(error(directory.path(), true).contains("neither a file nor a block device"));
        assert!(error(Path::new("/dev/null"), false).contains("neither a file nor a block device"));
        for id in ["", "twenty-one-characters", "sp ace", "ümlaut"] {
            let config = DiskConfig { id: id.to_owned(), ..config(&path, false) };
            assert!(Disk::open(&config).unwrap_err().to_string().contains("1 to 20"), "{id:?}");
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let writer = Disk::open(&config(&path, false)).unwrap();
        assert!(error(&path, false).contains("in use"));
        assert!(error(&path, true).contains("in use"));
        drop(writer);
        let readers = [Disk::open(&config(&path, true)).unwrap(), Disk::open(&config(&path, true)).unwrap()];
        assert!(error(&path, false).contains("in use"));
        drop(readers);
        assert_eq!(Disk::open(&config(&path, false)).unwrap().sectors, 8);
    }

    #[test]
    fn a_read_only_disk_cannot_be_written_by_the_host_either() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = Disk::open(&config(&path, true)).unwrap();
        assert!(disk.file.write_at(&[1], 0).is_err());
    }
}
