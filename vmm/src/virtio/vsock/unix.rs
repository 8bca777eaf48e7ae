//! Host streams as Unix sockets: the socket that host programs connect to, and the sockets at which
//! they listen for the guest.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::HostStream;
use super::muxer::{Host, StreamId};

/// What `sockaddr_un` holds, without its terminating zero.
const MAX_PATH: usize = 107;

/// The longest thing put behind the path, `_4294967295`.
const MAX_SUFFIX: usize = 11;

/// A socket that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockSocketError {
    /// The path of the socket, or of the guest's `<path>_<port>`, does not fit an address.
    #[error("vsock socket path {path:?} is {len} bytes long: at most {max} fit", max = MAX_PATH - MAX_SUFFIX)]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Another process listens there.
    #[error("vsock socket {0:?} is in use by another process: give each machine its own path")]
    InUse(PathBuf),
    /// There is a file that is not a socket; it is left alone.
    #[error("vsock socket path {0:?} exists and is not a socket: remove it or choose another path")]
    NotSocket(PathBuf),
    /// The host refused something.
    #[error("vsock socket {path:?}: {what}")]
    Host {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The socket that host programs connect to. The file goes when this is dropped.
#[derive(Debug)]
pub struct VsockListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: only our own is removed.
    file: (u64, u64),
}

impl VsockListener {
    /// Makes the socket, for this user alone. A file that a dead process left is replaced.
    ///
    /// # Errors
    /// When the path is in use, too long, or not writable.
    pub fn bind(path: &Path) -> Result<Self, VsockSocketError> {
        let len = path.as_os_str().len();
        if len > MAX_PATH - MAX_SUFFIX {
            return Err(VsockSocketError::TooLong { path: path.to_owned(), len });
        }
        let failed = |what| move |source| VsockSocketError::Host { path: path.to_owned(), what, source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .map_err(failed("cannot listen"))?;
        let metadata = fs::symlink_metadata(path).map_err(failed("cannot look at it"))?;
        let bound = Self { listener, path: path.to_owned(), file: (metadata.dev(), metadata.ino()) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(failed("cannot restrict it to its owner"))?;
        bound.listener.set_nonblocking(true).map_err(failed("cannot set it up"))?;
        Ok(bound)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle on the socket, for the worker.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn try_clone(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket at which nobody listens.
fn remove_stale(path: &Path) -> Result<(), VsockSocketError> {
    let failed = |what, source| VsockSocketError::Host { path: path.to_owned(), what, source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("cannot look at it", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(VsockSocketError::NotSocket(path.to_owned()));
    }
    match connect_to(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("cannot remove what a dead process left", error))
        }
        // A full backlog is a listener, too.
        Ok(_) => Err(VsockSocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(VsockSocketError::InUse(path.to_owned())),
        Err(error) => Err(failed("cannot find out whether it is in use", error)),
    }
}

/// Connects without ever blocking: a program with a full backlog must not stop the device.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

impl HostStream for UnixStream {
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}

/// The sockets `<path>_<port>`, and an epoll set of all streams: one descriptor for the worker's.
#[derive(Debug)]
pub struct UnixHost {
    path: PathBuf,
    epoll: Epoll,
}

/// One stream's readiness.
#[derive(Clone, Copy, Debug)]
pub struct StreamEvent {
    /// Whose.
    pub id: StreamId,
    /// There is something to read, or the end.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The program closed it.
    pub hung_up: bool,
}

impl UnixHost {
    /// Connects the guest to the sockets named `<path>_<port>`.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), epoll: Epoll::new()? })
    }

    /// Readiness that is there now, at most 64 of it; more stays for the next call.
    ///
    /// # Errors
    /// What `epoll_wait` said.
    pub fn events(&mut self) -> io::Result<Vec<StreamEvent>> {
        let mut ready = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut ready)?;
        let events = ready[..count].iter().map(|event| {
            let set = event.event_set();
            StreamEvent {
                id: event.data() as StreamId,
                readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::ERROR),
                writable: set.intersects(EventSet::OUT | EventSet::ERROR),
                hung_up: set.contains(EventSet::HANG_UP),
            }
        });
        Ok(events.collect())
    }
}

impl AsRawFd for UnixHost {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Host for UnixHost {
    type Stream = UnixStream;

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect_to(Path::new(&path))
    }

    fn watch(&mut self, stream: &UnixStream, id: StreamId) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        // The kernel forgets the stream when it is closed, as no other descriptor refers to it.
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(events, u64::from(id)))
    }
}
