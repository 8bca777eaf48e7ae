//! The harness's end of a host's exec channel. Any number of threads run commands over one
//! connection; a reader thread hands frames to the sessions they belong to.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::frame::{self, Body, Bytes, Exec, Frame, MAX_CHUNK, Status, Stream, VERSION, WINDOW};

/// Why a command gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// QEMU ended, or the host's PID 1 did.
    #[error("the host is gone: {0}")]
    Closed(String),
    /// The host's PID 1 is older or newer than the harness.
    #[error("the host speaks version {0} of the exec protocol, this harness {VERSION}; rebuild testbed-init")]
    Version(u32),
    /// The command could not be started.
    #[error("{0}")]
    Refused(String),
    /// The command ran longer than its caller allowed; it was killed.
    #[error("`{command}` did not end within {seconds} s; its output so far: {output}")]
    Timeout {
        /// What was run.
        command: String,
        /// The limit.
        seconds: u64,
        /// The end of what it wrote.
        output: String,
    },
    /// Reading what goes to the command's stdin failed.
    #[error("reading the command's input: {0}")]
    Input(#[source] io::Error),
    /// Passing on the command's output failed.
    #[error("passing on the command's output: {0}")]
    Output(#[source] io::Error),
}

/// A connection. Clones share it.
#[derive(Clone)]
pub(crate) struct Channel {
    shared: Arc<Shared>,
}

struct Shared {
    writer: Mutex<UnixStream>,
    next: AtomicU32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Version of the host's side, once it said hello.
    hello: Option<u32>,
    /// Why the connection ended, once it has.
    closed: Option<String>,
    sessions: HashMap<u32, mpsc::Sender<Body>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Takes over a connection.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        let mut reader = stream.try_clone()?;
        let shared = Arc::new(Shared {
            writer: Mutex::new(stream),
            next: AtomicU32::new(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let for_reader = Arc::clone(&shared);
        thread::spawn(move || {
            let reason = match for_reader.dispatch(&mut reader) {
                Ok(()) => "it closed the connection".into(),
                Err(e) => e.to_string(),
            };
            let mut state = lock(&for_reader.state);
            state.closed = Some(reason);
            // Their receivers wake up with an error.
            state.sessions.clear();
            for_reader.changed.notify_all();
        });
        Ok(Self { shared })
    }

    /// Waits until the host accepts commands. `false`: not within the time.
    pub(crate) fn wait_ready(&self, limit: Duration) -> Result<bool, ChannelError> {
        let state = lock(&self.shared.state);
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| state.hello.is_none() && state.closed.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match (&state.closed, state.hello) {
            (Some(reason), _) => Err(ChannelError::Closed(reason.clone())),
            (None, Some(VERSION)) => Ok(true),
            (None, Some(version)) => Err(ChannelError::Version(version)),
            (None, None) => Ok(false),
        }
    }

    /// Ends the connection; running commands fail with [`ChannelError::Closed`].
    pub(crate) fn close(&self) {
        let _ = lock(&self.shared.writer).shutdown(Shutdown::Both);
    }

    /// Asks the host to power off.
    pub(crate) fn power_off(&self) -> Result<(), ChannelError> {
        self.shared.send(0, Body::PowerOff)
    }

    /// A new session's number; its events go to `sender`.
    fn register(&self, sender: mpsc::Sender<Body>) -> u32 {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let mut state = lock(&self.shared.state);
        // A closed channel's session ends at once: its sender is dropped here.
        if state.closed.is_none() {
            state.sessions.insert(id, sender);
        }
        id
    }

    /// Sends a command on its way.
    pub(crate) fn open(&self, exec: Exec) -> Result<Session, ChannelError> {
        let (sender, events) = mpsc::channel();
        let id = self.register(sender);
        let detached = exec.output.is_some();
        let session = Session { id, events, shared: Arc::clone(&self.shared), detached, ended: false };
        self.shared.send(id, Body::Exec(exec))?;
        Ok(session)
    }
}

/// Serves a client's connection as if it were the host: its sessions become sessions of `channel`.
/// Returns when the client is gone, whose commands are then killed, unless they are detached.
pub(crate) fn proxy(channel: &Channel, mut client: UnixStream) -> io::Result<()> {
    let writer = Arc::new(Mutex::new(client.try_clone()?));
    frame::write(&mut *lock(&writer), &Frame { id: 0, body: Body::Hello { version: VERSION } })?;
    // By the client's numbers. The events are taken by a thread a session, so that a client that does
    // not read one command's output holds up that command only.
    let mut sessions = HashMap::new();
    while let Some(Frame { id, body }) = frame::read(&mut client)? {
        match body {
            Body::Exec(exec) => {
                let (sender, events) = mpsc::channel();
                let upstream = channel.register(sender);
                let detached = exec.output.is_some();
                let writer = Arc::clone(&writer);
                thread::spawn(move || {
                    for body in events {
                        if frame::write(&mut *lock(&writer), &Frame { id, body }).is_err() {
                            break;
                        }
                    }
                });
                sessions.insert(id, (upstream, detached));
                if channel.shared.send(upstream, Body::Exec(exec)).is_err() {
                    break;
                }
            }
            body => {
                if let Some((upstream, _)) = sessions.get(&id)
                    && channel.shared.send(*upstream, body).is_err()
                {
                    break;
                }
            }
        }
    }
    for (upstream, detached) in sessions.into_values() {
        let open = lock(&channel.shared.state).sessions.remove(&upstream).is_some();
        if open && !detached {
            let _ = channel.shared.send(upstream, Body::Signal { signal: libc::SIGKILL, group: true });
        }
    }
    Ok(())
}

impl Shared {
    fn send(&self, id: u32, body: Body) -> Result<(), ChannelError> {
        frame::write(&mut *lock(&self.writer), &Frame { id, body }).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => ChannelError::Refused(e.to_string()),
            _ => ChannelError::Closed(e.to_string()),
        })
    }

    fn dispatch(&self, reader: &mut UnixStream) -> io::Result<()> {
        while let Some(Frame { id, body }) = frame::read(reader)? {
            let mut state = lock(&self.state);
            match body {
                Body::Hello { version } => {
                    state.hello = Some(version);
                    self.changed.notify_all();
                }
                // A session that nobody waits for any more is no error.
                body => {
                    let last = matches!(body, Body::Ended(_) | Body::Refused(_));
                    if let Some(session) = state.sessions.get(&id) {
                        let _ = session.send(body);
                    }
                    if last {
                        state.sessions.remove(&id);
                    }
                }
            }
        }
        Ok(())
    }

    fn closed(&self) -> ChannelError {
        let reason = lock(&self.state).closed.clone();
        ChannelError::Closed(reason.unwrap_or_else(|| "the connection ended".into()))
    }
}

/// A command under way. Dropped before its end, it kills the command with its process group, unless
/// the command is detached.
pub(crate) struct Session {
    id: u32,
    events: mpsc::Receiver<Body>,
    shared: Arc<Shared>,
    detached: bool,
    ended: bool,
}

impl Session {
    /// The next event; `None` when the deadline passed.
    fn event(&mut self, deadline: Option<Instant>) -> Result<Option<Body>, ChannelError> {
        let body = match deadline {
            None => self.events.recv().map_err(|_| self.shared.closed())?,
            Some(deadline) => {
                match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(body) => body,
                    Err(mpsc::RecvTimeoutError::Timeout) => return Ok(None),
                    Err(mpsc::RecvTimeoutError::Disconnected) => return Err(self.shared.closed()),
                }
            }
        };
        self.ended |= matches!(body, Body::Ended(_) | Body::Refused(_));
        Ok(Some(body))
    }

    /// Waits for a detached command to start; its process id in the host.
    pub(crate) fn started(&mut self, limit: Duration) -> Result<u32, ChannelError> {
        match self.event(Some(Instant::now() + limit))? {
            Some(Body::Started { pid }) => Ok(pid),
            Some(Body::Refused(reason)) => Err(ChannelError::Refused(reason)),
            Some(_) | None => Err(ChannelError::Refused("the host did not start the command in time".into())),
        }
    }

    /// Waits for a detached command to end; `None`: it still runs after that time.
    pub(crate) fn ended(&mut self, limit: Duration) -> Result<Option<Status>, ChannelError> {
        let deadline = Instant::now() + limit;
        loop {
            match self.event(Some(deadline))? {
                Some(Body::Ended(status)) => return Ok(Some(status)),
                Some(Body::Refused(reason)) => return Err(ChannelError::Refused(reason)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Sends a signal to the command.
    pub(crate) fn signal(&self, signal: i32, group: bool) -> Result<(), ChannelError> {
        self.shared.send(self.id, Body::Signal { signal, group })
    }

    /// Carries the streams until the command ends: `None` when the deadline passed before that.
    pub(crate) fn run(
        &mut self,
        stdin: Option<Box<dyn Read + Send>>,
        deadline: Option<Instant>,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Option<Status>, ChannelError> {
        let credit = Arc::new(Credit::default());
        let input_error = Arc::new(Mutex::new(None));
        if let Some(from) = stdin {
            let (id, shared, credit) = (self.id, Arc::clone(&self.shared), Arc::clone(&credit));
            let input_error = Arc::clone(&input_error);
            thread::spawn(move || {
                if let Err(e) = feed(id, &shared, &credit, from) {
                    *lock(&input_error) = Some(e);
                }
                let _ = shared.send(id, Body::End(Stream::Stdin));
            });
        }
        let result = loop {
            match self.event(deadline) {
                Ok(Some(Body::Data(stream, Bytes(bytes)))) => {
                    if let Err(e) = output(stream, &bytes) {
                        break Err(ChannelError::Output(e));
                    }
                    if let Err(e) = self.shared.send(self.id, Body::Ack(stream)) {
                        break Err(e);
                    }
                }
                Ok(Some(Body::Ack(_))) => credit.give(),
                Ok(Some(Body::Ended(status))) => break Ok(Some(status)),
                Ok(Some(Body::Refused(reason))) => break Err(ChannelError::Refused(reason)),
                Ok(Some(_)) => {}
                Ok(None) => break Ok(None),
                Err(e) => break Err(e),
            }
        };
        credit.close();
        // A command whose input broke off must not pass for one that got all of it.
        match lock(&input_error).take() {
            Some(e) if result.is_ok() => Err(ChannelError::Input(e)),
            _ => result,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        lock(&self.shared.state).sessions.remove(&self.id);
        if !self.ended && !self.detached {
            let _ = self.signal(libc::SIGKILL, true);
        }
    }
}

/// Chunks of stdin that may be sent; `None` once the command has ended.
struct Credit {
    left: Mutex<Option<usize>>,
    more: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self { left: Mutex::new(Some(WINDOW)), more: Condvar::new() }
    }
}

impl Credit {
    fn take(&self) -> bool {
        let left = lock(&self.left);
        let mut left = self.more.wait_while(left, |l| *l == Some(0)).unwrap_or_else(PoisonError::into_inner);
        match left.as_mut() {
            Some(left) => {
                *left -= 1;
                true
            }
            None => false,
        }
    }

    fn give(&self) {
        if let Some(left) = lock(&self.left).as_mut() {
            *left += 1;
        }
        self.more.notify_one();
    }

    fn close(&self) {
        *lock(&self.left) = None;
        self.more.notify_all();
    }
}

fn feed(id: u32, shared: &Shared, credit: &Credit, mut from: Box<dyn Read + Send>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_CHUNK];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if !credit.take() || shared.send(id, Body::Data(Stream::Stdin, Bytes(buffer[..n].to_vec()))).is_err()
        {
            return Ok(());
        }
    }
}

/// What a command wrote, with a limit so that a command that floods cannot take this machine's memory.
#[derive(Default)]
pub(crate) struct Collector {
    /// Standard output so far.
    pub(crate) stdout: Vec<u8>,
    /// Standard error so far.
    pub(crate) stderr: Vec<u8>,
}

/// Most bytes of one stream kept in memory; larger results go to a file with `get`.
const MAX_COLLECTED: usize = 1 << 30;

impl Collector {
    pub(crate) fn take(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let buffer = if stream == Stream::Stderr { &mut self.stderr } else { &mut self.stdout };
        if buffer.len() + bytes.len() > MAX_COLLECTED {
            return Err(io::Error::other(format!("more than {MAX_COLLECTED} bytes")));
        }
        buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The end of both streams, for messages.
    pub(crate) fn tail(&self) -> String {
        let end = |bytes: &[u8]| {
            let from = bytes.len().saturating_sub(1000);
            String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
        };
        [end(&self.stdout), end(&self.stderr)].join(" | ")
    }
}
