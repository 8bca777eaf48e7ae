//! Running one machine from its description to its end: what the `lathe-vmm` process does.

use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};

use crate::api::{ApiError, ApiSocket};
use crate::config::VmConfig;
use crate::exit::ExitReason;
use crate::machine::{Ending, Machine, MachineError, PrepareError, Prepared};

/// What is not part of the machine.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the control API listens; absent means there is none.
    pub api_socket: Option<PathBuf>,
}

/// A machine that did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The host will not run it; nothing was started.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The control API's socket; nothing was started.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The host refused something on the way.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl RunError {
    /// The process's exit status for it.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::Prepare(error) => error.reason(),
            Self::Api(error) => error.reason(),
            Self::Machine(error) => error.reason(),
        }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The reason, which is the process's exit status.
    pub reason: ExitReason,
    /// What there is to say beyond it.
    pub message: Option<String>,
}

/// Runs a machine until it ends.
///
/// Meant for a process of its own: it blocks SIGINT, SIGTERM and SIGHUP, which then end the machine, and
/// replaces the panic hook, so that a panic anywhere ends the machine rather than leaving it half alive.
///
/// # Errors
/// When the machine did not run at all.
pub fn run(config: VmConfig, options: &Options) -> Result<Outcome, RunError> {
    let prepared = Prepared::new(config)?;
    let socket = options.api_socket.as_deref().map(ApiSocket::bind).transpose()?;
    let ending = Arc::new(Ending::new().map_err(MachineError::host("an eventfd"))?);
    end_on_panic(&ending);
    // Before any thread exists: threads inherit the mask.
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(|errno| MachineError::host("blocking signals")(errno.into()))?;
    let machine = Machine::build(prepared, Arc::clone(&ending))?.start()?;
    let server = match socket {
        Some(socket) => Some(socket.serve(machine.controls())?),
        None => None,
    };
    let (reason, message) = machine.wait(&signals)?;
    drop(server);
    Ok(Outcome { reason, message })
}

/// The message is still printed, by the hook that was there.
fn end_on_panic(ending: &Arc<Ending>) {
    let ending = Arc::clone(ending);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        ending.set(ExitReason::Internal, Some("a thread of the VMM panicked".to_owned()));
    }));
}
