//! What is known of each device that was ever lent, written before it becomes true.
//!
//! One file a device, replaced atomically and fsync'd at each step, as a sandbox's journal is
//! ([`crate::journal`]). It says who has the device, what its functions were bound to before, and which
//! step was begun last. What the device is bound to now it does not say: that is read from the kernel.

use std::fmt;
use std::path::{Path, PathBuf};

use lathe_api::HostPciAddress;
use serde::{Deserialize, Serialize};

use super::reset::ResetDone;
use super::scrub::Proof;
use crate::files::{self, FileError};

/// Raised when an older agent could misread a record.
const VERSION: u32 = 1;

/// Who has a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The sandbox of this ID.
    Sandbox(String),
    /// A person at the command line; stays until released by hand.
    Operator(String),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sandbox(id) => write!(f, "sandbox {id}"),
            Self::Operator(name) => write!(f, "operator {name}"),
        }
    }
}

/// Where a device is in its life. Only [`State::Free`] may be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nobody's, and given back to the host.
    Free,
    /// On its way to its owner. After a crash it is given back.
    Taking(Owner),
    /// Its owner has it.
    InUse(Owner),
    /// On its way back from the owner. After a crash that goes on.
    Scrubbing(Option<Owner>),
    /// Not offered before an operator has it released.
    Quarantined(String),
}

/// A PCI function, or a bridge, as it was before it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Where.
    pub address: HostPciAddress,
    /// The bound driver.
    pub driver: Option<String>,
    /// `driver_override`.
    pub driver_override: Option<String>,
    /// `reset_method`.
    pub reset_method: Option<String>,
}

/// An effect on the host that is about to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// `driver_override` is set to `vfio-pci`, a bridge's to none: no other driver can take it from here on.
    Override(HostPciAddress),
    /// The bound driver lets go.
    Unbind(HostPciAddress),
    /// The device is reset.
    Reset(HostPciAddress),
    /// Its memory is overwritten and read back.
    Scrub(HostPciAddress),
    /// `vfio-pci` takes it.
    Lend(HostPciAddress),
    /// `driver_override` and `reset_method` are as they were.
    Restore(HostPciAddress),
    /// The host's driver takes it.
    Return(HostPciAddress),
}

/// Milliseconds that the parts of the last hand-over took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Until the host's driver, or `vfio-pci`, had let go.
    pub unbind_ms: u64,
    /// Resets.
    pub reset_ms: u64,
    /// Overwriting and reading back.
    pub scrub_ms: u64,
    /// Until the new driver had it.
    pub bind_ms: u64,
}

/// A device's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The function it is known by.
    pub address: HostPciAddress,
    /// All functions that go with it, itself first.
    pub functions: Vec<Function>,
    /// Bridges whose driver has to be gone while it is lent ([`super::binding::bridges_of`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bridges: Vec<Function>,
    /// The boot in which `functions` was written: after another one the kernel has bound them anew.
    pub boot_id: String,
    /// Where it is in its life.
    pub state: State,
    /// What was begun last in this state.
    pub step: Option<Step>,
    /// How it was reset last.
    pub reset: Option<ResetDone>,
    /// What is proven of its memory since its last owner.
    pub proof: Option<Proof>,
    /// Its memory could be proven zero once, so it has to be each time.
    pub held_memory: bool,
    /// The size of its memory, where something told.
    pub memory_bytes: Option<u64>,
    /// How long the last hand-over took.
    pub times: Times,
}

impl Record {
    /// A device that was never lent.
    pub fn new(address: HostPciAddress, boot_id: &str) -> Self {
        Self {
            version: VERSION,
            address,
            functions: Vec::new(),
            bridges: Vec::new(),
            boot_id: boot_id.to_owned(),
            state: State::Free,
            step: None,
            reset: None,
            proof: None,
            held_memory: false,
            memory_bytes: None,
            times: Times::default(),
        }
    }

    /// Addresses of all functions that go with it.
    pub fn addresses(&self) -> Vec<HostPciAddress> {
        self.functions.iter().map(|function| function.address).collect()
    }
}

/// Called before and after each effect: tests end the process there.
pub type CrashPoint = dyn Fn() + Send + Sync;

/// A record and the file that holds it.
pub struct Ledger<'a> {
    path: PathBuf,
    /// What the file says, once [`Ledger::save`] was called.
    pub record: Record,
    crash_point: &'a CrashPoint,
}

impl<'a> Ledger<'a> {
    /// The file of a device's record.
    pub fn path(dir: &Path, address: HostPciAddress) -> PathBuf {
        dir.join(format!("{address}.json"))
    }

    /// Opens the record of `address` in `dir`, or begins one.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn open(
        dir: &Path,
        address: HostPciAddress,
        boot_id: &str,
        crash_point: &'a CrashPoint,
    ) -> Result<Self, FileError> {
        let path = Self::path(dir, address);
        let record = match files::read_json(&path) {
            Err(error) if error.is_not_found() => Record::new(address, boot_id),
            other => other?,
        };
        Ok(Self { path, record, crash_point })
    }

    /// Makes the file say what the record says.
    ///
    /// # Errors
    /// When it cannot be written; then nothing may be done to the device.
    pub fn save(&self) -> Result<(), FileError> {
        files::write_json(&self.path, &self.record)?;
        (self.crash_point)();
        Ok(())
    }

    /// Enters a state.
    ///
    /// # Errors
    /// As [`Ledger::save`].
    pub fn enter(&mut self, state: State) -> Result<(), FileError> {
        self.record.state = state;
        self.record.step = None;
        self.save()
    }

    /// Writes down that `step` is about to be taken, and takes it.
    ///
    /// # Errors
    /// When it cannot be written, or of the step.
    pub fn step<T, E: From<FileError>>(
        &mut self,
        step: Step,
        take: impl FnOnce(&mut Record) -> Result<T, E>,
    ) -> Result<T, E> {
        self.record.step = Some(step);
        self.save()?;
        let taken = take(&mut self.record);
        (self.crash_point)();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_written_before_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let gpu: HostPciAddress = "0000:01:00.0".parse().unwrap();
        let mut ledger = Ledger::open(dir.path(), gpu, "boot", &|| {}).unwrap();
        assert_eq!(ledger.record.state, State::Free);
        let owner = Owner::Sandbox("a-0-1".into());
        ledger.enter(State::Taking(owner.clone())).unwrap();
        let seen: Result<Record, FileError> = ledger
            .step(Step::Unbind(gpu), |_| Ok(Ledger::open(dir.path(), gpu, "boot", &|| {}).unwrap().record));
        let seen = seen.unwrap();
        assert_eq!((seen.state, seen.step), (State::Taking(owner), Some(Step::Unbind(gpu))));
    }

    #[test]
    fn a_damaged_record_is_an_error_not_a_free_device() {
        let dir = tempfile::tempdir().unwrap();
        let gpu: HostPciAddress = "0000:01:00.0".parse().unwrap();
        std::fs::write(Ledger::path(dir.path(), gpu), "{").unwrap();
        assert!(Ledger::open(dir.path(), gpu, "boot", &|| {}).is_err());
    }
}
