//! The ranks of one job, joined by TCP: every rank connects to rank 0 at `MASTER_ADDR:MASTER_PORT`.
//!
//! Whoever reaches the port may speak first, so nothing is believed before a valid greeting for
//! this very job, nothing is allocated beyond the stated bounds, and each stranger has a few
//! seconds. There is no encryption or authentication here: a job's network is its tenant's.
//!
//! A peer that dies closes its connection and is noticed at once; one whose machine vanishes is
//! noticed by TCP keepalive. Either ends the whole gang: ranks are restarted together.

mod frame;
mod master;
mod member;

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

pub use master::Master;
pub use member::Member;

use crate::passes::{Residuals, Sum};

/// Most ranks in a gang: rank 0 has a thread for each.
pub const MAX_RANKS: u32 = 1024;

/// Why ranks cannot work together. Each message is one line that names the peer.
#[derive(Debug, thiserror::Error)]
pub enum GangError {
    /// Rank 0 cannot listen.
    #[error("rank 0 cannot listen on {address}: {source}")]
    Listen {
        /// Where it tried to.
        address: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Rank 0 could not be reached in time.
    #[error("rank 0 at {address} was not reached within {seconds} s: {reason}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// How long was tried.
        seconds: u64,
        /// The last failure.
        reason: String,
    },
    /// Rank 0 does not want this rank.
    #[error("rank 0 at {address} refused this rank: {reason}")]
    Refused {
        /// Where it is.
        address: String,
        /// What it said.
        reason: String,
    },
    /// Some ranks never came.
    #[error("rank {missing} did not connect to rank 0 within {seconds} s{rejected}")]
    Missing {
        /// Their numbers, separated by commas.
        missing: String,
        /// How long rank 0 waited.
        seconds: u64,
        /// Who else came, if anyone; begins with a separator.
        rejected: String,
    },
    /// A connection ended.
    #[error("lost rank {rank} at {address}: {reason}")]
    Lost {
        /// The peer.
        rank: u32,
        /// Its address.
        address: String,
        /// How it ended.
        reason: String,
    },
    /// A peer does not follow the protocol.
    #[error("rank {rank} at {address} sent {what}")]
    Protocol {
        /// The peer.
        rank: u32,
        /// Its address.
        address: String,
        /// What it sent, and what was due.
        what: String,
    },
    /// Another rank gave up and said why.
    #[error("{reason}")]
    Aborted {
        /// The exit status of the rank where it began.
        exit: u8,
        /// Its reason, led by its rank.
        reason: String,
    },
    /// The addresses or ranks make no gang.
    #[error("{0}")]
    Setup(String),
}

/// Where this process stands in its gang.
#[derive(Debug, Clone)]
pub struct Place {
    /// This rank.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// Host name or address of rank 0.
    pub address: String,
    /// Port of rank 0.
    pub port: u16,
    /// How long to wait until all have met.
    pub connect_timeout: Duration,
    /// Silence of a peer's kernel after which the peer is taken for lost.
    pub peer_timeout: Duration,
    /// The job in words: ranks that do not have the same one do not belong together.
    pub problem: String,
    /// Largest message in bytes once a peer is known.
    pub message_limit: usize,
}

/// What ranks say to each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// A rank's first words.
    Hello {
        /// Its rank.
        rank: u32,
        /// The size of its gang.
        world: u32,
        /// Its job in words.
        problem: String,
    },
    /// Rank 0 takes the rank in.
    Welcome,
    /// Rank 0 does not, for this reason.
    Refused(String),
    /// A rank's first pass.
    Factored {
        /// Rows in its share.
        rows: u64,
        /// Sum of the response over them.
        response_sum: f64,
        /// Rows of the triangle of `[A | y]`.
        triangle_rows: u32,
        /// The triangle's upper part.
        triangle: Vec<f64>,
    },
    /// Rank 0 wants Aᵀr for these coefficients.
    Refine(Vec<f64>),
    /// A rank's part of Aᵀr.
    Refined(Vec<Sum>),
    /// Rank 0 wants the residuals for the final coefficients.
    Evaluate {
        /// The coefficients.
        coefficients: Vec<f64>,
        /// Where deviations of the response are measured from.
        centre: f64,
        /// Rows of the dataset before the rank's share.
        first_row: u64,
    },
    /// A rank's last pass.
    Evaluated {
        /// The residuals of its share.
        residuals: Residuals,
        /// Seconds it spent on reading.
        read_seconds: f64,
        /// Seconds it spent on arithmetic.
        compute_seconds: f64,
    },
    /// All is done.
    Done,
    /// The sender has given up.
    Abort {
        /// Its exit status.
        exit: u8,
        /// Why.
        reason: String,
    },
}

impl Message {
    fn kind(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "a greeting",
            Self::Welcome => "a welcome",
            Self::Refused(_) => "a refusal",
            Self::Factored { .. } => "a factor",
            Self::Refine(_) => "a refinement request",
            Self::Refined(_) => "a refinement",
            Self::Evaluate { .. } => "an evaluation request",
            Self::Evaluated { .. } => "residuals",
            Self::Done => "the end",
            Self::Abort { .. } => "an abort",
        }
    }
}

/// Text from a peer, made safe to print: one line, printable, bounded.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(1000).collect()
}

/// Has the kernel find out about peers that vanish without closing their connection.
fn watch_connection(stream: &TcpStream, timeout: Duration) -> nix::Result<()> {
    const PROBES: u32 = 5;
    let seconds = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).clamp(PROBES + 1, 32_000);
    let interval = seconds / (PROBES + 1);
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &interval)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &interval)?;
    setsockopt(stream, sockopt::TcpKeepCount, &PROBES)?;
    // Keepalive rests while data is in flight: this is the same limit for that case.
    setsockopt(stream, sockopt::TcpUserTimeout, &(seconds * 1000))?;
    setsockopt(stream, sockopt::TcpNoDelay, &true)
}

fn address_of(stream: &TcpStream) -> String {
    stream.peer_addr().map_or_else(|_| "an unknown address".to_owned(), plain_address)
}

/// An IPv4 address as such even when it reached a dual-stack socket.
fn plain_address(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
}
