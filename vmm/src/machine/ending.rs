//! How a machine ends: once, for the first reason anybody gives.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::exit::ExitReason;

/// The latch through which vCPUs, devices and the control API end the machine.
#[derive(Debug)]
pub struct Ending {
    set: AtomicBool,
    first: Mutex<Option<(ExitReason, Option<String>)>>,
    event: EventFd,
}

impl Ending {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { set: AtomicBool::new(false), first: Mutex::default(), event: EventFd::new(EFD_NONBLOCK)? })
    }

    fn lock(&self) -> MutexGuard<'_, Option<(ExitReason, Option<String>)>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine, unless it has ended. `message` is for people.
    pub fn set(&self, reason: ExitReason, message: Option<String>) {
        self.lock().get_or_insert((reason, message));
        self.set.store(true, Ordering::Release);
        // Fails only when the counter is full, and then it is signalled already.
        let _ = self.event.write(1);
    }

    /// Whether it has ended. Cheap: asked after every exit of every vCPU.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// How it ended, if it has.
    pub fn get(&self) -> Option<(ExitReason, Option<String>)> {
        self.lock().clone()
    }

    /// Readable once it has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let ending = Ending::new().unwrap();
        assert!(!ending.is_set() && ending.get().is_none());
        ending.set(ExitReason::Crash, Some("triple fault".to_owned()));
        ending.set(ExitReason::PowerOff, None);
        assert_eq!(ending.get(), Some((ExitReason::Crash, Some("triple fault".to_owned()))));
        assert!(ending.is_set() && ending.event().read().is_ok());
    }
}
