//! A container's filesystems, in the supervisor's own mount namespace.
//!
//! Because they are mounted nowhere else, the kernel takes them away with the last process of the
//! sandbox, loop devices included: there is nothing for anybody to clean up, whoever was killed.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lathe_api::MemorySize;
use lathe_guest_protocol::{MountSource, TaskSpec};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::files::{self, FileError};
use crate::loopback;

/// A filesystem that could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Files and folders.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Mount {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The task names a disk that was not given.
    #[error("the task has a disk {0:?} that was not prepared")]
    NoDisk(String),
}

fn failed(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RootfsError {
    let what = what.into();
    move |source| RootfsError::Mount { what, source }
}

/// What was mounted.
#[derive(Debug)]
pub struct Rootfs {
    /// The container's root: the image with a writable overlay.
    pub root: PathBuf,
    /// The same, as a descriptor.
    pub fd: OwnedFd,
    /// Datasets, and their places in the container.
    pub datasets: Vec<(PathBuf, String)>,
}

/// Leaves the host's mount namespace and mounts the task's filesystems below `run_dir`.
///
/// # Errors
/// When the kernel refuses; what was mounted goes with this process.
pub fn mount_all(
    run_dir: &Path,
    task: &TaskSpec,
    disks: &BTreeMap<String, PathBuf>,
    memory: MemorySize,
) -> Result<Rootfs, RootfsError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| failed("make a mount namespace")(e.into()))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .map_err(|e| failed("make mounts private")(e.into()))?;
    let place = |name: &str| {
        let path = run_dir.join(name);
        files::make_private_dir(&path).map(|()| path)
    };
    let lower = place("image")?;
    mount_disk(&task.root, disks, &lower, true)?;
    let writable = place("writable")?;
    match &task.overlay {
        Some(source) => mount_disk(source, disks, &writable, false)?,
        // Counted against the container's memory, and bounded by it.
        None => {
            let options = format!("mode=0700,size={}", memory.bytes());
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
            mount(Some("tmpfs"), &writable, Some("tmpfs"), flags, Some(options.as_str()))
                .map_err(|e| failed("mount the overlay's tmpfs")(e.into()))?;
        }
    }
    let root = place("root")?;
    overlay(&lower, &writable, &root)?;
    let mut datasets = Vec::new();
    for (index, wanted) in task.mounts.iter().enumerate() {
        let at = place(&format!("data{index}"))?;
        mount_disk(&wanted.source, disks, &at, wanted.read_only)?;
        datasets.push((at, wanted.target.clone()));
    }
    let fd = fs::File::open(&root).map_err(FileError::io("open", &root))?.into();
    Ok(Rootfs { root, fd, datasets })
}

fn overlay(lower: &Path, writable: &Path, root: &Path) -> Result<(), RootfsError> {
    let (upper, work) = (writable.join("upper"), writable.join("work"));
    for dir in [&upper, &work] {
        files::make_private_dir(dir)?;
    }
    // The root of the overlay is the upper's: it must look like the image's.
    let mode = fs::metadata(lower).map_err(FileError::io("read", lower))?.permissions();
    fs::set_permissions(&upper, mode).map_err(FileError::io("change the mode of", &upper))?;
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    // Device nodes and set-user-ID programs of an image mean nothing here.
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some("overlay"), root, Some("overlay"), flags, Some(options.as_str()))
        .map_err(|e| failed("mount the overlay")(e.into()))
}

fn mount_disk(
    source: &MountSource,
    disks: &BTreeMap<String, PathBuf>,
    at: &Path,
    read_only: bool,
) -> Result<(), RootfsError> {
    let MountSource::Disk { serial, fs } = source else {
        return Err(RootfsError::NoDisk(format!("{source:?}")));
    };
    let file = disks.get(serial).ok_or_else(|| RootfsError::NoDisk(serial.clone()))?;
    let what = || failed(format!("mount {} ({fs})", file.display()));
    let device = loopback::attach(file, read_only).map_err(what())?;
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, read_only);
    // The device frees itself with its last user; from here on that is the mount.
    mount(Some(device.path()), at, Some(fs.as_str()), flags, None::<&str>).map_err(|e| what()(e.into()))
}
