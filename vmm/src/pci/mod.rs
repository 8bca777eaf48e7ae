//! PCI Express: configuration spaces, BARs that guests may move, MSI-X, and the root complex.
//!
//! A device implements [`PciDevice`] around a [`config::ConfigSpace`]. The [`root::PciRoot`] gives it
//! an address and places its BARs, so that guests which do not enumerate find them programmed; it
//! follows the guest when that moves a BAR or turns decoding on and off. [`msix::Msix`] holds a
//! function's vectors. [`capabilities`] reads the lists that the host's devices wrote.
//!
//! The machine's own devices sit on bus 0 as integrated endpoints. What hangs below ports is a
//! [`tree::Tree`], planned from the host's topology ([`topology`]), given addresses ([`placement`]) and built
//! by [`root::PciRoot::build`]; [`port`] is a root port or a port of a switch, [`slot`] its hot-plug registers, and
//! [`hotplug`] what the host does to slots while the guest runs.

pub mod capabilities;
pub mod config;
pub mod config_ports;
pub mod express;
pub mod gpudirect;
pub mod hotplug;
pub mod intx;
pub mod msix;
pub mod placement;
pub mod port;
pub mod root;
pub mod slot;
pub mod sysfs;
pub mod topology;
pub mod tree;

use std::fmt;

use config::ConfigSpace;

/// Bus, device and function within the only segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// The function whose 4 KiB of ECAM begin at `offset` (PCIe 6.0 §7.2.2).
    fn from_ecam(offset: u64) -> Self {
        Self {
            bus: (offset >> 20) as u8,
            device: (offset >> 15) as u8 & 0x1f,
            function: (offset >> 12) as u8 & 0x7,
        }
    }

    /// The function selected in the 0xCF8 register (PCI 3.0 §3.2.2.3.2).
    fn from_config_address(register: u32) -> Self {
        Self {
            bus: (register >> 16) as u8,
            device: (register >> 11) as u8 & 0x1f,
            function: (register >> 8) as u8 & 0x7,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// One function, as the root complex sees it.
///
/// The root complex and the BARs' ranges on the MMIO bus share the function behind a lock: calls
/// come one at a time, from any vCPU's thread. A function never calls back into the root complex.
pub trait PciDevice: Send {
    /// The configuration space.
    fn config(&mut self) -> &mut ConfigSpace;

    /// The guest reads configuration space; `data` holds ones beforehand.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// The guest reads from a BAR; `data` holds ones beforehand, and lies within the BAR.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes to a BAR.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// The BAR answers at `address` from now on; `None`: nowhere. Before a move to another address
    /// there is always a call with `None`.
    fn bar_moved(&mut self, bar: u8, address: Option<u64>);

    /// The guest resets the bus that the function is on, through the bridge control register of the port above
    /// (PCIe 6.0 §7.5.1.3.13). Afterwards the command register and the BARs have to read as after power-on;
    /// the root complex follows them. Called with the root complex locked.
    fn bus_reset(&mut self) {}

    /// The function is about to go from the bus. Its DMA and its interrupts have to have ended when this returns: a
    /// guest that finds it gone uses the memory that it had given to it for something else. Called with the root
    /// complex locked, before anything shows the guest that it goes; nothing of the guest's arrives afterwards.
    fn leave(&mut self) {}
}
