//! One machine's life: check the host ([`Prepared`]), build ([`Machine`]), run ([`RunningMachine`]).
//!
//! Each stage consumes the one before, so there is no half-built machine: whatever fails, dropping
//! the stage undoes it, and nothing of the guest has run.

mod build;
mod counters;
mod devices;
mod ending;
mod passthrough;
mod pci;
mod prepare;
mod running;
mod terminal;

pub use build::{Machine, MachineError};
pub use counters::{DeviceCounters, Sample};
pub use ending::Ending;
pub use passthrough::{DeviceStatistics, DeviceView, Passthrough, PlugError};
pub use prepare::{PrepareError, Prepared};
pub use running::{Controls, RunningMachine, State};
