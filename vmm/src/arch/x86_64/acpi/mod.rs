//! Hardware-reduced ACPI (ACPI 6.5 §4.1): what the machine is, without emulating a chipset.
//!
//! The tables are laid out one after another from [`layout::ACPI`]: RSDP, DSDT, FADT, MADT, MCFG, SRAT and SLIT
//! where the machine has NUMA nodes, XSDT.

mod dsdt;
mod numa;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;
use super::topology::Topology;
use crate::numa::NumaNode;
use crate::pci::root::RootBridge;

const OEM_ID: [u8; 6] = *b"LATHE ";
const OEM_TABLE_ID: [u8; 8] = *b"LATHEVMM";
const OEM_REVISION: u32 = 1;

/// Sleep type of S5, the same in `_S5` and in the sleep control register.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Offsets of the registers from [`layout::ACPI_POWER`].
pub const SLEEP_CONTROL: u16 = 0;
/// See [`SLEEP_CONTROL`].
pub const SLEEP_STATUS: u16 = 1;
/// See [`SLEEP_CONTROL`].
pub const RESET: u16 = 2;

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct Description {
    /// How many CPUs.
    pub cpus: u8,
    /// Their APIC IDs.
    pub topology: Topology,
    /// The PCI host bridges, at least one.
    pub host_bridges: Vec<RootBridge>,
    /// NUMA nodes; empty for a machine without.
    pub nodes: Vec<NumaNode>,
}

/// One table: where it goes, its bytes.
struct Table {
    address: u64,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Sink(Vec<u8>);

impl AmlSink for Sink {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn vec(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Sink::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes all tables; the RSDP is at the start of [`layout::ACPI`].
///
/// # Errors
/// When low memory is missing.
pub fn write(memory: &GuestMemoryMmap, machine: &Description) -> Result<(), vm_memory::GuestMemoryError> {
    for table in tables(machine) {
        memory.write_slice(&table.bytes, GuestAddress(table.address))?;
    }
    Ok(())
}

/// Places tables one after another, each 16-byte aligned as the RSDP must be.
struct Placer {
    next: u64,
    placed: Vec<Table>,
}

impl Placer {
    fn place(&mut self, bytes: Vec<u8>) -> u64 {
        let address = self.next;
        self.next = (address + bytes.len() as u64).next_multiple_of(16);
        self.placed.push(Table { address, bytes });
        address
    }
}

fn tables(machine: &Description) -> Vec<Table> {
    let start = layout::ACPI.start + (Rsdp::len() as u64).next_multiple_of(16);
    let mut placer = Placer { next: start, placed: Vec::with_capacity(8) };
    let dsdt = placer.place(dsdt_bytes(machine));
    let mut entries =
        vec![placer.place(fadt_bytes(dsdt)), placer.place(madt_bytes(machine)), placer.place(mcfg_bytes())];
    if !machine.nodes.is_empty() {
        entries.push(placer.place(numa::srat(machine)));
        entries.push(placer.place(numa::slit(machine)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = placer.place(bytes_of(&xsdt));
    debug_assert!(placer.next <= layout::ACPI.end);
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    placer.placed.push(Table { address: layout::ACPI.start, bytes: rsdp });
    placer.placed
}

fn dsdt_bytes(machine: &Description) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&dsdt::body(machine));
    table.as_slice().to_vec()
}

fn fadt_bytes(dsdt: u64) -> Vec<u8> {
    // No VGA, no CMOS clock; the 8042 bit stays clear: only its reset line exists.
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_CLOCK_NOT_PRESENT: u16 = 1 << 5;
    let register = |offset| {
        let port = u64::from(layout::ACPI_POWER + offset);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_CLOCK_NOT_PRESENT).into();
    fadt.reset_reg = register(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL);
    fadt.sleep_status_reg = register(SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"LATHEVMM").into();
    bytes_of(&fadt.finalize())
}

fn madt_bytes(machine: &Description) -> Vec<u8> {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for index in 0..machine.cpus {
        let apic_id = machine.topology.apic_id(index) as u8;
        madt.add_structure(ProcessorLocalApic::new(index, apic_id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    bytes_of(&madt)
}

fn mcfg_bytes() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, u8::MAX);
    bytes_of(&mcfg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuConfig;
    use crate::pci::placement::HostBridgePlace;
    use std::fmt::Write as _;
    use std::ops::Range;

    fn bridge(buses: (u8, u8), low: Range<u64>, high: Range<u64>) -> RootBridge {
        let place = HostBridgePlace { buses, low: vec![low], high: vec![high], port_devices: Vec::new() };
        RootBridge { numa_node: None, place }
    }

    fn description(cpus: u8) -> Description {
        let topology = Topology::of(&CpuConfig { count: cpus, topology: None });
        let bridge = bridge((0, 255), layout::PCI_MMIO32, 0x1_4000_0000..0x80_0000_0000);
        Description { cpus, topology, host_bridges: vec![bridge], nodes: Vec::new() }
    }

    /// Two nodes around the 32-bit hole, a host bridge each, the second with two ports.
    fn numa_description() -> Description {
        let mut machine = description(3);
        let mut first = bridge((0, 3), 0xc020_0000..0xe000_0000, 0x2_0000_0000..0x40_0000_0000);
        let mut second = bridge((4, 255), 0xc000_0000..0xc020_0000, 0x40_0000_0000..0x80_0000_0000);
        (first.numa_node, second.numa_node) = (Some(0), Some(1));
        second.place.port_devices = vec![16, 17];
        machine.host_bridges = vec![first, second];
        let memory = 0..2 << 30;
        let low = NumaNode { cpus: 0..2, memory: vec![memory.clone()], distances: vec![10, 21] };
        let ranges = vec![2 << 30..3 << 30, 4 << 30..5 << 30];
        let high = NumaNode { cpus: 2..3, memory: ranges, distances: vec![21, 10] };
        machine.nodes = vec![low, high];
        machine
    }

    fn name(table: &Table) -> String {
        String::from_utf8_lossy(&table.bytes[..4]).into_owned()
    }

    fn dump(tables: &[Table]) -> String {
        let mut text = String::new();
        for table in tables {
            writeln!(text, "{} at {:#x}, {} bytes", name(table), table.address, table.bytes.len()).unwrap();
            for (row, bytes) in table.bytes.chunks(16).enumerate() {
                let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
                let printable = |b: &u8| if b.is_ascii_graphic() { char::from(*b) } else { '.' };
                let ascii: String = bytes.iter().map(printable).collect();
                writeln!(text, "  {:04x}: {:47}  {ascii}", row * 16, hex.join(" ")).unwrap();
            }
        }
        text
    }

    #[test]
    fn the_tables_of_a_two_cpu_machine() {
        insta::assert_snapshot!(dump(&tables(&description(2))));
    }

    #[test]
    fn the_tables_of_two_numa_nodes() {
        let all = tables(&numa_description());
        let differ = |table: &Table| matches!(name(table).as_str(), "DSDT" | "SRAT" | "SLIT" | "XSDT");
        let tables: Vec<Table> = all.into_iter().filter(differ).collect();
        insta::assert_snapshot!(dump(&tables));
    }

    #[test]
    fn every_table_sums_to_zero_and_the_largest_machine_fits() {
        let mut largest = description(64);
        let ports = bridge((0, 7), 0xc000_0000..0xc010_0000, 1 << 40..2 << 40);
        largest.host_bridges = (0..32).map(|_| ports.clone()).collect();
        for bridge in &mut largest.host_bridges {
            bridge.place.port_devices = (16..32).collect();
        }
        largest.nodes = vec![numa_description().nodes[0].clone(); 32];
        for node in &mut largest.nodes {
            node.distances = vec![20; 32];
        }
        for table in tables(&description(64)).into_iter().chain(tables(&largest)) {
            let sum = table.bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{}", name(&table));
            assert!(table.address + table.bytes.len() as u64 <= layout::ACPI.end);
        }
    }
}
