//! `lathe gpu`: GPUs of the cluster and of this machine, and what stands in the way of passing them
//! through.
//!
//! Reading a host is the agent's work: for this machine `lathe-agent` is run, which needs no cluster.

use std::path::PathBuf;
use std::process::{Command as Program, Stdio};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use lathe_api::HostPciAddress;
use lathe_api::gpu::{DeviceCheck, Gpu, GpuHealth, GpuState, Severity};
use lathe_api::node::Node;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::{Connection, ContextError};
use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the GPUs of the cluster; of this machine with --host, and where no cluster is configured.
    List {
        /// This machine's; needs no coordinator.
        #[arg(long)]
        host: bool,
        #[command(flatten)]
        agent: Agent,
    },
    /// Say what stands in the way of giving PCI devices of this machine to guests, and what to do about it.
    ///
    /// Without an address: of all its GPUs. The exit status is 4 if something blocks one of them.
    Check {
        /// PCI addresses of any devices, as 0000:65:00.0.
        addresses: Vec<HostPciAddress>,
        #[command(flatten)]
        agent: Agent,
    },
}

/// Which program reads this machine.
#[derive(Debug, Args)]
pub struct Agent {
    /// The agent to ask [default: lathe-agent beside this program, else on the PATH].
    #[arg(long = "agent", env = "LATHE_AGENT", value_name = "PATH")]
    path: Option<PathBuf>,
}

/// A GPU and the node that has it.
#[derive(Debug, Serialize)]
struct ClusterGpu<'a> {
    node: &'a str,
    #[serde(flatten)]
    gpu: &'a Gpu,
}

/// Runs a subcommand.
///
/// # Errors
/// What the coordinator or the agent said.
pub async fn run(command: Command, connection: &Connection, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::List { host: true, agent } => list_host(&agent, format),
        Command::List { host: false, agent } => match connection.client() {
            Ok(client) => list_cluster(&client.nodes().await?, format),
            Err(error) if matches!(error.downcast_ref(), Some(ContextError::Missing { .. })) => {
                eprintln!("lathe: {error}; these are this machine's GPUs");
                list_host(&agent, format)
            }
            Err(error) => Err(error),
        },
        Command::Check { addresses, agent } => check(&addresses, &agent, format),
    }
}

fn list_host(agent: &Agent, format: Format) -> anyhow::Result<Exit> {
    let gpus: Vec<Gpu> = agent.ask(&[])?;
    match format {
        Format::Json => output::json(&gpus)?,
        Format::Table => {
            let mut table = output::table(&HEADINGS);
            for gpu in &gpus {
                table.add_row(row(gpu));
            }
            println!("{table}");
        }
    }
    Ok(Exit::Success)
}

fn list_cluster(nodes: &[Node], format: Format) -> anyhow::Result<Exit> {
    let gpus = nodes.iter().flat_map(|node| node.inventory.gpus.iter().map(|gpu| (node.name.as_str(), gpu)));
    let gpus: Vec<_> = gpus.map(|(node, gpu)| ClusterGpu { node, gpu }).collect();
    match format {
        Format::Json => output::json(&gpus)?,
        Format::Table => {
            let mut table = output::table(&[&["NODE"], &HEADINGS[..]].concat());
            for ClusterGpu { node, gpu } in &gpus {
                table.add_row(std::iter::once((*node).to_owned()).chain(row(gpu)));
            }
            println!("{table}");
        }
    }
    Ok(Exit::Success)
}

const HEADINGS: [&str; 8] = ["ADDRESS", "MODEL", "MEMORY", "NUMA", "GROUP", "DRIVER", "STATE", "HEALTH"];

fn row(gpu: &Gpu) -> [String; 8] {
    let number = |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    [
        gpu.address.to_string(),
        gpu.model.clone(),
        format!("{} MiB", gpu.memory_bytes >> 20),
        number(gpu.numa_node),
        number(gpu.iommu_group),
        gpu.driver.clone().unwrap_or_else(|| "-".to_owned()),
        state(gpu),
        health(gpu),
    ]
}

/// The state, and the first thing that keeps it from being given to anybody.
pub fn state(gpu: &Gpu) -> String {
    let task = gpu.task.as_deref().unwrap_or("?");
    let blocking = gpu.problems.iter().find(|problem| problem.severity == Severity::Blocks);
    match (gpu.state, blocking) {
        (GpuState::Free, Some(problem)) => format!("blocked: {}", problem.what),
        (GpuState::Free, None) => "free".to_owned(),
        (GpuState::InUse, _) => format!("in use by {task}"),
        (GpuState::Scrubbing, _) => format!("scrubbing after {task}"),
        (GpuState::Quarantined, _) => {
            format!("quarantined: {}", gpu.reason.as_deref().unwrap_or("for an unknown reason"))
        }
    }
}

fn health(gpu: &Gpu) -> String {
    match &gpu.health {
        // Only NVIDIA's driver can be asked, and only while it runs the GPU.
        GpuHealth::Healthy if gpu.driver.as_deref() != Some("nvidia") => "-".to_owned(),
        GpuHealth::Healthy => "healthy".to_owned(),
        GpuHealth::Degraded(reason) => format!("degraded: {reason}"),
        GpuHealth::Failed(reason) => format!("failed: {reason}"),
    }
}

fn check(addresses: &[HostPciAddress], agent: &Agent, format: Format) -> anyhow::Result<Exit> {
    let mut arguments = vec!["--check".to_owned()];
    arguments.extend(addresses.iter().map(ToString::to_string));
    let checks: Vec<DeviceCheck> = agent.ask(&arguments)?;
    match format {
        Format::Json => output::json(&checks)?,
        Format::Table => lines(&checks).iter().for_each(|line| println!("{line}")),
    }
    if checks.is_empty() {
        eprintln!("lathe: this machine has no GPU; to check another device, name its PCI address");
        return Ok(Exit::Unavailable);
    }
    let blocked = checks.iter().any(blocks);
    Ok(if blocked { Exit::Unavailable } else { Exit::Success })
}

fn blocks(check: &DeviceCheck) -> bool {
    check.problems.iter().any(|problem| problem.severity == Severity::Blocks)
}

/// One line a problem; one that says so for a device that nothing blocks.
fn lines(checks: &[DeviceCheck]) -> Vec<String> {
    let mut lines = Vec::new();
    for check in checks {
        let address = check.address;
        if !blocks(check) {
            lines.push(format!("ok      {address} {}: can be passed through", check.what));
        }
        for problem in &check.problems {
            let severity = match problem.severity {
                Severity::Blocks => "blocks",
                Severity::Warns => "warns ",
            };
            lines.push(format!("{severity}  {address} {}; {}", problem.what, problem.fix));
        }
    }
    lines
}

impl Agent {
    /// What `lathe-agent gpus` answers.
    fn ask<T: DeserializeOwned>(&self, arguments: &[String]) -> anyhow::Result<T> {
        let program = self.program();
        let name = program.display();
        let output = Program::new(&program)
            .arg("gpus")
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| {
                format!("cannot run {name}; install lathe-agent beside lathe or give --agent")
            })?;
        if !output.status.success() {
            bail!("{name} gpus ended with {}", output.status);
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{name} answered something else than this version expects"))
    }

    fn program(&self) -> PathBuf {
        if let Some(path) = &self.path {
            return path.clone();
        }
        let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name("lathe-agent"));
        beside.filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("lathe-agent"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_api::gpu::GpuProblem;

    fn gpu(more: &str) -> Gpu {
        let text = format!(
            r#"{{"address": "0000:65:00.0", "vendor": 4318, "device": 9008, "class": 197120,
                "model": "10de:2330", "memory_bytes": 85899345920 {more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn states_say_who_has_it_and_what_is_in_the_way() {
        let healthy = r#", "health": {"is": "healthy"}"#;
        for (more, wanted) in [
            (r#", "state": "free""#, "free"),
            (r#", "state": "in_use", "task": "fit-ab12cd-0-1""#, "in use by fit-ab12cd-0-1"),
            (r#", "state": "quarantined", "reason": "no reset""#, "quarantined: no reset"),
            (
                r#", "state": "free", "problems": [{"severity": "warns", "what": "w", "fix": "f"},
                    {"severity": "blocks", "what": "the IOMMU is off", "fix": "f"}]"#,
                "blocked: the IOMMU is off",
            ),
        ] {
            assert_eq!(state(&gpu(&format!("{healthy}{more}"))), wanted);
        }
        let failed = gpu(r#", "state": "free", "health": {"is": "failed", "reason": "Xid 79"}"#);
        assert_eq!(health(&failed), "failed: Xid 79");
        assert_eq!(row(&failed)[2], "81920 MiB");
    }

    #[test]
    fn checks_are_one_line_a_problem() {
        let check = |severity: Severity| {
            let problem = GpuProblem { severity, what: "it is a bridge".into(), fix: "pass others".into() };
            let address = "0000:65:00.0".parse().unwrap();
            DeviceCheck { address, what: "PCI bridge".into(), problems: vec![problem] }
        };
        assert_eq!(
            lines(&[check(Severity::Blocks), check(Severity::Warns)]),
            [
                "blocks  0000:65:00.0 it is a bridge; pass others",
                "ok      0000:65:00.0 PCI bridge: can be passed through",
                "warns   0000:65:00.0 it is a bridge; pass others",
            ]
        );
    }

    #[test]
    fn an_agent_that_is_not_there_or_speaks_nonsense_is_named() {
        let ask =
            |path: &str| Agent { path: Some(path.into()) }.ask::<Vec<Gpu>>(&[]).unwrap_err().to_string();
        assert!(ask("/nonexistent/agent").contains("--agent"));
        assert!(ask("/bin/echo").contains("/bin/echo answered something else"));
        assert!(ask("/bin/false").contains("ended with"));
    }
}
