//! The PCI tree, as `lspci -tv` shows it but one function a line and in the order of addresses:
//!
//! ```text
//! tree pci0000:00
//! tree   0000:00:00.0 8086:0d57 060000
//! tree   0000:00:01.0 1b36:000c 060400 root-port [01-01]
//! tree     0000:01:00.0 1234:11e8 00ff00 endpoint numa=1
//! ```
//!
//! Address, IDs, class; what it is by its PCI Express capability; the buses behind a bridge; the NUMA node
//! where the firmware names one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use crate::Failure;
use crate::sysfs::{self, Device};

/// What one line says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Function {
    address: String,
    id: (u16, u16),
    class: u32,
    /// `None` for conventional devices.
    kind: Option<&'static str>,
    /// Secondary and subordinate bus of a bridge.
    buses: Option<(u8, u8)>,
    numa_node: Option<u32>,
}

/// A function by the path to it: the host bridge, then addresses.
type Tree = BTreeMap<Vec<String>, Option<Function>>;

/// Prints it.
pub fn print() -> Result<(), Failure> {
    let mut tree = Tree::new();
    for device in sysfs::devices()? {
        let path = path_of(&device.path.to_string_lossy());
        if let Some(bridge) = path.first() {
            tree.entry(vec![bridge.clone()]).or_default();
        }
        tree.insert(path, Some(function(&device)));
    }
    print!("{}", render(&tree));
    Ok(())
}

fn function(device: &Device) -> Function {
    let config = configuration(device).unwrap_or_default();
    Function {
        address: device.address.clone(),
        id: device.id,
        class: device.class,
        kind: express_kind(&config),
        buses: buses_behind(&config),
        // -1 means that the firmware names none.
        numa_node: device.text("numa_node").ok().and_then(|node| node.parse().ok()),
    }
}

/// The configuration space that is there without PCI Express. Each word of it is an exit to the VMM, and all of the
/// extended one would be a thousand of them.
fn configuration(device: &Device) -> std::io::Result<Vec<u8>> {
    let mut config = Vec::new();
    File::open(device.path.join("config"))?.take(256).read_to_end(&mut config)?;
    Ok(config)
}

/// `/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0` from the host bridge on.
fn path_of(path: &str) -> Vec<String> {
    path.trim_start_matches("/sys/devices/").split('/').map(str::to_owned).collect()
}

fn render(tree: &Tree) -> String {
    let line = |(path, function): (&Vec<String>, &Option<Function>)| {
        let indent = "  ".repeat(path.len().saturating_sub(1));
        let text = match function {
            Some(function) => describe(function),
            None => path.concat(),
        };
        format!("tree {indent}{text}\n")
    };
    tree.iter().map(line).collect()
}

fn describe(function: &Function) -> String {
    let Function { address, id: (vendor, device), class, kind, buses, numa_node } = function;
    let mut text = format!("{address} {vendor:04x}:{device:04x} {class:06x}");
    if let Some(kind) = kind {
        text.push_str(&format!(" {kind}"));
    }
    if let Some((secondary, subordinate)) = buses {
        text.push_str(&format!(" [{secondary:02x}-{subordinate:02x}]"));
    }
    if let Some(node) = numa_node {
        text.push_str(&format!(" numa={node}"));
    }
    text
}

/// The device/port type of the PCI Express capability (PCIe 6.0 §7.5.3.2).
fn express_kind(config: &[u8]) -> Option<&'static str> {
    const EXPRESS: u8 = 0x10;
    let at = capability(config, EXPRESS)?;
    Some(match config.get(at + 2)? >> 4 {
        0x0 => "endpoint",
        0x1 => "legacy-endpoint",
        0x4 => "root-port",
        0x5 => "upstream-port",
        0x6 => "downstream-port",
        0x7 => "pcie-to-pci-bridge",
        0x8 => "pci-to-pcie-bridge",
        0x9 => "integrated-endpoint",
        0xa => "event-collector",
        _ => "reserved-type",
    })
}

/// Where a capability is in configuration space. A list longer than there is room for is a loop.
fn capability(config: &[u8], wanted: u8) -> Option<usize> {
    const STATUS: usize = 0x06;
    const HAS_LIST: u8 = 0x10;
    const POINTER: usize = 0x34;
    if config.get(STATUS)? & HAS_LIST == 0 {
        return None;
    }
    let mut at = usize::from(config.get(POINTER)? & !3);
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if *config.get(at)? == wanted {
            return Some(at);
        }
        at = usize::from(config.get(at + 1)? & !3);
    }
    None
}

fn buses_behind(config: &[u8]) -> Option<(u8, u8)> {
    const HEADER_TYPE: usize = 0x0e;
    (config.get(HEADER_TYPE)? & 0x7f == 1).then_some((*config.get(0x19)?, *config.get(0x1a)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(header: u8, buses: (u8, u8), express: Option<u8>) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        (bytes[0x0e], bytes[0x19], bytes[0x1a]) = (header, buses.0, buses.1);
        if let Some(kind) = express {
            bytes[0x06] = 0x10;
            bytes[0x34] = 0x40;
            // MSI first, then the PCI Express capability.
            bytes[0x40..0x42].copy_from_slice(&[0x05, 0x50]);
            bytes[0x50..0x54].copy_from_slice(&[0x10, 0x00, kind << 4 | 2, 0]);
        }
        bytes
    }

    #[test]
    fn kinds_and_buses_from_configuration_space() {
        assert_eq!(express_kind(&config(1, (1, 2), Some(4))), Some("root-port"));
        assert_eq!(express_kind(&config(0, (0, 0), None)), None);
        assert_eq!(buses_behind(&config(1, (1, 2), Some(4))), Some((1, 2)));
        assert_eq!(buses_behind(&config(0x80, (1, 2), None)), None);
    }

    #[test]
    fn hostile_capability_lists_end() {
        let mut looping = config(0, (0, 0), None);
        (looping[0x06], looping[0x34], looping[0x40], looping[0x41]) = (0x10, 0x40, 0x05, 0x40);
        assert_eq!(express_kind(&looping), None);
        looping[0x41] = 0xfc;
        assert_eq!(express_kind(&looping[..0x80]), None);
        assert_eq!(express_kind(&[]), None);
    }

    #[test]
    fn rendering() {
        let function = |address: &str, kind, buses, numa_node| {
            Some(Function {
                address: address.into(),
                id: (0x1b36, 0x0c),
                class: 0x060400,
                kind,
                buses,
                numa_node,
            })
        };
        let path = |text: &str| path_of(&format!("/sys/devices/{text}"));
        let tree = Tree::from([
            (path("pci0000:00"), None),
            (
                path("pci0000:00/0000:00:01.0"),
                function("0000:00:01.0", Some("root-port"), Some((1, 1)), None),
            ),
            (
                path("pci0000:00/0000:00:01.0/0000:01:00.0"),
                function("0000:01:00.0", Some("endpoint"), None, Some(1)),
            ),
            (path("pci0000:00/0000:00:02.0"), function("0000:00:02.0", None, None, None)),
        ]);
        let expected = "tree pci0000:00\n\
            tree   0000:00:01.0 1b36:000c 060400 root-port [01-01]\n\
            tree     0000:01:00.0 1b36:000c 060400 endpoint numa=1\n\
            tree   0000:00:02.0 1b36:000c 060400\n";
        assert_eq!(render(&tree), expected);
    }
}
