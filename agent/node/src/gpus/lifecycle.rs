//! From free to a sandbox and back, and what to do when that was cut off.
//!
//! Every change of a device happens under its lock file, which the kernel lets go when the process dies,
//! and begins with a record ([`super::record`]). So two processes (an agent, an operator's command) never
//! work on one device, and whoever comes after a crash finds what was begun. Recovery has one direction:
//! what was not lent yet and what was on its way back both go back to the host, by the same steps as any
//! release; these may be repeated from the start at any point.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lathe_api::HostPciAddress;
use lathe_api::gpu::{GpuState, Severity};
use nix::fcntl::Flock;

use super::GpuError;
use super::binding::{self, BRIDGES, bridges_of, class_of, function_now, unit_of};
use super::choose::{Candidate, choose};
use super::host::{KernelHost, PciHost};
use super::record::{CrashPoint, Ledger, Owner, Record, State, Times};
use super::report::Known;
use super::reset;
use crate::files::{self, FileError};
use crate::inventory;
use crate::pci::{self, VFIO_PCI};

/// How long to wait for somebody else's work on a device: a scrub of the largest takes minutes.
const LOCK_PATIENCE: Duration = Duration::from_secs(3600);

/// Which devices may be lent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// All GPUs: display devices but the one the firmware's console is on, and processing accelerators.
    #[default]
    All,
    /// These alone, whatever they are.
    Named(Vec<HostPciAddress>),
    /// None.
    Off,
}

/// Says of a device why it must not be lent at the moment, such as a fault that its driver reports.
pub type Gate = Box<dyn Fn(HostPciAddress) -> Result<(), String> + Send + Sync>;

/// A device as others are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Where it is in its life, by its record and by what the kernel has it bound to.
    pub state: GpuState,
    /// Why it is quarantined.
    pub reason: Option<String>,
    /// Who has it, or had it last while it is being scrubbed.
    pub owner: Option<Owner>,
    /// The driver it goes back to.
    pub host_driver: Option<String>,
    /// Its last reset and the proof of its memory, for people.
    pub last: Option<String>,
    /// How long its last hand-over took.
    pub times: Times,
}

/// The host's devices and their records.
pub struct Gpus {
    pub(super) host: Box<dyn PciHost>,
    dir: PathBuf,
    pub(super) boot_id: String,
    pub(super) policy: Policy,
    gate: Gate,
    pub(super) known: Mutex<BTreeMap<HostPciAddress, Known>>,
    crash_point: Box<CrashPoint>,
    /// One chooser at a time.
    choosing: Mutex<()>,
}

impl Gpus {
    /// The devices of this host, with records in `dir`.
    pub fn new(dir: PathBuf, boot_id: String, policy: Policy) -> Self {
        let root = Path::new("/");
        let preflight = |address: HostPciAddress| {
            let checks = inventory::check(root, &[address]);
            let problem = checks.into_iter().flat_map(|check| check.problems);
            let blocks = problem.into_iter().find(|problem| problem.severity == Severity::Blocks);
            blocks.map_or(Ok(()), |problem| Err(format!("{}; {}", problem.what, problem.fix)))
        };
        let gpus = Self::on(Box::new(KernelHost::new(root)), dir, boot_id, policy);
        gpus.gated(Box::new(preflight))
    }

    pub(super) fn on(host: Box<dyn PciHost>, dir: PathBuf, boot_id: String, policy: Policy) -> Self {
        let gate: Gate = Box::new(|_| Ok(()));
        let known = Mutex::default();
        let choosing = Mutex::new(());
        Self { host, dir, boot_id, policy, gate, known, crash_point: Box::new(|| {}), choosing }
    }

    /// Asks `gate` before a device is taken.
    #[must_use]
    pub(super) fn gated(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Calls `crash_point` before and after each effect.
    #[must_use]
    pub fn crashing(mut self, crash_point: Box<CrashPoint>) -> Self {
        self.crash_point = crash_point;
        self
    }

    /// What may be lent by the policy, free or not.
    pub fn devices(&self) -> Vec<HostPciAddress> {
        let is_gpu = |function: &HostPciAddress| {
            let console = self.host.read(*function, "boot_vga").is_ok_and(|text| text == "1");
            pci::is_gpu(class_of(&*self.host, *function)) && !console
        };
        match &self.policy {
            Policy::All => self.host.functions().into_iter().filter(is_gpu).collect(),
            Policy::Named(named) => named.clone(),
            Policy::Off => Vec::new(),
        }
    }

    /// What can be said of a device.
    pub fn view(&self, address: HostPciAddress) -> View {
        let times = Times::default();
        let mut view =
            View { state: GpuState::Free, reason: None, owner: None, host_driver: None, last: None, times };
        let record = match self.ledger(address) {
            Ok(ledger) => ledger.record,
            Err(error) => {
                let reason = Some(format!("its record cannot be read: {error}"));
                return View { state: GpuState::Quarantined, reason, ..view };
            }
        };
        let text =
            |reset: &reset::ResetDone| format!("reset by {} in {} ms", reset.method, reset.milliseconds);
        let done = [record.reset.as_ref().map(text), record.proof.as_ref().map(ToString::to_string)];
        view.times = record.times;
        view.last = Some(done.into_iter().flatten().collect::<Vec<_>>().join(", ")).filter(|t| !t.is_empty());
        if record.state != State::Free {
            view.host_driver = record.functions.first().and_then(|function| function.driver.clone());
        }
        match &record.state {
            State::Free => {}
            State::Taking(owner) => (view.state, view.owner) = (GpuState::Scrubbing, Some(owner.clone())),
            State::Scrubbing(owner) => (view.state, view.owner) = (GpuState::Scrubbing, owner.clone()),
            State::Quarantined(reason) => {
                (view.state, view.reason) = (GpuState::Quarantined, Some(reason.clone()));
            }
            State::InUse(owner) => {
                (view.state, view.owner) = (GpuState::InUse, Some(owner.clone()));
                let lost = record.addresses().into_iter().find_map(|function| {
                    let driver = self.host.driver(function);
                    (driver.as_deref() != Some(VFIO_PCI)).then_some((function, driver))
                });
                if let Some((function, driver)) = lost {
                    let driver = driver.unwrap_or_else(|| "no driver".into());
                    view.state = GpuState::Quarantined;
                    view.reason =
                        Some(format!("it was lent to {owner}, but {function} is bound to {driver}"));
                }
            }
        }
        view
    }

    /// Says why a device cannot be taken; changes nothing.
    ///
    /// # Errors
    /// The first reason.
    pub fn check(&self, address: HostPciAddress) -> Result<Vec<HostPciAddress>, GpuError> {
        let refused = |why: &str| Err(GpuError::Refused { address, why: why.to_owned() });
        let host = &*self.host;
        if !host.functions().contains(&address) {
            return refused("there is no such device on this host");
        }
        if !host.answers(address) {
            return Err(GpuError::Gone(address));
        }
        if class_of(host, address) >> 16 == BRIDGES {
            return refused("it is a bridge; name a device below it");
        }
        let unit = unit_of(host, address)?;
        if !reset::is_possible(host, address, &unit) {
            return refused(
                "it has no reset that leaves its neighbours alone: what its user leaves in it would stay",
            );
        }
        if unit.iter().any(|f| host.driver(*f).as_deref() == Some(VFIO_PCI)) && !host.is_idle(address) {
            return refused("another program has it open through VFIO");
        }
        if let Some(fault) = self.known(address).and_then(|known| known.failed) {
            return refused(&fault);
        }
        (self.gate)(address).map_err(|why| GpuError::Refused { address, why })?;
        Ok(unit)
    }

    /// Picks `count` free devices, and writes down that `owner` takes them, after `journal` has taken note of
    /// them. What `owner` has already is picked first: a cut-off start is repeated so. Follow with
    /// [`Gpus::take`] for each.
    ///
    /// # Errors
    /// When there are not so many, or of `journal`.
    pub fn reserve<E: From<GpuError>>(
        &self,
        count: usize,
        owner: &Owner,
        journal: impl FnOnce(&[HostPciAddress]) -> Result<(), E>,
    ) -> Result<Vec<HostPciAddress>, E> {
        let _one = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut candidates, mut held, mut not_free) = (Vec::new(), Vec::new(), Vec::new());
        let mut soon = 0;
        for address in self.devices() {
            let view = self.view(address);
            match view.state {
                GpuState::InUse if view.owner.as_ref() == Some(owner) => held.push(address),
                GpuState::Free => match self.check(address) {
                    Ok(_) => candidates.push(self.candidate(address)),
                    Err(error) => not_free.push(error.to_string()),
                },
                state => {
                    soon += usize::from(state == GpuState::Scrubbing);
                    not_free.push(self.not_free(address).to_string());
                }
            }
        }
        held.truncate(count);
        let free = candidates.len();
        let Some(mut chosen) = choose(&candidates, count - held.len()) else {
            let because = not_free.iter().map(|text| format!("; {text}")).collect();
            return Err(GpuError::TooFew { wanted: count, free: free + held.len(), soon, because }.into());
        };
        chosen.extend_from_slice(&held);
        chosen.sort_unstable();
        journal(&chosen)?;
        for address in chosen.iter().filter(|address| !held.contains(address)) {
            self.reserve_one(*address, owner)?;
        }
        Ok(chosen)
    }

    /// Writes down that `owner` takes exactly these devices, after `journal` has taken note of them. What
    /// `owner` has of them already stays. Follow with [`Gpus::take`] for each.
    ///
    /// # Errors
    /// When one is not free, which it says; [`GpuError::TooFew`] when those that are not are being scrubbed
    /// and will be. Or of `journal`.
    pub fn reserve_named<E: From<GpuError>>(
        &self,
        addresses: &[HostPciAddress],
        owner: &Owner,
        journal: impl FnOnce(&[HostPciAddress]) -> Result<(), E>,
    ) -> Result<Vec<HostPciAddress>, E> {
        let _one = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut held, mut soon) = (Vec::new(), Vec::new());
        let offered = self.devices();
        for &address in addresses {
            if !offered.contains(&address) {
                let what = "this host does not lend it".to_owned();
                return Err(GpuError::NotFree { address, what }.into());
            }
            let view = self.view(address);
            match view.state {
                GpuState::InUse if view.owner.as_ref() == Some(owner) => held.push(address),
                GpuState::Free => drop(self.check(address)?),
                GpuState::Scrubbing => soon.push(address),
                GpuState::InUse | GpuState::Quarantined => return Err(self.not_free(address).into()),
            }
        }
        if let Some(address) = soon.first() {
            let (wanted, free) = (addresses.len(), addresses.len() - soon.len());
            let because = format!("; {address} is being scrubbed");
            return Err(GpuError::TooFew { wanted, free, soon: soon.len(), because }.into());
        }
        let mut chosen = addresses.to_vec();
        chosen.sort_unstable();
        journal(&chosen)?;
        for address in chosen.iter().filter(|address| !held.contains(address)) {
            self.reserve_one(*address, owner)?;
        }
        Ok(chosen)
    }

    /// Writes down that `owner` takes this device. Follow with [`Gpus::take`].
    ///
    /// # Errors
    /// When it is not free or cannot be taken; nothing is changed then.
    pub fn reserve_one(&self, address: HostPciAddress, owner: &Owner) -> Result<(), GpuError> {
        let not_free = || self.not_free(address);
        let _lock = self.lock(address, Duration::ZERO)?.ok_or_else(not_free)?;
        let mut ledger = self.ledger(address)?;
        if ledger.record.state != State::Free {
            return Err(not_free());
        }
        // Another device's function that goes along with that one.
        let unit = self.check(address)?;
        if let Some(other) = self.records()?.iter().find(|record| {
            record.address != address
                && record.state != State::Free
                && record.addresses().iter().any(|function| unit.contains(function))
        }) {
            return Err(GpuError::NotFree { address, what: format!("it is lent with {}", other.address) });
        }
        self.note_functions(&mut ledger.record, &unit);
        ledger.record.proof = None;
        let memory_bytes = self.known(address).and_then(|known| known.memory_bytes);
        // Once the host's driver has gone nobody tells any more.
        ledger.record.memory_bytes = memory_bytes.or(ledger.record.memory_bytes);
        ledger.enter(State::Taking(owner.clone()))?;
        Ok(())
    }

    /// Takes a reserved device from the host's driver and has it reset, proven clean and bound to `vfio-pci`.
    /// One that `owner` has already is left as it is. Returns all functions to pass to the guest.
    ///
    /// # Errors
    /// When that fails: then it is quarantined.
    pub fn take(&self, address: HostPciAddress, owner: &Owner) -> Result<Vec<HostPciAddress>, GpuError> {
        let not_free = || self.not_free(address);
        let _lock = self.lock(address, LOCK_PATIENCE)?.ok_or_else(not_free)?;
        let mut ledger = self.ledger(address)?;
        match &ledger.record.state {
            State::InUse(user) if user == owner => return Ok(ledger.record.addresses()),
            State::Taking(user) if user == owner => {}
            // Given up meanwhile, or never reserved.
            _ => return Err(not_free()),
        }
        if let Err(source) = self.host.load_vfio() {
            ledger.enter(State::Free)?;
            return Err(GpuError::Step { address, what: "load vfio-pci".into(), source });
        }
        let host = &*self.host;
        if let Err(error) = binding::seize(host, &mut ledger) {
            // It is clean and was the host's until now: what of it was taken goes back.
            if let Err(second) = binding::give_back(host, &mut ledger) {
                tracing::error!(%address, error = %second, "cannot be given back");
            }
            return self.quarantine(&mut ledger, error);
        }
        let lent = self.clean(&mut ledger, false).and_then(|()| binding::lend(host, &mut ledger));
        match lent {
            Ok(()) => {
                ledger.enter(State::InUse(owner.clone()))?;
                let last = self.view(address).last.unwrap_or_default();
                tracing::info!(%address, %owner, last, "device lent");
                Ok(ledger.record.addresses())
            }
            Err(error) => self.quarantine(&mut ledger, error),
        }
    }

    /// Takes a device back from `owner`, whose machine has ended, and gives it to the host, clean. What is
    /// not `owner`'s is left alone.
    ///
    /// # Errors
    /// When its record cannot be written. A device that cannot be proven clean is quarantined, which is no
    /// error to who gave it back.
    pub fn release(&self, address: HostPciAddress, owner: &Owner) -> Result<(), GpuError> {
        let _lock = self.lock(address, LOCK_PATIENCE)?.ok_or_else(|| self.not_free(address))?;
        let mut ledger = self.ledger(address)?;
        match &ledger.record.state {
            State::Taking(user) | State::InUse(user) | State::Scrubbing(Some(user)) if user == owner => {
                self.return_to_host(&mut ledger).or_else(tell_files)
            }
            _ => Ok(()),
        }
    }

    /// Tries again to prove a quarantined device clean, and gives it back to the host.
    ///
    /// # Errors
    /// When it is not quarantined, or stays so.
    pub fn release_quarantine(&self, address: HostPciAddress) -> Result<(), GpuError> {
        let not_free = || self.not_free(address);
        let _lock = self.lock(address, Duration::ZERO)?.ok_or_else(not_free)?;
        let mut ledger = self.ledger(address)?;
        let lost = self.view(address).state == GpuState::Quarantined;
        if !lost {
            return Err(GpuError::NotQuarantined(address));
        }
        self.return_to_host(&mut ledger)
    }

    /// What a crash or a restart has left: devices on their way, and those of sandboxes that `lives` does not
    /// know. To be asked before any sandbox is started, and then given to [`Gpus::take_back_stale`].
    ///
    /// # Errors
    /// When records cannot be read.
    pub fn stale(&self, lives: impl Fn(&str) -> bool) -> Result<Vec<Record>, FileError> {
        let is_stale = |record: &Record| match &record.state {
            State::Free | State::Quarantined(_) => false,
            State::Taking(_) | State::Scrubbing(_) => true,
            // After a restart of the host its old driver has it, and the last tenant's data may be in it.
            State::InUse(_) if record.boot_id != self.boot_id => true,
            State::InUse(Owner::Sandbox(id)) => !lives(id),
            State::InUse(Owner::Operator(_)) => false,
        };
        Ok(self.records()?.into_iter().filter(is_stale).collect())
    }

    /// Gives back to the host what [`Gpus::stale`] found, unless somebody works on it or has done so since.
    ///
    /// # Errors
    /// When records cannot be written.
    pub fn take_back_stale(&self, stale: Vec<Record>) -> Result<(), GpuError> {
        for found in stale {
            let Some(_lock) = self.lock(found.address, Duration::ZERO)? else { continue };
            let mut ledger = self.ledger(found.address)?;
            if ledger.record == found {
                tracing::info!(address = %found.address, step = ?found.step, "taking back a device");
                self.return_to_host(&mut ledger).or_else(tell_files)?;
            }
        }
        Ok(())
    }

    /// Both at once, where no sandbox is started meanwhile.
    ///
    /// # Errors
    /// When records cannot be read or written.
    pub fn recover(&self, lives: impl Fn(&str) -> bool) -> Result<(), GpuError> {
        self.take_back_stale(self.stale(lives)?)
    }

    /// Gives everything back to the host's drivers, quarantined devices too; those stay on record as such.
    ///
    /// # Errors
    /// When one cannot be given back.
    pub fn give_all_back(&self) -> Result<(), GpuError> {
        for record in self.records()? {
            let address = record.address;
            let _lock = self.lock(address, LOCK_PATIENCE)?.ok_or_else(|| self.not_free(address))?;
            let mut ledger = self.ledger(address)?;
            if ledger.record.state != State::Free {
                let Err(error) = self.return_to_host(&mut ledger) else { continue };
                tracing::error!(%error, "not proven clean; the host gets it back all the same");
                let host = &*self.host;
                if host.answers(address) {
                    binding::seize(host, &mut ledger)?;
                    binding::give_back(host, &mut ledger)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn note_functions(&self, record: &mut Record, unit: &[HostPciAddress]) {
        let host = &*self.host;
        record.functions = unit.iter().map(|address| function_now(host, *address)).collect();
        let bridges = unit.first().map(|address| bridges_of(host, *address)).unwrap_or_default();
        record.bridges = bridges.into_iter().map(|address| function_now(host, address)).collect();
        record.boot_id.clone_from(&self.boot_id);
    }

    fn candidate(&self, address: HostPciAddress) -> Candidate {
        let numa_node = self.host.read(address, "numa_node").ok().and_then(|text| text.parse().ok());
        Candidate { address, numa_node, path: self.host.path(address) }
    }

    fn not_free(&self, address: HostPciAddress) -> GpuError {
        let view = self.view(address);
        let what = match (view.state, view.owner, view.reason) {
            (_, _, Some(reason)) => format!("quarantined: {reason}"),
            (GpuState::InUse, Some(owner), _) => format!("{owner} has it"),
            (GpuState::Scrubbing, Some(owner), _) => format!("it is on its way to or from {owner}"),
            (GpuState::Free, ..) => "it was not reserved, or somebody works on it".to_owned(),
            _ => "it is being scrubbed".to_owned(),
        };
        GpuError::NotFree { address, what }
    }

    fn ledger(&self, address: HostPciAddress) -> Result<Ledger<'_>, FileError> {
        Ledger::open(&self.dir, address, &self.boot_id, &*self.crash_point)
    }

    /// Devices that may be lent, and those that ever were.
    ///
    /// # Errors
    /// When the records cannot be listed.
    pub fn lent_or_on_record(&self) -> Result<Vec<HostPciAddress>, FileError> {
        let mut all = self.devices();
        all.extend(self.records()?.iter().map(|record| record.address));
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// The driver that is bound.
    pub fn driver(&self, address: HostPciAddress) -> Option<String> {
        self.host.driver(address)
    }

    fn records(&self) -> Result<Vec<Record>, FileError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(FileError::io("list", &self.dir))?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let addresses = names.filter_map(|name| name.strip_suffix(".json")?.parse().ok());
        // One that is damaged is a device in quarantine, and no reason to leave the others alone.
        let read = |address| match self.ledger(address) {
            Ok(ledger) => Some(ledger.record),
            Err(error) => {
                tracing::error!(%address, %error, "a device's record cannot be read");
                None
            }
        };
        let mut records: Vec<Record> = addresses.filter_map(read).collect();
        records.sort_unstable_by_key(|record| record.address);
        Ok(records)
    }

    /// The device's lock, waited for as long as `patience`.
    fn lock(&self, address: HostPciAddress, patience: Duration) -> Result<Option<Flock<File>>, FileError> {
        files::make_private_dir(&self.dir)?;
        let path = self.dir.join(format!("{address}.lock"));
        let end = Instant::now() + patience;
        loop {
            let lock = files::try_lock(&path)?;
            if lock.is_some() || Instant::now() >= end {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A device that ended in quarantine has its record; only trouble with that is the caller's.
fn tell_files(error: GpuError) -> Result<(), GpuError> {
    match error {
        GpuError::File(_) => Err(error),
        _ => Ok(()),
    }
}
