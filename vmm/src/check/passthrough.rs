//! Passed-through devices, the slots for more of them, and the NUMA nodes they are near to.

use std::collections::BTreeSet;

use super::{FieldError, check_id, refuse};
use crate::config::{GpuDirectClique, HugepageSize, MemorySize, PassthroughConfig, VmConfig};

/// A device's ID appears in API paths.
const ID_MAX: usize = 64;
/// Each costs a bus number and address space.
const HOTPLUG_SLOTS_MAX: u8 = 16;
/// More than any board has; a bus number and a port each.
const DEVICES_MAX: usize = 64;
/// The field has four bits (NVIDIA's capability, version 5).
const CLIQUE_MAX: u8 = 15;
/// A guest with more nodes than this has fewer than two CPUs a node.
const NODES_MAX: usize = 32;

impl VmConfig {
    pub(super) fn check_passthrough(&self) -> Result<(), FieldError> {
        if self.passthrough.len() > DEVICES_MAX {
            return refuse(
                "passthrough",
                format!("{} devices, at most {DEVICES_MAX}", self.passthrough.len()),
            );
        }
        let mut ids = BTreeSet::new();
        for (index, device) in self.passthrough.iter().enumerate() {
            let field = format!("passthrough[{index}]");
            device.check(&field)?;
            if !ids.insert(&device.id) {
                return refuse(format!("{field}.id"), format!("{:?} is the ID of another device", device.id));
            }
            let same = |other: &PassthroughConfig| other.address == device.address;
            if let Some(first) = self.passthrough[..index].iter().position(same) {
                let problem = format!("{} is also passthrough[{first}]", device.address);
                return refuse(format!("{field}.address"), problem);
            }
        }
        if self.hotplug_slots > HOTPLUG_SLOTS_MAX {
            let problem = format!("{} is more than {HOTPLUG_SLOTS_MAX}", self.hotplug_slots);
            return refuse("hotplug_slots", problem);
        }
        Ok(())
    }

    pub(super) fn check_numa(&self) -> Result<(), FieldError> {
        if self.numa.is_empty() {
            return Ok(());
        }
        if self.numa.len() > NODES_MAX {
            return refuse("numa", format!("{} nodes, at most {NODES_MAX}", self.numa.len()));
        }
        let page = self.memory.hugepages.map_or(2 << 20, HugepageSize::bytes);
        let (mut cpus, mut bytes) = (0_u32, 0_u64);
        for (index, node) in self.numa.iter().enumerate() {
            if !node.memory.bytes().is_multiple_of(page) {
                let problem =
                    format!("{} is not a multiple of {}", node.memory, MemorySize::from_bytes(page));
                return refuse(format!("numa[{index}].memory"), problem);
            }
            cpus += u32::from(node.cpus);
            bytes = bytes.saturating_add(node.memory.bytes());
        }
        if cpus != u32::from(self.cpus.count) {
            let problem = format!("the nodes have {cpus} CPUs together, cpus.count is {}", self.cpus.count);
            return refuse("numa", problem);
        }
        if bytes != self.memory.size.bytes() {
            let together = MemorySize::from_bytes(bytes);
            let problem = format!("the nodes have {together} together, memory.size is {}", self.memory.size);
            return refuse("numa", problem);
        }
        Ok(())
    }
}

impl PassthroughConfig {
    /// Checks one device; `field` is where it stands, for the message.
    ///
    /// # Errors
    /// The first field that will not do.
    pub fn check(&self, field: &str) -> Result<(), FieldError> {
        check_id(&format!("{field}.id"), &self.id, ID_MAX)?;
        if self.id.contains(['/', '?', '#', '%']) {
            return refuse(format!("{field}.id"), format!("{:?} has characters that URLs reserve", self.id));
        }
        match self.gpudirect_clique {
            GpuDirectClique::Number(number) if number > CLIQUE_MAX => refuse(
                format!("{field}.gpudirect_clique"),
                format!("{number} is not between 0 and {CLIQUE_MAX}"),
            ),
            _ => Ok(()),
        }
    }
}
