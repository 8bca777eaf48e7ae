//! A cluster: on emulated hosts, with the coordinator on this machine, inside the hosts' network, and an
//! agent on each host; or all of it on this machine ([`crate::this_machine`]). Everything goes when the
//! cluster is dropped.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lathe_api::job::{Job, JobState};
use lathe_api::node::{Node, NodeState};
use lathe_testbed::bed::HARNESS_ADDRESS;
use lathe_testbed::{Bed, Device, Host, HostDescription, HostFile};
use nix::sched::{CloneFlags, setns};
use serde::de::DeserializeOwned;

use crate::artefacts;
use crate::leftovers::{self, Census};
use crate::this_machine::AgentHere;
use crate::wait::{PATIENCE, until};

/// The coordinator's port in the hosts' network.
const PORT: u16 = 7700;
/// How long an emulated host may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(60);

/// What kind of cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many hosts, named n1, n2, ...
    pub hosts: usize,
    /// CPUs of each.
    pub cpus: u32,
    /// Memory of each, MiB.
    pub memory_mib: u32,
    /// NUMA nodes of each, as CPUs and MiB, which add up to the above; none: one node with everything.
    pub numa: Vec<(u32, u32)>,
    /// PCI devices of each beyond those it needs.
    pub devices: Vec<Device>,
}

impl Default for Options {
    fn default() -> Self {
        Self { hosts: 2, cpus: 2, memory_mib: 3072, numa: Vec::new(), devices: Vec::new() }
    }
}

/// A running cluster.
pub struct Cluster {
    // Fields are dropped in this order: the coordinator ends before its network goes.
    coordinator: Option<Coordinator>,
    agent_here: Option<AgentHere>,
    hosts: Vec<Host>,
    bed: Option<Bed>,
    directory: tempfile::TempDir,
}

/// The coordinator's process; killed when dropped.
struct Coordinator(Child);

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Cluster {
    /// Starts hosts, coordinator and agents, and waits until every node is ready.
    ///
    /// # Errors
    /// When something does not come up; consoles and logs are then in `target/failures`.
    pub fn start(options: &Options) -> anyhow::Result<Self> {
        let mut cluster = Self::boot(options)?;
        cluster.start_coordinator()?;
        for host in &cluster.hosts {
            cluster.start_agent(host)?;
        }
        let ready = cluster.wait_for_nodes(options.hosts);
        if ready.is_err() {
            cluster.save_logs("start");
        }
        ready.map(|_| cluster)
    }

    /// Makes the cluster's keys and boots its hosts; neither coordinator nor agents run yet.
    ///
    /// # Errors
    /// When a host does not come up.
    pub fn boot(options: &Options) -> anyhow::Result<Self> {
        let mut cluster = Self::without_nodes(Some(Bed::new()?))?;
        let data = cluster.data_dir();
        let guest = artefacts::guest_bundle()?;
        let mut files = vec![
            file(guest.join("vmlinuz"), "/usr/lib/lathe/guest/vmlinuz"),
            file(guest.join("initramfs"), "/usr/lib/lathe/guest/initramfs"),
            file(guest.join("cmdline"), "/usr/lib/lathe/guest/cmdline"),
            file(data.join("ca.pem"), "/etc/lathe/ca.pem"),
            file(data.join("join.token"), "/etc/lathe/join.token"),
        ];
        for name in ["lathe", "lathe-agent", "lathe-vmm"] {
            files.push(file(artefacts::binary(name)?, &format!("/usr/bin/{name}")));
        }
        let descriptions = (1..=options.hosts).map(|number| {
            let mut host = HostDescription::new(format!("n{number}"));
            host.cpus = options.cpus;
            host.memory_mib = options.memory_mib;
            for (cpus, memory_mib) in &options.numa {
                host = host.numa_node(*cpus, *memory_mib);
            }
            host.files.clone_from(&files);
            host.devices.clone_from(&options.devices);
            host
        });
        if let Some(bed) = &cluster.bed {
            cluster.hosts = bed.boot_all(descriptions.collect())?;
        }
        Ok(cluster)
    }

    /// A coordinator and an agent on this machine, which runs the sandboxes itself.
    ///
    /// # Errors
    /// When one does not come up, or an agent runs here already.
    pub fn start_here() -> anyhow::Result<Self> {
        let mut cluster = Self::without_nodes(None)?;
        cluster.start_coordinator()?;
        cluster.agent_here = Some(AgentHere::start(cluster.scratch(), &cluster.data_dir(), &cluster.url())?);
        cluster.wait_for_nodes(1).with_context(|| {
            let log = std::fs::read_to_string(cluster.scratch().join("agent.log"));
            format!("the agent's log:\n{}", log.unwrap_or_default())
        })?;
        Ok(cluster)
    }

    /// Makes the cluster's keys.
    fn without_nodes(bed: Option<Bed>) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("lathe-cluster-").tempdir()?;
        let cluster = Self { coordinator: None, agent_here: None, hosts: Vec::new(), bed, directory };
        let output = Command::new(artefacts::binary("lathe-coordinator")?)
            .arg("init")
            .arg("--data-dir")
            .arg(cluster.data_dir())
            .args(["--address", &cluster.address()])
            .output()?;
        ensure!(output.status.success(), "init: {}", String::from_utf8_lossy(&output.stderr));
        Ok(cluster)
    }

    /// The coordinator's files: `ca.pem`, `admin.token`, `join.token`.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("coordinator")
    }

    /// A directory of this cluster's that goes with it.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The hosts, n1 first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Where the coordinator listens.
    fn address(&self) -> String {
        let address = if self.bed.is_some() { HARNESS_ADDRESS } else { "127.0.0.1" };
        format!("{address}:{PORT}")
    }

    /// The coordinator's URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    /// A command that reaches the coordinator: in the hosts' network, where there is one.
    fn command(&self, program: &str) -> anyhow::Result<Command> {
        let program = artefacts::binary(program)?;
        Ok(self.bed.as_ref().map_or_else(|| Command::new(&program), |bed| bed.command(&program)))
    }

    /// Connects from this process to an address in the hosts' network, where there is one.
    ///
    /// # Errors
    /// When the network cannot be entered, or nobody listens there.
    pub fn connect(&self, address: SocketAddr) -> anyhow::Result<TcpStream> {
        let Some(bed) = &self.bed else { return Ok(TcpStream::connect_timeout(&address, CONNECT)?) };
        let network = File::open(Path::new("/run/netns").join(bed.namespace()))?;
        // A thread of its own enters it and ends; the socket stays where it was made.
        let connecting = std::thread::spawn(move || -> anyhow::Result<TcpStream> {
            setns(network, CloneFlags::CLONE_NEWNET)?;
            Ok(TcpStream::connect_timeout(&address, CONNECT)?)
        });
        connecting.join().map_err(|_| anyhow::anyhow!("connecting to {address} panicked"))?
    }

    /// Starts the coordinator; its log goes on where an earlier one's ended.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn start_coordinator(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.coordinator_log())?;
        let child = self
            .command("lathe-coordinator")?
            .arg("serve")
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--listen", &self.address()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start lathe-coordinator")?;
        let coordinator = self.coordinator.insert(Coordinator(child));
        if let Some(status) = coordinator.0.try_wait()? {
            bail!("lathe-coordinator ended: {status}");
        }
        until("the coordinator answers", PATIENCE, || {
            Ok(self.lathe(["node", "list"])?.status.success().then_some(()))
        })
    }

    fn coordinator_log(&self) -> PathBuf {
        self.directory.path().join("coordinator.log")
    }

    /// SIGKILLs the coordinator.
    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Starts the agent on a host; its log is /var/log/lathe-agent.log there.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&self, host: &Host) -> anyhow::Result<u32> {
        let (url, address) = (self.url(), host.address());
        let process = host.spawn(
            [
                "/usr/bin/lathe-agent",
                "run",
                "--coordinator",
                &url,
                "--ca",
                "/etc/lathe/ca.pem",
                "--join-token-file",
                "/etc/lathe/join.token",
                "--name",
                host.name(),
                "--address",
                &address,
            ],
            "/var/log/lathe-agent.log",
        )?;
        Ok(process.pid())
    }

    /// Waits until `count` nodes are ready.
    ///
    /// # Errors
    /// When they do not become so.
    pub fn wait_for_nodes(&self, count: usize) -> anyhow::Result<Vec<Node>> {
        until("nodes are ready", PATIENCE, || {
            let nodes: Vec<Node> = self.json(["node", "list"])?;
            let ready = nodes.iter().filter(|node| node.state == NodeState::Ready).count();
            Ok((ready == count).then_some(nodes))
        })
    }

    /// The `lathe` command, in the hosts' network and with the admin's credentials.
    ///
    /// # Errors
    /// When it was not built.
    pub fn lathe_command(&self) -> anyhow::Result<Command> {
        let mut command = self.command("lathe")?;
        command
            .env("LATHE_COORDINATOR", self.url())
            .env("LATHE_CA", self.data_dir().join("ca.pem"))
            .env("LATHE_TOKEN_FILE", self.data_dir().join("admin.token"))
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `lathe` with these arguments.
    ///
    /// # Errors
    /// When it cannot be started; that it failed is the caller's to see.
    pub fn lathe<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Output> {
        Ok(self.lathe_command()?.args(args).output()?)
    }

    /// Runs `lathe --json` with these arguments and reads its answer.
    ///
    /// # Errors
    /// When it fails or answers something else.
    pub fn json<T: DeserializeOwned, S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<T> {
        let output = self.lathe_command()?.arg("--json").args(args).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}", stderr.trim());
        serde_json::from_slice(&output.stdout).context("lathe --json gave something else")
    }

    /// Submits a job file and returns at once.
    ///
    /// # Errors
    /// When it is refused.
    pub fn submit(&self, file: &Path, more: &[&str]) -> anyhow::Result<Job> {
        let file = file.to_str().context("a path that is not UTF-8")?;
        self.json(["job", "run", "--detach", file].into_iter().chain(more.iter().copied()))
    }

    /// Submits a job given as TOML text.
    ///
    /// # Errors
    /// When it is refused.
    pub fn submit_text(&self, text: &str) -> anyhow::Result<Job> {
        let file = tempfile::Builder::new().suffix(".toml").tempfile_in(self.scratch())?;
        std::fs::write(file.path(), text)?;
        self.submit(file.path(), &[])
    }

    /// The job now.
    ///
    /// # Errors
    /// When there is none of that ID.
    pub fn job(&self, id: &str) -> anyhow::Result<Job> {
        self.json(["job", "show", id])
    }

    /// Waits for a job's end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_for_job(&self, id: &str) -> anyhow::Result<Job> {
        let ended = until(&format!("job {id} ends"), PATIENCE, || {
            let job = self.job(id)?;
            Ok(job.state.is_terminal().then_some(job))
        });
        if ended.is_err() {
            self.save_logs(id);
        }
        ended.with_context(|| format!("{:?}", self.job(id)))
    }

    /// Submits a job file, waits for its end and expects success; the job and its output.
    ///
    /// # Errors
    /// When it does not succeed, with its output.
    pub fn run(&self, file: &Path, more: &[&str]) -> anyhow::Result<(Job, String)> {
        let job = self.submit(file, more)?;
        let job = self.wait_for_job(&job.id)?;
        let logs = self.logs(&job.id)?;
        if job.state != JobState::Succeeded {
            self.save_logs(&job.id);
            bail!("job {} is {:?}: {:?}\n{:#?}\n{logs}", job.id, job.state, job.reason, job.tasks);
        }
        Ok((job, logs))
    }

    /// All of a job's output.
    ///
    /// # Errors
    /// When there is no such job.
    pub fn logs(&self, id: &str) -> anyhow::Result<String> {
        let output = self.lathe(["job", "logs", id])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let stderr = String::from_utf8_lossy(&output.stderr);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &stderr)
    }

    /// What a host holds once no sandbox is left in it.
    ///
    /// # Errors
    /// When sandboxes stay, or the host does not answer.
    pub fn settled_census(&self, host: &Host) -> anyhow::Result<Census> {
        until("the host's sandboxes are gone", PATIENCE, || {
            let census = leftovers::census(host)?;
            let busy = census.keys().any(|line| line.starts_with("process ") || line.starts_with("sandbox "));
            Ok((!busy).then_some(census))
        })
    }

    /// Copies every console and log into `target/failures/NAME`, for a person to read.
    pub fn save_logs(&self, name: &str) {
        let directory = artefacts::repository().join("target/failures").join(name);
        let _ = std::fs::create_dir_all(&directory);
        let _ = std::fs::copy(self.coordinator_log(), directory.join("coordinator.log"));
        let _ = std::fs::copy(self.scratch().join("agent.log"), directory.join("agent.log"));
        for host in &self.hosts {
            let _ = host.save_console(&directory);
            let _ =
                host.get("/var/log/lathe-agent.log", directory.join(format!("{}-agent.log", host.name())));
        }
        eprintln!("consoles and logs: {}", directory.display());
    }
}

fn file(local: PathBuf, remote: &str) -> HostFile {
    HostFile { local, remote: remote.to_owned() }
}
