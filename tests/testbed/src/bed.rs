//! A bed: a network namespace with hosts in it, and the directories they use. Everything goes when
//! the bed and its hosts are dropped. What a killed harness leaves behind, the next bed removes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::description::HostDescription;
use crate::error::Error;
use crate::host::Host;
use crate::image;
use crate::netns::Namespace;
use crate::process::ProcessId;

/// Hosts have the addresses 10.88.0.11 to .210.
const MOST_HOSTS: u8 = 200;

/// This machine's address in every bed's network.
pub const HARNESS_ADDRESS: &str = "10.88.0.1";

/// What later harnesses need to know to clean up after this one.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    owner: Option<ProcessId>,
    namespace: String,
    /// Disks and archives.
    storage: PathBuf,
    /// QEMUs.
    processes: Vec<ProcessId>,
}

/// A set of hosts on one network.
pub struct Bed {
    inner: Arc<Inner>,
}

/// What hosts share; it lives until the last of them is gone.
pub(crate) struct Inner {
    name: String,
    /// Sockets, consoles and the record; short, because socket paths are limited to 107 bytes.
    directory: PathBuf,
    storage: PathBuf,
    pub(crate) namespace: Namespace,
    record: Mutex<Record>,
    taken: Mutex<BTreeSet<String>>,
    numbers: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command that will run on this machine but in the network of the bed with this namespace.
#[must_use]
pub fn command_in(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    Namespace::command_in(namespace, program)
}

/// Where beds keep what they need while they run.
#[must_use]
pub fn state_directory() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| "/tmp".into(), PathBuf::from).join("lathe-testbed")
}

/// Disks are too big for a runtime directory, which is memory on many machines.
fn storage_directory() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from).join("lathe-testbed")
}

impl Bed {
    /// Makes an empty bed with a name of its own, after removing what dead harnesses left.
    ///
    /// # Errors
    /// When QEMU cannot be had, or the caller lacks the privileges.
    pub fn new() -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("bed{count}-{}", std::process::id()))
    }

    /// Makes an empty bed of this name.
    ///
    /// # Errors
    /// As [`Bed::new`], and when a bed of the name is there.
    pub fn named(name: &str) -> Result<Self, Error> {
        check_machine()?;
        sweep()?;
        let directory = state_directory().join(name);
        let storage = storage_directory().join(name);
        // Names of beds are unique in a state directory, those of namespaces on the whole machine.
        let own = format!("-{}", std::process::id());
        let namespace = format!("lathe-{}{own}", name.trim_end_matches(own.as_str()));
        take_name(&directory).map_err(Error::file(&directory))?;
        let record = Record {
            owner: ProcessId::own(),
            namespace: namespace.clone(),
            storage: storage.clone(),
            processes: Vec::new(),
        };
        // Before anything that it speaks of is made.
        write_record(&directory, &record)?;
        let made = fs::create_dir_all(&storage)
            .map_err(Error::file(&storage))
            .and_then(|()| Ok(Namespace::create(namespace)?));
        let namespace = match made {
            Ok(namespace) => namespace,
            Err(e) => {
                clear(&directory, &record);
                return Err(e);
            }
        };
        let inner = Inner {
            name: name.into(),
            directory,
            storage,
            namespace,
            record: Mutex::new(record),
            taken: Mutex::default(),
            numbers: AtomicU32::new(1),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The bed's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Boots a host and waits until it takes commands.
    ///
    /// # Errors
    /// When the description is wrong or the host does not come up; then nothing of it is left.
    pub fn boot(&self, description: HostDescription) -> Result<Host, Error> {
        Host::boot(Arc::clone(&self.inner), description)
    }

    /// Boots several hosts at once.
    ///
    /// # Errors
    /// That of the first host that did not come up; the others are taken down again.
    pub fn boot_all(&self, descriptions: Vec<HostDescription>) -> Result<Vec<Host>, Error> {
        std::thread::scope(|scope| {
            let boots: Vec<_> =
                descriptions.into_iter().map(|description| scope.spawn(|| self.boot(description))).collect();
            // All are waited for before the first error ends the collection.
            let results: Vec<_> = boots.into_iter().map(|boot| boot.join()).collect();
            results
                .into_iter()
                .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    /// A command that will run on this machine but in the bed's network, where it is 10.88.0.1.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        Namespace::command_in(&self.inner.record_namespace(), program)
    }

    /// Removes network and files at once, although hosts that were killed may still be referred to.
    pub(crate) fn clear(&self) {
        clear(&self.inner.directory, &lock(&self.inner.record));
    }

    /// The network namespace's name, as `ip netns` lists it.
    #[must_use]
    pub fn namespace(&self) -> String {
        self.inner.record_namespace()
    }
}

impl Inner {
    fn record_namespace(&self) -> String {
        lock(&self.record).namespace.clone()
    }

    /// Takes a host's name and gives its number and directories.
    pub(crate) fn admit(&self, host: &str) -> Result<(u8, PathBuf, PathBuf), Error> {
        if !lock(&self.taken).insert(host.into()) {
            return Err(Error::Duplicate(host.into()));
        }
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let number = u8::try_from(number).ok().filter(|n| *n <= MOST_HOSTS).ok_or(Error::Full(MOST_HOSTS))?;
        let directory = self.directory.join(host);
        let storage = self.storage.join(host);
        for path in [&directory, &storage] {
            fs::create_dir_all(path).map_err(Error::file(path))?;
        }
        Ok((number, directory, storage))
    }

    /// Gives a host's name back and removes what it stored.
    pub(crate) fn dismiss(&self, host: &str) {
        for path in [self.directory.join(host), self.storage.join(host)] {
            let _ = fs::remove_dir_all(path);
        }
        lock(&self.taken).remove(host);
    }

    /// Starts a program in the bed's network that dies with the harness at the latest.
    pub(crate) fn network_command(&self, program: &str) -> Command {
        Namespace::command_in(&self.record_namespace(), program)
    }

    /// Notes a QEMU, or that one is gone.
    pub(crate) fn note(&self, process: ProcessId, runs: bool) -> Result<(), Error> {
        let mut record = lock(&self.record);
        record.processes.retain(|p| *p != process);
        if runs {
            record.processes.push(process);
        }
        write_record(&self.directory, &record)
    }

    /// The bed's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        clear(&self.directory, &lock(&self.record));
    }
}

/// Makes a bed's directory, which is the lock on its name: it fails when there is one.
fn take_name(directory: &Path) -> io::Result<()> {
    let mut attempts = 0;
    loop {
        fs::create_dir_all(state_directory())?;
        match fs::create_dir(directory) {
            // The last bed of another harness just took the parent directory with it.
            Err(e) if e.kind() == io::ErrorKind::NotFound && attempts < 10 => attempts += 1,
            result => return result,
        }
    }
}

fn record_path(directory: &Path) -> PathBuf {
    directory.join("bed.json")
}

/// Writes beside and renames, so that a reader sees the old or the new record.
fn write_record(directory: &Path, record: &Record) -> Result<(), Error> {
    let path = record_path(directory);
    let beside = directory.join("bed.json.new");
    let text = serde_json::to_vec_pretty(record).unwrap_or_default();
    fs::write(&beside, text).map_err(Error::file(&beside))?;
    fs::rename(&beside, &path).map_err(Error::file(path))
}

/// Removes everything a record speaks of, and the record last.
fn clear(directory: &Path, record: &Record) {
    for process in &record.processes {
        process.kill();
    }
    if let Err(e) = Namespace::remove(&record.namespace) {
        eprintln!("lathe-testbed: {e}");
    }
    let _ = fs::remove_dir_all(&record.storage);
    let _ = fs::remove_dir_all(directory);
    // The directories of all beds go with the last of them.
    let _ = fs::remove_dir(storage_directory());
    let _ = fs::remove_dir(state_directory());
}

/// Removes the beds whose harness is dead; their names.
///
/// # Errors
/// When the state directory cannot be read.
pub fn sweep() -> Result<Vec<String>, Error> {
    let mut removed = Vec::new();
    let entries = match fs::read_dir(state_directory()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(removed),
        Err(e) => return Err(Error::file(state_directory())(e)),
    };
    for entry in entries.flatten() {
        let directory = entry.path();
        let Ok(text) = fs::read(record_path(&directory)) else {
            // A bed that is being made or removed has no record for a moment. One whose harness was
            // killed in that moment has none for good, and nothing else either.
            let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
            if age.is_some_and(|age| age > Duration::from_secs(60)) {
                let _ = fs::remove_dir_all(&directory);
            }
            continue;
        };
        let Ok(record) = serde_json::from_slice::<Record>(&text) else { continue };
        if !record.owner.is_some_and(ProcessId::is_alive) {
            clear(&directory, &record);
            removed.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(removed)
}

/// What every bed needs of this machine.
fn check_machine() -> Result<(), Error> {
    if !geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    image::qemu()?;
    Ok(())
}
