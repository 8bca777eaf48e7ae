//! The machine's root complex: what the description asks for below ports, in the addresses that are free.

use std::sync::{Arc, Mutex};

use super::MachineError;
use crate::arch::native::layout;
use crate::bus::{Bus, SharedDevice};
use crate::config::VmConfig;
use crate::hypervisor::Hypervisor;
use crate::kvm::KvmHypervisor;
use crate::pci::placement::Space;
use crate::pci::root::{NamedDevice, Parts, PciRoot, Windows};
use crate::pci::topology;

/// Builds the root complex, and puts its configuration space on `mmio`.
pub(super) fn root(
    config: &VmConfig,
    physical_bits: u32,
    hypervisor: &Arc<KvmHypervisor>,
    mmio: &Arc<Bus>,
) -> Result<Arc<Mutex<PciRoot>>, MachineError> {
    let high = layout::pci_mmio64(config.memory.size.bytes(), physical_bits, u64::MAX);
    let windows = Windows { low: layout::PCI_MMIO32, high };
    let space = Space::new(&windows, None);
    let host_nodes: Vec<Option<u32>> = config.numa.iter().map(|node| node.host_node).collect();
    let devices: Vec<NamedDevice> = Vec::new();
    let tree = topology::plan(&[], &host_nodes, config.hotplug_slots);
    let tree = tree.try_map(|index| Ok::<_, MachineError>(devices[index].clone()))?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::clone(hypervisor) as Arc<dyn Hypervisor>;
    let root = PciRoot::build(Parts { windows, space, tree, hypervisor, mmio: Arc::clone(mmio) })?;
    let root = Arc::new(Mutex::new(root));
    let ecam = layout::ECAM;
    mmio.insert(ecam.start, ecam.end - ecam.start, Arc::clone(&root) as SharedDevice)?;
    Ok(root)
}
