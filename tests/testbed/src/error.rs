//! What a bed or a host can fail with.

use std::io;
use std::path::PathBuf;

use crate::channel::ChannelError;
use crate::description::DescriptionError;
use crate::frame::Status;
use crate::image::ImageError;
use crate::netns::NetworkError;

/// See the variants.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Network namespaces and taps take privileges.
    #[error("the testbed makes network namespaces and taps, which takes root; run it as root")]
    NotRoot,
    /// The description is at fault.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// There is nothing to boot.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The bed's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The exec channel.
    #[error("host {host}: {source}")]
    Channel {
        /// The host.
        host: String,
        /// What happened.
        source: ChannelError,
    },
    /// A file or directory of the bed.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A program of this machine.
    #[error("cannot run {program}: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The host did not come up.
    #[error(
        "host {host} did not come up: {reason}\n--- QEMU's messages\n{qemu}\n--- end of its console\n{console}"
    )]
    Boot {
        /// The host.
        host: String,
        /// What was missing.
        reason: String,
        /// QEMU's stderr.
        qemu: String,
        /// The console's last lines.
        console: String,
    },
    /// The host is off.
    #[error("host {0} is not running")]
    Off(String),
    /// The host still runs where it should not.
    #[error("host {0} runs already")]
    Running(String),
    /// It did not power off.
    #[error("host {0} did not power off in time; it was killed")]
    Shutdown(String),
    /// QEMU's monitor.
    #[error("host {host}: {command}: {source}")]
    Monitor {
        /// The host.
        host: String,
        /// The command.
        command: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// A device that should have gone.
    #[error("host {host}: the device {device} is still there after {seconds} s")]
    Plugged {
        /// The host.
        host: String,
        /// Its name or address.
        device: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A port that cannot do what was asked.
    #[error("host {host}: the port above {device} has no PCI Express slot")]
    NoSlot {
        /// The host.
        host: String,
        /// The device's address.
        device: String,
    },
    /// A command that had to succeed did not.
    #[error("host {host}: `{command}` ended with {status}: {output}")]
    Command {
        /// The host.
        host: String,
        /// What was run.
        command: String,
        /// How it ended.
        status: Status,
        /// The end of what it wrote.
        output: String,
    },
    /// Addresses are given out once.
    #[error("a bed has room for {0} hosts")]
    Full(u8),
    /// A host of that name.
    #[error("the bed has a host {0} already")]
    Duplicate(String),
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
