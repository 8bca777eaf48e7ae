//! A container from start to end, made by libcontainer.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lathe_api::MemorySize;
use lathe_api::job::{TaskExit, TaskState, Usage};
use lathe_api::node::LogStream;
use lathe_guest_protocol::TaskSpec;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until, timeout};

use super::control::Request;
use super::launch::{Launch, Veth};
use super::oci::{self, Bundle, UnknownUser, User};
use super::rootfs::{self, Rootfs, RootfsError};
use super::{Recorder, files, seccomp};
use crate::beneath;
use crate::cgroup;
use crate::journal::End;
use crate::network::links::{ContainerLink, LinkError, connect_container};

/// How often the cgroup is read.
const USAGE_PERIOD: Duration = Duration::from_secs(2);

/// How long pipes may stay open after the container's first process has gone. They close with its
/// PID namespace; this is for a kernel that takes its time.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// A container that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Its filesystems.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// Its user.
    #[error(transparent)]
    User(#[from] UnknownUser),
    /// Its files.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// Its working directory.
    #[error("cannot make the working directory {0}: {1}")]
    Cwd(String, Errno),
    /// Its pipes.
    #[error("cannot make the container's pipes: {0}")]
    Pipe(#[from] Errno),
    /// Its program.
    #[error("{0}")]
    Program(String),
    /// libcontainer.
    #[error("cannot make the container: {0}")]
    Runtime(String),
}

impl From<ContainerError> for End {
    fn from(error: ContainerError) -> Self {
        let reason = error.to_string();
        match error {
            ContainerError::User(_) | ContainerError::Cwd(..) | ContainerError::Program(_) => {
                Self::failed(reason)
            }
            _ => Self::lost(reason),
        }
    }
}

/// A container whose first process waits to be started.
pub struct Made {
    container: Container,
    pid: Pid,
    stdout: OwnedFd,
    stderr: OwnedFd,
    network: Option<Veth>,
}

/// Makes the container of `launch`. The process has one thread: libcontainer forks it.
///
/// # Errors
/// When the host or the image does not allow it.
pub fn create(
    launch: &Launch,
    disks: &BTreeMap<String, PathBuf>,
    memory: MemorySize,
    network: Option<&Veth>,
) -> Result<Made, ContainerError> {
    let rootfs = rootfs::mount_all(&launch.run_dir, &launch.task, disks, memory)?;
    beneath::make_dirs(rootfs.fd.as_fd(), Path::new(&launch.task.cwd))
        .map_err(|errno| ContainerError::Cwd(launch.task.cwd.clone(), errno))?;
    let user = User::find(&rootfs.fd, &launch.task.user.user)?;
    let bundle = write_bundle(launch, &rootfs, &user)?;
    let (stdout, stdout_inside) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let (stderr, stderr_inside) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let null = File::open("/dev/null").map_err(files::FileError::io("open", Path::new("/dev/null")))?;
    let name = launch.run_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let container = ContainerBuilder::new(name, SyscallType::default())
        .with_executor(Worker)
        .with_root_path(launch.run_dir.join("oci"))
        .map_err(runtime)?
        .with_stdin(null)
        .with_stdout(stdout_inside)
        .with_stderr(stderr_inside)
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(runtime)?;
    let pid = container.pid().ok_or_else(|| ContainerError::Runtime("it has no process".into()))?;
    Ok(Made { pid: Pid::from_raw(pid.as_raw()), container, stdout, stderr, network: network.cloned() })
}

/// The error and its causes; a missing program is the user's, and says so first.
fn runtime(error: impl std::error::Error) -> ContainerError {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    match text.find(NO_PROGRAM) {
        Some(start) => ContainerError::Program(text[start..].to_owned()),
        None => ContainerError::Runtime(text),
    }
}

fn write_bundle(launch: &Launch, rootfs: &Rootfs, user: &User) -> Result<PathBuf, ContainerError> {
    let etc = launch.run_dir.join("etc");
    files::make_private_dir(&etc)?;
    let task = &launch.task;
    let resolvers: String = task
        .network
        .iter()
        .flat_map(|n| &n.nameservers)
        .fold(String::new(), |text, ns| format!("{text}nameserver {}\n", Ipv4Addr::from(*ns)));
    for (name, content) in [
        ("hosts", oci::hosts_file(task)),
        ("hostname", format!("{}\n", task.hostname)),
        ("resolv.conf", resolvers),
    ] {
        files::write_atomic(&etc.join(name), content.as_bytes(), 0o644)?;
    }
    let bundle = launch.run_dir.join("bundle");
    files::make_private_dir(&bundle)?;
    let cgroup = cgroup::task_of(&launch.cgroup);
    let cgroup = cgroup.strip_prefix("/sys/fs/cgroup").unwrap_or(&cgroup);
    let parts = Bundle {
        root: &rootfs.root,
        etc: &etc,
        datasets: &rootfs.datasets,
        cgroup: &Path::new("/").join(cgroup),
    };
    files::write_json(&bundle.join("config.json"), &oci::config(task, user, &parts))?;
    Ok(bundle)
}

/// Runs a made container to its end.
pub async fn run(
    launch: &Launch,
    made: Made,
    recorder: &mut Recorder,
    requests: mpsc::Receiver<Request>,
) -> End {
    let pid = made.pid;
    let result = serve(launch, made, recorder, requests).await;
    result.unwrap_or_else(|error| {
        // Not to be left waiting for a start that never comes.
        let _ = kill(pid, Signal::SIGKILL);
        End::lost(error.to_string())
    })
}

/// What can go wrong around a container that exists.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("cannot start the container: {0}")]
    Start(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

async fn serve(
    launch: &Launch,
    mut made: Made,
    recorder: &mut Recorder,
    mut requests: mpsc::Receiver<Request>,
) -> Result<End, RunError> {
    let cgroup = cgroup::task_of(&launch.cgroup);
    let grace = Duration::from_secs(launch.task.grace_seconds.into());
    let mut children = signal(SignalKind::child())?;
    if let Some(veth) = &made.network {
        connect(&made, veth, &launch.task).await?;
    }
    let (sender, mut output) = mpsc::channel(8);
    spawn_reader(LogStream::Stdout, made.stdout, sender.clone())?;
    spawn_reader(LogStream::Stderr, made.stderr, sender)?;
    made.container.start().map_err(|e| RunError::Start(e.to_string()))?;
    recorder.running();

    let mut usage_timer = interval(USAGE_PERIOD);
    let mut stopping = None;
    let status = loop {
        if let Some(status) = reap(made.pid)? {
            break status;
        }
        let deadline = stopping.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            _ = children.recv() => {}
            Some((stream, data)) = output.recv() => recorder.output(stream, &data),
            _ = usage_timer.tick() => recorder.usage(usage(&cgroup)),
            // Taken even when it is one too many: a full queue would leave the agent unanswered.
            Some(Request::Stop) = requests.recv() => if stopping.is_none() {
                recorder.stopping();
                let _ = kill(made.pid, Signal::SIGTERM);
                stopping = Some(Instant::now() + grace);
            },
            () = sleep_until(deadline), if stopping.is_some() => {
                let _ = cgroup::kill(&cgroup);
                stopping = Some(Instant::now() + grace);
            }
        }
    };
    let drain = async {
        while let Some((stream, data)) = output.recv().await {
            recorder.output(stream, &data);
        }
    };
    let _ = timeout(DRAIN_PATIENCE, drain).await;
    Ok(end(status, &cgroup))
}

async fn connect(made: &Made, veth: &Veth, task: &TaskSpec) -> Result<(), RunError> {
    let Some(network) = &task.network else { return Ok(()) };
    let netns = File::open(format!("/proc/{}/ns/net", made.pid))?;
    let link = ContainerLink {
        name: &veth.name,
        bridge: &veth.bridge,
        mac: veth.mac,
        address: Ipv4Addr::from(network.address.octets),
        prefix: network.address.prefix,
        gateway: network.gateway.map(Ipv4Addr::from),
        mtu: network.mtu,
    };
    Ok(connect_container(&netns, &link).await?)
}

/// The container's end, if it has ended. Other children (of libcontainer) are reaped on the way.
fn reap(pid: Pid) -> io::Result<Option<WaitStatus>> {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => Ok(None),
        Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => Ok(Some(status)),
        Ok(_) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn end(status: WaitStatus, cgroup: &Path) -> End {
    let exit = match status {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) if cgroup::used(cgroup).oom_kills > 0 => {
            TaskExit::OutOfMemory
        }
        WaitStatus::Signaled(_, signal, _) => TaskExit::Signal(signal as i32),
        WaitStatus::Exited(_, code) => TaskExit::Code(code),
        _ => TaskExit::Code(-1),
    };
    End { state: TaskState::Exited, reason: None, lost: false, exit: Some(exit), usage: usage(cgroup) }
}

fn usage(cgroup: &Path) -> Usage {
    let used = cgroup::used(cgroup);
    Usage { cpu_us: used.cpu_us, memory_peak_bytes: used.memory_peak, output_dropped_bytes: 0 }
}

/// Reads a pipe to its end. The short queue is the backpressure, as in any pipe.
fn spawn_reader(
    stream: LogStream,
    pipe: OwnedFd,
    sender: mpsc::Sender<(LogStream, Vec<u8>)>,
) -> io::Result<()> {
    let mut pipe = pipe::Receiver::from_owned_fd(pipe)?;
    tokio::spawn(async move {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
            if sender.send((stream, buffer[..count].to_vec())).await.is_err() {
                break;
            }
        }
    });
    Ok(())
}

/// How a program that is not there is told; [`runtime`] looks for it.
const NO_PROGRAM: &str = "there is no executable";

/// Runs inside the container's first process, last of all.
#[derive(Clone)]
struct Worker;

impl Executor for Worker {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        use std::os::unix::process::CommandExt;
        // Here, because changing user or capabilities clears it.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| ExecutorError::Other(e.to_string()))?;
        let args = arguments(spec).ok_or(ExecutorError::InvalidArg)?;
        seccomp::install().map_err(|e| ExecutorError::Other(e.to_string()))?;
        let error = std::process::Command::new(&args[0]).args(&args[1..]).exec();
        // This is the container's own stderr: the user sees it. 126 is what shells return.
        eprintln!("lathe: cannot execute {}: {error}", args[0]);
        std::process::exit(126);
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let program = arguments(spec).map(|args| args[0].clone()).unwrap_or_default();
        let env = spec.process().as_ref().and_then(|p| p.env().clone()).unwrap_or_default();
        let path = env.iter().find_map(|line| line.strip_prefix("PATH=")).unwrap_or_default();
        let found = if program.contains('/') {
            Path::new(&program).exists()
        } else {
            path.split(':').any(|dir| Path::new(dir).join(&program).exists())
        };
        if found {
            return Ok(());
        }
        Err(ExecutorValidationError::ArgValidationError(format!(
            "{NO_PROGRAM} {program:?} in the image (PATH={path})"
        )))
    }

    fn setup_envs(
        &self,
        envs: HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        libcontainer::workload::default::DefaultExecutor {}.setup_envs(envs)
    }
}

fn arguments(spec: &Spec) -> Option<&Vec<String>> {
    spec.process().as_ref()?.args().as_ref().filter(|args| !args.is_empty())
}
