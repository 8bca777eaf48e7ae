//! Init of the task's PID namespace.
//!
//! It never returns into PID 1's code, and when it ends the kernel kills whatever is left in the
//! namespace.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;

use lathe_guest_protocol::{ExitStatus, TaskSpec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, sethostname};
use std::os::fd::AsFd;

use super::cgroup::Cgroup;
use super::channel::{Channel, Report};
use super::exec;
use super::root::{self, RootError};
use crate::clock::since_boot;

/// The writing ends of the task's pipes.
pub struct Streams {
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// The task could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("cannot isolate the task: {step}: {source}")]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// As the child wrote it before it gave up.
    #[error("{0}")]
    Exec(String),
}

/// For `map_err` of anything that converts to an I/O error.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> StartError {
    move |source| StartError::Step { step, source: source.into() }
}

/// Starts the task and looks after it until its first process ends.
pub fn run(spec: &TaskSpec, cgroup: &Cgroup, channel: &Channel, streams: Streams) -> ! {
    let end = match start(spec, cgroup, streams) {
        Ok((task, children)) => {
            let _ = channel.send_report(&Report::Started(since_boot()));
            Report::Ended(watch(task, &children, channel))
        }
        Err(error) => Report::Failed(error.to_string()),
    };
    let _ = channel.send_report(&end);
    std::process::exit(0)
}

/// Builds the task's surroundings and executes its program; returns its PID and its children's signals.
fn start(spec: &TaskSpec, cgroup: &Cgroup, streams: Streams) -> Result<(Pid, SignalFd), StartError> {
    // The shepherd shares the task's cgroup, and its death would be the task's.
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(step("oom_score_adj"))?;
    cgroup.enter().map_err(step("cgroup"))?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).map_err(step("namespaces"))?;
    sethostname(&spec.hostname).map_err(step("host name"))?;
    root::enter(spec)?;

    let mut child_signal = SigSet::empty();
    child_signal.add(Signal::SIGCHLD);
    child_signal.thread_block().map_err(step("signal mask"))?;
    let children = SignalFd::with_flags(&child_signal, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(step("signal descriptor"))?;
    let task = execute(spec, streams)?;
    Ok((task, children))
}

/// Forks the task; its program runs when this returns.
fn execute(spec: &TaskSpec, streams: Streams) -> Result<Pid, StartError> {
    // Both ends close on exec, so the reader sees the end of the pipe exactly when exec succeeds.
    let (reader, writer) = io::pipe().map_err(step("pipe"))?;
    // SAFETY: the shepherd is a fork of a process with one thread, and has one thread itself.
    match unsafe { fork() }.map_err(step("fork"))? {
        ForkResult::Child => exec::become_task(spec, streams, writer),
        ForkResult::Parent { child } => {
            drop(writer);
            drop(streams);
            match failure(reader) {
                None => Ok(child),
                Some(reason) => Err(StartError::Exec(reason)),
            }
        }
    }
}

fn failure(mut reader: PipeReader) -> Option<String> {
    let mut reason = String::new();
    match reader.read_to_string(&mut reason) {
        Ok(0) => None,
        Ok(_) => Some(reason),
        Err(error) => Some(format!("the task's start was not observed: {error}")),
    }
}

/// Reaps everything and passes signals on until `task` has ended.
fn watch(task: Pid, children: &SignalFd, channel: &Channel) -> ExitStatus {
    loop {
        while let Ok(Some(_)) = children.read_signal() {}
        if let Some(status) = reap(task) {
            return status;
        }
        let mut fds = [
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
            PollFd::new(channel.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() || !fds[1].any().unwrap_or(false) {
            continue;
        }
        match channel.signal() {
            Ok(Some(number)) => signal_group(task, number),
            Err(Errno::EINTR) => {}
            // Without PID 1 there is no machine.
            Ok(None) | Err(_) => return ExitStatus::Signal(libc::SIGKILL),
        }
    }
}

/// Collects every child that has ended; the status of `task` when it is among them.
fn reap(task: Pid) -> Option<ExitStatus> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == task => return Some(ExitStatus::Code(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == task => {
                return Some(ExitStatus::Signal(signal as i32));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// The task leads its own session and process group, so its PID names both.
fn signal_group(task: Pid, number: i32) {
    // SAFETY: kill takes two integers. nix's wrapper has no realtime signals.
    let _ = unsafe { libc::kill(-task.as_raw(), number) };
}
