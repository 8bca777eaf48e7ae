//! A microVM from start to end: the VMM process, and the conversation with the guest.

use std::path::Path;
use std::process::{ExitStatus as ProcessExit, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use lathe_api::job::{TaskExit, TaskState, Usage};
use lathe_api::node::LogStream;
use lathe_guest_protocol::{
    AGENT_PORT, ExitStatus, FrameError, FromGuest, Output, Resources, ToGuest, decode, encode, frame_length,
};
use lathe_vmm::exit::ExitReason;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::process::{Child, ChildStderr};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::control::Request;
use super::exec;
use super::launch::{ClassLaunch, Launch};
use super::session::{Event, Session, Violation};
use super::{Recorder, files};
use crate::cgroup;
use crate::journal::End;

/// How long a guest may take to say its first word. Nested under emulation a kernel takes tens of
/// seconds; on metal it takes one.
const HELLO_PATIENCE: Duration = Duration::from_secs(180);

/// How long a guest may take to power off after its task has ended.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(20);

/// What of the VMM's stderr is kept.
const LAST_WORDS: usize = 8 << 10;

/// What the guest said of the end.
#[derive(Debug, PartialEq)]
enum Verdict {
    Exited(ExitStatus),
    Failed(String),
    Misbehaved(String),
}

/// Runs the microVM of `launch` to its end.
///
/// # Errors
/// When the VMM could not be started at all.
pub async fn run(
    launch: &Launch,
    recorder: &mut Recorder,
    mut requests: mpsc::Receiver<Request>,
) -> anyhow::Result<End> {
    let ClassLaunch::Microvm { vmm, config, vsock, console, lock_memory } = &launch.class else {
        anyhow::bail!("not a microVM");
    };
    let mut socket = vsock.clone().into_os_string();
    socket.push(format!("_{AGENT_PORT}"));
    files::remove(socket.as_ref())?;
    // Before the guest can connect.
    let listener = UnixListener::bind(&socket).context("cannot listen for the guest")?;
    let mut child = exec::command(&cgroup::task_of(&launch.cgroup), *lock_memory, vmm)
        .arg("--config")
        .arg(config)
        .arg("--api-socket")
        .arg(launch.run_dir.join("vmm"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the VMM")?;
    let words = child.stderr.take().map(|stderr| tokio::spawn(last_words(stderr)));
    let mut machine = Machine {
        session: Session::new(launch.task.clone()),
        grace: Duration::from_secs(launch.task.grace_seconds.into()),
        verdict: None,
        stopping: false,
        killed: None,
        deadline: Some(Instant::now() + HELLO_PATIENCE),
        to_guest: None,
    };
    let status = machine.serve(&listener, &mut child, &mut requests, recorder).await?;
    files::remove(socket.as_ref())?;
    let words = match words {
        Some(task) => task.await.unwrap_or_default(),
        None => String::new(),
    };
    Ok(machine.end(status, &words, console, recorder.last_usage()))
}

struct Machine {
    session: Session,
    grace: Duration,
    verdict: Option<Verdict>,
    stopping: bool,
    /// Why this supervisor killed the VMM, if it did.
    killed: Option<String>,
    /// When patience ends, whatever it is that is awaited.
    deadline: Option<Instant>,
    to_guest: Option<mpsc::Sender<ToGuest>>,
}

impl Machine {
    async fn serve(
        &mut self,
        listener: &UnixListener,
        child: &mut Child,
        requests: &mut mpsc::Receiver<Request>,
        recorder: &mut Recorder,
    ) -> anyhow::Result<ProcessExit> {
        let mut from_guest: Option<mpsc::Receiver<Result<FromGuest, GuestError>>> = None;
        let status = loop {
            let deadline = self.deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                // The first connection is lathe-init's: nothing else runs in the guest before it.
                // A later one is the task's, and is not accepted.
                Ok((stream, _)) = listener.accept(), if from_guest.is_none() => {
                    let (reader, writer) = stream.into_split();
                    from_guest = Some(spawn_reader(reader));
                    self.to_guest = Some(spawn_writer(writer));
                }
                Some(message) = next(&mut from_guest) => self.on_guest(message, recorder),
                Some(Request::Stop) = requests.recv() => self.on_stop(recorder),
                status = child.wait() => break status?,
                () = sleep_until(deadline), if self.deadline.is_some() => {
                    self.on_deadline();
                    child.start_kill()?;
                }
            }
        };
        // What the guest sent before it went is still on its way.
        let drain = async {
            while let Some(message) = next(&mut from_guest).await {
                self.on_guest(message, recorder);
            }
        };
        let _ = timeout(Duration::from_secs(5), drain).await;
        Ok(status)
    }

    fn on_guest(&mut self, message: Result<FromGuest, GuestError>, recorder: &mut Recorder) {
        if self.verdict.is_some() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = message.map_err(|error| error.to_string()).and_then(|message| {
            let now = u64::try_from(now.as_nanos()).unwrap_or(0);
            self.session.receive(message, now).map_err(|v: Violation| v.to_string())
        });
        match event {
            Ok(Event::Send(answer)) => {
                tracing::info!(guest = self.session.software(), "the guest reports");
                self.send(answer);
                if !self.stopping {
                    self.deadline = None;
                }
            }
            Ok(Event::Started) => recorder.running(),
            Ok(Event::Output(Output::Stdout, data)) => recorder.output(LogStream::Stdout, &data),
            Ok(Event::Output(Output::Stderr, data)) => recorder.output(LogStream::Stderr, &data),
            Ok(Event::Usage(used)) => recorder.usage(usage(&used)),
            Ok(Event::Exited(status, used)) => {
                recorder.usage(usage(&used));
                recorder.ended();
                self.decide(Verdict::Exited(status));
            }
            Ok(Event::Failed(reason)) => self.decide(Verdict::Failed(reason)),
            Err(reason) => {
                self.decide(Verdict::Misbehaved(reason));
                // Nothing to wait for.
                self.deadline = Some(Instant::now());
            }
        }
    }

    fn decide(&mut self, verdict: Verdict) {
        self.verdict = Some(verdict);
        self.deadline = Some(Instant::now() + POWER_OFF_PATIENCE);
    }

    fn on_stop(&mut self, recorder: &mut Recorder) {
        if self.stopping || self.verdict.is_some() {
            return;
        }
        self.stopping = true;
        recorder.stopping();
        if self.session.is_connected() {
            self.send(ToGuest::Signal(libc::SIGTERM));
            self.deadline = Some(Instant::now() + self.grace);
        } else {
            // There is no task yet that could end in peace.
            self.deadline = Some(Instant::now());
        }
    }

    fn on_deadline(&mut self) {
        self.deadline = None;
        let seconds = self.grace.as_secs();
        self.killed = Some(match (&self.verdict, self.stopping) {
            (Some(_), _) => "it did not power off".to_owned(),
            (None, true) => format!("it did not end within {seconds} s of SIGTERM"),
            (None, false) => {
                format!("the guest did not report to the agent within {} s", HELLO_PATIENCE.as_secs())
            }
        });
    }

    /// Queues a message; a guest that reads nothing loses it, and gets killed in time.
    fn send(&self, message: ToGuest) {
        if let Some(queue) = &self.to_guest {
            let _ = queue.try_send(message);
        }
    }

    fn end(self, status: ProcessExit, words: &str, console: &Path, used: Usage) -> End {
        let failed = |reason: String, lost: bool| End {
            state: TaskState::Failed,
            reason: Some(reason),
            lost,
            exit: None,
            usage: used,
        };
        let exited = |exit, reason| End {
            state: TaskState::Exited,
            reason,
            lost: false,
            exit: Some(exit),
            usage: used,
        };
        match self.verdict {
            Some(Verdict::Exited(status)) => return exited(task_exit(status), None),
            Some(Verdict::Failed(reason) | Verdict::Misbehaved(reason)) => return failed(reason, false),
            None => {}
        }
        match self.killed {
            Some(reason) if self.stopping => return exited(TaskExit::Signal(libc::SIGKILL), Some(reason)),
            // A guest that never came up is the host's failure: kernel, initramfs or VMM.
            Some(reason) => return failed(with_console(reason, console), true),
            None => {}
        }
        let word = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let said = |text: String| if word.is_empty() { text } else { format!("{text}: {word}") };
        match status.code().and_then(ExitReason::from_code) {
            Some(ExitReason::PowerOff) => {
                failed("the guest powered off before its task had ended".into(), false)
            }
            Some(ExitReason::Reboot) => failed("the guest rebooted before its task had ended".into(), false),
            Some(ExitReason::Crash) => failed(with_console("the guest crashed".into(), console), false),
            Some(ExitReason::Killed) => failed("the VMM was killed through its control socket".into(), true),
            Some(reason @ (ExitReason::Internal | ExitReason::Unsupported)) => {
                failed(said(reason.to_string()), true)
            }
            Some(ExitReason::BadConfig) => failed(said("the VMM refused the machine".into()), false),
            None => {
                use std::os::unix::process::ExitStatusExt;
                let how = status.signal().map_or_else(
                    || format!("exited with status {}", status.code().unwrap_or(-1)),
                    |signal| format!("was killed by signal {signal}"),
                );
                failed(said(format!("the VMM {how}")), true)
            }
        }
    }
}

/// Adds the console's last line, where kernels say why they panic.
fn with_console(reason: String, console: &Path) -> String {
    let text = files::read_bounded(console, 32 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
    let line = text.lines().rev().find(|l| l.contains("panic")).or_else(|| text.lines().next_back());
    match line {
        Some(line) => {
            let line: String = line.chars().filter(|c| !c.is_control()).take(200).collect();
            format!("{reason}; its console's last word: {line}")
        }
        None => reason,
    }
}

fn task_exit(status: ExitStatus) -> TaskExit {
    match status {
        ExitStatus::Code(code) => TaskExit::Code(code),
        ExitStatus::Signal(signal) => TaskExit::Signal(signal),
        ExitStatus::OutOfMemory => TaskExit::OutOfMemory,
    }
}

fn usage(used: &Resources) -> Usage {
    Usage {
        cpu_us: used.cpu_us,
        memory_peak_bytes: used.memory_peak,
        output_dropped_bytes: used.output_dropped,
    }
}

/// Why no further message comes.
#[derive(Debug, thiserror::Error)]
enum GuestError {
    #[error("{0}")]
    Frame(FrameError),
    #[error("the connection to the guest failed: {0}")]
    Io(#[from] std::io::Error),
}

async fn next(
    receiver: &mut Option<mpsc::Receiver<Result<FromGuest, GuestError>>>,
) -> Option<Result<FromGuest, GuestError>> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => None,
    }
}

/// Reads frames until the guest closes. The short queue is the backpressure: a guest that writes
/// faster than the spool takes it blocks in its own write.
fn spawn_reader(
    mut stream: impl AsyncRead + Unpin + Send + 'static,
) -> mpsc::Receiver<Result<FromGuest, GuestError>> {
    let (sender, receiver) = mpsc::channel(8);
    tokio::spawn(async move {
        loop {
            let message = read_frame(&mut stream).await;
            match message {
                Ok(None) => break,
                Ok(Some(message)) => {
                    if sender.send(Ok(message)).await.is_err() {
                        break;
                    }
                }
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    break;
                }
            }
        }
    });
    receiver
}

async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<FromGuest>, GuestError> {
    let mut prefix = [0; 4];
    // A guest that dies closes without warning, at or inside a frame; the VMM's exit says why.
    if stream.read_exact(&mut prefix).await.is_err() {
        return Ok(None);
    }
    let mut body = vec![0; frame_length(prefix).map_err(GuestError::Frame)?];
    if stream.read_exact(&mut body).await.is_err() {
        return Ok(None);
    }
    decode(&body).map(Some).map_err(GuestError::Frame)
}

fn spawn_writer(mut stream: impl AsyncWrite + Unpin + Send + 'static) -> mpsc::Sender<ToGuest> {
    let (sender, mut receiver) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            let Ok(frame) = encode(&message) else {
                tracing::error!("a message to the guest is too long; its environment may be too large");
                break;
            };
            if stream.write_all(&frame).await.is_err() {
                break;
            }
        }
    });
    sender
}

/// The end of what the VMM writes to stderr.
async fn last_words(mut stderr: ChildStderr) -> String {
    let mut tail = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..count]);
        let excess = tail.len().saturating_sub(LAST_WORDS);
        tail.drain(..excess);
    }
    let text = String::from_utf8_lossy(&tail).into_owned();
    if !text.trim().is_empty() {
        tracing::info!(vmm = text.trim(), "the VMM's last words");
    }
    text
}

/// Whether the task's description fits a frame; checked before anything is made for it.
pub fn fits_frame(task: &lathe_guest_protocol::TaskSpec) -> bool {
    let start = ToGuest::Start { version: 0, wall_clock_ns: u64::MAX, task: Box::new(task.clone()) };
    encode(&start).is_ok()
}

#[cfg(test)]
#[path = "microvm_tests.rs"]
mod tests;
