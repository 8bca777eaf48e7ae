//! What a guest is told to run, and how it reports the end.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// One task: what to run, as whom, and with which files, network and limits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Program and arguments; the program is looked up in `PATH` if it has no slash.
    pub argv: Vec<String>,
    /// Environment as `(name, value)`.
    pub env: Vec<(String, String)>,
    /// Working directory; created if absent.
    pub cwd: String,
    /// Who runs it.
    pub user: UserSpec,
    /// The guest's host name.
    pub hostname: String,
    /// The root filesystem, read-only, with a writable overlay above it.
    pub root: MountSource,
    /// The writable overlay's disk (ext4); `None` keeps it in memory.
    pub overlay: Option<MountSource>,
    /// Further mounts, in order.
    pub mounts: Vec<Mount>,
    /// The network; `None` leaves loopback only.
    pub network: Option<Network>,
    /// Extra lines of /etc/hosts as `(address, name)`.
    pub hosts: Vec<(String, String)>,
    /// The gang member's rank, for the log.
    pub rank: u32,
    /// Limits inside the guest.
    pub limits: Limits,
    /// Seconds between SIGTERM and SIGKILL when the guest is told to stop by its power button.
    pub grace_seconds: u32,
    /// The machine has devices for the task to drive: it may load their kernel modules, make their device nodes and
    /// write to `/sys`. What that lets it break is its own machine.
    pub drives_devices: bool,
}

/// Where a filesystem comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum MountSource {
    /// No filesystem at all.
    #[default]
    None,
    /// A virtio-blk disk by its serial, with the filesystem's type (`erofs`, `ext4`).
    Disk {
        /// The serial, which is `vm.json`'s disk `id`.
        serial: String,
        /// The filesystem's type.
        fs: String,
    },
    /// A tmpfs of at most `size` bytes.
    Tmpfs {
        /// Bytes.
        size: u64,
    },
}

/// One mount in the task's filesystem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// What.
    pub source: MountSource,
    /// Absolute path, made if absent.
    pub target: String,
    /// Always true for datasets; the disk is read-only on the host too.
    pub read_only: bool,
}

/// Who runs the task, as the image says: `user[:group]` by number or by name in the image's passwd.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UserSpec {
    /// As in the OCI image configuration; empty means root (of the guest's user namespace).
    pub user: String,
}

/// The one interface, configured statically.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Address and prefix length.
    pub address: Address,
    /// The default gateway.
    pub gateway: Option<[u8; 4]>,
    /// In bytes.
    pub mtu: u16,
    /// Name servers for /etc/resolv.conf.
    pub nameservers: Vec<[u8; 4]>,
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Network byte order.
    pub octets: [u8; 4],
    /// 0 to 32.
    pub prefix: u8,
}

/// Limits inside the guest; zero means none beyond the machine's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory of the task's cgroup in bytes.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u32,
    /// Open files of a process.
    pub open_files: u64,
}

/// One of a task's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// The kernel's OOM killer ended it.
    OutOfMemory,
}

/// What a task used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// CPU time of the task's cgroup, microseconds.
    pub cpu_us: u64,
    /// Memory in use now, bytes.
    pub memory: u64,
    /// Peak memory, bytes.
    pub memory_peak: u64,
    /// Bytes of output dropped because of a limit; zero in a healthy task.
    pub output_dropped: u64,
}
