//! What of sandboxes is there: read from journals, statuses and locks, never remembered.

use std::path::Path;

use lathe_api::job::{Stages, TaskState};
use lathe_api::node::SandboxStatus;

use crate::files::FileError;
use crate::journal::{End, Journal, Record, Step};
use crate::paths::{Paths, is_valid_id};
use crate::supervisor::status::Status;
use crate::supervisor::try_lock;

/// One sandbox as it is found.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Its journal.
    pub record: Record,
    /// Its supervisor's last word.
    pub status: Option<Status>,
    /// Whether its supervisor lives.
    pub supervised: bool,
}

/// Sandboxes whose journal cannot be read, by ID.
pub type Damaged = Vec<(String, FileError)>;

/// Every sandbox of the node. A directory without a readable journal is reported apart.
///
/// # Errors
/// When the directory of all sandboxes cannot be read.
pub fn observe(paths: &Paths) -> Result<(Vec<Observed>, Damaged), FileError> {
    let all = paths.sandboxes();
    let (mut found, mut damaged) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&all).map_err(FileError::io("list", &all))? {
        let entry = entry.map_err(FileError::io("list", &all))?;
        let Some(id) = entry.file_name().to_str().filter(|id| is_valid_id(id)).map(str::to_owned) else {
            continue;
        };
        match observe_one(&entry.path()) {
            Ok(observed) => found.push(observed),
            Err(error) => damaged.push((id, error)),
        }
    }
    found.sort_by(|a, b| a.record.spec.id.cmp(&b.record.spec.id));
    Ok((found, damaged))
}

/// The sandbox of one directory.
///
/// # Errors
/// When its journal is missing or damaged.
pub fn observe_one(dir: &Path) -> Result<Observed, FileError> {
    let record = Journal::open(dir)?.record().clone();
    let begun = record.steps.contains(&Step::Supervisor);
    // The lock before the status: a supervisor that ends in between has written its last word.
    let supervised = begun && try_lock(dir)?.is_none();
    let status = if begun || record.end.is_some() { Status::read(dir).unwrap_or_default() } else { None };
    Ok(Observed { record, status, supervised })
}

impl Observed {
    /// Its ID.
    pub fn id(&self) -> &str {
        &self.record.spec.id
    }

    /// Whether its supervisor was started, at any time.
    pub fn was_started(&self) -> bool {
        self.record.steps.contains(&Step::Supervisor)
    }

    /// What the supervisor says of the end, or that it is gone without a word.
    pub fn verdict(&self, boot_id: &str) -> End {
        let said = self.status.as_ref().and_then(Status::end);
        said.unwrap_or_else(|| {
            let usage = self.status.as_ref().map(|s| s.usage).unwrap_or_default();
            let reason = if self.record.boot_id == boot_id {
                "the sandbox's supervisor was killed"
            } else {
                "the host was restarted"
            };
            End { usage, ..End::lost(reason) }
        })
    }

    /// How the coordinator is told of it.
    pub fn report(&self) -> SandboxStatus {
        if let Some(End { state, reason, lost, exit, usage }) = self.record.end.clone() {
            return SandboxStatus {
                id: self.id().to_owned(),
                state,
                ready: false,
                reason,
                lost,
                exit,
                usage,
                stages: self.stages(),
            };
        }
        self.report_ending()
    }

    /// The same, without its end: for as long as that is not to be told.
    pub fn report_ending(&self) -> SandboxStatus {
        let status = self.status.as_ref();
        let state = match status {
            Some(status) if !status.state.is_terminal() && self.record.end.is_none() => status.state,
            // Its last word counts once the agent has written it down.
            Some(_) => TaskState::Stopping,
            None if self.was_started() => TaskState::Starting,
            None => TaskState::Preparing,
        };
        let usage = status.map(|s| s.usage).unwrap_or_default();
        SandboxStatus {
            id: self.id().to_owned(),
            state,
            // Who tries its port knows.
            ready: false,
            reason: None,
            lost: false,
            exit: None,
            usage,
            stages: self.stages(),
        }
    }

    fn stages(&self) -> Stages {
        let status = self.status.as_ref();
        Stages {
            start_ms: status.map_or(0, |s| s.start_ms),
            run_ms: status.map_or(0, |s| s.run_ms),
            ..self.record.stages
        }
    }
}
