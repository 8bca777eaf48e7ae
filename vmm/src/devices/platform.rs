//! Registers with which a guest ends its own machine: ACPI sleep and reset, the keyboard controller's
//! reset line, pvpanic.

use std::sync::Arc;

use crate::arch::native::{acpi, layout};
use crate::bus::BusDevice;
use crate::exit::ExitReason;
use crate::machine::Ending;

/// ACPI's sleep control, sleep status and reset registers (ACPI 6.5 §4.8.3.7, §4.8.3.6).
pub struct PowerRegisters(Arc<Ending>);

impl PowerRegisters {
    /// Ports from [`layout::ACPI_POWER`].
    pub const LENGTH: u64 = 3;

    /// Registers that end the machine through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for PowerRegisters {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // Never asleep: the status register has no wake event to show.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        const CONTROL: u64 = acpi::SLEEP_CONTROL as u64;
        const RESET: u64 = acpi::RESET as u64;
        match (offset, data) {
            (CONTROL, [value, ..]) => {
                let sleep_type = value >> 2 & 0x7;
                if value & SLEEP_ENABLE != 0 && sleep_type == acpi::S5_SLEEP_TYPE {
                    self.0.set(ExitReason::PowerOff, None);
                }
            }
            (RESET, [acpi::RESET_VALUE, ..]) => self.0.set(ExitReason::Reboot, None),
            _ => {}
        }
    }
}

/// The keyboard controller at [`layout::I8042`], of which only the reset line exists.
pub struct KeyboardController(Arc<Ending>);

impl KeyboardController {
    /// A controller that ends the machine through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for KeyboardController {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // Input buffer empty: ready for a command; nothing typed.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const COMMAND: u64 = 0x64 - layout::I8042.start as u64;
        const PULSE_RESET: u8 = 0xfe;
        if (offset, data) == (COMMAND, &[PULSE_RESET]) {
            self.0.set(ExitReason::Reboot, None);
        }
    }
}

/// QEMU's pvpanic port (docs/specs/pvpanic.rst): reading tells what it takes, writing that it happened.
pub struct PanicNotifier(Arc<Ending>);

impl PanicNotifier {
    const PANICKED: u8 = 1;

    /// A notifier that ends the machine through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for PanicNotifier {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = Self::PANICKED;
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if data[0] & Self::PANICKED != 0 {
            self.0.set(ExitReason::Crash, Some("the guest kernel panicked".to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(make: impl Fn(Arc<Ending>) -> Box<dyn BusDevice>, offset: u64, value: u8) -> Option<ExitReason> {
        let ending = Arc::new(Ending::new().unwrap());
        make(Arc::clone(&ending)).write(offset, &[value]);
        ending.get().map(|(reason, _)| reason)
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let power = |ending| Box::new(PowerRegisters::new(ending)) as Box<dyn BusDevice>;
        assert_eq!(ends(power, 0, 0x34), Some(ExitReason::PowerOff));
        assert_eq!(ends(power, 0, 0x14), None, "no enable bit");
        assert_eq!(ends(power, 0, 0x2c), None, "S3");
        assert_eq!(ends(power, 1, 0x34), None, "the status register");
        assert_eq!(ends(power, 2, 1), Some(ExitReason::Reboot));
        assert_eq!(ends(power, 2, 0), None);
    }

    #[test]
    fn the_reset_line_and_the_panic_port_end_the_machine() {
        let keyboard = |ending| Box::new(KeyboardController::new(ending)) as Box<dyn BusDevice>;
        assert_eq!(ends(keyboard, 4, 0xfe), Some(ExitReason::Reboot));
        assert_eq!(ends(keyboard, 4, 0xd1), None);
        assert_eq!(ends(keyboard, 0, 0xfe), None);
        let panic = |ending| Box::new(PanicNotifier::new(ending)) as Box<dyn BusDevice>;
        assert_eq!(ends(panic, 0, 1), Some(ExitReason::Crash));
        assert_eq!(ends(panic, 0, 2), None);
    }
}
