//! Tap devices: opening one that exists, and what can be asked of it.
//!
//! Opening is apart from the device, because it needs a namespace and privileges that a jailed
//! monitor does not have. All that is done afterwards works on the descriptors alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::HEADER_SIZE;

const TUN: &str = "/dev/net/tun";

/// `IFNAMSIZ` less the terminating zero.
const MAX_NAME: usize = 15;

/// A tap that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is none that an interface can have.
    #[error("{0:?} is not the name of a network interface: 1 to {MAX_NAME} bytes, no blanks, no slash")]
    BadName(String),
    /// There is no such interface here. It is not made silently: nobody would have configured it.
    #[error(
        "tap {0:?} does not exist in this network namespace: make it first (`ip tuntap add {0} mode tap`)"
    )]
    Missing(String),
    /// The interface is something else.
    #[error("{0:?} is not a tap device")]
    NotTap(String),
    /// Another process has it open.
    #[error("tap {0:?} is in use by another process")]
    Busy(String),
    /// It belongs to somebody else.
    #[error("no permission to open tap {0:?}: make it for this user (`ip tuntap add ... user NAME`)")]
    Permission(String),
    /// The number of queues asked for does not suit how it was made.
    #[error("tap {name:?} was made {}: it cannot have {queues} queue pairs", made(*.multi_queue))]
    Queues {
        /// The tap.
        name: String,
        /// What was asked for.
        queues: u8,
        /// How it was made.
        multi_queue: bool,
    },
    /// The host refused something else.
    #[error("tap {name:?}: {what}")]
    Host {
        /// The tap.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn made(multi_queue: bool) -> &'static str {
    if multi_queue { "with multi_queue" } else { "without multi_queue" }
}

/// Opens the tap called `name` with `queues` queues, one descriptor each.
///
/// # Errors
/// When it does not exist, is in use, is somebody else's, or was not made for so many queues.
pub fn open_tap(name: &str, queues: u8) -> Result<Vec<File>, TapError> {
    let index = interface_index(name)?;
    let files: Vec<File> = (0..queues).map(|_| open_queue(name, queues)).collect::<Result<_, _>>()?;
    // Had it gone in between, the kernel would have made a new one, which goes with `files`.
    if interface_index(name)? != index {
        return Err(TapError::Missing(name.to_owned()));
    }
    Ok(files)
}

fn interface_index(name: &str) -> Result<u32, TapError> {
    let bad = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > MAX_NAME || name == "." || name == ".." || name.contains(bad) {
        return Err(TapError::BadName(name.to_owned()));
    }
    match if_nametoindex(name) {
        Ok(index) => Ok(index),
        Err(Errno::ENODEV | Errno::ENXIO) => Err(TapError::Missing(name.to_owned())),
        Err(error) => Err(host(name, "cannot look it up", error.into())),
    }
}

fn host(name: &str, what: &'static str, source: io::Error) -> TapError {
    TapError::Host { name: name.to_owned(), what, source }
}

fn open_queue(name: &str, queues: u8) -> Result<File, TapError> {
    attach(name, queues > 1).map_err(|error| match error {
        Errno::EBUSY => TapError::Busy(name.to_owned()),
        Errno::EPERM | Errno::EACCES => TapError::Permission(name.to_owned()),
        Errno::EINVAL => wrong_kind(name, queues),
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            host(name, "there is no /dev/net/tun: load the tun module", error.into())
        }
        _ => host(name, "cannot attach to it", error.into()),
    })
}

fn attach(name: &str, multi_queue: bool) -> Result<File, Errno> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN)
        .map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO))?;
    let multi_queue = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
    let mut request = InterfaceRequest { name: [0; 16], flags: flags as i16, padding: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request has the layout and the size of `struct ifreq`.
    Errno::result(unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF as _, &mut request) })?;
    Ok(file)
}

/// `struct ifreq` (netdevice(7)) as `TUNSETIFF` takes it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    padding: [u8; 22],
}

/// The kernel says EINVAL for all that does not match: the other kind of queue tells what. Not
/// sysfs, which shows the network namespace of whoever mounted it.
fn wrong_kind(name: &str, queues: u8) -> TapError {
    match attach(name, queues == 1) {
        Ok(_) | Err(Errno::EBUSY | Errno::EPERM) => {
            TapError::Queues { name: name.to_owned(), queues, multi_queue: queues == 1 }
        }
        Err(_) => TapError::NotTap(name.to_owned()),
    }
}

/// One queue of an open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// The kernel steers frames to it.
    attached: Mutex<bool>,
}

impl Tap {
    /// Takes over a descriptor that [`open_tap`] gave, and sets the size of its headers.
    ///
    /// # Errors
    /// When `file` is not a tap.
    pub fn new(file: File) -> io::Result<Self> {
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: the kernel reads an int.
        check(unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ as _, &size) })?;
        Ok(Self { file, attached: Mutex::new(true) })
    }

    /// Says what the reader of frames can cope with (`TUN_F_*`).
    ///
    /// # Errors
    /// When the kernel does not know the combination.
    pub fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the kernel takes the flags by value.
        check(unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD as _, offloads.into()) })
    }

    /// Whether the kernel steers frames to this queue of a tap with several.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut current = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == attached {
            return Ok(());
        }
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let request = InterfaceRequest { name: [0; 16], flags: flags as i16, padding: [0; 22] };
        // SAFETY: the request has the layout and the size of `struct ifreq`.
        check(unsafe { ioctl_with_ref(&self.file, libc::TUNSETQUEUE as _, &request) })?;
        *current = attached;
        Ok(())
    }

    /// The open file, for vhost.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
