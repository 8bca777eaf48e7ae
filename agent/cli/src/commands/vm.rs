//! `lathe vm run`: one microVM on this machine, without a cluster.
//!
//! The VMM is a process of its own and takes this one's place, so that signals, the terminal and
//! the exit status are the microVM's.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;
use lathe_vmm::config::VmConfig;

use crate::exit::Exit;

/// Arguments of `lathe vm run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The machine description (JSON).
    config: PathBuf,
    /// Serve the control API on this Unix socket.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// The VMM to run [default: lathe-vmm beside this program, else on the PATH].
    #[arg(long, env = "LATHE_VMM", value_name = "PATH")]
    vmm: Option<PathBuf>,
}

/// Checks the description and becomes the VMM. Returns only when that failed.
///
/// # Errors
/// One line that names the field, or the program that is missing.
pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    if let Err(error) = serde_json::from_str::<VmConfig>(&text) {
        bail!("{}: {error}", args.config.display());
    }
    let vmm = find_vmm(args.vmm.as_deref());
    let mut command = Command::new(&vmm);
    command.arg("--config").arg(&args.config);
    if let Some(socket) = &args.api_socket {
        command.arg("--api-socket").arg(socket);
    }
    // exec returns only to say why it could not.
    let error = command.exec();
    bail!("cannot run {}: {error}; install lathe-vmm beside lathe or give --vmm", vmm.display())
}

fn find_vmm(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("lathe-vmm")));
    beside.filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("lathe-vmm"))
}
