//! The supervisor: one small process a sandbox, for both classes.
//!
//! It exists so that sandboxes survive the agent. The agent may be upgraded or killed at any time;
//! the connection to a guest and the pipes of a container may not break with it. So they belong to
//! this process, which has its own session and nothing to do with the agent but files and a socket:
//!
//! | file | written by | holds |
//! | --- | --- | --- |
//! | `launch.json` | agent, before | what to start |
//! | `lock` | | held by the supervisor as long as it lives: the one test of whether it does |
//! | `status.json` | supervisor | state, then how it ended ([`status`]) |
//! | `spool/` | supervisor; agent deletes | output ([`spool`]) |
//! | `control` (runtime directory) | | stop requests ([`control`]) |
//!
//! The payload dies with its supervisor (`PR_SET_PDEATHSIG`), so a sandbox whose lock is free is
//! over: without a last word in `status.json`, it was lost. The process has one thread, because
//! containers are made by forking it.

pub mod container;
pub mod control;
pub mod exec;
pub mod launch;
pub mod microvm;
pub mod oci;
pub mod rootfs;
pub mod seccomp;
pub mod session;
pub mod spool;
pub mod status;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use lathe_api::job::{TaskState, Usage};
use lathe_api::node::LogStream;
use nix::fcntl::Flock;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::cgroup;
use crate::files::{self, FileError};
use crate::journal::End;
use launch::{ClassLaunch, Launch};
use spool::SpoolWriter;
use status::Status;

/// The lock's name in a sandbox's directory.
const LOCK: &str = "lock";
/// The spool's name in a sandbox's directory.
pub const SPOOL: &str = "spool";

/// Takes the lock of a sandbox's directory: `None` while its supervisor lives.
///
/// # Errors
/// When the file cannot be made.
pub fn try_lock(dir: &Path) -> Result<Option<Flock<File>>, FileError> {
    files::try_lock(&dir.join(LOCK))
}

/// How long, and how often, a starting supervisor tries for its lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Takes the lock for as long as the sandbox lives. The agent's own look at a sandbox holds it for an
/// instant ([`try_lock`]), which must not be taken for another supervisor.
fn own_lock(dir: &Path) -> Result<Option<Flock<File>>, FileError> {
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        let lock = try_lock(dir)?;
        if lock.is_some() || Instant::now() > end {
            return Ok(lock);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// `lathe-agent supervise DIR`: runs the sandbox of `dir` to its end.
///
/// # Errors
/// When it could not even begin; the sandbox's status says so too where it can.
pub fn main(dir: &Path) -> anyhow::Result<()> {
    // The agent's session may get a terminal's signals; this process must not.
    let _ = nix::unistd::setsid();
    let _lock = own_lock(dir)?.context("another supervisor runs this sandbox")?;
    let mut recorder = Recorder::new(dir)?;
    let end = supervise(dir, &mut recorder).unwrap_or_else(|error| End::lost(format!("{error:#}")));
    recorder.finish(&end);
    Ok(())
}

fn supervise(dir: &Path, recorder: &mut Recorder) -> anyhow::Result<End> {
    let launch = Launch::read(dir)?;
    cgroup::enter(&cgroup::supervisor_of(&launch.cgroup))?;
    recorder.save();
    // Made before the runtime: a fork must not copy another thread's locks.
    let made = match &launch.class {
        ClassLaunch::Container { disks, memory, network } => {
            match container::create(&launch, disks, *memory, network.as_ref()) {
                Ok(made) => Some(made),
                Err(error) => return Ok(error.into()),
            }
        }
        ClassLaunch::Microvm { .. } => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let control = launch.run_dir.join(control::SOCKET);
        files::remove(&control)?;
        let listener = UnixListener::bind(&control)
            .with_context(|| format!("cannot listen on {}", control.display()))?;
        let (sender, requests) = mpsc::channel(4);
        tokio::spawn(control::serve(listener, sender));
        match made {
            Some(made) => Ok(container::run(&launch, made, recorder, requests).await),
            None => microvm::run(&launch, recorder, requests).await,
        }
    })
}

/// What the supervisor writes for the agent. A full disk costs output, not the task.
#[derive(Debug)]
pub struct Recorder {
    dir: PathBuf,
    status: Status,
    spool: SpoolWriter,
    begun: Instant,
    running: Option<Instant>,
}

impl Recorder {
    /// A recorder for the sandbox of `dir`.
    ///
    /// # Errors
    /// When the spool cannot be opened.
    pub fn new(dir: &Path) -> Result<Self, FileError> {
        Ok(Self {
            dir: dir.to_owned(),
            status: Status::default(),
            spool: SpoolWriter::open(&dir.join(SPOOL))?,
            begun: Instant::now(),
            running: None,
        })
    }

    /// The task's process runs.
    pub fn running(&mut self) {
        let now = Instant::now();
        self.running = Some(now);
        self.status.start_ms = millis(now - self.begun);
        if self.status.state == TaskState::Starting {
            self.status.state = TaskState::Running;
        }
        self.save();
    }

    /// The task's process has ended; taking its machine down is not its time.
    pub fn ended(&mut self) {
        self.save();
        self.running = None;
    }

    /// The task was told to end.
    pub fn stopping(&mut self) {
        self.status.state = TaskState::Stopping;
        self.save();
    }

    /// The task wrote this.
    pub fn output(&mut self, stream: LogStream, data: &[u8]) {
        if let Err(error) = self.spool.output(stream, data) {
            tracing::error!(%error, "output lost");
        }
    }

    /// What the task used so far.
    pub fn usage(&mut self, usage: Usage) {
        self.status.usage = usage;
        self.save();
    }

    /// The last usage that was recorded.
    pub fn last_usage(&self) -> Usage {
        self.status.usage
    }

    fn finish(&mut self, end: &End) {
        let noted = self.spool.finish().and_then(|()| end.reason.iter().try_for_each(|r| self.spool.note(r)));
        if let Err(error) = noted {
            tracing::error!(%error, "the end of the output was lost");
        }
        self.status.state = end.state;
        self.status.reason.clone_from(&end.reason);
        self.status.lost = end.lost;
        self.status.exit = end.exit;
        self.status.usage = end.usage;
        self.save();
    }

    fn save(&mut self) {
        self.status.usage.output_dropped_bytes =
            self.status.usage.output_dropped_bytes.max(self.spool.dropped());
        if let Some(since) = self.running {
            self.status.run_ms = millis(since.elapsed());
        }
        if let Err(error) = self.status.write(&self.dir) {
            tracing::error!(%error, "status not written");
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_tells_a_living_supervisor_from_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let held = try_lock(dir.path()).unwrap().unwrap();
        assert!(try_lock(dir.path()).unwrap().is_none());
        drop(held);
        assert!(try_lock(dir.path()).unwrap().is_some());
    }

    #[test]
    fn the_last_word_is_in_the_status() {
        let dir = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::new(dir.path()).unwrap();
        recorder.running();
        assert_eq!(Status::read(dir.path()).unwrap().unwrap().state, TaskState::Running);
        recorder.output(LogStream::Stdout, b"no newline");
        recorder.finish(&End::lost("gone"));
        let end = Status::read(dir.path()).unwrap().unwrap().end().unwrap();
        assert_eq!((end.lost, end.reason.as_deref()), (true, Some("gone")));
        let lines = spool::SpoolReader::open(&dir.path().join(SPOOL)).unwrap().read("s", 9).unwrap();
        assert_eq!(lines[0].text, "no newline");
    }
}
