//! Where a console's output goes: nowhere, our standard output, or a bounded file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::config::{ConsoleConfig, MemorySize};

/// A console that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{field}.path: {path}: {source}", path = path.display())]
pub struct ConsoleError {
    field: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The sink behind a console. Writing never fails the guest: what cannot be kept is dropped,
/// and `write` says so by an error that the device counts.
#[derive(Debug)]
pub enum ConsoleOutput {
    /// Everything is dropped, and that is no loss.
    Null,
    /// The VMM's standard output.
    Stdout(File),
    /// A file, and how many bytes it may still take.
    File {
        /// Opened for appending.
        file: File,
        /// Bytes left of the limit.
        left: u64,
    },
}

impl ConsoleOutput {
    /// Opens what `config` names; `field` is its name in the configuration, for the error.
    ///
    /// What a file holds already counts towards its limit: restarts do not grow it further.
    ///
    /// # Errors
    /// When the file cannot be opened for appending, or is not a regular file.
    pub fn open(config: &ConsoleConfig, field: &'static str) -> Result<Self, ConsoleError> {
        match config {
            ConsoleConfig::Null => Ok(Self::Null),
            ConsoleConfig::Stdio => {
                let stdout = io::stdout().as_fd().try_clone_to_owned();
                stdout.map(|fd| Self::Stdout(File::from(fd))).map_err(|source| ConsoleError {
                    field,
                    path: "/dev/stdout".into(),
                    source,
                })
            }
            ConsoleConfig::File { path, limit } => open_bounded(path, *limit)
                .map_err(|source| ConsoleError { field, path: path.clone(), source }),
        }
    }
}

fn open_bounded(path: &PathBuf, limit: MemorySize) -> io::Result<ConsoleOutput> {
    // Not blocking: opening a FIFO without a reader would hang before the check below.
    let file =
        OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(ConsoleOutput::File { file, left: limit.bytes().saturating_sub(metadata.len()) })
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Null => Ok(bytes.len()),
            Self::Stdout(file) => file.write(bytes),
            Self::File { file, left } => {
                let length = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                if length == 0 && !bytes.is_empty() {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                let written = file.write(&bytes[..length])?;
                *left -= written as u64;
                Ok(written)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_never_grows_past_its_limit_over_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial.log");
        let config = ConsoleConfig::File { path: path.clone(), limit: MemorySize::from_bytes(10) };
        let mut output = ConsoleOutput::open(&config, "serial").unwrap();
        output.write_all(b"seven 7").unwrap();
        let mut output = ConsoleOutput::open(&config, "serial").unwrap();
        assert_eq!(output.write(b"eight bytes").unwrap(), 3);
        assert!(output.write(b"x").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"seven 7eig");
    }

    #[test]
    fn a_path_that_is_no_file_is_refused_by_name() {
        let config = ConsoleConfig::File { path: "/dev/full".into(), limit: MemorySize::from_bytes(10) };
        let error = ConsoleOutput::open(&config, "console").unwrap_err();
        assert_eq!(error.to_string(), "console.path: /dev/full: not a regular file");
    }
}
