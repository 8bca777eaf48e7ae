//! Makes on the host what a sandbox needs, and starts its supervisor.
//!
//! Each thing is in the journal before it exists. The whole may be repeated after a crash at any
//! point: things that exist already are taken as they are, or made anew.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_api::job::IsolationClass;
use lathe_api::sandbox::SandboxSpec;
use lathe_guest_protocol::TaskSpec;

use super::machine::{GuestBundle, MachineParts, vm_config};
use super::{MAX_PIDS, SpecError, dataset_serial, devices};
use crate::cgroup::{CgroupTree, Limits};
use crate::files::{self, FileError};
use crate::gpus::{GpuError, Gpus};
use crate::images::blobs::BlobError;
use crate::images::{Artefact, ImageError, ImageStore};
use crate::journal::{End, Journal, Step};
use crate::network::address::mac_of;
use crate::network::{BRIDGE, Network, NetworkError};
use crate::paths::{Paths, SandboxKey};
use crate::supervisor::launch::{ClassLaunch, Launch, Veth};
use crate::supervisor::try_lock;

/// What the VMM itself may use beyond its guest's memory: its heap, and the page cache of disks.
const VMM_MEMORY: u64 = 128 << 20;

/// What it uses for each function that is passed through: page tables of BARs, configuration, interrupts.
const VFIO_MEMORY: u64 = 64 << 20;

/// Threads of a VMM: vCPUs, devices, workers.
const VMM_PIDS: u32 = 256;

/// How long a supervisor may take to begin.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait before the coordinator is asked again for a blob.
const FETCH_RETRY: Duration = Duration::from_secs(2);

/// The node's means, shared by all sandboxes.
pub struct Host {
    /// Where everything is.
    pub paths: Paths,
    /// Images and datasets.
    pub images: ImageStore,
    /// Bridge, taps, filter.
    pub network: Network,
    /// The cgroup tree.
    pub cgroups: CgroupTree,
    /// Devices that sandboxes get for themselves.
    pub gpus: Arc<Gpus>,
    /// This boot.
    pub boot_id: String,
}

/// A sandbox that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Its description.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its image or a dataset.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its GPUs.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A panic.
    #[error("taking its GPUs was cut off")]
    Worker,
    /// Its overlay disk.
    #[error("mkfs.ext4 failed: {0}")]
    Mkfs(String),
    /// Its supervisor.
    #[error("the supervisor did not start: {0}")]
    Supervisor(String),
}

impl PrepareError {
    /// The end of the sandbox: the user's fault, or the host's.
    pub fn end(&self) -> End {
        match self {
            Self::Spec(_) => End::failed(self.to_string()),
            Self::Image(ImageError::Mkfs(_) | ImageError::File(_)) => End::lost(self.to_string()),
            Self::Image(_) => End::failed(self.to_string()),
            _ => End::lost(self.to_string()),
        }
    }
}

/// Prepares and starts the sandbox of `journal`. Returns once its supervisor lives.
///
/// # Errors
/// When something cannot be made; what was made is in the journal.
pub async fn prepare(host: &Host, journal: &mut Journal) -> Result<(), PrepareError> {
    let spec = journal.record().spec.clone();
    let key = SandboxKey::of(&spec.id);
    let (task, disks) = artefacts(host, journal, &spec).await?;
    let begun = Instant::now();
    let launch = make(host, journal, &spec, &key, task, disks).await?;
    journal.stages().prepare_ms = millis(begun);
    start(&host.paths.sandbox(&spec.id), journal, &launch).await
}

/// Image and datasets: the long part, which leaves nothing but caches.
async fn artefacts(
    host: &Host,
    journal: &mut Journal,
    spec: &SandboxSpec,
) -> Result<(TaskSpec, BTreeMap<String, PathBuf>), PrepareError> {
    let subnet = host.network.subnet().await?;
    // Before anything is fetched for it.
    super::address(spec, subnet)?;
    let begun = Instant::now();
    let image = patiently(|| host.images.image(&spec.image.digest)).await?;
    journal.stages().image_ms = millis(begun);
    let task = super::task(spec, &image.config, subnet)?;
    let begun = Instant::now();
    let mut disks = BTreeMap::from([("root".to_owned(), image.path)]);
    for (index, dataset) in spec.datasets.iter().enumerate() {
        let made = patiently(|| host.images.dataset(&dataset.dataset)).await?;
        disks.insert(dataset_serial(index), made.path);
    }
    journal.stages().datasets_ms = millis(begun);
    Ok((task, disks))
}

/// Tries again while the coordinator cannot be reached: that is no fault of the task.
async fn patiently<F>(mut attempt: impl FnMut() -> F) -> Result<Artefact, ImageError>
where
    F: Future<Output = Result<Artefact, ImageError>>,
{
    use lathe_api::client::ClientError;
    loop {
        match attempt().await {
            Err(ImageError::Blob(BlobError::Client(error @ ClientError::Unreachable { .. }))) => {
                tracing::warn!(%error, "fetching again in a moment");
                tokio::time::sleep(FETCH_RETRY).await;
            }
            other => return other,
        }
    }
}

async fn make(
    host: &Host,
    journal: &mut Journal,
    spec: &SandboxSpec,
    key: &SandboxKey,
    task: TaskSpec,
    mut disks: BTreeMap<String, PathBuf>,
) -> Result<Launch, PrepareError> {
    // First, because it is undone last: nothing that could use them is left then.
    let passthrough = devices::take(host, journal, spec).await?;
    let dir = host.paths.sandbox(&spec.id);
    let run_dir = host.paths.sandbox_run(key);
    journal.begin(Step::RunDir { path: run_dir.clone() })?;
    files::remove(&run_dir)?;
    files::make_private_dir(&run_dir)?;

    if let Some(size) = spec.resources.disk {
        let path = dir.join("overlay.img");
        journal.begin(Step::OverlayDisk { path: path.clone() })?;
        make_overlay(&path, size.bytes()).await?;
        disks.insert("overlay".into(), path);
    }

    let address = super::address(spec, host.network.subnet().await?)?;
    let interface = key.interface();
    journal.begin(Step::Interface { name: interface.clone() })?;
    host.network.admit(key, address).await?;

    let memory = spec.resources.memory.bytes();
    let limits = match spec.class {
        IsolationClass::Container => Limits { memory, cpus: spec.resources.cpus, pids: MAX_PIDS },
        // One CPU more than the guest has, for its devices.
        _ => Limits {
            memory: memory + vmm_memory(memory, passthrough.len()),
            cpus: spec.resources.cpus + 1,
            pids: VMM_PIDS,
        },
    };
    journal.begin(Step::Cgroup { path: host.cgroups.sandbox(&key.to_string()) })?;
    let cgroup = host.cgroups.make(&key.to_string(), limits)?;
    if let Some(node) = spec.numa_node {
        host.cgroups.prefer_numa(Path::new("/"), &cgroup, node);
    }

    let class = if spec.class == IsolationClass::Container {
        let network = Veth { name: interface, bridge: BRIDGE.into(), mac: mac_of(address) };
        ClassLaunch::Container { disks, memory: spec.resources.memory, network: Some(network) }
    } else {
        host.network.make_tap(&interface).await?;
        let (vsock, console) = (run_dir.join("vsock"), dir.join("console.log"));
        let parts = MachineParts {
            guest: &GuestBundle::of(&host.paths.guest),
            disks: &disks,
            tap: &interface,
            address,
            vsock: &vsock,
            console: &console,
            passthrough: &passthrough,
            root: Path::new("/"),
        };
        let config = dir.join("vm.json");
        files::write_json(&config, &vm_config(spec, &parts))?;
        let vmm = host.paths.vmm.clone();
        ClassLaunch::Microvm { vmm, config, vsock, console, lock_memory: !passthrough.is_empty() }
    };
    let launch = Launch { id: spec.id.clone(), run_dir, cgroup, task, class };
    launch.write(&dir)?;
    Ok(launch)
}

/// What a VMM may use beside its guest's memory of `memory` bytes.
fn vmm_memory(memory: u64, functions: usize) -> u64 {
    if functions == 0 {
        return VMM_MEMORY;
    }
    // The IOMMU's page tables count too: 8 bytes for each 4 KiB at worst, once for the memory and once more
    // for VFIO's own list of what is pinned; and those for the devices' BARs.
    VMM_MEMORY + memory / 256 + VFIO_MEMORY * functions as u64
}

/// A sparse disk with an empty filesystem.
async fn make_overlay(path: &Path, size: u64) -> Result<(), PrepareError> {
    files::remove(path)?;
    let file = std::fs::File::create(path).map_err(FileError::io("make", path))?;
    file.set_len(size).map_err(FileError::io("size", path))?;
    let output = tokio::process::Command::new("mkfs.ext4")
        // No journal: the disk does not outlive the task, and what a crash leaves is thrown away.
        .args([
            "-q",
            "-F",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1,nodiscard,root_owner=0:0",
            "-m",
            "0",
        ])
        .arg(path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| PrepareError::Mkfs(format!("{error}; install e2fsprogs")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(PrepareError::Mkfs(text.lines().last().unwrap_or("no reason given").to_owned()))
}

async fn start(dir: &Path, journal: &mut Journal, launch: &Launch) -> Result<(), PrepareError> {
    journal.begin(Step::Supervisor)?;
    let failed = |reason: String| PrepareError::Supervisor(reason);
    let log = dir.join("supervisor.log");
    let log = std::fs::File::create(&log).map_err(FileError::io("make", &log))?;
    let error_log = log.try_clone().map_err(|e| failed(e.to_string()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("lathe-agent").arg("supervise").arg(dir);
    command.stdin(Stdio::null()).stdout(log).stderr(error_log).current_dir("/");
    // Not tokio's: its child outlives this process, and dropping the handle is meant.
    let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let deadline = Instant::now() + SUPERVISOR_PATIENCE;
    // Until the lock is held nobody could tell it from a dead one.
    while try_lock(dir)?.is_some() {
        if let Some(status) = child.try_wait().map_err(|e| failed(e.to_string()))? {
            // One so quick that it was never seen alive has left its word in the status.
            if crate::supervisor::status::Status::read(dir)?.is_some() {
                return Ok(());
            }
            return Err(failed(format!("{status}; see {}", dir.join("supervisor.log").display())));
        }
        if Instant::now() > deadline {
            return Err(failed(format!("{} did not begin in time", launch.id)));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    reap(child);
    Ok(())
}

/// Waits for the supervisor somewhere aside, so that it does not stay as a zombie.
fn reap(mut child: std::process::Child) {
    tokio::task::spawn_blocking(move || child.wait());
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
