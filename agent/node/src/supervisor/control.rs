//! The supervisor's control socket: one JSON line in, one out.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// The socket's name in a sandbox's runtime directory.
pub const SOCKET: &str = "control";

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a supervisor can be asked. Asking twice is asking once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request", deny_unknown_fields)]
pub enum Request {
    /// SIGTERM to the task; after the sandbox's grace period, kill.
    Stop,
}

/// Asks a supervisor and waits until it has taken note.
///
/// # Errors
/// When it is gone or does not answer in five seconds.
pub async fn ask(run_dir: &Path, request: Request) -> io::Result<()> {
    let exchange = async {
        let mut stream = UnixStream::connect(run_dir.join(SOCKET)).await?;
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        match stream.read_u8().await? {
            b'+' => Ok(()),
            _ => Err(io::Error::other("the supervisor did not understand the request")),
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}

/// Answers connections to `listener` for ever, one at a time, passing each request on.
pub async fn serve(listener: UnixListener, requests: mpsc::Sender<Request>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            // A client that hangs only delays the next by the time-out.
            let _ = tokio::time::timeout(PATIENCE, answer(stream, &requests)).await;
        }
    }
}

async fn answer(stream: UnixStream, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    (&mut stream).take(4096).read_until(b'\n', &mut line).await?;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => {
            let _ = requests.send(request).await;
            b"+"
        }
        Err(_) => b"-",
    };
    stream.get_mut().write_all(reply).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_arrives_once_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let (sender, mut requests) = mpsc::channel(4);
        let server = tokio::spawn(serve(listener, sender));
        ask(dir.path(), Request::Stop).await.unwrap();
        assert_eq!(requests.recv().await, Some(Request::Stop));
        let mut stream = UnixStream::connect(dir.path().join(SOCKET)).await.unwrap();
        stream.write_all(b"{\"request\":\"dance\"}\n").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'-');
        server.abort();
        let gone = tempfile::tempdir().unwrap();
        assert!(ask(gone.path(), Request::Stop).await.is_err());
    }
}
