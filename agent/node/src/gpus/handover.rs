//! The way back from whoever has a device to the host, and what both ways have in common: reset and proof.
//!
//! All of it may be repeated from the start wherever it was cut off. Callers hold the device's lock.

use std::time::{Duration, Instant};

use super::binding::{self, class_of, unit_of};
use super::record::{Ledger, Record, State, Step};
use super::{GpuError, Gpus, reset, scrub};
use crate::pci::{VFIO_PCI, is_gpu};

/// How long a VMM that was killed may keep its devices open.
const CLOSE_PATIENCE: Duration = Duration::from_secs(20);

impl Gpus {
    /// From whatever there is of it to the host's driver, clean. The lock is held.
    pub(super) fn return_to_host(&self, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
        let host = &*self.host;
        let (owner, untouched) = match &ledger.record.state {
            State::Taking(owner) => (Some(owner.clone()), self.is_as_it_was(&ledger.record)),
            State::InUse(owner) => (Some(owner.clone()), false),
            State::Scrubbing(owner) => (owner.clone(), false),
            State::Free | State::Quarantined(_) => (None, false),
        };
        // One that never left its driver only has marks to be removed.
        let returned = if untouched {
            binding::give_back(host, ledger)
        } else {
            ledger.enter(State::Scrubbing(owner))?;
            self.take_back(ledger).and_then(|()| binding::give_back(host, ledger))
        };
        match returned {
            Ok(()) => {
                ledger.enter(State::Free)?;
                let last = self.view(ledger.record.address).last.unwrap_or_default();
                tracing::info!(address = %ledger.record.address, last, "device free");
                Ok(())
            }
            Err(error) => self.quarantine(ledger, error),
        }
    }

    fn take_back(&self, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
        let host = &*self.host;
        let address = ledger.record.address;
        if !host.answers(address) {
            return Err(GpuError::Gone(address));
        }
        if ledger.record.boot_id != self.boot_id || ledger.record.functions.is_empty() {
            let unit = unit_of(host, address)?;
            self.note_functions(&mut ledger.record, &unit);
        }
        let end = Instant::now() + CLOSE_PATIENCE;
        while !host.is_idle(address) {
            if Instant::now() > end {
                return Err(GpuError::Open(address));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // The tenant's last orders to the device end before VFIO's walls around it come down.
        let walled = ledger.record.addresses().iter().all(|f| host.driver(*f).as_deref() == Some(VFIO_PCI));
        if walled {
            self.reset(ledger)?;
        }
        binding::seize(host, ledger)?;
        self.clean(ledger, walled)
    }

    /// Resets it, unless that is done, and proves its memory clean. No driver has it.
    pub(super) fn clean(&self, ledger: &mut Ledger<'_>, is_reset: bool) -> Result<(), GpuError> {
        if !is_reset {
            self.reset(ledger)?;
        }
        let host = &*self.host;
        ledger.record.proof = None;
        let mut whole: Option<scrub::Proof> = None;
        for address in ledger.record.addresses() {
            let proof = ledger.step(Step::Scrub(address), |record| {
                let first = address == record.address;
                let memory = record.memory_bytes.filter(|_| first);
                scrub::scrub(host, address, record.held_memory && first, memory)
                    .map_err(|source| GpuError::Scrub { address, source })
            })?;
            // The others bring no memory of their own as a rule; what they bring counts.
            match &mut whole {
                None => {
                    ledger.record.held_memory |= proof.zero_bytes > 0;
                    whole = Some(proof);
                }
                Some(whole) => {
                    whole.zero_bytes += proof.zero_bytes;
                    whole.milliseconds += proof.milliseconds;
                }
            }
        }
        ledger.record.times.scrub_ms = whole.as_ref().map_or(0, |proof| proof.milliseconds);
        ledger.record.proof = whole;
        Ok(())
    }

    fn reset(&self, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
        let host = &*self.host;
        let ours = ledger.record.addresses();
        ledger.record.times.reset_ms = 0;
        for address in &ours {
            let (address, first) = (*address, *address == ledger.record.address);
            let gpu = is_gpu(class_of(host, address));
            let done = ledger.step(Step::Reset(address), |_| {
                reset::reset(host, address, &ours, gpu).map_err(|source| GpuError::Reset { address, source })
            });
            match done {
                Ok(done) => {
                    ledger.record.times.reset_ms += done.milliseconds;
                    // A reset of the bus was theirs as well.
                    let all = done.method == "bus_all";
                    if first {
                        ledger.record.reset = Some(done);
                    }
                    if all {
                        break;
                    }
                }
                // The audio part of a graphics card often has none of its own.
                Err(GpuError::Reset { source: reset::ResetError::NoMethod, .. }) if !first => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn quarantine<T>(&self, ledger: &mut Ledger<'_>, error: GpuError) -> Result<T, GpuError> {
        // Without its record nothing is known; the state on disk is not free either.
        if !matches!(error, GpuError::File(_)) {
            let address = ledger.record.address;
            tracing::error!(%address, %error, "device quarantined");
            let advice = format!("repair it, then run `lathe-agent gpus release-quarantine {address}`");
            ledger.enter(State::Quarantined(format!("{error}; {advice}")))?;
        }
        Err(error)
    }

    /// Whether every function is bound to what it was, in this boot.
    fn is_as_it_was(&self, record: &Record) -> bool {
        let mut all = record.functions.iter().chain(&record.bridges);
        let bound = all.all(|f| f.driver == self.host.driver(f.address));
        // Without a driver before, it cannot be seen what was done.
        let told = record.functions.iter().all(|f| f.driver.is_some());
        bound && told && record.boot_id == self.boot_id
    }
}
