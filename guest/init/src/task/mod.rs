//! The task: everything between what the host asked for and a process that runs it.
//!
//! PID 1 forks one *shepherd* into a new PID namespace. The shepherd ([`shepherd`]) is that
//! namespace's init: it builds the task's view of the machine ([`root`], [`cgroup`]), forks the
//! task itself ([`exec`], [`user`], [`privileges`]), reaps what the task orphans, and passes on
//! signals. So a task is not PID 1 and keeps the default actions of signals, and when the shepherd
//! ends, the kernel ends everything the task started.
//!
//! PID 1 and the shepherd talk over a sequenced-packet socket pair ([`channel`]); output goes
//! through pipes straight to PID 1.

mod cgroup;
mod channel;
mod exec;
mod privileges;
mod root;
mod shepherd;
mod user;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lathe_guest_protocol::{ExitStatus, Output, Resources, TaskSpec};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::session::{Task, TaskEvent};
use cgroup::{Cgroup, CgroupError};
use channel::{Channel, Report};

/// The task's processes could not be set up; whatever fails later is [`TaskEvent::Failed`].
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The task's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A system call failed.
    #[error("cannot start the task: {step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// A task in its own namespaces and cgroup.
#[derive(Debug)]
pub struct LinuxTask {
    shepherd: Pid,
    channel: Channel,
    cgroup: Cgroup,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl LinuxTask {
    /// Starts `spec`. To be called once, by PID 1, while it has one thread.
    ///
    /// # Errors
    /// When there is no shepherd to report what fails later.
    pub fn spawn(spec: TaskSpec) -> Result<Self, SpawnError> {
        let step = |step| move |source| SpawnError::Step { step, source };
        let cgroup = Cgroup::create(&spec.limits)?;
        let (channel, theirs) = Channel::pair().map_err(step("socket pair"))?;
        let (stdout, stdout_writer) = pipe2(OFlag::O_CLOEXEC).map_err(step("pipe"))?;
        let (stderr, stderr_writer) = pipe2(OFlag::O_CLOEXEC).map_err(step("pipe"))?;
        // Takes effect for the next child: PID 1 itself stays where it is.
        unshare(CloneFlags::CLONE_NEWPID).map_err(step("new PID namespace"))?;
        // SAFETY: PID 1 has one thread, so the child inherits no lock held by another.
        match unsafe { fork() }.map_err(step("fork"))? {
            ForkResult::Child => shepherd::run(
                &spec,
                &cgroup,
                &theirs,
                shepherd::Streams { stdout: stdout_writer, stderr: stderr_writer },
            ),
            ForkResult::Parent { child } => Ok(Self { shepherd: child, channel, cgroup, stdout, stderr }),
        }
    }

    /// The shepherd's last word, or its death without one, which only a kill brings about.
    fn end(&mut self, status: ExitStatus) -> TaskEvent {
        let _ = waitpid(self.shepherd, None);
        let killed = matches!(status, ExitStatus::Signal(libc::SIGKILL));
        if killed && self.cgroup.out_of_memory() {
            return TaskEvent::Ended(ExitStatus::OutOfMemory);
        }
        TaskEvent::Ended(status)
    }
}

impl Task for LinuxTask {
    fn events(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn next_event(&mut self) -> Option<TaskEvent> {
        match self.channel.report() {
            Ok(Some(Report::Started(at))) => Some(TaskEvent::Started(at)),
            Ok(Some(Report::Failed(reason))) => {
                let _ = waitpid(self.shepherd, None);
                Some(TaskEvent::Failed(reason))
            }
            Ok(Some(Report::Ended(status))) => Some(self.end(status)),
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            Ok(None) | Err(_) => {
                // Dead already, unless its last word was garbled: then it must not be waited for.
                self.kill();
                Some(self.end(ExitStatus::Signal(libc::SIGKILL)))
            }
        }
    }

    fn stream(&self, which: Output) -> BorrowedFd<'_> {
        match which {
            Output::Stdout => self.stdout.as_fd(),
            Output::Stderr => self.stderr.as_fd(),
        }
    }

    fn signal(&mut self, number: i32) {
        // Full only when the shepherd has died, which is reported as an event.
        let _ = self.channel.send_signal(number);
    }

    fn kill(&mut self) {
        let _ = kill(self.shepherd, Signal::SIGKILL);
    }

    fn usage(&self) -> Resources {
        self.cgroup.usage()
    }
}
