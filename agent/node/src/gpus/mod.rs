//! Lends the host's GPUs, and other PCI devices that an operator names, to sandboxes.
//!
//! A device goes `free` → `in_use` → `scrubbing` → `free`. On each way it is taken from its driver, reset,
//! and its memory overwritten and read back where it shows any; only then is it lent, or the host's again.
//! Whatever fails on the way ends in `quarantined`, which survives the agent and is left by hand alone. So
//! nothing is ever offered that was not proven clean, as far as the device lets one prove it.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`lifecycle`] | the states, and what leads from one to the next; recovery after a crash |
//! | [`handover`] | the way back to the host, reset and proof |
//! | [`choose`] | which of the free ones a sandbox gets |
//! | [`record`] | what is known of a device, in a file, written before it is true |
//! | [`binding`] | from the host's driver to `vfio-pci` and back, with what must go along |
//! | [`reset`] | by which method, and doing it |
//! | [`scrub`] | zeros in all memory that shows, and the proof |
//! | [`report`] | what the inventory says of them, and what it knows that matters here |
//! | [`host`] | the kernel's side of it: sysfs |
//! | [`commands`] | `lathe-agent gpus` |
//!
//! Using the device through VFIO is the VMM's: it gets the addresses of functions bound to `vfio-pci`.

mod binding;
mod choose;
pub mod commands;
mod handover;
mod host;
mod lifecycle;
mod record;
mod report;
mod reset;
mod scrub;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use lathe_api::HostPciAddress;

pub use lifecycle::{Gate, Gpus, Policy, View};
pub use record::{Owner, Record, Times};
pub use report::Figures;
pub use scrub::child as scrub_bar;

use crate::files::FileError;
use reset::ResetError;
use scrub::ScrubError;

/// Why a device is not lent, or not back.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// Nothing was changed.
    #[error("{address} cannot be taken: {why}")]
    Refused {
        /// The device.
        address: HostPciAddress,
        /// What stands in the way, and what to do.
        why: String,
    },
    /// Somebody has it.
    #[error("{address} is not free: {what}")]
    NotFree {
        /// The device.
        address: HostPciAddress,
        /// Who has it, or why it is not offered.
        what: String,
    },
    /// Not so many.
    #[error("{wanted} GPUs are wanted and {free} of this host's are free{because}")]
    TooFew {
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        free: usize,
        /// How many are being scrubbed and will be free.
        soon: usize,
        /// What is with the others; empty or beginning with `; `.
        because: String,
    },
    /// The kernel refused.
    #[error("{address}: cannot {what}: {source}")]
    Step {
        /// The function.
        address: HostPciAddress,
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel said yes and did something else.
    #[error("{address}: {wanted} should have it now, and {found} has")]
    Bound {
        /// The function.
        address: HostPciAddress,
        /// As it should be.
        wanted: String,
        /// As it is.
        found: String,
    },
    /// Nothing to release.
    #[error("{0} is not quarantined")]
    NotQuarantined(HostPciAddress),
    /// A process has it open.
    #[error("{0} is still open through VFIO: its virtual machine has not ended")]
    Open(HostPciAddress),
    /// Pulled, fallen off the bus, or never there.
    #[error("{0} does not answer: it was pulled, or has fallen off the bus")]
    Gone(HostPciAddress),
    /// Its reset.
    #[error("{address}: {source}")]
    Reset {
        /// The function.
        address: HostPciAddress,
        /// Why not.
        source: ResetError,
    },
    /// Its memory.
    #[error("{address}: {source}")]
    Scrub {
        /// The function.
        address: HostPciAddress,
        /// Why not.
        source: ScrubError,
    },
    /// The record.
    #[error(transparent)]
    File(#[from] FileError),
}
