//! What a supervisor tells the agent about its sandbox: one file, replaced atomically.

use std::path::Path;

use lathe_api::job::{TaskExit, TaskState, Usage};
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};
use crate::journal::End;

const FILE: &str = "status.json";

/// The sandbox as its supervisor last saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `Starting`, `Running`, `Stopping`, or a terminal state, which is the supervisor's last word.
    pub state: TaskState,
    /// Why it failed.
    pub reason: Option<String>,
    /// Whether the failure is the host's or the VMM's.
    pub lost: bool,
    /// How the task's process ended.
    pub exit: Option<TaskExit>,
    /// What it used.
    pub usage: Usage,
    /// From the supervisor's start to the task's process.
    pub start_ms: u64,
    /// The task's process, so far or in all.
    pub run_ms: u64,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            state: TaskState::Starting,
            reason: None,
            lost: false,
            exit: None,
            usage: Usage::default(),
            start_ms: 0,
            run_ms: 0,
        }
    }
}

impl Status {
    /// Replaces the status in a sandbox's directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), FileError> {
        files::write_json(&dir.join(FILE), self)
    }

    /// The status in a sandbox's directory; none before its supervisor has begun.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>, FileError> {
        match files::read_json(&dir.join(FILE)) {
            Ok(status) => Ok(Some(status)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The end, if this is one.
    pub fn end(&self) -> Option<End> {
        self.state.is_terminal().then(|| End {
            state: self.state,
            reason: self.reason.clone(),
            lost: self.lost,
            exit: self.exit,
            usage: self.usage,
        })
    }
}
