//! Everything that can be refused before a VM exists: files, memory, CPUs, what KVM can boot.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::devices::{self, Backend};
use crate::boot::{ImageError, KernelImage};
use crate::check::FieldError;
use crate::config::{PassthroughConfig, VmConfig};
use crate::devices::{ConsoleError, ConsoleOutput};
use crate::exit::ExitReason;
use crate::memory::{self, MemoryError};
use crate::numa::{self, NumaError};
use crate::probe::{self, KvmSupport};
use crate::vfio::VfioError;
use crate::vfio::host::HostDevice;
use crate::virtio::block::DiskError;
use crate::virtio::net::NetError;
use crate::virtio::vsock::VsockSocketError;

/// A machine this host will not run.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A field that no host would accept.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The kernel or the initramfs.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// NUMA nodes.
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// A console's file.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The host's side of vsock.
    #[error(transparent)]
    Vsock(#[from] VsockSocketError),
    /// A passed-through device.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// Standard input, for a console.
    #[error("standard input: {0}")]
    Stdin(#[source] io::Error),
    /// More vCPUs than CPUs: they would only take turns.
    #[error("cpus.count: {count} is more than this host's {host} CPUs")]
    CpusBeyondHost {
        /// Asked for.
        count: u8,
        /// Online CPUs.
        host: usize,
    },
    /// No usable KVM at all.
    #[error("{}", .0.advice())]
    NoKvm(KvmSupport),
    /// Linux on a KVM that would die in its early boot.
    #[error("boot.kernel: {}: {}", .0.display(), probe::CANNOT_BOOT)]
    CannotBoot(PathBuf),
}

impl PrepareError {
    /// The process's exit status for it.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::NoKvm(_) | Self::CannotBoot(_) => ExitReason::Unsupported,
            _ => ExitReason::BadConfig,
        }
    }
}

/// A checked machine description with its files open.
pub struct Prepared {
    pub(super) config: VmConfig,
    pub(super) kernel: KernelImage,
    pub(super) initramfs: Option<(PathBuf, File)>,
    pub(super) serial: ConsoleOutput,
    pub(super) devices: Vec<Backend>,
    pub(super) passthrough: Vec<HostDevice>,
}

impl Prepared {
    /// Checks `config` against this host and opens what it names. Makes no VM and runs nothing.
    ///
    /// # Errors
    /// The first thing this host will not do, naming the field, the value and the limit.
    pub fn new(config: VmConfig) -> Result<Self, PrepareError> {
        config.check()?;
        check_cpus(config.cpus.count)?;
        memory::check_host(&config.memory)?;
        numa::check_host(&config.numa, config.memory.hugepages, Path::new(numa::HOST_NODES))?;
        let kernel = KernelImage::open(&config.boot.kernel)?;
        let initramfs = open_initramfs(&config)?;
        check_kvm(&kernel)?;
        let serial = ConsoleOutput::open(&config.serial, "serial")?;
        let passthrough = find_passthrough(&config)?;
        let devices = devices::open(&config)?;
        Ok(Self { config, kernel, initramfs, serial, devices, passthrough })
    }

    /// The description.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }
}

fn check_cpus(count: u8) -> Result<(), PrepareError> {
    // SAFETY: asks for a number; touches no memory.
    let host = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    let host = usize::try_from(host).unwrap_or(1);
    if usize::from(count) > host { Err(PrepareError::CpusBeyondHost { count, host }) } else { Ok(()) }
}

fn find_passthrough(config: &VmConfig) -> Result<Vec<HostDevice>, VfioError> {
    let find = |(index, device): (usize, &PassthroughConfig)| {
        HostDevice::find(device.address, &format!("passthrough[{index}].address"))
    };
    config.passthrough.iter().enumerate().map(find).collect()
}

fn open_initramfs(config: &VmConfig) -> Result<Option<(PathBuf, File)>, PrepareError> {
    let Some(path) = &config.boot.initramfs else { return Ok(None) };
    let unreadable =
        |source: io::Error| ImageError::Unreadable { field: "initramfs", path: path.clone(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")).into());
    }
    if metadata.len() == 0 {
        return Err(ImageError::EmptyInitramfs(path.clone()).into());
    }
    Ok(Some((path.clone(), file)))
}

/// Refuses Linux where only emulation stands behind KVM; hand-written guests may try.
fn check_kvm(kernel: &KernelImage) -> Result<(), PrepareError> {
    match probe::kvm() {
        KvmSupport::Full => Ok(()),
        support @ KvmSupport::Unavailable(_) => Err(PrepareError::NoKvm(support)),
        KvmSupport::EmulatedOnly => {
            if kernel.is_linux().map_err(|source| kernel.unreadable(source))? {
                return Err(PrepareError::CannotBoot(kernel.path().to_owned()));
            }
            Ok(())
        }
    }
}
