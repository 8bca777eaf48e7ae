//! The terminal as a serial line: raw while the machine runs, as it was afterwards.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Standard input in raw mode; dropping it restores what was.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` when standard input is no terminal.
    pub(super) fn of_stdin() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done when the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// In raw mode Ctrl-C goes to the guest, so ending the machine has keys of its own, those of QEMU:
/// Ctrl-A x. Ctrl-A twice types Ctrl-A.
pub(super) struct Escape {
    enabled: bool,
    started: bool,
}

impl Escape {
    const KEY: u8 = 0x01;

    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, started: false }
    }

    /// What of `input` is for the guest, and whether the user asked to end the machine.
    pub(super) fn filter(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        if !self.enabled {
            return (input.to_vec(), false);
        }
        let mut typed = Vec::with_capacity(input.len());
        let mut quit = false;
        for byte in input {
            match (std::mem::take(&mut self.started), *byte) {
                (false, Self::KEY) => self.started = true,
                (true, b'x') => quit = true,
                (_, byte) => typed.push(byte),
            }
        }
        (typed, quit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_even_in_two_reads_and_ctrl_a_twice_types_it() {
        let mut escape = Escape::new(true);
        assert_eq!(escape.filter(b"ls\n\x01"), (b"ls\n".to_vec(), false));
        assert_eq!(escape.filter(b"x"), (vec![], true));
        assert_eq!(escape.filter(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(Escape::new(false).filter(b"\x01x"), (b"\x01x".to_vec(), false));
    }
}
