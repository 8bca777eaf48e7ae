//! OCI layers onto a folder, from archives that want to get out of it.
//!
//! Every path of an archive is resolved by the kernel with `openat2(RESOLVE_IN_ROOT)`, below the
//! folder's descriptor: whatever symbolic links, `..` or races are in the way, the result is inside.
//! (`RESOLVE_NO_SYMLINKS` would refuse real images, whose later layers write through links such as
//! `/lib -> usr/lib` of earlier ones.) The last component is always handled by name in its opened
//! parent and never followed. Device nodes and FIFOs are skipped: containers get their own `/dev`.
//!
//! Sizes, counts and the expansion of compressed data are bounded; see [`Limits`].

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use tar::{Archive, Entry, EntryType};

use super::manifest::Compression;
use crate::beneath::{make_dirs, open_dir};

/// What an image may cost the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries in all layers. Each costs an inode.
    pub entries: u64,
    /// Bytes of content in all layers.
    pub bytes: u64,
    /// Content per compressed byte in each layer; a bomb reaches 1000 with gzip, real layers 10.
    pub ratio: u64,
    /// Components of a path.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 2_000_000, bytes: 64 << 30, ratio: 200, depth: 128 }
    }
}

/// A layer that was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Reading the archive or writing files failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The entry.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The archive itself is broken.
    #[error("the layer is not a valid archive: {0}")]
    Archive(#[source] io::Error),
    /// The archive is over a limit.
    #[error("the layer is over a limit: {0}")]
    Limit(String),
}

/// A folder that layers are put on, lowest first.
#[derive(Debug)]
pub struct Unpacker {
    root: OwnedFd,
    limits: Limits,
    entries: u64,
    bytes: u64,
}

impl Unpacker {
    /// Unpacks below `root`, an empty folder.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn new(root: &Path, limits: Limits) -> Result<Self, UnpackError> {
        let root = File::open(root).map_err(at(root))?.into();
        Ok(Self { root, limits, entries: 0, bytes: 0 })
    }

    /// Puts one layer of `compressed` bytes on top.
    ///
    /// # Errors
    /// When it is malformed or over a limit; the folder is then to be thrown away.
    pub fn layer(
        &mut self,
        blob: impl Read,
        compressed: u64,
        compression: Compression,
    ) -> Result<(), UnpackError> {
        let plain: Box<dyn Read + '_> = match compression {
            Compression::None => Box::new(blob),
            Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(blob)),
            Compression::Zstd => Box::new(zstd::Decoder::new(blob).map_err(UnpackError::Archive)?),
        };
        // The archive's own framing is counted too: a bomb need not consist of files.
        let budget = compressed.saturating_mul(self.limits.ratio).saturating_add(16 << 20);
        let mut archive = Archive::new(Budget { inner: plain, left: budget });
        let mut layer = Layer { unpacker: self, made: HashSet::new(), directories: Vec::new() };
        for entry in archive.entries().map_err(UnpackError::Archive)? {
            layer.entry(entry.map_err(UnpackError::Archive)?)?;
        }
        layer.finish()
    }

    fn count(&mut self, bytes: u64) -> Result<(), UnpackError> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.entries > self.limits.entries {
            return Err(UnpackError::Limit(format!("more than {} entries", self.limits.entries)));
        }
        if self.bytes > self.limits.bytes {
            return Err(UnpackError::Limit(format!("more than {} bytes of content", self.limits.bytes)));
        }
        Ok(())
    }
}

/// A reader that fails once it has given more than it may.
struct Budget<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Budget<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("it expands far beyond its compressed size"))?;
        Ok(count)
    }
}

/// One layer being unpacked.
struct Layer<'a> {
    unpacker: &'a mut Unpacker,
    /// Paths that this layer made, and the folders they are in: an opaque whiteout hides only what lies below the layer.
    made: HashSet<PathBuf>,
    /// Directories and their times, set last because every file made in them changes it.
    directories: Vec<(PathBuf, i64)>,
}

impl Layer<'_> {
    fn entry(&mut self, mut entry: Entry<'_, impl Read>) -> Result<(), UnpackError> {
        let raw = entry.path().map_err(UnpackError::Archive)?.into_owned();
        let kind = entry.header().entry_type();
        let size = if kind.is_file() { entry.size() } else { 0 };
        self.unpacker.count(size)?;
        let path = normalize(&raw, self.unpacker.limits.depth)?;
        let Some((parent, name)) = path.parent().zip(path.file_name()) else {
            // The root itself: only its metadata, as a directory.
            return Ok(());
        };
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self.whiteout(parent, OsStr::from_bytes(hidden));
        }
        let dir = make_dirs(self.unpacker.root.as_fd(), parent).map_err(|e| at(parent)(e.into()))?;
        let meta = Metadata::of(&entry)?;
        match kind {
            EntryType::Directory => self.directory(dir.as_fd(), name, &path, &meta)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                clear(dir.as_fd(), name).map_err(at(&path))?;
                regular(dir.as_fd(), name, &mut entry, &meta).map_err(at(&path))?;
            }
            EntryType::Symlink => {
                let target = link_target(&entry, &path)?;
                clear(dir.as_fd(), name).map_err(at(&path))?;
                symlink(dir.as_fd(), name, &target, &meta).map_err(at(&path))?;
            }
            EntryType::Link => {
                let target = normalize(&link_target(&entry, &path)?, self.unpacker.limits.depth)?;
                self.hard_link(dir.as_fd(), name, &path, &target)?;
            }
            // Device nodes, FIFOs, and what no archive should have.
            _ => return Ok(()),
        }
        // With its ancestors, so that hiding what is below asks one question a name.
        for made in path.ancestors() {
            if !self.made.insert(made.to_owned()) {
                break;
            }
        }
        Ok(())
    }

    fn directory(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        meta: &Metadata,
    ) -> Result<(), UnpackError> {
        let make = || {
            let exists = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW);
            if !exists.is_ok_and(|s| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR) {
                clear(dir, name)?;
                mkdirat(dir, name, Mode::from_bits_truncate(0o700))?;
            }
            let made =
                openat(dir, name, OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
            meta.apply(made.as_fd())
        };
        make().map_err(at(path))?;
        self.directories.push((path.to_owned(), meta.mtime));
        Ok(())
    }

    fn hard_link(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        target: &Path,
    ) -> Result<(), UnpackError> {
        let (Some(parent), Some(target_name)) = (target.parent(), target.file_name()) else {
            return Err(at(path)(io::Error::other("hard link to the root")));
        };
        let target_dir = open_dir(self.unpacker.root.as_fd(), parent).map_err(|e| at(path)(e.into()))?;
        let same = target == path;
        let link = || {
            if !same {
                clear(dir, name)?;
                // Without AT_SYMLINK_FOLLOW: a link to a link is the link.
                linkat(&target_dir, target_name, dir, name, AtFlags::empty())?;
            }
            Ok(())
        };
        link().map_err(at(path))
    }

    fn whiteout(&mut self, parent: &Path, hidden: &OsStr) -> Result<(), UnpackError> {
        let dir = match open_dir(self.unpacker.root.as_fd(), parent) {
            Ok(dir) => dir,
            // Nothing below to hide.
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(errno) => return Err(at(parent)(errno.into())),
        };
        match hidden.as_bytes() {
            b".wh..opq" => self.clear_below(&dir, parent).map_err(at(parent)),
            // Other `.wh..wh.` names are another tool's own business; `.` and `..` are an attack.
            name if name.starts_with(b".wh.") || matches!(name, b"" | b"." | b"..") => Ok(()),
            _ if self.made.contains(&parent.join(hidden)) => Ok(()),
            _ => clear(dir.as_fd(), hidden).map_err(at(&parent.join(hidden))),
        }
    }

    /// Removes what is in `dir` and was not made by this layer.
    fn clear_below(&self, dir: &OwnedFd, path: &Path) -> io::Result<()> {
        for name in names(dir.as_fd())? {
            let path = path.join(&name);
            if !self.made.contains(&path) {
                clear(dir.as_fd(), &name)?;
                continue;
            }
            let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            if let Ok(below) = openat(dir, name.as_os_str(), flags, Mode::empty()) {
                self.clear_below(&below, &path)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), UnpackError> {
        for (path, mtime) in self.directories.iter().rev() {
            // A later entry of the layer may have replaced it by something else.
            if let Ok(dir) = open_dir(self.unpacker.root.as_fd(), path) {
                let time = TimeSpec::new(*mtime, 0);
                futimens(&dir, &time, &time).map_err(|e| at(path)(e.into()))?;
            }
        }
        Ok(())
    }
}

/// Owner, mode and time of an entry.
struct Metadata {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: i64,
}

impl Metadata {
    fn of<R: Read>(entry: &Entry<'_, R>) -> Result<Self, UnpackError> {
        let header = entry.header();
        let id = |value: io::Result<u64>| {
            let value = value.map_err(UnpackError::Archive)?;
            // The last one means "leave it" to chown.
            u32::try_from(value)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| UnpackError::Limit(format!("owner {value} is not a user ID")))
        };
        Ok(Self {
            uid: id(header.uid())?,
            gid: id(header.gid())?,
            mode: header.mode().map_err(UnpackError::Archive)? & 0o7777,
            mtime: i64::try_from(header.mtime().map_err(UnpackError::Archive)?).unwrap_or(0),
        })
    }

    fn apply(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        chown(|uid, gid| fchown(file, uid, gid), self)?;
        // After the owner, because changing that clears set-user-ID.
        fchmod(file, Mode::from_bits_truncate(self.mode))?;
        let time = TimeSpec::new(self.mtime, 0);
        Ok(futimens(file, &time, &time)?)
    }
}

/// Without privileges (in tests) everything belongs to whoever unpacks.
fn chown(
    change: impl FnOnce(Option<Uid>, Option<Gid>) -> nix::Result<()>,
    meta: &Metadata,
) -> io::Result<()> {
    match change(Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid))) {
        Err(Errno::EPERM) if !nix::unistd::geteuid().is_root() => Ok(()),
        other => Ok(other?),
    }
}

fn regular(dir: BorrowedFd<'_>, name: &OsStr, entry: &mut impl Read, meta: &Metadata) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(dir, name, flags, Mode::from_bits_truncate(0o600))?);
    io::copy(entry, &mut file)?;
    file.flush()?;
    meta.apply(file.as_fd())
}

fn symlink(dir: BorrowedFd<'_>, name: &OsStr, target: &Path, meta: &Metadata) -> io::Result<()> {
    symlinkat(target, dir, name)?;
    chown(|uid, gid| fchownat(dir, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW), meta)?;
    let time = TimeSpec::new(meta.mtime, 0);
    Ok(utimensat(dir, name, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

fn link_target<R: Read>(entry: &Entry<'_, R>, path: &Path) -> Result<PathBuf, UnpackError> {
    let target = entry.link_name().map_err(UnpackError::Archive)?;
    let target = target.ok_or_else(|| at(path)(io::Error::other("a link without a target")))?;
    Ok(target.into_owned())
}

/// Removes `name` in `dir`, with all that is in it; never through a link.
fn clear(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let below = openat(dir, name, flags, Mode::empty())?;
    for child in names(below.as_fd())? {
        clear(below.as_fd(), &child)?;
    }
    Ok(unlinkat(dir, name, UnlinkatFlags::RemoveDir)?)
}

fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let mut listing = Dir::from_fd(dir.try_clone_to_owned()?)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// A path as components below the root: `/` and `.` go, and `..` is refused as no honest archive has it.
fn normalize(path: &Path, depth: usize) -> Result<PathBuf, UnpackError> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(at(path)(io::Error::other("a path with \"..\"")));
            }
        }
    }
    if normal.components().count() > depth || normal.as_os_str().len() > 4095 {
        return Err(UnpackError::Limit(format!(
            "a path deeper than {depth} folders or longer than 4095 bytes"
        )));
    }
    Ok(normal)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> UnpackError {
    let path = path.to_owned();
    move |source| UnpackError::Io { path, source }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
