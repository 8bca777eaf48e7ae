//! Lathe's virtual machine monitor: one process, one microVM.
//!
//! It knows nothing of agents, jobs or clusters. A machine is described by [`config::VmConfig`],
//! built, run until it ends, and the reason it ended is the process's exit status ([`exit`]).
//!
//! Without the default feature `monitor` only the description ([`config`]) and the exit codes
//! remain: that is what the agent and the command line use.

#[cfg(feature = "monitor")]
use std::io::Write as _;

pub mod check;
pub mod client;
pub mod config;
pub mod exit;
pub mod host_address;
pub mod probe;

#[cfg(feature = "monitor")]
pub mod api;
#[cfg(feature = "monitor")]
pub mod arch;
#[cfg(feature = "monitor")]
pub mod boot;
#[cfg(feature = "monitor")]
pub mod bus;
#[cfg(feature = "monitor")]
pub mod devices;
#[cfg(feature = "monitor")]
pub mod hypervisor;
#[cfg(feature = "monitor")]
pub mod kvm;
#[cfg(feature = "monitor")]
pub mod machine;
#[cfg(feature = "monitor")]
pub mod memory;
#[cfg(feature = "monitor")]
pub mod numa;
#[cfg(feature = "monitor")]
pub mod pci;
#[cfg(feature = "monitor")]
mod ranges;
#[cfg(feature = "monitor")]
pub mod run;
#[cfg(feature = "monitor")]
pub mod vfio;
#[cfg(feature = "monitor")]
pub mod virtio;

/// Says on standard error what the machine goes on without. One event a line.
#[cfg(feature = "monitor")]
pub(crate) fn notice(message: std::fmt::Arguments<'_>) {
    // Nobody may read it any more; that is no reason to stop.
    let _ = writeln!(std::io::stderr(), "lathe-vmm: {message}");
}
