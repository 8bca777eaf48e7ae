//! The machine's virtio devices: first opened on the host, then put on the PCI bus.
//!
//! Their order on the bus is that of the description: disks, networks, vsock, entropy, console.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;

use super::counters::DeviceCounters;
use super::{MachineError, PrepareError};
use crate::bus::lock;
use crate::config::{ConsoleConfig, VmConfig};
use crate::devices::ConsoleOutput;
use crate::hypervisor::Hypervisor;
use crate::pci::root::{PciRoot, SharedPciDevice};
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::device::{GuestRam, VirtioDevice};
use crate::virtio::net::{Net, NetParts};
use crate::virtio::rng::Rng;
use crate::virtio::transport::VirtioPci;
use crate::virtio::vsock::{Vsock, VsockListener};

/// A device and what it counts.
pub(super) struct Backend {
    device: Box<dyn VirtioDevice>,
    counters: DeviceCounters,
}

/// Opens what the devices of `config` stand on: disks, taps, sockets, files.
pub(super) fn open(config: &VmConfig) -> Result<Vec<Backend>, PrepareError> {
    let mut backends = Vec::new();
    let mut add = |device: Box<dyn VirtioDevice>, counters| backends.push(Backend { device, counters });
    for disk in &config.disks {
        let block = Block::new(disk)?;
        let counters = DeviceCounters::Block { id: disk.id.clone(), counters: block.counters() };
        add(Box::new(block), counters);
    }
    for network in &config.networks {
        let net = Net::new(NetParts::open(network)?)?;
        let counters = DeviceCounters::Net { id: network.id.clone(), counters: net.metrics() };
        add(Box::new(net), counters);
    }
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.cid, VsockListener::bind(&vsock.socket)?);
        let counters = DeviceCounters::Vsock { counters: device.metrics() };
        add(Box::new(device), counters);
    }
    if config.rng {
        add(Box::new(Rng::new()), DeviceCounters::Nothing);
    }
    if let Some(console) = &config.console {
        let device = Console::new(ConsoleOutput::open(console, "console")?, console_input(console)?);
        let counters = DeviceCounters::Console { counters: device.counters() };
        add(Box::new(device), counters);
    }
    Ok(backends)
}

fn console_input(config: &ConsoleConfig) -> Result<Option<File>, PrepareError> {
    if *config != ConsoleConfig::Stdio {
        return Ok(None);
    }
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    stdin.map(|fd| Some(File::from(fd))).map_err(PrepareError::Stdin)
}

/// The virtio devices of a machine, on its PCI bus.
#[derive(Default)]
pub(super) struct VirtioDevices {
    functions: Vec<(Arc<Mutex<VirtioPci>>, DeviceCounters)>,
}

impl VirtioDevices {
    /// Puts `backends` on bus 0.
    pub(super) fn attach(
        backends: Vec<Backend>,
        memory: &GuestMemoryMmap,
        hypervisor: &Arc<dyn Hypervisor>,
        root: &Mutex<PciRoot>,
    ) -> Result<Self, MachineError> {
        let memory = GuestRam::new(memory.clone());
        let mut functions = Vec::with_capacity(backends.len());
        for Backend { device, counters } in backends {
            let function = VirtioPci::new(device, memory.clone(), Arc::clone(hypervisor))?;
            let function = Arc::new(Mutex::new(function));
            lock(root).add(Arc::clone(&function) as SharedPciDevice)?;
            functions.push((function, counters));
        }
        Ok(Self { functions })
    }

    /// Stops all work; the vCPUs are stopped already.
    pub(super) fn pause(&self) {
        for (function, _) in &self.functions {
            lock(function).pause();
        }
    }

    /// Undoes [`pause`](Self::pause).
    pub(super) fn resume(&self) {
        for (function, _) in &self.functions {
            lock(function).resume();
        }
    }

    /// Ends all work for good, waiting for what is in flight; the vCPUs are stopped already.
    pub(super) fn stop(&self) {
        for (function, _) in &self.functions {
            lock(function).reset();
        }
    }

    /// What each device counts.
    pub(super) fn counters(&self) -> impl Iterator<Item = &DeviceCounters> {
        self.functions.iter().map(|(_, counters)| counters)
    }
}
