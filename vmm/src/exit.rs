//! How a microVM ended, as the exit status of the `lathe-vmm` process.
//!
//! Supervisors tell the ends apart by these codes alone, so they never change meaning.

use std::fmt;
use std::process::ExitCode;

/// Why the VMM process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The VMM itself failed; its last line on stderr says how.
    Internal,
    /// The command line or `vm.json` was wrong; nothing was started.
    BadConfig,
    /// The guest asked for a reset. The VMM does not restart guests, its supervisor does.
    Reboot,
    /// The guest died: triple fault, panic reported through pvpanic, or a KVM internal error.
    Crash,
    /// Killed through the control API.
    Killed,
    /// This machine's KVM cannot boot the given guest (see `lathe doctor`).
    Unsupported,
}

impl ExitReason {
    /// Every reason, for documentation and for decoding.
    pub const ALL: [Self; 7] = [
        Self::PowerOff,
        Self::Internal,
        Self::BadConfig,
        Self::Reboot,
        Self::Crash,
        Self::Killed,
        Self::Unsupported,
    ];

    /// The process exit status.
    pub const fn code(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Internal => 1,
            Self::BadConfig => 2,
            Self::Reboot => 10,
            Self::Crash => 11,
            Self::Killed => 12,
            Self::Unsupported => 13,
        }
    }

    /// The reason behind an exit status, if it is one of ours.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| i32::from(reason.code()) == code)
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Internal => "the VMM failed",
            Self::BadConfig => "the configuration was rejected",
            Self::Reboot => "the guest asked for a reboot",
            Self::Crash => "the guest crashed",
            Self::Killed => "killed through the control API",
            Self::Unsupported => "this machine's KVM cannot boot this guest",
        })
    }
}

impl From<ExitReason> for ExitCode {
    fn from(reason: ExitReason) -> Self {
        Self::from(reason.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_decode() {
        for reason in ExitReason::ALL {
            assert_eq!(ExitReason::from_code(i32::from(reason.code())), Some(reason));
        }
        assert_eq!(ExitReason::from_code(77), None);
    }
}
