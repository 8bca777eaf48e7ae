//! Exit statuses of the `lathe` command.

use std::process::ExitCode;

/// How the command ended. Scripts may rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Success,
    /// The job, or something else the command waited for, failed.
    Failed,
    /// Wrong arguments or a wrong file; nothing was changed.
    Usage,
    /// The coordinator cannot be reached, or refused who we are.
    Unreachable,
    /// This machine cannot do what was asked.
    Unavailable,
    /// The job was cancelled.
    Cancelled,
    /// The exit status of a program that was run in our place.
    Other(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Success => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
            Exit::Unavailable => 4,
            Exit::Cancelled => 5,
            Exit::Other(code) => code,
        })
    }
}
