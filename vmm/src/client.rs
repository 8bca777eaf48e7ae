//! A client of the control API: blocking, one request a connection, on the standard library alone.
//!
//! For the agent and the command line, which talk to a VMM a few times in its life.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{HostPciAddress, PassthroughConfig, VmConfig};

/// How long a VMM may take for one answer: pausing waits up to ten seconds for a vCPU.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The same where guest memory may have to be pinned first: some seconds for each 100 GiB.
const PLUG_TIMEOUT: Duration = Duration::from_secs(300);
/// The largest answer is `/metrics` of 64 vCPUs, some tens of KiB.
const ANSWER_MAX: u64 = 1 << 20;

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No VMM answers there.
    #[error("{path}: {source}", path = path.display())]
    Unreachable {
        /// The control socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The VMM refused.
    #[error("{path}: {status}: {detail}", path = path.display())]
    Refused {
        /// The control socket.
        path: PathBuf,
        /// The HTTP status code.
        status: u16,
        /// The problem document's detail.
        detail: String,
    },
    /// What came back is not an answer of a VMM.
    #[error("{path}: not an answer of lathe-vmm: {why}", path = path.display())]
    Garbled {
        /// The control socket.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// They do.
    Running,
    /// They are stopped, and so are the devices.
    Paused,
}

/// A machine as the control API shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// Whether the vCPUs run.
    pub state: VmState,
    /// Seconds since the guest's first instruction, pauses included.
    pub uptime_seconds: f64,
    /// The machine's description.
    pub config: VmConfig,
}

/// A passed-through device as the control API shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its ID in the machine.
    pub id: String,
    /// Its address on the host.
    pub address: HostPciAddress,
    /// The kernel's interface in use: `iommufd` or `container`.
    pub backend: String,
    /// The guest's slot.
    pub slot: Option<u16>,
    /// Its address in the guest.
    pub guest_address: Option<String>,
    /// How it was reset before the guest got it.
    pub reset: String,
    /// How long that took, in milliseconds.
    pub reset_ms: f64,
    /// Whether other devices reach its BARs.
    pub peer_to_peer: bool,
}

/// A VMM's control socket.
#[derive(Clone, Debug)]
pub struct VmmClient {
    socket: PathBuf,
}

impl VmmClient {
    /// A client of the VMM that listens on `socket`. Connects with the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The machine and its state.
    ///
    /// # Errors
    /// When no VMM answers, or not as one.
    pub fn state(&self) -> Result<VmInfo, ClientError> {
        let body = self.request("GET", "/v1/vm")?;
        serde_json::from_slice(&body).map_err(|error| self.garbled(error))
    }

    /// Stops the vCPUs and devices.
    ///
    /// # Errors
    /// When no VMM answers, or a vCPU did not stop.
    pub fn pause(&self) -> Result<(), ClientError> {
        self.request("PUT", "/v1/vm/pause").map(drop)
    }

    /// Lets a paused machine run again.
    ///
    /// # Errors
    /// When no VMM answers.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.request("PUT", "/v1/vm/resume").map(drop)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When no VMM answers.
    pub fn power_button(&self) -> Result<(), ClientError> {
        self.request("PUT", "/v1/vm/power-button").map(drop)
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// When no VMM answers.
    pub fn kill(&self) -> Result<(), ClientError> {
        self.request("PUT", "/v1/vm/kill").map(drop)
    }

    /// The passed-through devices.
    ///
    /// # Errors
    /// When no VMM answers, or not as one.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, ClientError> {
        let body = self.request("GET", "/v1/vm/devices")?;
        serde_json::from_slice(&body).map_err(|error| self.garbled(error))
    }

    /// Plugs a device of the host into the guest. Mapping the guest's memory for the first one takes a while
    /// on large machines.
    ///
    /// # Errors
    /// When no VMM answers, the device cannot be passed through, or no slot is free.
    pub fn plug(&self, device: &PassthroughConfig) -> Result<DeviceInfo, ClientError> {
        let body = serde_json::to_vec(device).map_err(|error| self.garbled(error))?;
        let answer = self.send("POST", "/v1/vm/devices", &body, PLUG_TIMEOUT)?;
        serde_json::from_slice(&answer).map_err(|error| self.garbled(error))
    }

    /// Asks the guest to let go of a device, which is gone from the list when it has; or with `surprise`
    /// takes it away at once.
    ///
    /// # Errors
    /// When no VMM answers, or there is no such device.
    pub fn unplug(&self, id: &str, surprise: bool) -> Result<(), ClientError> {
        self.request("DELETE", &format!("/v1/vm/devices/{id}?surprise={surprise}")).map(drop)
    }

    /// Counters as Prometheus text.
    ///
    /// # Errors
    /// When no VMM answers, or not in text.
    pub fn metrics(&self) -> Result<String, ClientError> {
        String::from_utf8(self.request("GET", "/metrics")?).map_err(|error| self.garbled(error))
    }

    fn garbled(&self, why: impl ToString) -> ClientError {
        ClientError::Garbled { path: self.socket.clone(), why: why.to_string() }
    }

    fn request(&self, method: &str, resource: &str) -> Result<Vec<u8>, ClientError> {
        self.send(method, resource, &[], TIMEOUT)
    }

    fn send(
        &self,
        method: &str,
        resource: &str,
        body: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { path: self.socket.clone(), source };
        let answer = self.exchange(method, resource, body, timeout).map_err(unreachable)?;
        let (status, body) = parse_answer(&answer).map_err(|why| self.garbled(why))?;
        if (200..300).contains(&status) {
            return Ok(body.to_vec());
        }
        #[derive(Deserialize)]
        struct Problem {
            detail: String,
        }
        let detail =
            serde_json::from_slice(body).map_or_else(|_| "no detail".to_owned(), |p: Problem| p.detail);
        Err(ClientError::Refused { path: self.socket.clone(), status, detail })
    }

    /// The server closes the connection after its answer, as asked; so the answer ends with the stream.
    fn exchange(&self, method: &str, resource: &str, body: &[u8], timeout: Duration) -> io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let content = match (method, body.len()) {
            ("PUT", 0) => "Content-Length: 0\r\n".to_owned(),
            (_, 0) => String::new(),
            (_, length) => format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
        };
        let request =
            format!("{method} {resource} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\n{content}\r\n");
        stream.write_all(request.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// The status code and body of a response without chunks, which the VMM never sends (RFC 9112 §4, §6).
fn parse_answer(answer: &[u8]) -> Result<(u16, &[u8]), &'static str> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or("the head is cut off")?;
    let (head, body) = (&answer[..end], &answer[end + 4..]);
    let head = std::str::from_utf8(head).map_err(|_| "the head is not text")?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok())
        .ok_or("no status line")?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>())
    });
    match length {
        None => Ok((status, body)),
        Some(Ok(length)) => body.get(..length).map(|body| (status, body)).ok_or("the body is cut off"),
        Some(Err(_)) => Err("the length is not a number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(parse_answer(answer), Ok((200, b"{}".as_slice())));
        assert_eq!(parse_answer(b"HTTP/1.1 204 No Content\r\n\r\n"), Ok((204, b"".as_slice())));
        assert!(parse_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}").is_err());
        assert!(parse_answer(b"SSH-2.0-OpenSSH\r\n\r\n").is_err());
        assert!(parse_answer(b"HTTP/1.1 200 OK\r\n").is_err());
    }

    #[test]
    fn nobody_there_is_an_error_with_the_path() {
        let error = VmmClient::new("/nonexistent/api").state().unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/api: "), "{error}");
    }
}
