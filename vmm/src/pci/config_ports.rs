//! Ports 0xCF8 (address) and 0xCFC (data), the older way into configuration space (PCI 3.0 §3.2.2.3.2).

use std::sync::{Arc, Mutex, PoisonError};

use super::PciAddress;
use super::config::CONVENTIONAL_SIZE;
use super::root::PciRoot;
use crate::bus::BusDevice;

/// The first of the eight ports of [`ConfigPorts`].
pub const CONFIG_PORTS: u64 = 0xcf8;
/// How many ports [`ConfigPorts`] has.
pub const CONFIG_PORTS_SIZE: u64 = 8;

/// The two ports. An access costs a guest two exits where ECAM costs
/// one, so machines whose guests read the MCFG table do without.
pub struct ConfigPorts {
    root: Arc<Mutex<PciRoot>>,
    address: u32,
}

impl ConfigPorts {
    const ENABLE: u32 = 1 << 31;
    const DATA: u64 = 4;

    /// Ports onto `root`'s functions.
    pub fn new(root: Arc<Mutex<PciRoot>>) -> Self {
        Self { root, address: 0 }
    }

    /// The function and the register that an access to a data port means.
    fn target(&self, port: u64, len: usize) -> Option<(PciAddress, u16)> {
        let byte = port.checked_sub(Self::DATA)?;
        let offset = u64::from(self.address & 0xfc) + byte;
        let fits = byte + len as u64 <= 4 && offset as usize + len <= CONVENTIONAL_SIZE;
        let address = PciAddress::from_config_address(self.address);
        (self.address & Self::ENABLE != 0 && fits).then_some((address, offset as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (0, 4) = (offset, data.len()) {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
            root.read_config(address, register, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only a dword reaches the address register: 0xCF9 is a chipset's reset control.
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
        } else if let Some((address, register)) = self.target(offset, data.len()) {
            let mut root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
            root.write_config(address, register, data);
        }
    }
}
