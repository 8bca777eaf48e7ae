//! Where a function sits on the host, read from sysfs.
//!
//! `/sys/bus/pci/devices/ADDRESS` leads to a directory below those of all bridges above the function. What each
//! bridge is stands in its configuration space, of which only a privileged process sees more than 64
//! bytes; without that a bridge is one of unknown kind, and the guest gets less of the host's tree, not an error.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::capabilities::{self, u16_at};
use super::config::CAP_EXPRESS;
use super::express::{DEVICE_CAPABILITIES_2, LINK_CAPABILITIES, LINK_STATUS, Link, PortTraits};
use crate::host_address::HostPciAddress;

/// A function of the host, and what is above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFunction {
    /// Its address.
    pub address: HostPciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, subclass and interface as one 24-bit number.
    pub class: u32,
    /// The host's NUMA node, if it is near one.
    pub numa_node: Option<u32>,
    /// The physical function of which this is a virtual one.
    pub physical_function: Option<HostPciAddress>,
    /// The bridges above it, the one on the root bus first.
    pub path: Vec<HostPort>,
}

/// A bridge of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Its address.
    pub address: HostPciAddress,
    /// What it is.
    pub kind: HostPortKind,
    /// Its link.
    pub traits: PortTraits,
}

/// What a bridge of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPortKind {
    /// A PCI Express root port.
    Root,
    /// A switch's port towards the root.
    Upstream,
    /// A switch's port away from the root.
    Downstream,
    /// A bridge to or within conventional PCI, or one whose configuration space cannot be read.
    Other,
}

/// A function that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// It is not there.
    #[error("the host has no PCI function {0}")]
    Missing(HostPciAddress),
    /// A file of it.
    #[error("{}: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file with something else in it than the kernel writes.
    #[error("{}: {text:?} is not a number", .path.display())]
    Number {
        /// Which.
        path: PathBuf,
        /// What is in it.
        text: String,
    },
}

impl HostFunction {
    /// Reads what `sysfs`, which is `/sys` but in tests, says of a function.
    ///
    /// # Errors
    /// When it is not there, or unlike anything the kernel writes.
    pub fn read(sysfs: &Path, address: HostPciAddress) -> Result<Self, SysfsError> {
        let link = sysfs.join("bus/pci/devices").join(address.to_string());
        let directory = fs::canonicalize(&link).map_err(|_| SysfsError::Missing(address))?;
        let physical = fs::read_link(directory.join("physfn")).ok();
        let physical_function =
            physical.and_then(|target| target.file_name()?.to_str()?.parse::<HostPciAddress>().ok());
        let numa_node: i64 = number(&directory.join("numa_node")).unwrap_or(-1);
        Ok(Self {
            address,
            vendor: number(&directory.join("vendor"))? as u16,
            device: number(&directory.join("device"))? as u16,
            class: number(&directory.join("class"))? as u32,
            numa_node: u32::try_from(numa_node).ok(),
            physical_function,
            path: bridges(&directory),
        })
    }
}

/// Decimal, or hexadecimal with its prefix.
fn number(path: &Path) -> Result<i64, SysfsError> {
    let text =
        fs::read_to_string(path).map_err(|source| SysfsError::File { path: path.to_owned(), source })?;
    let text = text.trim();
    let value = match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None => i64::from_str(text),
    };
    value.map_err(|_| SysfsError::Number { path: path.to_owned(), text: text.to_owned() })
}

/// The bridges in whose directories a function's directory lies, outermost first.
fn bridges(function: &Path) -> Vec<HostPort> {
    let above = function.ancestors().skip(1);
    let mut path: Vec<HostPort> = above
        .map_while(|directory| {
            let address: HostPciAddress = directory.file_name()?.to_str()?.parse().ok()?;
            let config = fs::read(directory.join("config")).unwrap_or_default();
            let (kind, traits) = describe(&config);
            Some(HostPort { address, kind, traits })
        })
        .collect();
    path.reverse();
    path
}

/// What the Express capability says (PCIe 6.0 §7.5.3).
fn describe(config: &[u8]) -> (HostPortKind, PortTraits) {
    let list = capabilities::conventional(config);
    let express = list.iter().find(|capability| capability.id == u16::from(CAP_EXPRESS));
    let end = |at: usize| at + usize::from(DEVICE_CAPABILITIES_2) + 2;
    let Some(at) = express.map(|it| usize::from(it.offset)).filter(|at| end(*at) <= config.len()) else {
        return (HostPortKind::Other, PortTraits::default());
    };
    let register = |offset: u16| u16_at(config, at + usize::from(offset));
    let kind = match register(2) >> 4 & 0xf {
        0x4 => HostPortKind::Root,
        0x5 => HostPortKind::Upstream,
        0x6 => HostPortKind::Downstream,
        _ => HostPortKind::Other,
    };
    let capable = Link::from_register(register(LINK_CAPABILITIES).into()).unwrap_or_default();
    let trained = Link::from_register(register(LINK_STATUS).into()).unwrap_or(capable);
    let atomics = register(DEVICE_CAPABILITIES_2) & PortTraits::ATOMICS;
    (kind, PortTraits { capable, trained, atomics })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Configuration space with an Express capability of a type, as a privileged reader sees it.
    fn express(kind: u8) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[0x06] = 0x10;
        config[0x34] = 0x48;
        config[0x48..0x4c].copy_from_slice(&[0x01, 0x80, 0, 0]);
        config[0x80..0x84].copy_from_slice(&[0x10, 0, 2 | kind << 4, 0]);
        config[0x8c..0x8e].copy_from_slice(&0x0104_u16.to_le_bytes());
        config[0x92..0x94].copy_from_slice(&0x0083_u16.to_le_bytes());
        config[0xa4] = 0x40;
        config
    }

    fn make(directory: &Path, config: &[u8], files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        fs::write(directory.join("config"), config).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
    }

    #[test]
    fn a_function_behind_a_switch_is_read_with_all_that_is_above_it() {
        let root = tempfile::tempdir().unwrap();
        let devices = root.path().join("devices/pci0000:40");
        let port = devices.join("0000:40:01.1");
        let upstream = port.join("0000:41:00.0");
        let downstream = upstream.join("0000:42:04.0");
        let gpu = downstream.join("0000:43:00.0");
        make(&port, &express(4), &[]);
        make(&upstream, &express(5), &[]);
        make(&downstream, &express(6)[..64], &[]);
        let files =
            [("vendor", "0x10de\n"), ("device", "0x2330\n"), ("class", "0x030200\n"), ("numa_node", "1\n")];
        make(&gpu, &[], &files);
        symlink("../0000:40:01.1", gpu.join("physfn")).unwrap();
        fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
        symlink(&gpu, root.path().join("bus/pci/devices/0000:43:00.0")).unwrap();

        let address: HostPciAddress = "0000:43:00.0".parse().unwrap();
        let function = HostFunction::read(root.path(), address).unwrap();
        assert_eq!((function.vendor, function.device, function.class), (0x10de, 0x2330, 0x03_02_00));
        assert_eq!(function.numa_node, Some(1));
        assert_eq!(function.physical_function, Some("0000:40:01.1".parse().unwrap()));
        let path: Vec<_> = function.path.iter().map(|port| (port.address.to_string(), port.kind)).collect();
        let expected = [
            ("0000:40:01.1".to_owned(), HostPortKind::Root),
            ("0000:41:00.0".to_owned(), HostPortKind::Upstream),
            // Only 64 bytes of it could be read.
            ("0000:42:04.0".to_owned(), HostPortKind::Other),
        ];
        assert_eq!(path, expected);
        let traits = function.path[0].traits;
        assert_eq!(Some(traits.capable), Link::new(4, 16));
        assert_eq!((Some(traits.trained), traits.atomics), (Link::new(3, 8), 0x40));

        let missing = HostFunction::read(root.path(), "0000:99:00.0".parse().unwrap()).unwrap_err();
        assert_eq!(missing.to_string(), "the host has no PCI function 0000:99:00.0");
        fs::write(gpu.join("class"), "display").unwrap();
        assert!(HostFunction::read(root.path(), address).unwrap_err().to_string().contains("display"));
    }

    #[test]
    fn a_capability_list_without_end_ends() {
        let mut config = vec![0; 256];
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x40]);
        assert_eq!(describe(&config), (HostPortKind::Other, PortTraits::default()));
        assert_eq!(describe(&[]), (HostPortKind::Other, PortTraits::default()));
    }
}
