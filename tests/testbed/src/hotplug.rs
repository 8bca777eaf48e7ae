//! Devices that come to a host and go from it while it runs, through the PCI Express slots of its ports.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Error;
use crate::host::Host;

/// A host's kernel waits 5 seconds between the attention button and the removal (PCIe 6.0 §6.7.1.5), and then
/// until the device's users have let go.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// Linux waits a second after it has cut a slot's power, and takes what changes meanwhile for a result of that.
const SETTLING: Duration = Duration::from_secs(2);

/// Where the PCI Express capability has its Slot Capabilities' flag, and its Slot Control register
/// (PCIe 6.0 §7.5.3.2, §7.5.3.10).
const SLOT_IMPLEMENTED: (usize, u8) = (3, 1);
const SLOT_CONTROL: usize = 0x18;
/// Bits of Slot Control: Hot-Plug Interrupt Enable, the Power Indicator on and off, Power Controller off, and that with
/// the indicator off.
const INTERRUPT: u16 = 0x0020;
const INDICATOR_ON: u16 = 0x0100;
const INDICATOR_OFF: u16 = 0x0300;
const POWER_CUT: u16 = 0x0400;
const POWER_OFF: u16 = POWER_CUT | INDICATOR_OFF;

impl Host {
    /// Plugs a device of QEMU's into a port, both by QEMU's names; `id` is the name of the new device.
    /// It needs a kind without a disk or memory of this machine behind it. The host sees it seconds later.
    ///
    /// # Errors
    /// When the host is off, or QEMU refuses.
    pub fn plug(&self, device: &str, id: &str, port: &str, properties: &[(&str, &str)]) -> Result<(), Error> {
        sleep(SETTLING);
        let mut arguments = json!({ "driver": device, "id": id, "bus": port });
        for (name, value) in properties {
            arguments[*name] = json!(value);
        }
        self.ask_monitor("device_add", &arguments).map(drop)
    }

    /// Presses the attention button of a device's slot and waits until the host has let it go. The host's
    /// driver is asked, and may take its time: a process that holds a VFIO device is told to give it back.
    ///
    /// # Errors
    /// When the host is off, QEMU knows no such device, or it is still there after a minute.
    pub fn unplug(&self, id: &str) -> Result<(), Error> {
        self.press_attention_button(id)?;
        let deadline = Instant::now() + UNPLUG_LIMIT;
        while self.has_device(id)? {
            if Instant::now() > deadline {
                return Err(self.still_there(id));
            }
            sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The first half of [`Host::unplug`]: the host begins to let the device go 5 seconds later.
    ///
    /// # Errors
    /// When the host is off, or QEMU knows no such device.
    pub fn press_attention_button(&self, id: &str) -> Result<(), Error> {
        self.ask_monitor("device_del", &json!({ "id": id })).map(drop)
    }

    /// Whether QEMU has a device of this name.
    ///
    /// # Errors
    /// When the host is off.
    pub fn has_device(&self, id: &str) -> Result<bool, Error> {
        let list = self.ask_monitor("qom-list", &json!({ "path": "/machine/peripheral" }))?;
        let named = |entry: &Value| entry.get("name").and_then(Value::as_str) == Some(id);
        Ok(list.as_array().is_some_and(|entries| entries.iter().any(named)))
    }

    /// Tears a device out of its slot without asking the host: from this moment on it answers nothing, and
    /// the port tells its driver that the card is gone. `address` is the device's in the host.
    ///
    /// # Errors
    /// When the host is off, there is no such device, or no slot above it.
    pub fn tear_out(&self, address: &str) -> Result<(), Error> {
        // QEMU takes a card away whose slot has no power. The port's driver is to find power there and no card,
        // as of a card torn out; it hears of that with the second write.
        let writes = |control| vec![(control | POWER_OFF) & !INTERRUPT, control & !POWER_CUT];
        self.write_slot_control(address, writes)
    }

    /// Cuts the power of a device's slot, or turns it on again: a device that hangs. It stays in the host's list,
    /// and answers nothing, until the power is back; then it is as after a cold reset, and the host has to remove
    /// it and look for it again.
    ///
    /// # Errors
    /// When the host is off, there is no such device, or no slot above it.
    pub fn power_slot(&self, address: &str, on: bool) -> Result<(), Error> {
        // With the indicator off it would be a card taken out.
        let lit = |control: u16| control & !INDICATOR_OFF | INDICATOR_ON;
        let write = |control| if on { lit(control) & !POWER_CUT } else { lit(control) | POWER_CUT };
        self.write_slot_control(address, |control| vec![write(control)])
    }

    /// Writes to Slot Control of the port above a device, one after the other, what `values` makes of its content.
    fn write_slot_control(&self, address: &str, values: impl Fn(u16) -> Vec<u16>) -> Result<(), Error> {
        let device = format!("/sys/bus/pci/devices/{address}");
        let port = self.shell(&format!("dirname $(readlink -f {device})"))?;
        let config = format!("{}/config", port.trim());
        let no_slot = || Error::NoSlot { host: self.name().into(), device: address.into() };
        let registers = self.read_file(&config)?;
        let at = slot_control(&registers).ok_or_else(no_slot)?;
        let control =
            registers.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_le_bytes);
        let write = |value: u16| {
            let [low, high] = value.to_le_bytes();
            // Capabilities are at multiples of four.
            let half = at / 2;
            format!("printf '\\{low:03o}\\{high:03o}' | dd of={config} bs=2 seek={half} conv=notrunc")
        };
        let writes: Vec<_> = values(control.ok_or_else(no_slot)?).into_iter().map(write).collect();
        self.shell(&writes.join(" && ")).map(drop)
    }

    fn still_there(&self, device: &str) -> Error {
        Error::Plugged { host: self.name().into(), device: device.into(), seconds: UNPLUG_LIMIT.as_secs() }
    }
}

/// Where Slot Control is in a port's configuration space.
fn slot_control(config: &[u8]) -> Option<usize> {
    const POINTER: usize = 0x34;
    const EXPRESS: u8 = 0x10;
    let mut at = usize::from(*config.get(POINTER)?);
    // No list has more entries.
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if *config.get(at)? == EXPRESS {
            let (offset, bit) = SLOT_IMPLEMENTED;
            return (config.get(at + offset)? & bit == bit).then_some(at + SLOT_CONTROL);
        }
        at = usize::from(*config.get(at + 1)?);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(slot: u8) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x05, 0x54]);
        config[0x54..0x58].copy_from_slice(&[0x10, 0, 0x42, slot]);
        config
    }

    #[test]
    fn slots_are_found_behind_other_capabilities() {
        assert_eq!(slot_control(&port(1)), Some(0x54 + 0x18));
        assert_eq!(slot_control(&port(0)), None, "a port without a slot");
        assert_eq!(slot_control(&[0; 64]), None);
        assert_eq!(slot_control(&[]), None);
    }
}
