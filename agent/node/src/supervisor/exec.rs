//! `lathe-agent exec`: a step between the supervisor and its payload that needs no `unsafe`.
//!
//! What has to happen in the child between fork and exec (enter the cgroup, ask to die with the
//! parent) happens in this program's own, ordinary process, which then becomes the payload.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::Signal;

use crate::cgroup;

/// Becomes `argv`, in `cgroup`, killed when `parent` dies; with `lock_memory` it may lock as much memory as
/// the cgroup gives it. Returns only if that fails.
///
/// # Errors
/// When the cgroup is gone, the parent has died already, or the program cannot be executed.
pub fn main(
    parent: u32,
    cgroup: &Path,
    lock_memory: bool,
    argv: &[String],
) -> anyhow::Result<std::convert::Infallible> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // Died before the line above: nobody would ever send the signal.
    anyhow::ensure!(std::os::unix::process::parent_id() == parent, "the supervisor is gone");
    if lock_memory {
        // VFIO counts the guest's memory against this limit, once a container or I/O address space, and the
        // default is 8 MiB. What is locked is charged to the cgroup as well, whose limit is the one that binds.
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
            .context("cannot raise RLIMIT_MEMLOCK")?;
    }
    cgroup::enter(cgroup)?;
    let (program, args) = argv.split_first().context("nothing to execute")?;
    Err(Command::new(program).args(args).exec()).with_context(|| format!("cannot execute {program}"))
}

/// A command that runs `program` in `cgroup` and dies with this thread.
pub fn command(cgroup: &Path, lock_memory: bool, program: &Path) -> tokio::process::Command {
    // This link works even after an upgrade has replaced the file.
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg("exec").arg("--parent").arg(std::process::id().to_string());
    if lock_memory {
        command.arg("--lock-memory");
    }
    command.arg("--cgroup").arg(cgroup).arg("--").arg(program);
    command
}
