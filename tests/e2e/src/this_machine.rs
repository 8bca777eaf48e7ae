//! This machine as the host: where it has what a host needs, nothing has to be emulated.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use lathe_api::job::IsolationClass;
use lathe_api::node::Inventory;

use crate::artefacts;

/// What makes a gang.
const CPUS: u32 = 2;

/// Why this machine cannot be the demo's host; `None` if it can.
pub fn unfit() -> Option<String> {
    problem().unwrap_or_else(|error| Some(format!("{error:#}")))
}

fn problem() -> anyhow::Result<Option<String>> {
    let directories = Directories::below(Path::new("/nonexistent"))?;
    let output = Command::new(artefacts::binary("lathe-agent")?)
        .args(["inventory", "--json"])
        .args(directories.arguments())
        .stderr(Stdio::null())
        .output()
        .context("cannot run lathe-agent")?;
    let inventory: Inventory = serde_json::from_slice(&output.stdout).context("lathe-agent inventory")?;
    let cannot = |class: IsolationClass| !inventory.classes.contains(&class);
    if cannot(IsolationClass::Microvm) || cannot(IsolationClass::Container) {
        // The unikernel class is no part of the demo.
        let problems = inventory.class_problems.iter().filter(|problem| !problem.starts_with("unikernel"));
        return Ok(Some(problems.cloned().collect::<Vec<_>>().join("; ")));
    }
    if std::fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count) == 0 {
        return Ok(Some("it has no IOMMU".to_owned()));
    }
    let cpus = inventory.cpus.online;
    Ok((cpus < CPUS).then(|| format!("it has {cpus} CPUs, the smallest gang needs {CPUS}")))
}

/// Where an agent of the harness keeps what it has.
struct Directories {
    state: PathBuf,
    run: PathBuf,
    guest: PathBuf,
    vmm: PathBuf,
}

impl Directories {
    fn below(scratch: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            state: scratch.join("agent"),
            run: scratch.join("run"),
            guest: artefacts::guest_bundle()?,
            vmm: artefacts::binary("lathe-vmm")?,
        })
    }

    fn arguments(&self) -> impl Iterator<Item = &std::ffi::OsStr> {
        [
            ("--state-dir", &self.state),
            ("--run-dir", &self.run),
            ("--guest-dir", &self.guest),
            ("--vmm", &self.vmm),
        ]
        .into_iter()
        .flat_map(|(flag, path)| [flag.as_ref(), path.as_os_str()])
    }
}

/// An agent on this machine; when dropped it ends, and all that it made goes.
pub(crate) struct AgentHere {
    process: Child,
    directories: Directories,
}

impl AgentHere {
    /// Starts it as node `n1`; its log is `agent.log` in `scratch`.
    pub(crate) fn start(scratch: &Path, data: &Path, url: &str) -> anyhow::Result<Self> {
        let directories = Directories::below(scratch)?;
        let log = File::create(scratch.join("agent.log"))?;
        let process = Command::new(artefacts::binary("lathe-agent")?)
            .args(["run", "--coordinator", url, "--name", "n1", "--address", "127.0.0.1", "--ca"])
            .arg(data.join("ca.pem"))
            .arg("--join-token-file")
            .arg(data.join("join.token"))
            .args(directories.arguments())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start lathe-agent")?;
        Ok(Self { process, directories })
    }
}

impl Drop for AgentHere {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let Ok(agent) = artefacts::binary("lathe-agent") else { return };
        let reset = Command::new(agent)
            .args(["reset", "--state", "--force"])
            .args(self.directories.arguments())
            .status();
        if !reset.is_ok_and(|status| status.success()) {
            eprintln!("lathe-agent reset failed: what the agent made on this machine is still there");
        }
    }
}
