//! The guest's clocks.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Time since the kernel's start.
pub fn since_boot() -> Duration {
    // The clock exists in every kernel since 2.6.39; zero keeps a caller without it going.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

/// Sets the wall clock to `nanoseconds` since the Unix epoch.
pub fn set_wall_clock(nanoseconds: u64) -> Result<(), Errno> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(nanoseconds)))
}
