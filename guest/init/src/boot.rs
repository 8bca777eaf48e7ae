//! The first milliseconds: init's own mounts and the connection to the host.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::sleep;
use std::time::Duration;

use lathe_guest_protocol::AGENT_PORT;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use crate::clock::since_boot;

/// The host's context ID, for every guest (virtio 1.2 §5.10.4).
const HOST_CID: u32 = 2;

/// How long the vsock device and the host's listener may take to appear. The host listens before
/// it starts the machine, so this is spent only when something is broken.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// What keeps init from reaching the host.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// One of init's own filesystems.
    #[error("cannot mount {fs} at {target}: {source}; the guest kernel must have it built in")]
    Mount {
        /// The filesystem's type.
        fs: &'static str,
        /// Where it goes.
        target: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The host was not reached.
    #[error(
        "cannot connect to port {AGENT_PORT} of the host over vsock: {0}; the machine needs a vsock device and a listener at its socket"
    )]
    Connect(#[source] Errno),
}

/// Mounts what init itself uses. The task gets its own.
pub fn mount_pseudo_filesystems() -> Result<(), BootError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let plan = [
        ("proc", "/proc", quiet, None),
        ("sysfs", "/sys", quiet, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, None),
        ("tmpfs", "/run", quiet, Some("mode=0755")),
        ("cgroup2", "/sys/fs/cgroup", quiet, None),
    ];
    for (fs, target, flags, data) in plan {
        // Fails where it exists already, and the mount says so if it could not be made.
        let _ = fs::create_dir(target);
        match mount(Some(fs), target, Some(fs), flags, data) {
            // The kernel has mounted devtmpfs by itself when it was built to.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(source) => return Err(BootError::Mount { fs, target, source }),
        }
    }
    // From here on the console is for panics: each character is an exit from the guest.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    // Containers elsewhere let any user bind low ports and ping, and images rely on it.
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    Ok(())
}

/// Connects to the host's agent, waiting a bounded time for the device to appear.
pub fn connect_to_host() -> Result<OwnedFd, BootError> {
    let deadline = since_boot() + CONNECT_PATIENCE;
    let mut pause = Duration::from_millis(1);
    loop {
        match try_connect() {
            Ok(fd) => return Ok(fd),
            Err(errno) if since_boot() >= deadline => return Err(BootError::Connect(errno)),
            Err(_) => sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn try_connect() -> Result<OwnedFd, Errno> {
    let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT))?;
    Ok(fd)
}
