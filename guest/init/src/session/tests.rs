//! Sessions over socket pairs, with ordinary processes in the place of tasks.

use super::*;
use lathe_guest_protocol::{decode, encode, frame_length};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::thread::{JoinHandle, spawn};

/// A shell command; its end is noticed by a thread that reads from a pipe only the shell holds.
struct ShellTask {
    child: Child,
    stdout: ChildStdout,
    stderr: ChildStderr,
    end: std::io::PipeReader,
    reported_start: bool,
}

impl ShellTask {
    fn new(script: &str) -> Self {
        let (end, end_writer) = std::io::pipe().unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(end_writer) // held open by the shell and by nothing else
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Self { child, stdout, stderr, end, reported_start: false }
    }
}

impl Task for ShellTask {
    fn events(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
    fn next_event(&mut self) -> Option<TaskEvent> {
        use std::os::unix::process::ExitStatusExt;
        if !self.reported_start {
            self.reported_start = true;
            return Some(TaskEvent::Started(Duration::from_nanos(1)));
        }
        let status = self.child.wait().unwrap();
        let status = match status.code() {
            Some(code) => ExitStatus::Code(code),
            None => ExitStatus::Signal(status.signal().unwrap()),
        };
        Some(TaskEvent::Ended(status))
    }
    fn stream(&self, which: Output) -> BorrowedFd<'_> {
        match which {
            Output::Stdout => self.stdout.as_fd(),
            Output::Stderr => self.stderr.as_fd(),
        }
    }
    fn signal(&mut self, number: i32) {
        let signal = nix::sys::signal::Signal::try_from(number).unwrap();
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal);
    }
    fn kill(&mut self) {
        let _ = self.child.kill();
    }
    fn usage(&self) -> Resources {
        Resources { cpu_us: 3, ..Resources::default() }
    }
}

struct PipeButton(std::io::PipeReader);

impl PowerButton for PipeButton {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.0.as_fd()]
    }
    fn pressed(&mut self) -> bool {
        self.0.read(&mut [0]).unwrap() == 1
    }
}

struct Host {
    stream: UnixStream,
    button: std::io::PipeWriter,
    guest: JoinHandle<Result<(), LinkError>>,
}

fn start(script: &str, grace: Duration) -> Host {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (button_reader, button) = std::io::pipe().unwrap();
    let mut task = ShellTask::new(script);
    let guest = spawn(move || {
        let mut link = Link::new(theirs.into()).unwrap();
        run(&mut link, &mut task, &mut PipeButton(button_reader), grace)
    });
    Host { stream: ours, button, guest }
}

impl Host {
    fn next(&mut self) -> FromGuest {
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix).unwrap();
        let mut body = vec![0; frame_length(prefix).unwrap()];
        self.stream.read_exact(&mut body).unwrap();
        decode(&body).unwrap()
    }

    fn say(&mut self, message: &ToGuest) {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
    }

    /// Reads until this much of stdout has come.
    fn wait_for_stdout(&mut self, expected: &[u8]) {
        let mut got = Vec::new();
        while got.len() < expected.len() {
            if let FromGuest::Output { stream: Output::Stdout, data } = self.next() {
                got.extend(data);
            }
        }
        assert_eq!(got, expected);
    }

    /// Everything to the end: stdout, stderr, the last message.
    fn finish(mut self) -> (Vec<u8>, Vec<u8>, FromGuest) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next() {
                FromGuest::Output { stream: Output::Stdout, data } => stdout.extend(data),
                FromGuest::Output { stream: Output::Stderr, data } => stderr.extend(data),
                FromGuest::Started { .. } | FromGuest::Usage(_) | FromGuest::Hello { .. } => {}
                end => {
                    self.guest.join().unwrap().unwrap();
                    return (stdout, stderr, end);
                }
            }
        }
    }
}

fn exit_status(end: FromGuest) -> ExitStatus {
    match end {
        FromGuest::Exited { status, usage } => {
            assert_eq!(usage.cpu_us, 3);
            status
        }
        other => panic!("not an exit: {other:?}"),
    }
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn output_is_complete_before_the_exit_is_reported() {
    let (stdout, stderr, end) = start("echo out; echo err >&2; exit 7", LONG).finish();
    assert_eq!((&stdout[..], &stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(exit_status(end), ExitStatus::Code(7));
}

#[test]
fn a_host_that_does_not_read_stops_the_task_and_loses_nothing() {
    // Four megabytes: far more than the backlog, the socket and the pipe hold together.
    let host = start("seq -f %015.0f 262144; echo done >&2", LONG);
    let (stdout, stderr, end) = host.finish();
    let expected: String = (1..=262_144).map(|n| format!("{n:015}\n")).collect();
    assert!(stdout == expected.as_bytes(), "output was lost or reordered");
    assert_eq!(stderr, b"done\n");
    assert_eq!(exit_status(end), ExitStatus::Code(0));
}

#[test]
fn a_full_backlog_leaves_the_tasks_pipes_unread() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut link = Link::new(ours.into()).unwrap();
    let mut task = ShellTask::new("echo waiting");
    // Its output is in the pipe now, and its end is noticeable.
    task.child.wait().unwrap();
    let filler = FromGuest::Output { stream: Output::Stdout, data: vec![0; MAX_OUTPUT] };
    while link.backlog() < BACKLOG_LIMIT {
        link.queue(&filler).unwrap();
        link.flush().unwrap();
    }
    let (button, _pressed) = std::io::pipe().unwrap();
    let button = PipeButton(button);
    let life = Lifecycle::new(LONG, since_boot());
    let session = Session { link: &mut link, task: &mut task, life, end: None, open: [true; 2] };
    let ready = session.wait(&button).unwrap();
    assert!(ready.events && ready.streams == [false, false], "output was taken that has no room");

    let reader = spawn(move || std::io::copy(&mut theirs, &mut std::io::sink()));
    session.link.drain().unwrap();
    assert!(session.wait(&button).unwrap().streams[0], "output is not taken when there is room again");
    drop(link);
    reader.join().unwrap().unwrap();
}

#[test]
fn signals_reach_the_task() {
    let mut host = start("trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.01; done", LONG);
    host.wait_for_stdout(b"ready\n");
    host.say(&ToGuest::Signal(15));
    let (stdout, _, end) = host.finish();
    assert_eq!(stdout, b"caught\n");
    assert_eq!(exit_status(end), ExitStatus::Code(3));
}

#[test]
fn shutdown_kills_a_task_that_ignores_signals() {
    let mut host = start("trap '' TERM; echo ready; while :; do :; done", LONG);
    host.wait_for_stdout(b"ready\n");
    host.say(&ToGuest::Shutdown);
    assert_eq!(exit_status(host.finish().2), ExitStatus::Signal(9));
}

#[test]
fn the_power_button_asks_first_and_kills_after_the_grace() {
    let mut host =
        start("trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done", Duration::from_millis(200));
    host.wait_for_stdout(b"ready\n");
    host.button.write_all(&[1]).unwrap();
    let (stdout, _, end) = host.finish();
    assert_eq!(stdout, b"asked\n");
    assert_eq!(exit_status(end), ExitStatus::Signal(9));
}

#[test]
fn a_lost_host_kills_the_task() {
    let mut host = start("echo ready; while :; do sleep 0.01; done", LONG);
    host.wait_for_stdout(b"ready\n");
    drop(host.stream);
    assert!(host.guest.join().unwrap().is_err());
}

#[test]
fn decisions_follow_the_phases() {
    let at = Duration::from_secs;
    let mut life = Lifecycle::new(at(10), at(0));
    assert_eq!(life.on_message(&ToGuest::Signal(0)), Action::Nothing, "not a signal");
    assert_eq!(life.on_message(&ToGuest::Signal(65)), Action::Nothing, "not a signal");
    assert_eq!(life.on_message(&ToGuest::Signal(10)), Action::Signal(10));
    assert_eq!(life.on_power_button(at(3)), Action::Signal(15));
    assert_eq!(life.on_power_button(at(4)), Action::Nothing, "a second press does not extend the grace");
    assert_eq!(life.wake_at(), Some(at(5)), "usage is due before the deadline");
    assert!(life.usage_due(at(5)) && !life.usage_due(at(6)));
    assert_eq!(life.on_time(at(12)), Action::Nothing);
    assert_eq!(life.on_time(at(13)), Action::Kill);
    assert_eq!(life.on_time(at(14)), Action::Nothing, "killed once");
    assert_eq!(life.on_message(&ToGuest::Shutdown), Action::Nothing);
    life.phase = Phase::Ended;
    assert_eq!(life.on_message(&ToGuest::Signal(15)), Action::Nothing);
    assert_eq!(life.wake_at(), None);
}
