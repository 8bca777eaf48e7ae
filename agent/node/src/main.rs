//! `lathe-agent`: the program. What it does is in the library.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use lathe_agent::gpus::Policy;
use lathe_agent::gpus::commands::{self as gpu_commands, GpuArguments, GpusCommand};
use lathe_agent::paths::Paths;
use lathe_agent::{agent, identity, manual, reset, supervisor};
use lathe_api::HostPciAddress;

/// The host agent of Lathe.
#[derive(Debug, Parser)]
#[command(name = "lathe-agent", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host until SIGTERM; sandboxes go on without it.
    Run(RunArguments),
    /// Print what this host has and can run.
    Inventory {
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        directories: Directories,
    },
    /// Print the GPUs of this host as JSON, which `lathe gpu` shows to people; or take, release and repair
    /// them by hand.
    #[command(args_conflicts_with_subcommands = true)]
    Gpus {
        #[command(subcommand)]
        command: Option<GpusCommand>,
        /// What is in the way of giving PCI functions to sandboxes instead; of all GPUs if none is named.
        #[arg(long)]
        check: bool,
        /// PCI addresses, as 0000:65:00.0.
        #[arg(requires = "check")]
        addresses: Vec<HostPciAddress>,
        #[command(flatten)]
        directories: Directories,
    },
    /// Undo what agents made on this host: sandboxes, bridge, filter, cgroups, runtime files.
    Reset {
        /// Also remove the state directory: the node's identity, images, datasets, output not yet shipped.
        #[arg(long)]
        state: bool,
        /// End sandboxes that run.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        directories: Directories,
    },
    /// Run one sandbox by hand, without a cluster.
    #[command(subcommand)]
    Sandbox(SandboxCommand),
    /// Run the sandbox of a directory to its end; started by the agent.
    #[command(hide = true)]
    Supervise {
        /// The sandbox's directory.
        dir: PathBuf,
    },
    /// Become a program in a cgroup; started by the supervisor.
    #[command(hide = true)]
    Exec {
        /// The process to die with.
        #[arg(long)]
        parent: u32,
        /// The cgroup to enter.
        #[arg(long)]
        cgroup: PathBuf,
        /// Let it lock as much memory as the cgroup gives it.
        #[arg(long)]
        lock_memory: bool,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Directories {
    /// What survives a reboot: identity, caches, journals.
    #[arg(long, default_value = "/var/lib/lathe")]
    state_dir: PathBuf,
    /// Sockets and mount points.
    #[arg(long, default_value = "/run/lathe")]
    run_dir: PathBuf,
    /// Kernel (`vmlinuz`), `initramfs` and `cmdline` of microVMs.
    #[arg(long, default_value = "/usr/lib/lathe/guest")]
    guest_dir: PathBuf,
    /// The VMM.
    #[arg(long, default_value = "/usr/bin/lathe-vmm")]
    vmm: PathBuf,
}

impl Directories {
    fn paths(self) -> anyhow::Result<Paths> {
        // Supervisors and libraries run elsewhere: relative paths would mean something else there.
        let absolute = |path: PathBuf| std::path::absolute(&path).with_context(|| path.display().to_string());
        Ok(Paths {
            state: absolute(self.state_dir)?,
            run: absolute(self.run_dir)?,
            guest: absolute(self.guest_dir)?,
            vmm: absolute(self.vmm)?,
        })
    }
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The coordinator, as https://IP:PORT.
    #[arg(long)]
    coordinator: String,
    /// The cluster's CA certificate.
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// A join token; read only until the node has joined.
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// The node's name, unique in the cluster.
    #[arg(long)]
    name: String,
    /// The address other nodes reach this one at.
    #[arg(long)]
    address: Ipv4Addr,
    /// Serve Prometheus metrics here.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// What to say of this host, for pools and jobs to choose by, as zone=a; `lathe.rack` and `lathe.leaf`
    /// say where it stands. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    gpus: GpuArguments,
    #[command(flatten)]
    directories: Directories,
}

#[derive(Debug, Subcommand)]
enum SandboxCommand {
    /// Run the sandbox of a specification, print its output, and exit as its task did.
    Run {
        /// A sandbox specification in JSON, as the coordinator gives it to agents.
        spec: PathBuf,
        /// A folder of blobs named by their SHA-256, as `blobs/sha256` of an OCI layout.
        #[arg(long, value_name = "DIR")]
        blobs: PathBuf,
        /// The sandboxes' subnet.
        #[arg(long, default_value = "10.42.0.0/24")]
        subnet: String,
        #[command(flatten)]
        gpus: GpuArguments,
        #[command(flatten)]
        directories: Directories,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let default = match &arguments.command {
        // Its words would come out of the container's own stderr; what matters of them it returns.
        Command::Supervise { .. } => "info,libcontainer=off,libcgroups=off",
        // What it does it prints.
        Command::Gpus { .. } => "warn",
        _ => "info",
    };
    let filter = EnvFilter::try_from_env("LATHE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match dispatch(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lathe-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Supervise { dir } => supervisor::main(&dir)?,
        Command::Exec { parent, cgroup, lock_memory, argv } => {
            match supervisor::exec::main(parent, &cgroup, lock_memory, &argv)? {}
        }
        Command::Inventory { json, directories } => print_inventory(&directories.paths()?, json)?,
        Command::Gpus { command: Some(command), .. } => gpu_commands::run(command)?,
        Command::Gpus { command: None, check, addresses, directories } => {
            agent::load_modules();
            if !nix::unistd::geteuid().is_root() {
                eprintln!("lathe-agent: not run as root: who uses a GPU, and ACS, cannot be seen");
            }
            let json = if check {
                serde_json::to_string_pretty(&agent::check_devices(&addresses))?
            } else {
                serde_json::to_string_pretty(&agent::read_gpus(&directories.paths()?, Policy::All))?
            };
            println!("{json}");
        }
        Command::Reset { state, force, directories } => {
            runtime()?.block_on(reset::run(directories.paths()?, state, force))?;
        }
        Command::Run(arguments) => runtime()?.block_on(agent::run(settings(arguments)?))?,
        Command::Sandbox(SandboxCommand::Run { spec, blobs, subnet, gpus, directories }) => {
            let paths = directories.paths()?;
            let code = runtime()?.block_on(manual::run(&spec, blobs, &subnet, gpus.policy(), paths))?;
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn settings(arguments: RunArguments) -> anyhow::Result<agent::Settings> {
    let paths = arguments.directories.paths()?;
    let joined = identity::stored(&paths.identity())?.is_some();
    let token = match &arguments.join_token_file {
        // The file may be gone once it has served its purpose.
        Some(file) if !joined => Some(identity::read_text(file).context("--join-token-file")?),
        _ => None,
    };
    Ok(agent::Settings {
        coordinator: arguments.coordinator,
        ca_pem: identity::read_text(&arguments.ca).context("--ca")?,
        token,
        name: arguments.name,
        address: arguments.address.to_string(),
        paths,
        metrics: arguments.metrics_listen,
        gpus: arguments.gpus.policy(),
        labels: arguments.label.into_iter().collect(),
    })
}

/// A label, as `KEY=VALUE`.
fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: write KEY=VALUE"))?;
    let plain = |part: &str| {
        part.len() <= 63 && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
    };
    if key.is_empty() || key == "name" || !plain(key) || !plain(value) {
        let rule =
            "a key and a value of letters, digits and -_./, at most 63 each; the key name is the node's own";
        return Err(format!("{text:?}: {rule}"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn print_inventory(paths: &Paths, json: bool) -> anyhow::Result<()> {
    agent::load_modules();
    let inventory = agent::read_inventory(paths, &agent::gpus_of(paths, Policy::All));
    if json {
        println!("{}", serde_json::to_string_pretty(&inventory)?);
        return Ok(());
    }
    let cpus = &inventory.cpus;
    println!("host      {} (Linux {})", inventory.hostname, inventory.kernel);
    println!(
        "cpus      {} online, {} cores, {} sockets: {}",
        cpus.online, cpus.cores, cpus.sockets, cpus.model
    );
    println!("memory    {}", inventory.memory.map_or("unknown".to_owned(), |m| format!("{} MiB", m.mib())));
    for node in &inventory.numa {
        println!("numa      node {}: {} CPUs, {} MiB", node.id, node.cpus.len(), node.memory_bytes >> 20);
    }
    for pool in inventory.hugepages.iter().filter(|pool| pool.total > 0) {
        println!("hugepages {} of {} free, {} KiB each", pool.free, pool.total, pool.page_bytes >> 10);
    }
    for disk in &inventory.disks {
        println!("disk      {} {} MiB {}", disk.name, disk.size_bytes >> 20, disk.model);
    }
    for nic in &inventory.nics {
        println!("nic       {} {} {}", nic.name, nic.mac, nic.driver);
    }
    for device in &inventory.pci {
        let group = device.iommu_group.map_or("none".to_owned(), |group| group.to_string());
        let driver = device.driver.as_deref().unwrap_or("none");
        let (vendor, id, class) = (device.vendor, device.device, device.class);
        println!(
            "pci       {} {vendor:04x}:{id:04x} class {class:06x} driver {driver} iommu group {group}",
            device.address
        );
    }
    for class in &inventory.classes {
        println!("can run   {}", serde_json::to_value(class)?.as_str().unwrap_or_default());
    }
    for problem in &inventory.class_problems {
        println!("cannot    {problem}");
    }
    Ok(())
}
