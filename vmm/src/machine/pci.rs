//! The machine's root complex: what the description asks for below ports, in the addresses that are free.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::MachineError;
use crate::arch::native::layout;
use crate::bus::{Bus, SharedDevice, lock};
use crate::config::{GpuDirectClique, VmConfig};
use crate::hypervisor::Hypervisor;
use crate::pci::gpudirect::gpudirect_cliques;
use crate::pci::placement::Space;
use crate::pci::root::{NamedDevice, Parts, PciRoot, SharedPciDevice, Windows};
use crate::pci::sysfs::HostFunction;
use crate::pci::topology;
use crate::vfio::passthrough::{Device, Opened};

/// What the root complex is built for.
pub(super) struct Site<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) physical_bits: u32,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) mmio: &'a Arc<Bus>,
}

/// Builds the root complex with the passed-through devices below ports as they are on the host, and puts its
/// configuration space on the MMIO bus.
pub(super) fn root(site: &Site<'_>, opened: Option<&Opened>) -> Result<Arc<Mutex<PciRoot>>, MachineError> {
    let devices = opened.map_or(&[][..], Opened::devices);
    let functions = devices
        .iter()
        .map(|device| HostFunction::read(Path::new("/sys"), device.host.address))
        .collect::<Result<Vec<_>, _>>()?;
    show_cliques(devices, &functions);
    // Addresses that a device cannot reach would do for the CPU, but not for its peers.
    let apertures = opened.map(Opened::apertures).transpose()?.filter(|ranges| !ranges.is_empty());
    let end = apertures.iter().flatten().map(|range| range.end).max().unwrap_or(u64::MAX);
    let config = site.config;
    let high = layout::pci_mmio64(config.memory.size.bytes(), site.physical_bits, end);
    let windows = Windows { low: layout::PCI_MMIO32, high };
    let space = Space::new(&windows, apertures.as_deref());
    let host_nodes: Vec<Option<u32>> = config.numa.iter().map(|node| node.host_node).collect();
    let tree = topology::plan(&functions, &host_nodes, config.hotplug_slots);
    let tree = tree.try_map(|index| Ok::<_, MachineError>(named(&devices[index])))?;
    let (hypervisor, mmio) = (Arc::clone(&site.hypervisor), Arc::clone(site.mmio));
    let root = PciRoot::build(Parts { windows, space, tree, hypervisor, mmio })?;
    for device in devices {
        wire_pin(&root, device);
    }
    let root = Arc::new(Mutex::new(root));
    let ecam = layout::ECAM;
    site.mmio.insert(ecam.start, ecam.end - ecam.start, Arc::clone(&root) as SharedDevice)?;
    Ok(root)
}

/// A device as the root complex takes it.
pub(super) fn named(device: &Device) -> NamedDevice {
    NamedDevice { id: device.config.id.clone(), device: Arc::clone(&device.pci) as SharedPciDevice }
}

/// Connects a device's interrupt pin to where its place in the tree leads.
pub(super) fn wire_pin(root: &PciRoot, device: &Device) {
    let shared = Arc::clone(&device.pci) as SharedPciDevice;
    let pin = lock(&device.pci).pin();
    if let Some(gsi) = root.pin_gsi(&shared, pin) {
        lock(&device.pci).wire_pin(gsi);
    }
}

/// Tells NVIDIA's driver which GPUs reach each other, by what the description says or the topology shows.
fn show_cliques(devices: &[Device], functions: &[HostFunction]) {
    for (device, computed) in devices.iter().zip(gpudirect_cliques(functions)) {
        let clique = match device.config.gpudirect_clique {
            GpuDirectClique::Auto => computed,
            GpuDirectClique::Off => None,
            GpuDirectClique::Number(number) => Some(number),
        };
        let Some(clique) = clique else { continue };
        if !lock(&device.pci).show_clique(clique) {
            let address = device.host.address;
            crate::notice(format_args!("{address}: its configuration space has no room for its clique"));
        }
    }
}
