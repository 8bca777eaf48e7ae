//! The filesystems of the host.

use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

const NOTHING: Option<&str> = None;

/// Leaves the initramfs as a root that `pivot_root` accepts: that call fails on the kernel's first
/// mount, which has no parent. A bind mount of it on top of itself has one, and copies nothing.
pub fn switch_root() -> io::Result<()> {
    fs::create_dir_all("/newroot")?;
    mount(Some("/"), "/newroot", NOTHING, MsFlags::MS_BIND, NOTHING)?;
    chdir("/newroot")?;
    mount(Some("."), "/", NOTHING, MsFlags::MS_MOVE, NOTHING)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// What every distribution has mounted after its early boot.
pub fn kernel_filesystems() -> io::Result<()> {
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let none = MsFlags::empty();
    // (type, where, flags, options)
    for (kind, target, flags, options) in [
        ("proc", "/proc", secure, None),
        ("sysfs", "/sys", secure, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, None),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("ptmxmode=0666,mode=0620,gid=5"),
        ),
        ("tmpfs", "/dev/shm", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777")),
        ("hugetlbfs", "/dev/hugepages", none, None),
        ("mqueue", "/dev/mqueue", secure, None),
        ("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755")),
        ("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777")),
        ("cgroup2", "/sys/fs/cgroup", secure, Some("nsdelegate")),
        ("bpf", "/sys/fs/bpf", secure, Some("mode=0700")),
        ("securityfs", "/sys/kernel/security", secure, None),
        ("debugfs", "/sys/kernel/debug", secure, None),
        ("tracefs", "/sys/kernel/tracing", secure, None),
    ] {
        if !Path::new(target).exists() {
            // Directories in sysfs exist when the kernel has the feature.
            if target.starts_with("/sys") {
                continue;
            }
            fs::create_dir_all(target)?;
        }
        mount(Some(kind), target, Some(kind), flags, options)
            .map_err(|e| io::Error::other(format!("mounting {kind} at {target}: {e}")))?;
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ] {
        std::os::unix::fs::symlink(target, link)?;
    }
    Ok(())
}

/// Mounts the disk with the serial number `lathe-data` at `/var/lib/lathe`.
pub fn data_disk() -> io::Result<()> {
    let Some(disk) = disk_with_serial("lathe-data")? else { return Ok(()) };
    fs::create_dir_all("/var/lib/lathe")?;
    // Inode tables are left to be cleared on use: doing it in the background would disturb
    // measurements with a disk's worth of writes.
    mount(Some(&disk), "/var/lib/lathe", Some("ext4"), MsFlags::MS_NOATIME, Some("noinit_itable"))
        .map_err(|e| io::Error::other(format!("mounting {} at /var/lib/lathe: {e}", disk.display())))
}

fn disk_with_serial(wanted: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if serial.trim() == wanted {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Mounts the directory that the harness shares, read-only, at `/share`.
pub fn share() -> io::Result<()> {
    fs::create_dir_all("/share")?;
    let options = "trans=virtio,version=9p2000.L,msize=512000,cache=none";
    mount(Some("share"), "/share", Some("9p"), MsFlags::MS_RDONLY, Some(options))
        .map_err(|e| io::Error::other(format!("mounting the shared directory at /share: {e}")))
}

/// Makes the data disk clean before the power goes.
pub fn unmount_data_disk() {
    nix::unistd::sync();
    let _ = nix::mount::umount("/var/lib/lathe");
}
