//! SRAT and SLIT: which CPUs and which memory are near each other, and how far the nodes are apart.

use acpi_tables::sdt::Sdt;

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const ENABLED: u32 = 1;

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// The System Resource Affinity Table (ACPI 6.5 §5.2.16); a node is a proximity domain of the same number.
pub(super) fn srat(machine: &Description) -> Vec<u8> {
    let mut body = Vec::new();
    // Reserved: 1, and eight bytes of zero.
    body.extend_from_slice(&1_u32.to_le_bytes());
    body.extend_from_slice(&[0; 8]);
    for (domain, node) in machine.nodes.iter().enumerate() {
        for cpu in node.cpus.clone() {
            body.extend(cpu_affinity(domain as u32, machine.topology.apic_id(cpu) as u8));
        }
        for range in &node.memory {
            body.extend(memory_affinity(domain as u32, range.start, range.end - range.start));
        }
    }
    let mut table = table(*b"SRAT", 3);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// Processor local APIC affinity (§5.2.16.1): all APIC IDs fit a byte.
fn cpu_affinity(domain: u32, apic_id: u8) -> [u8; 16] {
    let [d0, d1, d2, d3] = domain.to_le_bytes();
    let [f0, f1, f2, f3] = ENABLED.to_le_bytes();
    [0, 16, d0, apic_id, f0, f1, f2, f3, 0, d1, d2, d3, 0, 0, 0, 0]
}

/// Memory affinity (§5.2.16.2).
fn memory_affinity(domain: u32, base: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![1, 40];
    bytes.extend_from_slice(&domain.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&base.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&ENABLED.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// The System Locality Information Table (§5.2.17).
pub(super) fn slit(machine: &Description) -> Vec<u8> {
    let mut table = table(*b"SLIT", 1);
    table.append_slice(&(machine.nodes.len() as u64).to_le_bytes());
    for node in &machine.nodes {
        table.append_slice(&node.distances);
    }
    table.as_slice().to_vec()
}
