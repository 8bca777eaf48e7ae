//! `lathe cluster`: a new cluster's CA and tokens.
//!
//! The coordinator makes them, because it keeps the private key; this command runs it and then points
//! this machine's configuration at the new cluster.

use std::fs;
use std::path::PathBuf;
use std::process::Command as Process;

use anyhow::{Context, bail};
use clap::Subcommand;

use crate::context::{ConfigFile, config_path};
use crate::exit::Exit;

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a cluster's CA, the coordinator's certificate, an admin token and a join token.
    Init {
        /// Where the coordinator keeps its state; must not hold a cluster yet.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Address at which agents and people reach the coordinator, as 10.0.0.1:7700.
        #[arg(long, value_name = "HOST:PORT")]
        address: String,
        /// Do not point this user's configuration at the new cluster.
        #[arg(long)]
        no_config: bool,
    },
}

/// Runs a subcommand.
///
/// # Errors
/// When the coordinator is not installed, or what it said.
pub fn run(command: Command) -> anyhow::Result<Exit> {
    let Command::Init { data_dir, address, no_config } = command;
    let beside = std::env::current_exe()?.with_file_name("lathe-coordinator");
    let program = if beside.exists() { beside } else { PathBuf::from("lathe-coordinator") };
    let status = Process::new(&program)
        .arg("init")
        .arg("--data-dir")
        .arg(&data_dir)
        .args(["--address", &address])
        .status()
        .with_context(|| {
            format!("cannot run {}; install lathe-coordinator beside lathe", program.display())
        })?;
    if !status.success() {
        return Ok(Exit::Other(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
    }
    if !no_config {
        let data_dir = fs::canonicalize(&data_dir).context("cannot resolve --data-dir")?;
        let path = config_path();
        if path.exists() {
            bail!(
                "{} names another cluster already; the new cluster is made: give --coordinator, --ca and \
                 --token-file, or remove the file and write it anew",
                path.display()
            );
        }
        let file = ConfigFile {
            coordinator: Some(format!("https://{address}")),
            ca: Some(data_dir.join("ca.pem")),
            token_file: Some(data_dir.join("admin.token")),
        };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        fs::write(&path, toml::to_string(&file)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("{} now points at this cluster", path.display());
    }
    Ok(Exit::Success)
}
