//! A function's configuration space as sysfs shows it: just what a pre-flight check asks of it.
//!
//! The bytes come from a device, so lists in them are walked with a bound: a list that points at
//! itself must not hang the agent.

/// Extended configuration space ends here (PCIe 6.0 §7.2).
const SIZE: usize = 4096;
/// Capabilities are at least a dword apart, from 0x40 to 0x100.
const MAX_CAPABILITIES: usize = (0x100 - 0x40) / 4;
/// As are extended ones, from 0x100 to 0x1000.
const MAX_EXTENDED: usize = (SIZE - 0x100) / 4;

const CAPABILITY_PCIE: u8 = 0x10;
const EXTENDED_ACS: u16 = 0x0d;

/// Source validation, request redirect, completion redirect and upstream forwarding (PCIe 6.0
/// §7.7.11.2): with these a port sends every request between devices below it up to the IOMMU. They are
/// what Linux demands before it gives devices groups of their own.
const ACS_ISOLATES: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;

/// The bytes that could be read; without privilege those are the first 64.
pub(super) struct ConfigSpace(Vec<u8>);

/// What a port does about requests between the devices below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acs {
    /// It sends them to the IOMMU.
    Isolates,
    /// It could and was not told to.
    Off,
    /// It cannot.
    Missing,
    /// Its configuration space cannot be read as far as that.
    Unreadable,
}

/// What a function is in PCI Express terms (PCIe 6.0 §7.5.3.2, device/port type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortType {
    RootPort,
    Upstream,
    Downstream,
    /// To a conventional PCI bus, or on one.
    PciBridge,
    Endpoint,
}

impl PortType {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::RootPort => "root port",
            Self::Upstream => "switch upstream port",
            Self::Downstream => "switch downstream port",
            Self::PciBridge => "bridge to a conventional PCI bus",
            Self::Endpoint => "endpoint",
        }
    }
}

impl ConfigSpace {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn word(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte(at)?, self.byte(at + 1)?]))
    }

    fn dword(&self, at: usize) -> Option<u32> {
        Some(u32::from(self.word(at)?) | u32::from(self.word(at + 2)?) << 16)
    }

    /// Whether reads come back as ones: the device is gone, off, or hung. The class code tells: a virtual function's
    /// vendor and device ID are always ones (PCIe 6.0 §9.3.4.1.1).
    pub(super) fn is_absent(&self) -> bool {
        self.dword(8) == Some(u32::MAX)
    }

    /// Whether the header is a bridge's.
    pub(super) fn is_bridge(&self) -> bool {
        self.byte(0x0e).is_some_and(|header| header & 0x7f == 1)
    }

    /// Where the PCI Express capability is.
    fn pcie(&self) -> Option<usize> {
        const STATUS_CAPABILITIES: u16 = 1 << 4;
        if self.word(0x06)? & STATUS_CAPABILITIES == 0 {
            return None;
        }
        let mut at = usize::from(self.byte(0x34)? & !3);
        for _ in 0..MAX_CAPABILITIES {
            if at < 0x40 {
                return None;
            }
            if self.byte(at)? == CAPABILITY_PCIE {
                return Some(at);
            }
            at = usize::from(self.byte(at + 1)? & !3);
        }
        None
    }

    /// What kind of port it is, if the configuration space could be read.
    pub(super) fn port_type(&self) -> Option<PortType> {
        self.byte(0x40)?;
        let Some(at) = self.pcie() else {
            return Some(if self.is_bridge() { PortType::PciBridge } else { PortType::Endpoint });
        };
        Some(match self.word(at + 2)? >> 4 & 0xf {
            4 => PortType::RootPort,
            5 => PortType::Upstream,
            6 => PortType::Downstream,
            7 | 8 => PortType::PciBridge,
            _ => PortType::Endpoint,
        })
    }

    /// Access control services of a port.
    pub(super) fn acs(&self) -> Acs {
        let mut at = 0x100;
        for _ in 0..MAX_EXTENDED {
            let Some(header) = self.dword(at) else { return Acs::Unreadable };
            // No extended capabilities at all reads as zeros or, through some bridges, as ones.
            if header == 0 || header == u32::MAX {
                return Acs::Missing;
            }
            if header as u16 == EXTENDED_ACS {
                return match self.word(at + 6) {
                    Some(control) if control & ACS_ISOLATES == ACS_ISOLATES => Acs::Isolates,
                    Some(_) => Acs::Off,
                    None => Acs::Unreadable,
                };
            }
            at = (header >> 20) as usize & !3;
            if at < 0x100 {
                return Acs::Missing;
            }
        }
        Acs::Missing
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A port of a type; `acs` is its control register, none if it has no such capability.
    pub(in crate::inventory) fn port(kind: u16, acs: Option<u16>) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        bytes[0x06] = 0x10;
        bytes[0x0e] = 1;
        bytes[0x34] = 0x48;
        // Another capability in front.
        bytes[0x48..0x4a].copy_from_slice(&[0x01, 0x60]);
        bytes[0x60..0x62].copy_from_slice(&[CAPABILITY_PCIE, 0]);
        bytes[0x62..0x64].copy_from_slice(&(kind << 4 | 2).to_le_bytes());
        // Advanced error reporting, then ACS.
        let next = if acs.is_some() { 0x148_u32 } else { 0 };
        bytes[0x100..0x104].copy_from_slice(&(0x0001 | 2 << 16 | next << 20).to_le_bytes());
        if let Some(control) = acs {
            bytes[0x148..0x14c].copy_from_slice(&(u32::from(EXTENDED_ACS) | 1 << 16).to_le_bytes());
            bytes[0x14e..0x150].copy_from_slice(&control.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn ports_and_their_acs_are_read() {
        let read = |bytes: Vec<u8>| {
            let config = ConfigSpace::new(bytes);
            (config.port_type(), config.acs())
        };
        assert_eq!(read(port(4, Some(0x1d))), (Some(PortType::RootPort), Acs::Isolates));
        assert_eq!(read(port(6, Some(0x01))), (Some(PortType::Downstream), Acs::Off));
        assert_eq!(read(port(7, None)), (Some(PortType::PciBridge), Acs::Missing));
        assert_eq!(read(port(4, Some(0x1d))[..64].to_vec()), (None, Acs::Unreadable));
        assert!(ConfigSpace::new(vec![0xff; 64]).is_absent());
        let mut virtual_function = vec![0; 64];
        virtual_function[..4].fill(0xff);
        assert!(!ConfigSpace::new(virtual_function).is_absent());
    }

    #[test]
    fn lists_that_point_at_themselves_end() {
        let mut bytes = port(4, None);
        bytes[0x49] = 0x48;
        bytes[0x100..0x104].copy_from_slice(&(0x0001_u32 | 0x100 << 20).to_le_bytes());
        let config = ConfigSpace::new(bytes);
        assert_eq!(config.acs(), Acs::Missing);
        assert_eq!(config.port_type(), Some(PortType::PciBridge));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..4097)) {
            let config = ConfigSpace::new(bytes);
            let _ = (config.is_absent(), config.is_bridge(), config.port_type(), config.acs());
        }
    }
}
