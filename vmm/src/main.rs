//! The `lathe-vmm` program: one process, one microVM. Everything is in the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lathe_vmm::config::VmConfig;
use lathe_vmm::exit::ExitReason;
use lathe_vmm::machine::Prepared;
use lathe_vmm::run::{Options, run};

/// Runs one microVM from its description until it ends.
///
/// Exit status: 0 the guest powered off, 1 the VMM failed, 2 bad configuration, 10 reboot, 11 crash,
/// 12 killed, 13 this machine's KVM cannot boot the guest.
#[derive(Parser)]
#[command(name = "lathe-vmm", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The machine description, vm.json.
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Serve the control API on this Unix socket.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Check the description against this host and run nothing.
    #[arg(long)]
    validate: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print the control API's OpenAPI document.
    Openapi,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Openapi) = arguments.command {
        println!("{}", lathe_vmm::api::openapi_json());
        return ExitCode::SUCCESS;
    }
    match start(&arguments) {
        Ok(reason) => reason.into(),
        Err((reason, message)) => {
            eprintln!("lathe-vmm: {message}");
            reason.into()
        }
    }
}

fn start(arguments: &Arguments) -> Result<ExitReason, (ExitReason, String)> {
    let path = arguments.config.clone().unwrap_or_default();
    let bad = |message: String| (ExitReason::BadConfig, message);
    let text = std::fs::read_to_string(&path).map_err(|error| bad(format!("{}: {error}", path.display())))?;
    let config = VmConfig::from_json(&text).map_err(|error| bad(error.to_string()))?;
    if arguments.validate {
        Prepared::new(config).map_err(|error| (error.reason(), error.to_string()))?;
        return Ok(ExitReason::PowerOff);
    }
    let options = Options { api_socket: arguments.api_socket.clone() };
    let outcome = std::panic::catch_unwind(|| run(config, &options))
        .map_err(|_| (ExitReason::Internal, "the main thread panicked".to_owned()))?
        .map_err(|error| (error.reason(), error.to_string()))?;
    if let Some(message) = outcome.message {
        eprintln!("lathe-vmm: {}: {message}", outcome.reason);
    }
    Ok(outcome.reason)
}
