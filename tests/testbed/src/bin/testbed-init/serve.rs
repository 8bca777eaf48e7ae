//! The exec server: starts the commands that arrive on the virtio-serial port and carries their
//! streams. One thread reads the port; each session has threads of its own, so that no command can
//! hold up another.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use lathe_testbed::frame::{self, Body, Bytes, Exec, Frame, MAX_CHUNK, Status, Stream, VERSION, WINDOW};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::{log, mounts};

/// The port's name on QEMU's command line.
const PORT: &str = "lathe.exec";

/// The port and the sessions on it.
struct Server {
    port: Mutex<File>,
    sessions: Mutex<HashMap<u32, Arc<Session>>>,
}

/// A running command.
struct Session {
    pid: Pid,
    stdin: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    stdout: Credit,
    stderr: Credit,
}

/// Chunks that may still be sent before the harness acknowledges one.
struct Credit {
    left: Mutex<usize>,
    more: Condvar,
}

impl Credit {
    fn new() -> Self {
        Self { left: Mutex::new(WINDOW), more: Condvar::new() }
    }

    fn take(&self) {
        let left = lock(&self.left);
        let mut left = self.more.wait_while(left, |left| *left == 0).unwrap_or_else(PoisonError::into_inner);
        *left -= 1;
    }

    fn give(&self) {
        *lock(&self.left) += 1;
        self.more.notify_one();
    }
}

/// No thread here panics while it holds a lock; if one did, its data would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves the port until it fails.
pub fn run() -> io::Result<()> {
    let path = find_port()?;
    let mut port = OpenOptions::new().read(true).write(true).open(&path)?;
    let server =
        Arc::new(Server { port: Mutex::new(port.try_clone()?), sessions: Mutex::new(HashMap::new()) });
    server.send(0, Body::Hello { version: VERSION });
    loop {
        match frame::read(&mut port)? {
            Some(frame) => server.handle(frame),
            // No harness is connected at the moment.
            None => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn find_port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).unwrap_or_default().trim() == PORT {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::other(format!("no virtio-serial port is named {PORT}")))
}

impl Server {
    fn send(&self, id: u32, body: Body) {
        if let Err(e) = frame::write(&mut *lock(&self.port), &Frame { id, body }) {
            log(&format!("writing to the harness failed: {e}"));
        }
    }

    fn session(&self, id: u32) -> Option<Arc<Session>> {
        lock(&self.sessions).get(&id).cloned()
    }

    fn handle(self: &Arc<Self>, frame: Frame) {
        let Frame { id, body } = frame;
        match body {
            Body::Exec(exec) => self.start(id, exec),
            Body::PowerOff => power_off(),
            Body::Signal { signal, group } => {
                if let (Some(session), Ok(signal)) = (self.session(id), Signal::try_from(signal)) {
                    // It may have ended by itself meanwhile.
                    let _ = if group { killpg(session.pid, signal) } else { kill(session.pid, signal) };
                }
            }
            Body::Data(Stream::Stdin, bytes) => {
                // Never more than WINDOW chunks wait in this channel. A command that closed its stdin
                // takes none; the acknowledgement keeps the harness's writer going all the same.
                let session = self.session(id);
                let taken = session
                    .and_then(|s| lock(&s.stdin).as_ref().map(|stdin| stdin.send(bytes.0).is_ok()))
                    .unwrap_or(false);
                if !taken {
                    self.send(id, Body::Ack(Stream::Stdin));
                }
            }
            Body::End(Stream::Stdin) => {
                if let Some(session) = self.session(id) {
                    lock(&session.stdin).take();
                }
            }
            Body::Ack(Stream::Stdout) => self.session(id).iter().for_each(|s| s.stdout.give()),
            Body::Ack(Stream::Stderr) => self.session(id).iter().for_each(|s| s.stderr.give()),
            other => log(&format!("the harness sent {other:?}, which only hosts send")),
        }
    }

    fn start(self: &Arc<Self>, id: u32, exec: Exec) {
        let detached = exec.output.is_some();
        let mut child = match spawn(&exec) {
            Ok(child) => child,
            Err(e) => {
                let program = exec.argv.first().map_or("", String::as_str);
                self.send(id, Body::Refused(format!("cannot start {program:?}: {e}")));
                return;
            }
        };
        let (sender, receiver) = mpsc::channel();
        let session = Arc::new(Session {
            pid: Pid::from_raw(child.id() as i32),
            stdin: Mutex::new(exec.stdin.then_some(sender)),
            stdout: Credit::new(),
            stderr: Credit::new(),
        });
        lock(&self.sessions).insert(id, Arc::clone(&session));
        self.send(id, Body::Started { pid: child.id() });

        let ended = Arc::new(AtomicBool::new(false));
        let mut pumps = Vec::new();
        if let Some(stdin) = child.stdin.take() {
            let server = Arc::clone(self);
            // Not joined: it may wait for chunks for as long as the harness likes.
            thread::spawn(move || server.feed(id, stdin, &receiver));
        }
        if !detached {
            if let Some(stdout) = child.stdout.take() {
                let (server, session, ended) = (Arc::clone(self), Arc::clone(&session), Arc::clone(&ended));
                pumps.push(thread::spawn(move || {
                    server.pump(id, stdout, Stream::Stdout, &session.stdout, &ended);
                }));
            }
            if let Some(stderr) = child.stderr.take() {
                let (server, session, ended) = (Arc::clone(self), Arc::clone(&session), Arc::clone(&ended));
                pumps.push(thread::spawn(move || {
                    server.pump(id, stderr, Stream::Stderr, &session.stderr, &ended);
                }));
            }
        }
        let server = Arc::clone(self);
        thread::spawn(move || {
            let status = child.wait();
            ended.store(true, Ordering::Release);
            for pump in pumps {
                let _ = pump.join();
            }
            lock(&server.sessions).remove(&id);
            lock(&session.stdin).take();
            server.send(
                id,
                match status {
                    Ok(status) => Body::Ended(match (status.code(), status.signal()) {
                        (Some(code), _) => Status::Exited(code),
                        (None, signal) => Status::Signaled(signal.unwrap_or(0)),
                    }),
                    Err(e) => Body::Refused(format!("waiting for the command failed: {e}")),
                },
            );
        });
    }

    /// Writes chunks to a command's stdin until the harness ends it or the command closes it.
    fn feed(&self, id: u32, mut stdin: impl Write, chunks: &mpsc::Receiver<Vec<u8>>) {
        let mut open = true;
        for chunk in chunks {
            open = open && stdin.write_all(&chunk).is_ok();
            self.send(id, Body::Ack(Stream::Stdin));
        }
    }

    /// Sends a command's output until its end, or until the command has ended and the pipe is empty:
    /// a daemon that it left behind may hold the pipe open for ever.
    fn pump(
        &self,
        id: u32,
        mut from: impl Read + AsFd + AsRawFd,
        stream: Stream,
        credit: &Credit,
        ended: &AtomicBool,
    ) {
        let mut buffer = vec![0; MAX_CHUNK];
        loop {
            // Looked at before the poll: what the command wrote before it ended is then in the pipe.
            let last = ended.load(Ordering::Acquire);
            let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            let timeout = if last { PollTimeout::ZERO } else { PollTimeout::from(100_u8) };
            match poll(&mut fds, timeout) {
                Ok(0) if last => break,
                Ok(0) => continue,
                Ok(_) => {}
                Err(_) => continue,
            }
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    credit.take();
                    self.send(id, Body::Data(stream, Bytes(buffer[..n].to_vec())));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.send(id, Body::End(stream));
    }
}

fn spawn(exec: &Exec) -> io::Result<Child> {
    let Some((program, arguments)) = exec.argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin")
        .env("HOME", "/root")
        .env("TERM", "dumb")
        .envs(exec.env.iter().map(|(name, value)| (name, value)))
        .current_dir(exec.directory.as_deref().unwrap_or("/root"))
        // A group of its own, so that a command that is given up goes with its children.
        .process_group(0)
        .stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() });
    if let Some(path) = &exec.output {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        command.stdout(file.try_clone()?).stderr(file);
    } else {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    command.spawn()
}

/// SIGTERM, a grace period, SIGKILL, then the data disk and the power.
fn power_off() {
    let everything = Pid::from_raw(-1);
    // Neither PID 1 nor the caller is among them.
    let _ = kill(everything, Signal::SIGTERM);
    for _ in 0..50 {
        if !others_running() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let _ = kill(everything, Signal::SIGKILL);
    mounts::unmount_data_disk();
    let Err(e) = reboot(RebootMode::RB_POWER_OFF);
    log(&format!("cannot power off: {e}"));
}

/// Whether any process but PID 1, this one and kernel threads is there.
fn others_running() -> bool {
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    let own = std::process::id();
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != 1 && *pid != own)
        // Kernel threads and zombies have no command line.
        .any(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
}
