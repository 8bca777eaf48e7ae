//! How the machine is asked to end, and how it ends.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::reboot::{RebootMode, reboot};

use crate::session::PowerButton;

/// `struct input_event` on 64-bit Linux: two words of time, type, code, value.
const EVENT_SIZE: usize = 24;

/// The ACPI power button as the kernel's input layer shows it.
#[derive(Debug)]
pub struct InputButton {
    devices: Vec<File>,
}

impl InputButton {
    /// Opens every input device: a microVM has no others than buttons.
    pub fn open() -> Self {
        let Ok(entries) = fs::read_dir("/dev/input") else { return Self { devices: Vec::new() } };
        let devices = entries
            .flatten()
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"event"))
            .filter_map(|entry| {
                fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(entry.path()).ok()
            })
            .collect();
        Self { devices }
    }
}

impl PowerButton for InputButton {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.devices.iter().map(AsFd::as_fd).collect()
    }

    fn pressed(&mut self) -> bool {
        let mut pressed = false;
        let mut events = [0; EVENT_SIZE * 16];
        // A device that fails would be reported as readable for ever, so it is dropped.
        self.devices.retain_mut(|device| match device.read(&mut events) {
            Ok(len) => {
                pressed |= events[..len].chunks_exact(EVENT_SIZE).any(is_power_key);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        });
        pressed
    }
}

/// Whether the event is the power key going down.
fn is_power_key(event: &[u8]) -> bool {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    half(16) == EV_KEY && half(18) == KEY_POWER && half(20) != 0
}

/// Powers the machine off, with everything written to the disks.
pub fn off() -> ! {
    nix::unistd::sync();
    end(RebootMode::RB_POWER_OFF)
}

/// Makes a panic of init end the machine by a reset, which the host tells apart from a power-off.
/// Without this a panic in a kernel that does not reboot on panics would hang the machine.
pub fn reboot_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("lathe-init: {info}");
        if std::process::id() == 1 {
            end(RebootMode::RB_AUTOBOOT)
        }
    }));
}

fn end(how: RebootMode) -> ! {
    let refused: Result<Infallible, _> = reboot(how);
    // PID 1's exit makes the kernel panic, and the VMM sees that.
    eprintln!("lathe-init: the machine does not end: {refused:?}");
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        [vec![0; 16], kind.to_ne_bytes().into(), code.to_ne_bytes().into(), value.to_ne_bytes().into()]
            .concat()
    }

    #[test]
    fn only_the_power_key_going_down_counts() {
        assert!(is_power_key(&event(1, 116, 1)));
        assert!(!is_power_key(&event(1, 116, 0)), "release");
        assert!(!is_power_key(&event(0, 0, 0)), "synchronisation");
        assert!(!is_power_key(&event(1, 142, 1)), "sleep");
    }
}
