//! Processes of this machine: started so that they die with the harness, recorded so that a later
//! harness can tell them from a stranger that got the same number.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process, identified by its number and its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process number.
    pub pid: i32,
    /// Clock ticks after boot at which it started (`proc_pid_stat(5)`, field 22).
    pub started: u64,
}

impl ProcessId {
    /// The process with this number now; `None` if there is none.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field, the name, may hold spaces and brackets; fields count from behind it.
        let (_, rest) = stat.rsplit_once(") ")?;
        // A zombie holds nothing any more.
        if rest.starts_with('Z') {
            return None;
        }
        let started = rest.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid: i32::try_from(pid).ok()?, started })
    }

    /// This process.
    #[must_use]
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        u32::try_from(self.pid).ok().and_then(Self::of) == Some(self)
    }

    /// Kills it, if it still runs.
    pub fn kill(self) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

type Request = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a command that is killed when this process ends, however it ends.
///
/// The kernel ties that to the *thread* that forked, and threads of tests come and go; so one thread
/// that lives as long as the process starts them all.
pub(crate) fn spawn_mortal(command: &Command, stdout: Stdio, stderr: Stdio) -> io::Result<Child> {
    static LAUNCHER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let launcher = LAUNCHER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, reply) in requests {
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    // setpriv asks for the signal and becomes the command.
    let mut mortal = Command::new("setpriv");
    mortal
        .args(["--pdeathsig", "KILL", "--"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        // A Ctrl-C on the terminal is for the harness, which then takes its hosts down.
        .process_group(0);
    let (reply, result) = mpsc::channel();
    launcher.send((mortal, reply)).map_err(io::Error::other)?;
    result.recv().map_err(io::Error::other)?
}
