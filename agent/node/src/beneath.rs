//! Paths below a folder that somebody hostile filled: the kernel resolves them, inside.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// Opens `path` below `root`: links, `..` and absolute paths are taken as if `root` were `/`.
///
/// # Errors
/// As `openat2`.
pub fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Opens the directory `path` below `root`.
///
/// # Errors
/// As `openat2`.
pub fn open_dir(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    open(root, path, OFlag::O_DIRECTORY)
}

/// Opens the directory `path` below `root`, making what is missing of it.
///
/// # Errors
/// When a component is something else than a directory, or cannot be made.
pub fn make_dirs(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    match open_dir(root, path) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let mut so_far = PathBuf::new();
    for component in path.components().filter(|c| !matches!(c, std::path::Component::RootDir)) {
        let above = open_dir(root, &so_far)?;
        match mkdirat(&above, component.as_os_str(), Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        so_far.push(component);
    }
    open_dir(root, path)
}

/// The content of a regular file below `root`, if there is one of at most `limit` bytes.
///
/// # Errors
/// When reading fails or the file is longer.
pub fn read_file(root: &OwnedFd, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    // Without O_NONBLOCK a FIFO in the image would hang the reader.
    let file = match open(root.as_fd(), path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY) {
        Ok(file) => std::fs::File::from(file),
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(Some(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_end_inside() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let root = outside.path().join("root");
        std::fs::create_dir(&root).unwrap();
        symlink("../secret", root.join("a")).unwrap();
        symlink("/etc", root.join("etc2")).unwrap();
        let fd = OwnedFd::from(std::fs::File::open(&root).unwrap());
        assert_eq!(read_file(&fd, Path::new("/a"), 99).unwrap(), None);
        make_dirs(fd.as_fd(), Path::new("/work/deep")).unwrap();
        assert!(root.join("work/deep").is_dir());
        assert!(make_dirs(fd.as_fd(), Path::new("etc2/x")).is_err() || root.join("etc/x").exists());
        assert!(!Path::new("/etc/x").exists());
    }
}
