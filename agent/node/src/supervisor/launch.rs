//! What an agent tells a supervisor, once: `launch.json` in the sandbox's directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lathe_api::MemorySize;
use lathe_guest_protocol::TaskSpec;
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};

const FILE: &str = "launch.json";

/// One sandbox, ready to start: everything named here exists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The sandbox's ID, for logs.
    pub id: String,
    /// Directory of sockets and mount points.
    pub run_dir: PathBuf,
    /// The sandbox's cgroup.
    pub cgroup: PathBuf,
    /// The task, the same for every class.
    pub task: TaskSpec,
    /// What runs it.
    pub class: ClassLaunch,
}

/// The part that differs by isolation class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ClassLaunch {
    /// A microVM.
    Microvm {
        /// The VMM's binary.
        vmm: PathBuf,
        /// The machine description.
        config: PathBuf,
        /// The Unix socket behind the guest's vsock device.
        vsock: PathBuf,
        /// The file that the guest's serial console goes to.
        console: PathBuf,
        /// Whether devices reach its memory: all of that is pinned then.
        #[serde(default)]
        lock_memory: bool,
    },
    /// A container.
    Container {
        /// The files behind the task's disks, by serial.
        disks: BTreeMap<String, PathBuf>,
        /// Memory limit, for the overlay kept in memory.
        memory: MemorySize,
        /// The host's end of the veth pair, and the bridge it joins.
        network: Option<Veth>,
    },
}

/// The host's side of a container's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Veth {
    /// Name of the host's end.
    pub name: String,
    /// The bridge it joins.
    pub bridge: String,
    /// The container's hardware address.
    pub mac: [u8; 6],
}

impl Launch {
    /// Writes it into a sandbox's directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), FileError> {
        files::write_json(&dir.join(FILE), self)
    }

    /// Reads it from a sandbox's directory.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn read(dir: &Path) -> Result<Self, FileError> {
        files::read_json(&dir.join(FILE))
    }
}
