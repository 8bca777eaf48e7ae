//! GPUDirect peer-to-peer cliques: which GPUs NVIDIA's driver may let reach each other's memory in a guest.
//!
//! In a guest the driver cannot know which way a write from one GPU to another takes, and does without unless a
//! vendor-specific capability in the GPU's configuration space puts it into a clique with the other ("GPUDirect
//! P2P on virtual machines", the interface behind QEMU's `x-nv-gpudirect-clique`). The capability is defined for the
//! architectures from Pascal to Hopper. An architecture that is not in [`ARCHITECTURES`] gets none: a driver that does
//! not expect it there ignores it at best.

use super::sysfs::{HostFunction, HostPortKind};
use crate::host_address::HostPciAddress;

const NVIDIA: u16 = 0x10de;
/// VGA controllers and 3D controllers: GPUs, and not their audio or USB functions.
const GPU_CLASSES: [u32; 2] = [0x0300, 0x0302];
/// The field has four bits.
const CLIQUES: usize = 16;

/// Device IDs by architecture (pci.ids): the inclusive ranges that NVIDIA gave their chips.
pub const ARCHITECTURES: [(&str, &[(u16, u16)]); 6] = [
    ("Pascal", &[(0x15f0, 0x15ff), (0x1725, 0x172f), (0x1b00, 0x1d7f)]),
    ("Volta", &[(0x1d80, 0x1dff)]),
    ("Turing", &[(0x1e00, 0x1fff), (0x2180, 0x21ff)]),
    ("Ampere", &[(0x2080, 0x20ff), (0x2200, 0x22ff), (0x2400, 0x25ff)]),
    ("Hopper", &[(0x2300, 0x237f)]),
    ("Ada Lovelace", &[(0x2680, 0x28ff)]),
];

/// The capability for `clique`, 0 to 15, with the end of the list as its next pointer.
pub fn capability(clique: u8) -> [u8; 8] {
    const VENDOR_SPECIFIC: u8 = 0x09;
    // Signature, then the version (0) in the low three bits and the clique above.
    [VENDOR_SPECIFIC, 0, 8, b'P', b'2', b'P', (clique & 0xf) << 3, 0]
}

/// The architecture of a GPU that may be in a clique.
pub fn architecture(vendor: u16, device: u16, class: u32) -> Option<&'static str> {
    let is_gpu = vendor == NVIDIA && GPU_CLASSES.contains(&(class >> 8));
    let contains =
        |ranges: &[(u16, u16)]| ranges.iter().any(|(first, last)| (*first..=*last).contains(&device));
    let found = ARCHITECTURES.iter().find(|(_, ranges)| contains(ranges));
    found.filter(|_| is_gpu).map(|(name, _)| *name)
}

/// The clique of each function; `None` for all that is not such a GPU.
///
/// GPUs below the same outermost switch are in one clique: what one writes to another turns round in a switch. Across
/// root ports a write goes through the host's root complex, and whether that forwards it is known of few. A GPU
/// that is alone has a clique of its own, and there is none beyond the sixteenth.
pub fn gpudirect_cliques(functions: &[HostFunction]) -> Vec<Option<u8>> {
    let mut known: Vec<HostPciAddress> = Vec::new();
    let clique = |function: &HostFunction| {
        architecture(function.vendor, function.device, function.class)?;
        let switch = function.path.iter().find(|port| port.kind == HostPortKind::Upstream);
        let place = switch.map_or(function.address, |port| port.address);
        let index = known.iter().position(|other| *other == place).unwrap_or_else(|| {
            known.push(place);
            known.len() - 1
        });
        (index < CLIQUES).then_some(index as u8)
    };
    functions.iter().map(clique).collect()
}

#[cfg(test)]
mod tests {
    use super::super::topology::tests::{function, ports};
    use super::*;

    #[test]
    fn gpus_below_one_switch_are_a_clique_and_others_have_none() {
        let gpu = |address, device, path| {
            let mut gpu = function(address, path);
            (gpu.vendor, gpu.device, gpu.class) = (NVIDIA, device, 0x03_02_00);
            gpu
        };
        let [first, second] = [ports("40:01.1 41:00.0 42:00.0"), ports("40:01.1 41:00.0 42:01.0")];
        let other = ports("80:01.1 81:00.0 82:00.0");
        let mut audio = gpu("0000:43:00.1", 0x2330, first.clone());
        audio.class = 0x04_03_00;
        let functions = [
            gpu("0000:43:00.0", 0x2330, first),
            audio,
            gpu("0000:83:00.0", 0x2330, other.clone()),
            gpu("0000:44:00.0", 0x2330, second),
            gpu("0000:84:00.0", 0x2901, other),
            gpu("0000:05:00.0", 0x20b0, ports("00:02.0")),
        ];
        assert_eq!(gpudirect_cliques(&functions), [Some(0), None, Some(1), Some(0), None, Some(2)]);
        assert_eq!(architecture(NVIDIA, 0x1eb8, 0x03_02_00), Some("Turing"));
        assert_eq!(architecture(0x1002, 0x1eb8, 0x03_02_00), None);
    }

    #[test]
    fn the_capability_carries_the_clique_above_the_version() {
        assert_eq!(capability(5), [0x09, 0, 8, b'P', b'2', b'P', 5 << 3, 0]);
    }
}
