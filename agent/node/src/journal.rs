//! What was done for a sandbox, written before it is done.
//!
//! One small JSON file a sandbox, replaced atomically and fsync'd at each step. A step is in the
//! journal before its effect is in the kernel, so whatever a crashed agent left behind is listed;
//! undoing a step that never happened is harmless, because every undo is idempotent. Undone steps
//! leave the journal last to first, so a crash in the middle of cleaning up resumes there.

use std::path::{Path, PathBuf};

use lathe_api::HostPciAddress;
use lathe_api::job::{Stages, TaskExit, TaskState, Usage};
use lathe_api::sandbox::SandboxSpec;
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};

/// The journal's name in a sandbox's directory.
const FILE: &str = "journal.json";

/// Raised when an older agent could misread a record.
const VERSION: u32 = 1;

/// Something that exists on the host for one sandbox and has to be taken away again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Directory of sockets and mount points.
    RunDir {
        /// Where.
        path: PathBuf,
    },
    /// Sparse disk of the writable overlay.
    OverlayDisk {
        /// Where.
        path: PathBuf,
    },
    /// Tap device; a container's veth has the same name, and the kernel removes it with the
    /// container's network namespace, but not before the last process has gone.
    Interface {
        /// The kernel's name of it.
        name: String,
    },
    /// Cgroup with everything that runs for the sandbox. Undone by killing what is in it.
    Cgroup {
        /// Absolute path in the cgroup filesystem.
        path: PathBuf,
    },
    /// Devices of the host that the sandbox gets for itself. Undone by giving them back, clean.
    Gpus {
        /// As they are known; functions that go along are in the device's own record.
        addresses: Vec<HostPciAddress>,
    },
    /// The supervisor process. Its life is known by the lock it holds; its end by its cgroup.
    Supervisor,
}

/// How a sandbox ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// A terminal state.
    pub state: TaskState,
    /// One line, for the user.
    pub reason: Option<String>,
    /// The host's or VMM's fault.
    pub lost: bool,
    /// How the process ended.
    pub exit: Option<TaskExit>,
    /// What it used.
    pub usage: Usage,
}

impl End {
    /// A failure that is not the host's.
    pub fn failed(reason: impl Into<String>) -> Self {
        Self::without_exit(reason.into(), false)
    }

    /// A failure of the host, the VMM or the agent.
    pub fn lost(reason: impl Into<String>) -> Self {
        Self::without_exit(reason.into(), true)
    }

    fn without_exit(reason: String, lost: bool) -> Self {
        Self { state: TaskState::Failed, reason: Some(reason), lost, exit: None, usage: Usage::default() }
    }
}

/// A sandbox's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// What the coordinator asked for, when the sandbox was first seen.
    pub spec: SandboxSpec,
    /// The boot in which it was made: after another boot no process, interface, cgroup or mount
    /// of it exists.
    pub boot_id: String,
    /// What was begun and not undone, in order.
    pub steps: Vec<Step>,
    /// Set once; nothing is started for the sandbox after that.
    pub end: Option<End>,
    /// When it ended, milliseconds since the Unix epoch; zero before.
    pub ended_ms: u64,
    /// Every step is undone; what remains is output to ship and this record.
    pub cleaned: bool,
    /// Milliseconds spent so far.
    pub stages: Stages,
    /// When the journal was begun, milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A record and the file that holds it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Record,
}

impl Journal {
    /// Begins a journal in `dir`, which exists.
    ///
    /// # Errors
    /// When it cannot be written; then nothing may be done for the sandbox.
    pub fn create(dir: &Path, spec: SandboxSpec, boot_id: String) -> Result<Self, FileError> {
        let record = Record {
            version: VERSION,
            spec,
            boot_id,
            steps: Vec::new(),
            end: None,
            ended_ms: 0,
            cleaned: false,
            stages: Stages::default(),
            created_ms: files::now_ms(),
        };
        let journal = Self { path: dir.join(FILE), record };
        journal.save()?;
        Ok(journal)
    }

    /// Opens the journal in `dir`.
    ///
    /// # Errors
    /// When there is none or it is damaged.
    pub fn open(dir: &Path) -> Result<Self, FileError> {
        let path = dir.join(FILE);
        Ok(Self { record: files::read_json(&path)?, path })
    }

    /// What it says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Writes down that `step` is about to be taken.
    ///
    /// # Errors
    /// When it cannot be written; then the step must not be taken.
    pub fn begin(&mut self, step: Step) -> Result<(), FileError> {
        if !self.record.steps.contains(&step) {
            self.record.steps.push(step);
        }
        self.save()
    }

    /// The step to undo next.
    pub fn last(&self) -> Option<&Step> {
        self.record.steps.last()
    }

    /// Writes down that the last step was undone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn undone(&mut self) -> Result<(), FileError> {
        self.record.steps.pop();
        self.save()
    }

    /// Writes down how the sandbox ended. The first end stands.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end(&mut self, end: End) -> Result<(), FileError> {
        if self.record.end.is_none() {
            self.record.end = Some(end);
            self.record.ended_ms = files::now_ms();
        }
        self.save()
    }

    /// Writes down that nothing of the sandbox is left on the host.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn cleaned(&mut self) -> Result<(), FileError> {
        self.record.cleaned = true;
        self.save()
    }

    /// Changes the measured times; written with the next step.
    pub fn stages(&mut self) -> &mut Stages {
        &mut self.record.stages
    }

    fn save(&self) -> Result<(), FileError> {
        files::write_json(&self.path, &self.record)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sandbox::tests::spec;

    #[test]
    fn a_crash_after_any_step_leaves_all_begun_steps_listed() {
        let steps = [
            Step::RunDir { path: "/run/x".into() },
            Step::OverlayDisk { path: "/d".into() },
            Step::Gpus { addresses: vec!["0000:65:00.0".parse().unwrap()] },
            Step::Cgroup { path: "/c".into() },
            Step::Supervisor,
        ];
        for crash_after in 0..=steps.len() {
            let dir = tempfile::tempdir().unwrap();
            let mut journal = Journal::create(dir.path(), spec("a-0-1"), "boot".into()).unwrap();
            for step in &steps[..crash_after] {
                journal.begin(step.clone()).unwrap();
            }
            drop(journal); // the crash
            let mut found = Journal::open(dir.path()).unwrap();
            assert_eq!(found.record().steps, steps[..crash_after]);
            // A second crash in the middle of undoing loses nothing either.
            if found.last().is_some() {
                found.undone().unwrap();
                drop(found);
                found = Journal::open(dir.path()).unwrap();
                assert_eq!(found.record().steps, steps[..crash_after - 1]);
            }
        }
    }

    #[test]
    fn the_first_end_stands() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), spec("a-0-1"), "boot".into()).unwrap();
        journal.end(End::failed("first")).unwrap();
        journal.end(End::lost("second")).unwrap();
        let end = Journal::open(dir.path()).unwrap().record().end.clone().unwrap();
        assert_eq!((end.reason.as_deref(), end.lost), (Some("first"), false));
    }

    #[test]
    fn a_damaged_journal_is_an_error_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Journal::open(dir.path()).unwrap_err().to_string().contains("journal.json"));
    }
}
