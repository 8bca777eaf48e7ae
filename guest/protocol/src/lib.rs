//! Messages between a sandbox's host side and the guest, over virtio-vsock.
//!
//! The guest connects to CID 2, port [`AGENT_PORT`], says [`FromGuest::Hello`], is answered with
//! [`ToGuest::Start`], and from then on reports what its task does until [`FromGuest::Exited`].
//! The unikernel and `lathe-init` speak it alike, so the crate is `no_std`.
//!
//! A frame is a little-endian `u32` length and that many bytes of [postcard]. Lengths above
//! [`MAX_FRAME`] are refused before anything is allocated: either side may be hostile.
//! Backpressure is the stream's own: a guest whose output nobody reads blocks in its write.
//!
//! [postcard]: https://postcard.jamesmunns.com/wire-format

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod frame;
mod task;

pub use frame::{FrameError, decode, encode, frame_length};
pub use task::{
    Address, ExitStatus, Limits, Mount, MountSource, Network, Output, Resources, TaskSpec, UserSpec,
};

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Version of these messages; raised with every change that an older peer would misread.
pub const VERSION: u16 = 2;

/// The host's vsock port that guests connect to.
pub const AGENT_PORT: u32 = 1024;

/// The longest frame body, in bytes. Task descriptions with large environments fit;
/// a peer cannot make the other allocate more.
pub const MAX_FRAME: usize = 256 * 1024;

/// The most output carried by one [`FromGuest::Output`], in bytes.
pub const MAX_OUTPUT: usize = 32 * 1024;

/// What a guest says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The first message.
    Hello {
        /// The guest's [`VERSION`].
        version: u16,
        /// Name and version of the guest's software, for the host's log.
        software: String,
        /// Nanoseconds from the guest kernel's start to this message.
        since_boot_ns: u64,
    },
    /// The task's process runs.
    Started {
        /// Nanoseconds from the guest kernel's start to the task's exec.
        since_boot_ns: u64,
    },
    /// Bytes the task wrote.
    Output {
        /// Which of its streams.
        stream: Output,
        /// At most [`MAX_OUTPUT`] bytes.
        data: Vec<u8>,
    },
    /// Sent every few seconds while the task runs.
    Usage(Resources),
    /// The task has ended and all its output was sent. The guest powers off next.
    Exited {
        /// How it ended.
        status: ExitStatus,
        /// Totals and peaks.
        usage: Resources,
    },
    /// The task could not be started; one line that names what and why. The guest powers off next.
    Failed {
        /// For the user.
        reason: String,
    },
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToGuest {
    /// The answer to [`FromGuest::Hello`].
    Start {
        /// The host's [`VERSION`].
        version: u16,
        /// The wall clock, nanoseconds since the Unix epoch; the guest sets its own to it.
        wall_clock_ns: u64,
        /// What to run.
        task: alloc::boxed::Box<TaskSpec>,
    },
    /// Send this signal to the task's processes.
    Signal(
        /// Linux signal number, 1 to 64.
        i32,
    ),
    /// Kill everything and power off.
    Shutdown,
}
