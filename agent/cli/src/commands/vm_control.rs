//! `lathe vm state`, `pause`, ...: a running microVM, through its control socket.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lathe_vmm::client::VmmClient;

use crate::exit::Exit;
use crate::output::{self, Format};

/// Arguments of `lathe vm control`.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// What to do.
    action: Action,
    /// The socket that `--api-socket` named.
    socket: PathBuf,
}

/// What a control socket can be asked for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    /// Print the state, the description and the uptime.
    State,
    /// Stop the vCPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// End the machine at once.
    Kill,
    /// Print the counters in Prometheus' text format.
    Metrics,
}

/// Does it.
///
/// # Errors
/// When nothing listens on the socket, or what the VMM said.
pub fn run(args: &ControlArgs, format: Format) -> anyhow::Result<Exit> {
    let client = VmmClient::new(&args.socket);
    match args.action {
        Action::State => {
            let info = client.state()?;
            match format {
                Format::Json => output::json(&info)?,
                Format::Table => {
                    let config = &info.config;
                    println!("{}", serde_json::to_value(info.state)?.as_str().unwrap_or_default());
                    println!(
                        "{} vCPUs, {}, {}",
                        config.cpus.count,
                        config.memory.size,
                        config.boot.kernel.display()
                    );
                }
            }
        }
        Action::Pause => client.pause()?,
        Action::Resume => client.resume()?,
        Action::PowerButton => client.power_button()?,
        Action::Kill => client.kill()?,
        Action::Metrics => print!("{}", client.metrics()?),
    }
    Ok(Exit::Success)
}
