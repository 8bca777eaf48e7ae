//! `scripts/testbed`: emulated bare-metal hosts by hand.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use lathe_testbed::supervisor::{Action, Reply, Request, ask, attach, supervise};
use lathe_testbed::{HostDescription, HostFile, Stream, bed, image};

/// Emulated bare-metal hosts: QEMU machines in which KVM, an IOMMU and VFIO are real.
#[derive(Parser)]
#[command(name = "testbed", max_term_width = 110)]
struct Cli {
    /// The bed to work on; several can be up beside each other.
    #[arg(long, default_value = "hand", global = true)]
    bed: String,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start hosts n1, n2, ... and leave them running.
    Up(Up),
    /// Run a command in a host; its streams and exit code become this command's.
    Exec {
        /// The host.
        host: String,
        /// Start it in the background, its output at the end of this file in the host.
        #[arg(long, value_name = "FILE")]
        detach: Option<String>,
        /// Program and arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Copy a file into a host.
    Put {
        /// The host.
        host: String,
        /// File here.
        local: PathBuf,
        /// File there.
        remote: String,
    },
    /// Copy a file out of a host.
    Get {
        /// The host.
        host: String,
        /// File there.
        remote: String,
        /// File here.
        local: PathBuf,
    },
    /// Print what a host wrote to its serial console.
    Console {
        /// The host.
        host: String,
    },
    /// List the hosts.
    Ps,
    /// Run a command of this machine in the hosts' network, where it is 10.88.0.1.
    Net {
        /// Program and arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Stop a host's CPUs.
    Pause { host: String },
    /// Let a paused host go on.
    Resume { host: String },
    /// Take a host's power away.
    Kill { host: String },
    /// Power a host off in order.
    Shutdown { host: String },
    /// Start a host that is off; it has its data disk still.
    Restart { host: String },
    /// Take a host off the network.
    Cut { host: String },
    /// Put a host back on the network.
    Restore { host: String },
    /// Take the hosts down, and remove what killed harnesses left behind.
    Down {
        /// Also take down the other beds that `up` started.
        #[arg(long)]
        all: bool,
    },
    /// Hold a bed; `up` starts this.
    #[command(hide = true)]
    Supervise,
}

#[derive(Args)]
struct Up {
    /// How many hosts.
    #[arg(long, default_value_t = 1)]
    nodes: u32,
    /// CPUs of each [default: 2, or 1 with --deterministic].
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory of each in MiB [default: 3072].
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// 2 MiB pages that each reserves.
    #[arg(long, value_name = "COUNT")]
    huge_pages: Option<u32>,
    /// Clocks that count instructions: repeatable times, one CPU.
    #[arg(long)]
    deterministic: bool,
    /// A directory that the hosts see, read-only and live, at /share.
    #[arg(long, value_name = "DIRECTORY")]
    share: Option<PathBuf>,
    /// A file that is in the hosts when they start, as LOCAL:REMOTE.
    #[arg(long = "file", value_name = "LOCAL:REMOTE")]
    files: Vec<String>,
    /// Do not install Lathe's binaries and guest bundle.
    #[arg(long)]
    bare: bool,
    /// Hosts described in TOML files, one a host, instead of n1, n2, ...
    #[arg(long = "description", value_name = "FILE")]
    descriptions: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("testbed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let name = cli.bed.as_str();
    let act = |action, host| ask(name, &Request::Do(action, host)).map(drop);
    match cli.command {
        Verb::Up(up) => start(name, &up)?,
        Verb::Exec { host, detach, argv } => return exec(name, &host, detach.as_deref(), argv),
        Verb::Put { host, local, remote } => attach(name, &host)?.put(local, &remote)?,
        Verb::Get { host, remote, local } => attach(name, &host)?.get(&remote, local)?,
        Verb::Console { host } => {
            if let Reply::Text(text) = ask(name, &Request::Console(host))? {
                io::stdout().write_all(text.as_bytes())?;
            }
        }
        Verb::Ps => list(name)?,
        Verb::Net { argv } => return net(name, &argv),
        Verb::Pause { host } => act(Action::Pause, host)?,
        Verb::Resume { host } => act(Action::Resume, host)?,
        Verb::Kill { host } => act(Action::Kill, host)?,
        Verb::Shutdown { host } => act(Action::Shutdown, host)?,
        Verb::Restart { host } => act(Action::Restart, host)?,
        Verb::Cut { host } => act(Action::Cut, host)?,
        Verb::Restore { host } => act(Action::Restore, host)?,
        Verb::Down { all } => down(name, all)?,
        Verb::Supervise => hold(name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The hosts that `up` is asked for.
fn describe(up: &Up) -> anyhow::Result<Vec<HostDescription>> {
    let mut hosts = Vec::new();
    for path in &up.descriptions {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        hosts.push(toml::from_str(&text).with_context(|| path.display().to_string())?);
    }
    if hosts.is_empty() {
        hosts.extend((1..=up.nodes).map(|number| HostDescription::new(format!("n{number}"))));
    }
    let mut files = if up.bare { Vec::new() } else { image::installed_files()? };
    for file in &up.files {
        let Some((local, remote)) = file.split_once(':') else { bail!("--file {file}: use LOCAL:REMOTE") };
        files.push(HostFile { local: local.into(), remote: remote.into() });
    }
    let share = up.share.as_ref().map(fs::canonicalize).transpose().context("--share")?;
    for host in &mut hosts {
        if up.deterministic {
            *host = host.clone().deterministic();
        }
        host.cpus = up.cpus.unwrap_or(host.cpus);
        host.memory_mib = up.memory.unwrap_or(host.memory_mib);
        host.huge_pages = up.huge_pages.unwrap_or(host.huge_pages);
        host.files.extend(files.iter().cloned());
        if share.is_some() {
            host.share.clone_from(&share);
        }
        host.validate()?;
    }
    Ok(hosts)
}

fn start(name: &str, up: &Up) -> anyhow::Result<()> {
    if ask(name, &Request::List).is_ok() {
        bail!("bed {name:?} is up already; `scripts/testbed down` takes it down");
    }
    let hosts = describe(up)?;
    let mut supervisor = Command::new(std::env::current_exe()?)
        .args(["--bed", name, "supervise"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Kept open, the terminal or pipe of this command would never see its end.
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = supervisor.stdin.take() {
        serde_json::to_writer(&mut stdin, &hosts)?;
    }
    let mut answer = String::new();
    if let Some(mut stdout) = supervisor.stdout.take() {
        stdout.read_to_string(&mut answer)?;
    }
    if answer.trim() == "ready" {
        return list(name);
    }
    let status = supervisor.wait()?;
    bail!("{}", if answer.is_empty() { format!("the supervisor ended with {status}") } else { answer })
}

/// Holds the bed. Its standard output is read by `up`: "ready", or the reason why not.
fn hold(name: &str) -> anyhow::Result<()> {
    let hosts = serde_json::from_reader(io::stdin())?;
    // Away from the terminal, whose Ctrl-C is for the commands typed there.
    nix::unistd::setsid()?;
    let result = supervise(name, hosts, || {
        println!("ready");
        // `up` reads until the end, which a closed descriptor is.
        if let Ok(nothing) = fs::File::options().write(true).open("/dev/null") {
            let _ = nix::unistd::dup2_stdout(nothing);
        }
    });
    if let Err(e) = result {
        print!("{e}");
        return Err(e.into());
    }
    Ok(())
}

fn list(name: &str) -> anyhow::Result<()> {
    if let Reply::Hosts { namespace, hosts } = ask(name, &Request::List)? {
        println!("{:<12} {:<14} {:>4} {:>10}  QEMU", "HOST", "ADDRESS", "CPUS", "MEMORY");
        for host in hosts {
            let qemu = host.qemu_pid.map_or_else(|| "off".into(), |pid| format!("pid {pid}"));
            println!(
                "{:<12} {:<14} {:>4} {:>6} MiB  {qemu}",
                host.name, host.address, host.cpus, host.memory_mib
            );
        }
        println!("network namespace {namespace}; this machine is {} there", bed::HARNESS_ADDRESS);
    }
    Ok(())
}

fn exec(name: &str, host: &str, detach: Option<&str>, argv: Vec<String>) -> anyhow::Result<ExitCode> {
    let mut command = attach(name, host)?.command(argv).no_limit();
    if let Some(output) = detach {
        println!("{}", command.spawn(output)?.pid());
        return Ok(ExitCode::SUCCESS);
    }
    // A terminal's input would be taken from whatever is typed next; a pipe's or file's is meant.
    if !io::stdin().is_terminal() {
        command = command.stdin(io::stdin());
    }
    let status = command.carry(&mut |stream, bytes| match stream {
        Stream::Stderr => io::stderr().write_all(bytes),
        _ => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
    })?;
    Ok(ExitCode::from(u8::try_from(status.shell_code()).unwrap_or(u8::MAX)))
}

fn net(name: &str, argv: &[String]) -> anyhow::Result<ExitCode> {
    let Reply::Hosts { namespace, .. } = ask(name, &Request::List)? else { bail!("unexpected answer") };
    let status = bed::command_in(&namespace, &argv[0]).args(&argv[1..]).status()?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(u8::MAX)))
}

fn down(name: &str, all: bool) -> anyhow::Result<()> {
    let mut names = vec![name.to_owned()];
    if all {
        names.extend(beds_with_supervisor()?);
    }
    for name in names {
        if ask(&name, &Request::Down).is_ok() {
            println!("bed {name} is down");
        }
    }
    for name in bed::sweep()? {
        println!("removed what was left of bed {name}");
    }
    Ok(())
}

fn beds_with_supervisor() -> anyhow::Result<Vec<String>> {
    let directory = bed::state_directory();
    if !Path::new(&directory).exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.path().join("control.sock").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}
