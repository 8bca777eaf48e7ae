//! The task's view of the filesystem, in its own mount namespace.
//!
//! Everything is assembled under [`STAGE`], then moved over `/`: the root of an initramfs cannot
//! be pivoted away. The image is hostile, so every path inside it is resolved by the kernel as if
//! it were the root already ([`Tree`]): a symlink in the image cannot lead a mount out of it.

use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use lathe_guest_protocol::{MountSource, TaskSpec};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mkdirat, mknodat, umask};
use nix::unistd::{UnlinkatFlags, chdir, chroot, symlinkat, unlinkat};

use crate::disk::{self, NoSuchDisk};

/// Where the overlay's parts and the assembled tree live, on init's /run.
const STAGE: &str = "/run/lathe";

/// The task's filesystem could not be built.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// Nothing to run from.
    #[error("the task has no root filesystem: root must be a disk")]
    NoRoot,
    /// A path of the task description.
    #[error("cannot mount at {0:?}: a mount's target is an absolute path without \"..\", and not / itself")]
    BadTarget(String),
    /// A disk of the task description.
    #[error(transparent)]
    Disk(#[from] NoSuchDisk),
    /// A mount was refused.
    #[error("cannot mount {what} at {target}: {source}")]
    Mount {
        /// Filesystem and device.
        what: String,
        /// Path inside the task's root.
        target: String,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// Something could not be made in the tree.
    #[error("cannot make {path} in the task's root: {source}")]
    Make {
        /// Path inside the task's root.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The tree could not become the root.
    #[error("cannot enter the task's root: {0}")]
    Enter(#[source] Errno),
}

/// A pseudo filesystem of the task.
struct Pseudo {
    fs: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// In mount order; as the OCI runtime specification has them for Linux.
const PSEUDO: [Pseudo; 7] = [
    Pseudo { fs: "proc", target: "/proc", flags: QUIET, data: None },
    Pseudo { fs: "sysfs", target: "/sys", flags: QUIET.union(MsFlags::MS_RDONLY), data: None },
    Pseudo { fs: "cgroup2", target: "/sys/fs/cgroup", flags: QUIET.union(MsFlags::MS_RDONLY), data: None },
    // A quarter of a megabyte holds any number of nodes that make sense.
    Pseudo { fs: "tmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, data: Some("mode=0755,size=256k") },
    Pseudo {
        fs: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: Some("newinstance,ptmxmode=0666,mode=0620,gid=5"),
    },
    // Bounded by half of memory, and by the task's own limit, which it is charged to.
    Pseudo { fs: "tmpfs", target: "/dev/shm", flags: QUIET, data: Some("mode=1777") },
    Pseudo { fs: "mqueue", target: "/dev/mqueue", flags: QUIET, data: None },
];

/// Character devices of /dev: name, major, minor.
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Symbolic links of /dev.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Hidden from the task: they show or steer the machine, not the task.
const MASKED: [&str; 7] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
];

/// Readable and not writable: a task as root could halt or reconfigure its guest through them.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Builds the task's root and makes it the root of the calling process, which must have a mount
/// namespace of its own.
pub fn enter(spec: &TaskSpec) -> Result<(), RootError> {
    umask(Mode::empty());
    // Nothing of the task's may propagate back to init.
    mount_at("private", None, "/", MsFlags::MS_REC | MsFlags::MS_PRIVATE, None, "/")?;
    let tree = Tree::open(&mount_overlay(spec)?)?;
    for pseudo in &PSEUDO {
        // Drivers are bound and devices turned on through sysfs.
        let writable = spec.drives_devices && pseudo.fs == "sysfs";
        let flags = if writable { pseudo.flags - MsFlags::MS_RDONLY } else { pseudo.flags };
        tree.mount(pseudo.fs, None, pseudo.target, flags, pseudo.data)?;
    }
    fill_dev(&tree)?;
    restrict(&tree)?;
    for entry in &spec.mounts {
        check_target(&entry.target)?;
        let source = Source::resolve(&entry.source)?;
        let read_only = if entry.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | read_only;
        if let Some(source) = source {
            tree.mount(&source.fs, source.device.as_deref(), &entry.target, flags, source.data.as_deref())?;
        }
    }
    write_etc(&tree, spec)?;
    umask(Mode::from_bits_truncate(0o022));
    switch(&tree)
}

/// What to give to mount(2).
struct Source {
    fs: String,
    device: Option<String>,
    data: Option<String>,
}

impl Source {
    /// `None` for no filesystem at all.
    fn resolve(source: &MountSource) -> Result<Option<Self>, NoSuchDisk> {
        Ok(match source {
            MountSource::None => None,
            MountSource::Disk { serial, fs } => {
                let device = disk::find(serial)?.display().to_string();
                Some(Self { fs: fs.clone(), device: Some(device), data: None })
            }
            MountSource::Tmpfs { size } => Some(Self {
                fs: "tmpfs".to_owned(),
                device: None,
                // Zero would be no limit at all to tmpfs.
                data: (*size > 0).then(|| format!("mode=1777,size={size}")),
            }),
        })
    }
}

/// Mounts the image with a writable layer above it; returns the path of the result.
fn mount_overlay(spec: &TaskSpec) -> Result<String, RootError> {
    let [image, layer, root] = ["image", "layer", "root"].map(|name| format!("{STAGE}/{name}"));
    for dir in [&image, &layer, &root] {
        make_dir_all(dir)?;
    }
    let Some(source @ Source { device: Some(_), .. }) = Source::resolve(&spec.root)? else {
        return Err(RootError::NoRoot);
    };
    let flags = MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
    mount_at(&source.fs, source.device.as_deref(), &image, flags, None, "/")?;

    let overlay = spec.overlay.as_ref().unwrap_or(&MountSource::Tmpfs { size: 0 });
    let upper = Source::resolve(overlay)?.unwrap_or_else(|| Source {
        fs: "tmpfs".to_owned(),
        device: None,
        data: None,
    });
    mount_at(&upper.fs, upper.device.as_deref(), &layer, MsFlags::MS_NODEV, upper.data.as_deref(), "/")?;
    let (upper, work) = (format!("{layer}/upper"), format!("{layer}/work"));
    // The upper directory is the task's /: it must not take tmpfs's sticky mode.
    for dir in [&upper, &work] {
        make_dir_all(dir)?;
        set_mode(dir, 0o755)?;
    }
    let data = format!("lowerdir={image},upperdir={upper},workdir={work}");
    mount_at("overlay", None, &root, MsFlags::MS_NODEV, Some(&data), "/")?;
    Ok(root)
}

fn make_dir_all(path: &str) -> Result<(), RootError> {
    fs::create_dir_all(path).map_err(|source| RootError::Make { path: path.to_owned(), source })
}

fn set_mode(path: &str, mode: u32) -> Result<(), RootError> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, mode).map_err(|source| RootError::Make { path: path.to_owned(), source })
}

/// mount(2) at a path of init's; `shown` is what the message calls it. For changes of a mount's
/// flags or place the kernel ignores `fs`, which then only names the step.
fn mount_at(
    fs: &str,
    device: Option<&str>,
    target: &str,
    flags: MsFlags,
    data: Option<&str>,
    shown: &str,
) -> Result<(), RootError> {
    mount(Some(device.unwrap_or(fs)), target, Some(fs), flags, data).map_err(|source| RootError::Mount {
        what: device.map_or_else(|| fs.to_owned(), |device| format!("{fs} of {device}")),
        target: shown.to_owned(),
        source,
    })
}

fn check_target(target: &str) -> Result<(), RootError> {
    let mut parts = target.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
    let names_something = parts.peek().is_some();
    if target.starts_with('/') && names_something && parts.all(|part| part != "..") {
        return Ok(());
    }
    Err(RootError::BadTarget(target.to_owned()))
}

fn fill_dev(tree: &Tree) -> Result<(), RootError> {
    let dev = tree.directory("/dev")?;
    let failed = |name: &str| {
        let path = format!("/dev/{name}");
        move |source: Errno| RootError::Make { path, source: source.into() }
    };
    for (name, major, minor) in NODES {
        let mode = Mode::from_bits_truncate(0o666);
        mknodat(&dev, name, SFlag::S_IFCHR, mode, makedev(major, minor)).map_err(failed(name))?;
    }
    for (name, target) in LINKS {
        symlinkat(target, &dev, name).map_err(failed(name))?;
    }
    Ok(())
}

/// Masks and write-protects what a kernel offers of [`MASKED`] and [`READ_ONLY`].
fn restrict(tree: &Tree) -> Result<(), RootError> {
    let null = tree
        .resolve("/dev/null")
        .map_err(|errno| RootError::Make { path: "/dev/null".to_owned(), source: errno.into() })?;
    for path in MASKED {
        let Some(found) = tree.find(path) else { continue };
        let target = descriptor_path(&found);
        if Path::new(&target).is_dir() {
            mount_at("tmpfs", None, &target, QUIET | MsFlags::MS_RDONLY, Some("size=0,nr_inodes=1"), path)?;
        } else {
            let source = descriptor_path(&null);
            mount_at("bind", Some(&source), &target, MsFlags::MS_BIND, None, path)?;
        }
    }
    for path in READ_ONLY {
        let Some(found) = tree.find(path) else { continue };
        let target = descriptor_path(&found);
        mount_at("bind", Some(&target), &target, MsFlags::MS_BIND, None, path)?;
        // The flags of a bind are set by a remount of it, which the descriptor from before the
        // bind does not name.
        let Some(bound) = tree.find(path) else { continue };
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | QUIET;
        mount_at("bind", None, &descriptor_path(&bound), flags, None, path)?;
    }
    Ok(())
}

/// The files that name the machine and its network.
fn write_etc(tree: &Tree, spec: &TaskSpec) -> Result<(), RootError> {
    let etc = tree.directory("/etc")?;
    let files = [
        ("hostname", format!("{}\n", spec.hostname)),
        ("hosts", hosts(spec, Path::new("/proc/net/if_inet6").exists())),
        ("resolv.conf", resolv_conf(spec)),
    ];
    for (name, contents) in files {
        let failed = |source: io::Error| RootError::Make { path: format!("/etc/{name}"), source };
        // A fresh file: the image's may be a symlink to anywhere.
        match unlinkat(&etc, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = openat(&etc, name, flags, Mode::from_bits_truncate(0o644));
        let mut file = fs::File::from(file.map_err(|errno| failed(errno.into()))?);
        file.write_all(contents.as_bytes()).map_err(failed)?;
    }
    Ok(())
}

fn hosts(spec: &TaskSpec, ipv6: bool) -> String {
    let mut text = "127.0.0.1 localhost\n".to_owned();
    // In a kernel without IPv6, programs would try this first and fail.
    if ipv6 {
        text += "::1 localhost\n";
    }
    let own =
        spec.network.as_ref().map_or(Ipv4Addr::new(127, 0, 1, 1), |network| network.address.octets.into());
    if !spec.hostname.is_empty() {
        text += &format!("{own} {}\n", spec.hostname);
    }
    for (address, name) in &spec.hosts {
        text += &format!("{address} {name}\n");
    }
    text
}

fn resolv_conf(spec: &TaskSpec) -> String {
    let servers = spec.network.iter().flat_map(|network| &network.nameservers);
    servers.map(|octets| format!("nameserver {}\n", Ipv4Addr::from(*octets))).collect()
}

/// Makes the tree the root of this mount namespace and of this process.
fn switch(tree: &Tree) -> Result<(), RootError> {
    // Init's own mounts, which nothing in the new root may reach. The tree holds its own.
    let descriptor = descriptor_path(&tree.root);
    chdir(descriptor.as_str()).map_err(RootError::Enter)?;
    for target in ["/proc", "/sys", "/dev"] {
        umount2(target, MntFlags::MNT_DETACH).map_err(RootError::Enter)?;
    }
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(RootError::Enter)?;
    chroot(".").map_err(RootError::Enter)?;
    chdir("/").map_err(RootError::Enter)
}

/// A path that mount(2) resolves to what the descriptor stands for.
fn descriptor_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A directory tree in which paths are resolved as if it were the root.
struct Tree {
    root: OwnedFd,
}

impl Tree {
    fn open(path: &str) -> Result<Self, RootError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(path, flags, Mode::empty())
            .map_err(|errno| RootError::Make { path: "/".to_owned(), source: errno.into() })?;
        Ok(Self { root })
    }

    fn resolve(&self, path: &str) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.root, path, how)
    }

    /// What is at `path`, if anything.
    fn find(&self, path: &str) -> Option<OwnedFd> {
        self.resolve(path).ok()
    }

    /// The directory at `path`, made with its parents where absent.
    fn directory(&self, path: &str) -> Result<OwnedFd, RootError> {
        let failed = |errno: Errno| RootError::Make { path: path.to_owned(), source: errno.into() };
        let mut current = self.resolve("/").map_err(failed)?;
        let mut walked = String::new();
        for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
            walked = format!("{walked}/{part}");
            current = match self.resolve(&walked) {
                Err(Errno::ENOENT) => {
                    mkdirat(&current, part, Mode::from_bits_truncate(0o755)).map_err(failed)?;
                    self.resolve(&walked).map_err(failed)?
                }
                found => found.map_err(failed)?,
            };
        }
        Ok(current)
    }

    /// Mounts at a directory of the tree, made where absent.
    fn mount(
        &self,
        fs: &str,
        device: Option<&str>,
        target: &str,
        flags: MsFlags,
        data: Option<&str>,
    ) -> Result<(), RootError> {
        let directory = self.directory(target)?;
        mount_at(fs, device, &descriptor_path(&directory), flags, data, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_guest_protocol::{Address, Network};
    use std::os::unix::fs::symlink;

    #[test]
    fn a_symlink_in_the_image_does_not_lead_out_of_it() {
        let outside = tempfile::tempdir().unwrap();
        let image = tempfile::tempdir().unwrap();
        symlink(outside.path(), image.path().join("data")).unwrap();
        symlink("../../../..", image.path().join("up")).unwrap();
        let tree = Tree::open(image.path().to_str().unwrap()).unwrap();
        // The absolute link points at a path that the image does not have.
        assert!(tree.directory("/data/set").is_err());
        tree.directory("/up/made").unwrap();
        assert!(image.path().join("made").is_dir());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn mount_targets_are_made_with_their_parents() {
        let image = tempfile::tempdir().unwrap();
        let tree = Tree::open(image.path().to_str().unwrap()).unwrap();
        tree.directory("/a//b/./c").unwrap();
        assert!(image.path().join("a/b/c").is_dir());
        fs::write(image.path().join("file"), "").unwrap();
        assert!(tree.directory("/file/below").is_err());
    }

    #[test]
    fn mounts_over_the_root_or_outside_it_are_refused() {
        for bad in ["", "/", "//", "/.", "data", "/data/../..", "/.."] {
            assert!(check_target(bad).is_err(), "{bad:?} was accepted");
        }
        for good in ["/data", "/a/b/", "/..data"] {
            assert!(check_target(good).is_ok(), "{good:?} was refused");
        }
    }

    #[test]
    fn parents_are_mounted_before_children() {
        for (index, pseudo) in PSEUDO.iter().enumerate() {
            let later = &PSEUDO[index + 1..];
            let hides = |other: &Pseudo| pseudo.target.starts_with(&format!("{}/", other.target));
            assert!(!later.iter().any(hides), "{} would be hidden", pseudo.target);
        }
    }

    #[test]
    fn names_of_the_gang_reach_hosts_and_resolv_conf() {
        let spec = TaskSpec {
            hostname: "rank-0".to_owned(),
            hosts: vec![("10.0.0.3".to_owned(), "rank-1".to_owned())],
            network: Some(Network {
                address: Address { octets: [10, 0, 0, 2], prefix: 24 },
                gateway: None,
                mtu: 1500,
                nameservers: vec![[192, 0, 2, 53]],
            }),
            ..TaskSpec::default()
        };
        assert_eq!(hosts(&spec, false), "127.0.0.1 localhost\n10.0.0.2 rank-0\n10.0.0.3 rank-1\n");
        assert!(hosts(&spec, true).contains("\n::1 localhost\n"));
        assert_eq!(resolv_conf(&spec), "nameserver 192.0.2.53\n");
        assert_eq!(resolv_conf(&TaskSpec::default()), "");
    }
}
