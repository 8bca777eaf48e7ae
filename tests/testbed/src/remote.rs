//! Commands and files in a host: what its exec channel offers, whether the channel leads to QEMU
//! directly or through the supervisor that `scripts/testbed up` leaves behind.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::channel::{Channel, ChannelError, Collector, Session};
use crate::error::Error;
use crate::frame::{Exec, Status, Stream};

/// Time a command gets unless its caller says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Time a file gets.
const FILE_LIMIT: Duration = Duration::from_secs(600);

/// The inside of a host. Clones reach the same host, from any thread.
#[derive(Clone)]
pub struct Remote {
    host: String,
    channel: Channel,
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without white space at the end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().into()
    }
}

impl Remote {
    pub(crate) fn new(host: String, channel: Channel) -> Self {
        Self { host, channel }
    }

    /// The host's name.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    fn error(&self, source: ChannelError) -> Error {
        Error::Channel { host: self.host.clone(), source }
    }

    /// A command to be given input, environment or another time limit than 2 minutes, and run.
    #[must_use]
    pub fn command<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> HostCommand {
        HostCommand {
            remote: self.clone(),
            exec: Exec { argv: argv.into_iter().map(Into::into).collect(), ..Exec::default() },
            stdin: None,
            limit: Some(COMMAND_LIMIT),
        }
    }

    /// Copies a file of this machine, with its permission bits, into the host.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn put(&self, local: impl AsRef<Path>, remote: &str) -> Result<(), Error> {
        let local = local.as_ref();
        let file = File::open(local).map_err(Error::file(local))?;
        let mode = file.metadata().map_err(Error::file(local))?.permissions().mode() & 0o7777;
        self.write_from(file, remote, mode)
    }

    /// Writes a file in the host, making its directory where needed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, remote: &str, content: impl Into<Vec<u8>>) -> Result<(), Error> {
        self.write_from(io::Cursor::new(content.into()), remote, 0o644)
    }

    fn write_from(&self, from: impl Read + Send + 'static, remote: &str, mode: u32) -> Result<(), Error> {
        // Beside and renamed: a binary that is running can be replaced, and none is ever half there.
        let script =
            r#"mkdir -p "$(dirname "$1")" && cat >"$1.put" && chmod "$2" "$1.put" && mv -f "$1.put" "$1""#;
        self.command(["sh", "-c", script, "put", remote, &format!("{mode:o}")])
            .stdin(from)
            .limit(FILE_LIMIT)
            .check()
            .map(drop)
    }

    /// Copies a file of the host to this machine.
    ///
    /// # Errors
    /// When it cannot be read or written; then `local` is as it was.
    pub fn get(&self, remote: &str, local: impl AsRef<Path>) -> Result<(), Error> {
        let local = local.as_ref();
        let directory = local.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(Error::file(local))?;
        self.read_to(remote, file.as_file_mut())?;
        file.persist(local).map_err(|e| Error::file(local)(e.error))?;
        Ok(())
    }

    /// A file's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_file(&self, remote: &str) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        self.read_to(remote, &mut content)?;
        Ok(content)
    }

    fn read_to(&self, remote: &str, to: &mut dyn Write) -> Result<(), Error> {
        let mut errors = Collector::default();
        let status = self.command(["cat", "--", remote]).limit(FILE_LIMIT).carry(&mut |stream, bytes| {
            if stream == Stream::Stdout { to.write_all(bytes) } else { errors.take(stream, bytes) }
        })?;
        if status.success() {
            return Ok(());
        }
        let command = format!("cat {remote}");
        Err(Error::Command { host: self.host.clone(), command, status, output: errors.tail() })
    }
}

/// A command for a host, to be completed and run.
pub struct HostCommand {
    remote: Remote,
    exec: Exec,
    stdin: Option<Box<dyn Read + Send>>,
    limit: Option<Duration>,
}

impl HostCommand {
    /// Gives the command this input. It is read on a thread of its own.
    #[must_use]
    pub fn stdin(mut self, from: impl Read + Send + 'static) -> Self {
        self.stdin = Some(Box::new(from));
        self.exec.stdin = true;
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.exec.env.push((name.into(), value.into()));
        self
    }

    /// Sets its working directory, which is /root otherwise.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<String>) -> Self {
        self.exec.directory = Some(directory.into());
        self
    }

    /// Sets how long it may take before it is killed.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Lets it take as long as it takes.
    #[must_use]
    pub fn no_limit(mut self) -> Self {
        self.limit = None;
        self
    }

    /// Runs it and waits for its end.
    ///
    /// # Errors
    /// When it cannot be started, does not end in time, or the host goes away. A command that fails
    /// is no error here; see [`HostCommand::check`].
    pub fn run(mut self) -> Result<Output, Error> {
        let mut collector = Collector::default();
        let status = self.run_into(&mut |stream, bytes| collector.take(stream, bytes))?;
        match status {
            Some(status) => Ok(Output { status, stdout: collector.stdout, stderr: collector.stderr }),
            None => Err(self.timeout(collector.tail())),
        }
    }

    /// Runs it and expects success; its standard output as text.
    ///
    /// # Errors
    /// As [`HostCommand::run`], and [`Error::Command`] when it does not exit with 0.
    pub fn check(self) -> Result<String, Error> {
        let (host, command) = (self.remote.host.clone(), self.exec.argv.join(" "));
        let output = self.run()?;
        if output.status.success() {
            return Ok(output.text());
        }
        let status = output.status;
        let collector = Collector { stdout: output.stdout, stderr: output.stderr };
        Err(Error::Command { host, command, status, output: collector.tail() })
    }

    /// Runs it and hands its output on as it comes.
    ///
    /// # Errors
    /// As [`HostCommand::run`], and when `output` fails.
    pub fn carry(mut self, output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>) -> Result<Status, Error> {
        self.run_into(output)?.ok_or_else(|| self.timeout(String::new()))
    }

    fn run_into(
        &mut self,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Option<Status>, Error> {
        let deadline = self.limit.and_then(|limit| Instant::now().checked_add(limit));
        self.remote
            .channel
            .open(self.exec.clone())
            .and_then(|mut session| session.run(self.stdin.take(), deadline, output))
            .map_err(|e| self.remote.error(e))
    }

    fn timeout(&self, output: String) -> Error {
        self.remote.error(ChannelError::Timeout {
            command: self.exec.argv.join(" "),
            seconds: self.limit.unwrap_or_default().as_secs(),
            output,
        })
    }

    /// Starts it in the background: it goes on by itself, its stdout and stderr at the end of the
    /// file `output` in the host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut self, output: &str) -> Result<Process, Error> {
        self.exec.output = Some(output.into());
        let mut session = self
            .remote
            .channel
            .open(self.exec)
            .map_err(|e| Error::Channel { host: self.remote.host.clone(), source: e })?;
        let pid = session.started(COMMAND_LIMIT).map_err(|e| self.remote.error(e))?;
        Ok(Process { remote: self.remote, pid, session, status: None })
    }
}

/// A command that runs in the background of a host. Dropping this lets it run on.
pub struct Process {
    remote: Remote,
    pid: u32,
    session: Session,
    status: Option<Status>,
}

impl Process {
    /// Its process number in the host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends it a signal; nothing happens when it has ended already.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        self.session.signal(signal, false).map_err(|e| self.remote.error(e))
    }

    /// Waits for its end; `None`: it still runs after that time.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Status>, Error> {
        if self.status.is_none() {
            self.status = self.session.ended(limit).map_err(|e| self.remote.error(e))?;
        }
        Ok(self.status)
    }
}
