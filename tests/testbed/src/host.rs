//! A running host: commands, files, and what can befall a machine.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bed::Inner;
use crate::channel::Channel;
use crate::description::HostDescription;
use crate::error::Error;
use crate::image;
use crate::process::{ProcessId, spawn_mortal};
use crate::qemu::{self, Places};
use crate::qmp;
use crate::remote::{HostCommand, Output, Process, Remote};

/// A host is up within seconds on an idle machine; several at once on a busy one take their time.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// An emulated bare-metal host. Methods take `&self` and may be called from several threads.
pub struct Host {
    description: HostDescription,
    at: Places,
    bed: Arc<Inner>,
    running: Mutex<Option<Running>>,
}

struct Running {
    qemu: Child,
    process: Option<ProcessId>,
    channel: Channel,
}

impl Host {
    pub(crate) fn boot(bed: Arc<Inner>, description: HostDescription) -> Result<Self, Error> {
        description.validate()?;
        let base = image::base()?;
        let (number, directory, storage) = bed.admit(&description.name)?;
        let at = Places {
            qemu: image::qemu()?.join("bin/qemu-system-x86_64"),
            kernel: image::kernel(&base, &description)?,
            initramfs: storage.join("initramfs"),
            disk: storage.join("disk"),
            directory,
            tap: format!("tap{number}"),
            number,
        };
        // From here on dropping the host undoes what was done.
        let host = Self { description, at, bed, running: Mutex::new(None) };
        image::write_initramfs(&base, &host.description, &host.at.initramfs)?;
        if host.description.disk_mib > 0 {
            make_disk(&host.at.disk, host.description.disk_mib)?;
        }
        host.bed.namespace.add_tap(&host.at.tap)?;
        host.start()?;
        Ok(host)
    }

    /// The host's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// What it is made of.
    #[must_use]
    pub fn description(&self) -> &HostDescription {
        &self.description
    }

    /// Its address in the bed's network.
    #[must_use]
    pub fn address(&self) -> String {
        self.at.address()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its QEMU runs (paused counts).
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.lock().as_mut().is_some_and(|running| matches!(running.qemu.try_wait(), Ok(None)))
    }

    fn start(&self) -> Result<(), Error> {
        let mut guard = self.lock();
        if guard.as_mut().is_some_and(|running| matches!(running.qemu.try_wait(), Ok(None))) {
            return Err(Error::Running(self.name().into()));
        }
        self.reap(guard.take());
        for socket in [self.at.exec_socket(), self.at.qmp_socket()] {
            let _ = fs::remove_file(socket);
        }
        let mut command = self.bed.network_command(&self.at.qemu.to_string_lossy());
        command.args(qemu::arguments(&self.description, &self.at));
        let log = self.qemu_log();
        let file = File::create(&log).map_err(Error::file(&log))?;
        let copy = file.try_clone().map_err(Error::file(&log))?;
        let mut qemu = spawn_mortal(&command, Stdio::from(file), Stdio::from(copy))
            .map_err(|source| Error::Run { program: "qemu-system-x86_64", source })?;
        let process = ProcessId::of(qemu.id());
        if let Some(process) = process {
            self.bed.note(process, true)?;
        }
        let connected = connect(&self.at.exec_socket(), &mut qemu).and_then(Channel::new);
        match connected {
            Ok(channel) => {
                let ready = channel.wait_ready(BOOT_LIMIT);
                let running = Running { qemu, process, channel };
                let reason = match ready {
                    Ok(true) => {
                        *guard = Some(running);
                        return Ok(());
                    }
                    Ok(false) => format!("it was not ready within {} s", BOOT_LIMIT.as_secs()),
                    Err(e) => e.to_string(),
                };
                self.reap(Some(running));
                Err(self.boot_error(reason))
            }
            Err(e) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                if let Some(process) = process {
                    self.bed.note(process, false)?;
                }
                Err(self.boot_error(format!("QEMU did not start: {e}")))
            }
        }
    }

    fn qemu_log(&self) -> PathBuf {
        self.at.directory.join("qemu.log")
    }

    fn boot_error(&self, reason: String) -> Error {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        Error::Boot {
            host: self.name().into(),
            reason,
            qemu: fs::read_to_string(self.qemu_log()).unwrap_or_default().trim().into(),
            console: lines[lines.len().saturating_sub(30)..].join("\n"),
        }
    }

    /// Kills and waits.
    fn reap(&self, running: Option<Running>) {
        let Some(mut running) = running else { return };
        running.channel.close();
        let _ = running.qemu.kill();
        let _ = running.qemu.wait();
        if let Some(process) = running.process
            && let Err(e) = self.bed.note(process, false)
        {
            eprintln!("lathe-testbed: {e}");
        }
    }

    pub(crate) fn channel(&self) -> Result<Channel, Error> {
        let guard = self.lock();
        let running = guard.as_ref().ok_or_else(|| Error::Off(self.name().into()))?;
        Ok(running.channel.clone())
    }

    /// The inside of the host as it runs now; after a restart it has to be asked for again.
    ///
    /// # Errors
    /// When the host is off.
    pub fn remote(&self) -> Result<Remote, Error> {
        Ok(Remote::new(self.name().into(), self.channel()?))
    }

    /// Runs a command and waits for its end: 2 minutes at most, without input.
    ///
    /// # Errors
    /// When it cannot be started, does not end in time, or the host goes away. A command that fails
    /// is no error here; see [`Host::check`].
    pub fn exec<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Output, Error> {
        self.command(argv)?.run()
    }

    /// Runs a command that has to succeed; its standard output as text.
    ///
    /// # Errors
    /// As [`Host::exec`], and [`Error::Command`] when the command does not exit with 0.
    pub fn check<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<String, Error> {
        self.command(argv)?.check()
    }

    /// Runs a line of shell that has to succeed; its standard output as text.
    ///
    /// # Errors
    /// As [`Host::check`].
    pub fn shell(&self, script: &str) -> Result<String, Error> {
        self.check(["sh", "-c", script])
    }

    /// A command to be given input, environment or another time limit.
    ///
    /// # Errors
    /// When the host is off.
    pub fn command<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<HostCommand, Error> {
        Ok(self.remote()?.command(argv))
    }

    /// Starts a command that goes on by itself, its stdout and stderr at the end of the file `output`
    /// in the host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn<S: Into<String>>(
        &self,
        argv: impl IntoIterator<Item = S>,
        output: &str,
    ) -> Result<Process, Error> {
        self.command(argv)?.spawn(output)
    }

    /// Copies a file of this machine, with its permission bits, into the host.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn put(&self, local: impl AsRef<Path>, remote: &str) -> Result<(), Error> {
        self.remote()?.put(local, remote)
    }

    /// Copies a file of the host to this machine.
    ///
    /// # Errors
    /// When it cannot be read or written; then `local` is as it was.
    pub fn get(&self, remote: &str, local: impl AsRef<Path>) -> Result<(), Error> {
        self.remote()?.get(remote, local)
    }

    /// Writes a file in the host, making its directory where needed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, remote: &str, content: impl Into<Vec<u8>>) -> Result<(), Error> {
        self.remote()?.write_file(remote, content)
    }

    /// A file's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_file(&self, remote: &str) -> Result<Vec<u8>, Error> {
        self.remote()?.read_file(remote)
    }

    /// Takes the host off the network; frames are lost without a sign, both ways.
    ///
    /// # Errors
    /// When the bridge cannot be changed.
    pub fn cut_network(&self) -> Result<(), Error> {
        Ok(self.bed.namespace.disconnect(&self.at.tap)?)
    }

    /// Puts it back on.
    ///
    /// # Errors
    /// When the bridge cannot be changed.
    pub fn restore_network(&self) -> Result<(), Error> {
        Ok(self.bed.namespace.connect(&self.at.tap)?)
    }

    /// Stops all of the host's CPUs.
    ///
    /// # Errors
    /// When the host is off.
    pub fn pause(&self) -> Result<(), Error> {
        self.monitor("stop")
    }

    /// Lets them go on. The host's clocks stood still; they are behind by the time it was paused.
    ///
    /// # Errors
    /// When the host is off.
    pub fn resume(&self) -> Result<(), Error> {
        self.monitor("cont")
    }

    fn monitor(&self, command: &'static str) -> Result<(), Error> {
        self.ask_monitor(command, &Value::Null).map(drop)
    }

    /// Runs a command of QEMU's monitor.
    pub(crate) fn ask_monitor(&self, command: &'static str, arguments: &Value) -> Result<Value, Error> {
        if !self.is_running() {
            return Err(Error::Off(self.name().into()));
        }
        let answer = qmp::execute(&self.at.qmp_socket(), command, arguments);
        answer.map_err(|source| Error::Monitor { host: self.name().into(), command, source })
    }

    /// Takes the power away. The data disk keeps what the host had written to it.
    pub fn kill(&self) {
        let running = self.lock().take();
        self.reap(running);
    }

    /// Starts a host that is off, with the data disk it had.
    ///
    /// # Errors
    /// When it runs, or does not come up.
    pub fn restart(&self) -> Result<(), Error> {
        self.start()
    }

    /// Shuts the host down in order: SIGTERM to all, a grace period, the disk unmounted.
    ///
    /// # Errors
    /// When that takes longer than a minute; the host is killed then.
    pub fn shutdown(&self) -> Result<(), Error> {
        let channel = self.channel()?;
        channel.power_off().map_err(|source| Error::Channel { host: self.name().into(), source })?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.is_running() {
            if Instant::now() > deadline {
                self.kill();
                return Err(Error::Shutdown(self.name().into()));
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        Ok(())
    }

    /// All that the host wrote to its serial console, over restarts.
    #[must_use]
    pub fn console(&self) -> String {
        fs::read(self.at.console())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Process number of its QEMU on this machine.
    #[must_use]
    pub fn qemu_pid(&self) -> Option<u32> {
        self.lock().as_ref().map(|running| running.qemu.id())
    }

    /// Copies console and QEMU's messages into a directory; the console's copy.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn save_console(&self, directory: &Path) -> Result<PathBuf, Error> {
        fs::create_dir_all(directory).map_err(Error::file(directory))?;
        let to = directory.join(format!("{}-console.log", self.name()));
        fs::copy(self.at.console(), &to).map_err(Error::file(&to))?;
        let log = directory.join(format!("{}-qemu.log", self.name()));
        fs::copy(self.qemu_log(), &log).map_err(Error::file(log))?;
        Ok(to)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            let directory = image::repository().join("target/testbed-consoles").join(self.bed.name());
            if let Ok(path) = self.save_console(&directory) {
                eprintln!("lathe-testbed: the console of {} is in {}", self.name(), path.display());
            }
        }
        self.kill();
        self.bed.namespace.remove_tap(&self.at.tap);
        self.bed.dismiss(&self.description.name);
    }
}

/// Connects to a socket that QEMU is about to make.
fn connect(socket: &Path, qemu: &mut Child) -> io::Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => {}
        }
        if let Some(status) = qemu.try_wait()? {
            return Err(io::Error::other(format!("it ended with {status}")));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A sparse file with an empty ext4 filesystem.
fn make_disk(path: &Path, mib: u32) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::file(path))?;
    file.set_len(u64::from(mib) << 20).map_err(Error::file(path))?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", "lathe-data", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(path)
        .output()
        .map_err(|source| Error::Run { program: "mkfs.ext4", source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Run { program: "mkfs.ext4", source: io::Error::other(message) })
}
