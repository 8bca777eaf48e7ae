//! The `lathe` command: the cluster's front door, and microVMs on this machine.
//!
//! [`commands`] has one module a noun. [`context`] finds the coordinator and the credentials.
//! Exit statuses are in [`exit`], images on this machine in [`oci`].

#![forbid(unsafe_code)]

mod commands;
mod context;
mod exit;
mod oci;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use commands::{
    audit, cluster, dataset, doctor, gpu, image, job, node, pool, service, simulate, token, vm, vm_control,
    vm_device,
};
use context::Connection;
use exit::Exit;
use lathe_api::client::ClientError;
use output::Format;

/// GPU microVMs on bare metal, and the work that runs in them.
///
/// Exit status: 0 done, 1 the job or step failed, 2 wrong arguments or file, 3 the coordinator cannot be
/// reached or refused the credentials, 4 this machine cannot do it, 5 the job was cancelled.
#[derive(Debug, Parser)]
#[command(name = "lathe", version, propagate_version = true)]
struct Cli {
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a cluster.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// The hosts of the cluster.
    #[command(subcommand)]
    Node(node::Command),
    /// Parts of the cluster, and the policies that hold there.
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Who work belongs to, and how much they may have.
    #[command(subcommand)]
    Tenant(pool::TenantCommand),
    /// What operators did (admin).
    Audit(audit::AuditArgs),
    /// GPUs, and what stands in the way of giving them to guests.
    #[command(subcommand)]
    Gpu(gpu::Command),
    /// Credentials of nodes and people.
    #[command(subcommand)]
    Token(token::Command),
    /// Images that tasks run.
    #[command(subcommand)]
    Image(image::Command),
    /// Data that tasks read.
    #[command(subcommand)]
    Dataset(dataset::Command),
    /// Work that ends.
    #[command(subcommand)]
    Job(job::Command),
    /// Work that stays up, with as many replicas as the requests in flight need.
    #[command(subcommand)]
    Service(service::Command),
    /// MicroVMs on this machine, without a cluster.
    #[command(subcommand)]
    Vm(VmCommand),
    Simulate(Box<simulate::SimulateArgs>),
    /// What this machine can do, and what to do about what it cannot.
    Doctor,
    /// Print a completion script for a shell, to be sourced from its start file.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    /// Run one microVM until it ends; the exit status is the VMM's.
    Run(vm::RunArgs),
    /// Look at a running microVM, pause it, press its power button.
    Control(vm_control::ControlArgs),
    /// Passed-through devices of a running microVM.
    #[command(subcommand)]
    Device(vm_device::DeviceCommand),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli).await {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("lathe: {}", one_line(&error));
            classify(&error).into()
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<Exit> {
    let format = if cli.json { Format::Json } else { Format::Table };
    match cli.command {
        Command::Simulate(args) => simulate::run(&args, format),
        Command::Doctor => doctor::run(format),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lathe", &mut std::io::stdout());
            Ok(Exit::Success)
        }
        Command::Vm(VmCommand::Run(args)) => vm::run(&args),
        Command::Vm(VmCommand::Control(args)) => vm_control::run(&args, format),
        Command::Vm(VmCommand::Device(command)) => vm_device::run(&command, format),
        Command::Cluster(command) => cluster::run(command),
        Command::Node(command) => node::run(command, &cli.connection.client()?, format).await,
        Command::Pool(command) => pool::pool(command, &cli.connection.client()?, format).await,
        Command::Tenant(command) => pool::tenant(command, &cli.connection.client()?, format).await,
        Command::Audit(args) => audit::run(&args, &cli.connection.client()?, format).await,
        Command::Gpu(command) => gpu::run(command, &cli.connection, format).await,
        Command::Token(command) => token::run(command, &cli.connection.client()?, format).await,
        Command::Image(command) => image::run(command, &cli.connection.client()?, format).await,
        Command::Dataset(command) => dataset::run(command, &cli.connection.client()?, format).await,
        Command::Job(command) => job::run(command, &cli.connection, format).await,
        Command::Service(command) => service::run(command, &cli.connection, format).await,
    }
}

/// The error and what caused it on one line, without saying anything twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line
}

fn classify(error: &anyhow::Error) -> Exit {
    let client = error.chain().find_map(|cause| cause.downcast_ref::<ClientError>());
    match client {
        Some(ClientError::Unreachable { .. } | ClientError::Untrusted { .. }) => Exit::Unreachable,
        Some(error) if matches!(error.status(), Some(401 | 403)) => Exit::Unreachable,
        _ => Exit::Usage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_joined_once() {
        let error =
            anyhow::anyhow!("no such file").context("cannot read x: no such file").context("job.toml");
        assert_eq!(one_line(&error), "job.toml: cannot read x: no such file");
    }
}
