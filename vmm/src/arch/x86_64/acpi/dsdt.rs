//! The DSDT's body: CPUs, PCI host bridges, serial port, power button, panic notifier.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, Notify, Or, Package, PackageBuilder, Path, ResourceTemplate,
    Return, Scope, Uuid, ZERO,
};

use super::super::layout;
use super::{Description, S5_SLEEP_TYPE, bytes_of};
use crate::pci::intx::intx_gsi;
use crate::pci::root::RootBridge;

/// The host bridge's `_OSC` (PCI Firmware 3.3 §4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";

pub(super) fn body(machine: &Description) -> Vec<u8> {
    let mut aml = Vec::new();
    aml.extend(sleep_states());
    aml.extend(system_bus(&[
        processors(machine.cpus),
        reserved_memory(),
        host_bridges(machine),
        serial_port(),
        power_button(),
        event_device(),
        panic_notifier(),
    ]));
    aml
}

fn sleep_states() -> Vec<u8> {
    bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO])))
}

fn system_bus(devices: &[Vec<u8>]) -> Vec<u8> {
    Scope::raw("\\_SB_".into(), devices.concat())
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

/// A container, so that the guest's CPUs have one parent (ACPI 6.5 §8.4).
fn processors(count: u8) -> Vec<u8> {
    struct Processor(u8);
    impl Aml for Processor {
        fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
            let path = format!("C{:03}", self.0);
            let names = [name("_HID", &"ACPI0007"), name("_UID", &self.0)];
            Device::new(Path::new(&path), vec![&names[0], &names[1]]).to_aml_bytes(sink);
        }
    }
    let processors: Vec<Processor> = (0..count).map(Processor).collect();
    let names = [name("_HID", &"ACPI0010"), name("_CID", &EISAName::new("PNP0A05"))];
    let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
    children.extend(processors.iter().map(|processor| processor as &dyn Aml));
    bytes_of(&Device::new("CPUS".into(), children))
}

/// Claims ECAM: Linux does not use what MCFG names unless a motherboard device owns it.
fn reserved_memory() -> Vec<u8> {
    let ecam = layout::ECAM;
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![&Memory32Fixed::new(
            true,
            ecam.start as u32,
            (ecam.end - ecam.start) as u32,
        )]),
    );
    let names = [name("_HID", &EISAName::new("PNP0C02")), name("_UID", &ZERO), resources];
    bytes_of(&Device::new("MBRD".into(), vec![&names[0], &names[1], &names[2]]))
}

fn host_bridges(machine: &Description) -> Vec<u8> {
    let bridges = machine.host_bridges.iter().enumerate();
    bridges.flat_map(|(index, bridge)| host_bridge(index, bridge)).collect()
}

/// PCI0 to PCI9, PCIA to PCIZ: as many host bridges as there can be NUMA nodes.
fn bridge_path(index: usize) -> Path {
    let digit = char::from_digit(index as u32, 36).unwrap_or('Z').to_ascii_uppercase();
    Path::new(&format!("PCI{digit}"))
}

/// No I/O window: no device here needs I/O BARs. `_PRT` only for root ports: the interrupts of the
/// machine's own devices are messages.
fn host_bridge(index: usize, bridge: &RootBridge) -> Vec<u8> {
    let place = &bridge.place;
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let window32 = |range: &Range<u64>| {
        AddressSpace::new_memory(cacheable, true, range.start as u32, (range.end - 1) as u32, None)
    };
    let window64 =
        |range: &Range<u64>| AddressSpace::new_memory(cacheable, true, range.start, range.end - 1, None);
    let buses = AddressSpace::new_bus_number(u16::from(place.buses.0), u16::from(place.buses.1));
    let low: Vec<_> = place.low.iter().map(window32).collect();
    let high: Vec<_> = place.high.iter().map(window64).collect();
    let mut windows: Vec<&dyn Aml> = vec![&buses];
    windows.extend(low.iter().map(|window| window as &dyn Aml));
    windows.extend(high.iter().map(|window| window as &dyn Aml));
    let mut names = vec![
        name("_HID", &EISAName::new("PNP0A08")),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &(index as u8)),
        name("_SEG", &ZERO),
        name("_BBN", &place.buses.0),
        name("_CRS", &ResourceTemplate::new(windows)),
    ];
    names.extend(bridge.numa_node.map(|node| name("_PXM", &node)));
    names.extend(interrupt_routing(&place.port_devices));
    let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
    // Hands the guest every feature it asks for (native hotplug, AER): there is no firmware that
    // would handle them. An unknown UUID is refused by bit 2 of the first dword.
    let status = Path::new("CDW1");
    let first = CreateDWordField::new(&status, &Arg(3), &ZERO);
    let known = Uuid::new(OSC_UUID);
    let is_known = Equal::new(&Arg(0), &known);
    let granted = If::new(&is_known, vec![]);
    let refuse = Or::new(&status, &status, &4_u8);
    let refused = Else::new(vec![&refuse]);
    let answer = Return::new(&Arg(3));
    let osc = Method::new("_OSC".into(), 4, false, vec![&first, &granted, &refused, &answer]);
    children.push(&osc);
    bytes_of(&Device::new(bridge_path(index), children))
}

/// `_PRT` (ACPI 6.5 §6.2.13): where the legacy interrupts of what is below each root port arrive. A zero source
/// means that the index is a GSI.
fn interrupt_routing(port_devices: &[u8]) -> Option<Name> {
    let mut table = PackageBuilder::new();
    for device in port_devices {
        for pin in 0..4_u8 {
            let gsi = intx_gsi(*device, pin + 1)? as u8;
            let address = u32::from(*device) << 16 | 0xffff;
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    (!port_devices.is_empty()).then(|| name("_PRT", &table))
}

fn serial_port() -> Vec<u8> {
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![
            &Interrupt::new(true, true, false, false, layout::COM1_GSI),
            &IO::new(layout::COM1, layout::COM1, 1, 8),
        ]),
    );
    let names =
        [name("_HID", &EISAName::new("PNP0501")), name("_UID", &ZERO), name("_DDN", &"COM1"), resources];
    bytes_of(&Device::new("COM1".into(), vec![&names[0], &names[1], &names[2], &names[3]]))
}

fn power_button() -> Vec<u8> {
    let names = [name("_HID", &EISAName::new("PNP0C0C")), name("_UID", &ZERO)];
    bytes_of(&Device::new("PWRB".into(), vec![&names[0], &names[1]]))
}

/// The generic event device (ACPI 6.5 §5.6.9); its only event is the power button.
fn event_device() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let names = [
        name("_HID", &"ACPI0013"),
        name("_UID", &ZERO),
        name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
    ];
    const PRESSED: u8 = 0x80;
    let button = Path::new("\\_SB_.PWRB");
    let press = Notify::new(&button, &PRESSED);
    let event = Method::new("_EVT".into(), 1, true, vec![&press]);
    bytes_of(&Device::new("GED_".into(), vec![&names[0], &names[1], &names[2], &event]))
}

/// QEMU's pvpanic, the interface that Linux has a driver for.
fn panic_notifier() -> Vec<u8> {
    let resources =
        name("_CRS", &ResourceTemplate::new(vec![&IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1)]));
    let names = [name("_HID", &"QEMU0001"), name("_UID", &ZERO), name("_STA", &0xf_u8), resources];
    bytes_of(&Device::new("PEVT".into(), vec![&names[0], &names[1], &names[2], &names[3]]))
}
