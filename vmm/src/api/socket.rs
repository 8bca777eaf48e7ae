//! The API's Unix socket and the thread that serves it.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, sync::mpsc};

use tokio::sync::oneshot;

use super::routes::router;
use crate::exit::ExitReason;
use crate::machine::Controls;

/// A control API that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Another VMM answers there.
    #[error("--api-socket: {0} is in use by another process")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("--api-socket: {0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The host refused.
    #[error("--api-socket: {path}: {source}", path = path.display())]
    Host {
        /// Which socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

impl ApiError {
    /// The process's exit status for it.
    pub fn reason(&self) -> ExitReason {
        ExitReason::BadConfig
    }
}

/// A bound socket that nobody answers yet; removed when dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: SocketPath,
}

/// The socket's file; dropping it removes the file.
#[derive(Debug)]
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = fs::remove_file(&self.0);
    }
}

impl ApiSocket {
    /// Binds `path`. A socket that a dead process left there is replaced, a live one is not.
    ///
    /// # Errors
    /// When the path is taken or cannot be bound.
    pub fn bind(path: &Path) -> Result<Self, ApiError> {
        let host = |source| ApiError::Host { path: path.to_owned(), source };
        if let Ok(metadata) = fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(ApiError::NotASocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(host)?;
                }
                _ => return Err(ApiError::InUse(path.to_owned())),
            }
        }
        let listener = UnixListener::bind(path).map_err(host)?;
        let socket = Self { listener, path: SocketPath(path.to_owned()) };
        // Whoever may connect may kill the machine.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(host)?;
        socket.listener.set_nonblocking(true).map_err(host)?;
        Ok(socket)
    }

    /// Starts answering, on a thread of its own.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn serve(self, machine: Arc<Controls>) -> Result<ApiServer, ApiError> {
        let Self { listener, path } = self;
        let host = |source| ApiError::Host { path: path.0.clone(), source };
        let (stop, stopped) = oneshot::channel();
        let (finished, finish) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                if let Err(error) = serve(listener, machine, stopped) {
                    eprintln!("lathe-vmm: the control API stopped: {error}");
                }
                // Nobody waits any more when the server is gone.
                let _ = finished.send(());
            })
            .map_err(host)?;
        Ok(ApiServer { stop: Some(stop), finish, _thread: thread, _path: path })
    }
}

fn serve(listener: UnixListener, machine: Arc<Controls>, stopped: oneshot::Receiver<()>) -> io::Result<()> {
    // A request that waits for devices has a thread of its own, which is not kept for the next: a VMM that nobody asks
    // has none.
    const KEEP_ALIVE: Duration = Duration::from_millis(100);
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_io().enable_time().thread_keep_alive(KEEP_ALIVE).build()?;
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        axum::serve(listener, router(machine))
            .with_graceful_shutdown(async {
                // An error means that the server was dropped, which is the same wish.
                let _ = stopped.await;
            })
            .await
    })
}

/// A served API. Dropping it answers what was asked already, then removes the socket.
#[derive(Debug)]
pub struct ApiServer {
    stop: Option<oneshot::Sender<()>>,
    finish: mpsc::Receiver<()>,
    _thread: JoinHandle<()>,
    _path: SocketPath,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        /// A client that keeps its connection open must not keep the process alive.
        const LIMIT: Duration = Duration::from_millis(200);
        if let Some(stop) = self.stop.take() {
            // The thread may have ended by itself.
            let _ = stop.send(());
        }
        let _ = self.finish.recv_timeout(LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        let socket = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(ApiError::InUse(_))));
        drop(socket);
        assert!(!path.exists(), "the socket was left behind");
        fs::write(&path, "notes").unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(ApiError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"notes");
    }
}
