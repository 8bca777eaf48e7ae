//! Running a provider's program: what it reads, what it may write, and for how long.
//!
//! The program gets nothing of the coordinator's: an environment of its own, `/` as its directory, none of
//! its files, and a process group, which is killed as a whole when the program has ended, takes too long,
//! writes too much, or the coordinator stops.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::contract::MAX_ANSWER_BYTES;
use super::one_line;

/// Where the program finds others; it sets what else it needs.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Kept of what it says on its standard error: the end, where the reason is.
const MAX_SAID_BYTES: usize = 16 << 10;
const MAX_SAID_LINES: usize = 64;
const MAX_LINE_CHARS: usize = 300;
/// For output that is still under way when the program's whole group is gone.
const DRAIN: Duration = Duration::from_secs(2);

/// A program that gave no answer. Displayed as one line.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not there, or not a program.
    #[error("{path} cannot be started: {source}")]
    Start {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It took too long.
    #[error("it did not answer within {}s and was killed{}", .after.as_secs(), ended(.said))]
    TimedOut {
        /// What it was given.
        after: Duration,
        /// The last line of its standard error.
        said: Option<String>,
    },
    /// It wrote too much.
    #[error("it answered more than {MAX_ANSWER_BYTES} bytes and was killed{}", ended(.said))]
    TooLong {
        /// The last line of its standard error.
        said: Option<String>,
    },
    /// It failed.
    #[error("it ended with {status}{}", ended(.said))]
    Failed {
        /// How.
        status: ExitStatus,
        /// The last line of its standard error.
        said: Option<String>,
    },
    /// Something that left its process group holds its output open.
    #[error("a process that it left behind holds its standard output open")]
    HeldOpen,
    /// The coordinator is stopping.
    #[error("the coordinator stopped before it answered")]
    Stopped,
    /// Its streams or its end could not be followed.
    #[error("it cannot be followed: {0}")]
    Io(#[from] std::io::Error),
}

fn ended(said: &Option<String>) -> String {
    said.as_ref().map(|said| format!(": {said}")).unwrap_or_default()
}

/// Why a program is not waited for any more.
enum End {
    /// It ended.
    Itself,
    /// It took too long.
    Late,
    /// It writes too much.
    TooLong,
    /// The coordinator stops.
    Stopped,
}

/// Runs the program with `input` on its standard input; what it wrote to its standard output.
///
/// # Errors
/// When it gave no answer; whether it did anything is then unknown.
pub async fn run(
    path: &Path,
    input: Vec<u8>,
    timeout: Duration,
    stop: &CancellationToken,
) -> Result<Vec<u8>, CommandError> {
    let start = |source| CommandError::Start { path: path.to_owned(), source };
    let mut child = spawn(path).map_err(start)?;
    let group = Group::of(&child)?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(std::io::Error::other("it has no streams").into());
    };
    // One that does not read it to its end is judged by what it answers.
    tokio::spawn(async move { stdin.write_all(&input).await });
    let too_long = CancellationToken::new();
    let output = tokio::spawn(read_answer(stdout, too_long.clone()));
    let said = tokio::spawn(read_end(stderr));
    let end = group.wait(timeout, &too_long, stop).await?;
    let status = child.wait().await?;
    let said = tokio::time::timeout(DRAIN, said).await.ok().and_then(Result::ok).unwrap_or_default();
    let said = tell(path, &said);
    match end {
        // Nobody reads what comes after the most that is read, which may end it before it is killed.
        _ if too_long.is_cancelled() => return Err(CommandError::TooLong { said }),
        End::Itself if status.success() => {}
        End::Itself => return Err(CommandError::Failed { status, said }),
        End::Late => return Err(CommandError::TimedOut { after: timeout, said }),
        End::TooLong => return Err(CommandError::TooLong { said }),
        End::Stopped => return Err(CommandError::Stopped),
    }
    let output = tokio::time::timeout(DRAIN, output).await.map_err(|_| CommandError::HeldOpen)?;
    let output = output.map_err(std::io::Error::other)??;
    // It may have ended before the last of it was read.
    if output.len() > MAX_ANSWER_BYTES { Err(CommandError::TooLong { said }) } else { Ok(output) }
}

fn spawn(path: &Path) -> std::io::Result<Child> {
    Command::new(path)
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}

/// A process group whose leader has not been reaped: killed when this is dropped.
struct Group(Pid);

impl Group {
    fn of(child: &Child) -> std::io::Result<Self> {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        id.map(|id| Self(Pid::from_raw(id))).ok_or_else(|| std::io::Error::other("it has no process ID"))
    }

    /// Waits for the leader's end or for a reason to make one, and kills what is left of the group. The
    /// leader is left to be reaped: until then its number, which is the group's, is nobody else's.
    async fn wait(
        self,
        timeout: Duration,
        too_long: &CancellationToken,
        stop: &CancellationToken,
    ) -> std::io::Result<End> {
        let leader = self.0;
        let mut exited = tokio::task::spawn_blocking(move || {
            waitid(Id::Pid(leader), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        });
        let end = tokio::select! {
            biased;
            exited = &mut exited => {
                exited.map_err(std::io::Error::other)??;
                return Ok(End::Itself);
            }
            () = stop.cancelled() => End::Stopped,
            () = too_long.cancelled() => End::TooLong,
            () = tokio::time::sleep(timeout) => End::Late,
        };
        drop(self);
        exited.await.map_err(std::io::Error::other)??;
        Ok(end)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Nobody is left in it, then.
        let _ = killpg(self.0, Signal::SIGKILL);
    }
}

/// Reads an answer to its end, or says that it has none and reads no more.
async fn read_answer(
    stream: impl AsyncRead + Unpin,
    too_long: CancellationToken,
) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut stream = stream.take(MAX_ANSWER_BYTES as u64 + 1);
    stream.read_to_end(&mut answer).await?;
    if answer.len() > MAX_ANSWER_BYTES {
        too_long.cancel();
    }
    Ok(answer)
}

/// Reads all, and keeps the end.
async fn read_end(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    // What fails to be read is not said.
    while let Ok(1..) = stream.read_buf(&mut kept).await {
        kept.drain(..kept.len().saturating_sub(MAX_SAID_BYTES));
    }
    kept
}

/// Logs what a program said; its last line.
fn tell(path: &Path, said: &[u8]) -> Option<String> {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<String> = said
        .lines()
        .map(|line| one_line(line, MAX_LINE_CHARS).trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    for line in lines.iter().skip(lines.len().saturating_sub(MAX_SAID_LINES)) {
        tracing::info!(program = %path.display(), "{line}");
    }
    lines.into_iter().next_back()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    struct Program(tempfile::TempDir);

    impl Program {
        fn new(script: &str) -> Self {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let path = dir.path().join("program");
            std::fs::write(&path, format!("#!/bin/bash\n{script}\n")).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
            Self(dir)
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        async fn run(&self, input: &str, timeout: Duration) -> Result<String, CommandError> {
            let stop = CancellationToken::new();
            let answer = run(&self.file("program"), input.into(), timeout, &stop).await?;
            Ok(String::from_utf8(answer).expect("text"))
        }
    }

    /// Waits until a process is gone, or a zombie that somebody else has to reap: one that was killed
    /// takes its time. Only a broken test waits for long.
    async fn gone(program: &Program, name: &str) {
        let id = std::fs::read_to_string(program.file(name)).expect("it got so far");
        let is_gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", id.trim()));
            stat.map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
        };
        for _ in 0..6000 {
            if is_gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{name} {id} lives");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn it_reads_the_request_and_gets_nothing_else_of_ours() {
        let program = Program::new("cat; env | cut -d= -f1 | sort | tr '\\n' ' '; pwd");
        let answer = program.run("asked\n", LONG).await.expect("an answer");
        let lines: Vec<&str> = answer.lines().collect();
        assert_eq!(lines[0], "asked");
        // What bash itself adds is all there is beside the path.
        let names: Vec<&str> = lines[1].split_whitespace().collect();
        assert!(names.iter().all(|name| ["PATH", "PWD", "SHLVL", "_", "/"].contains(name)), "{names:?}");
        assert!(lines[1].ends_with(" /"), "{answer}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_failure_is_told_with_the_last_thing_it_said() {
        let program = Program::new("echo first >&2; printf 'no \\007capacity\\n\\n' >&2; exit 3");
        let error = program.run("", LONG).await.expect_err("it fails").to_string();
        assert!(error.contains("exit status: 3: no  capacity") && !error.contains('\n'), "{error}");
        let error = Program::new("kill -TERM $$").run("", LONG).await.expect_err("killed").to_string();
        assert!(error.contains("signal: 15"), "{error}");
        let stop = CancellationToken::new();
        let error = run(Path::new("/nowhere/x"), vec![], LONG, &stop).await.expect_err("nothing there");
        assert!(error.to_string().contains("/nowhere/x cannot be started"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_that_takes_too_long_is_killed_with_all_that_it_started() {
        let program = Program::new(
            "sleep 1000 & echo $! > ${0%/*}/child; echo $$ > ${0%/*}/self; echo stuck >&2; wait",
        );
        let error = program.run("", Duration::from_secs(1)).await.expect_err("it takes too long");
        assert!(error.to_string().contains("within 1s and was killed: stuck"), "{error}");
        gone(&program, "self").await;
        gone(&program, "child").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_it_leaves_behind_does_not_outlive_its_answer_nor_hold_it_up() {
        let program = Program::new("sleep 1000 & echo $! > ${0%/*}/child; echo done");
        assert_eq!(program.run("", LONG).await.expect("an answer"), "done\n");
        gone(&program, "child").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_without_end_is_cut_off() {
        let error = Program::new("yes").run("", LONG).await.expect_err("too much");
        assert!(matches!(error, CommandError::TooLong { .. }), "{error}");
        // Said without end is only said at the end.
        let program = Program::new("yes no | head -n 3000000 >&2; echo the last >&2; exit 1");
        let error = program.run("", LONG).await.expect_err("it fails").to_string();
        assert!(error.ends_with(": the last"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_that_does_not_read_may_answer_all_the_same() {
        let input = "x".repeat(1 << 20);
        assert_eq!(Program::new("echo yes").run(&input, LONG).await.expect("an answer"), "yes\n");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_coordinators_stop_ends_it() {
        let program = Program::new("echo $$ > ${0%/*}/self; exec sleep 1000");
        let stop = CancellationToken::new();
        let (path, stopped) = (program.file("program"), stop.clone());
        let running = tokio::spawn(async move { run(&path, vec![], LONG, &stopped).await });
        while !std::fs::read_to_string(program.file("self")).is_ok_and(|id| id.ends_with('\n')) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        let error = running.await.expect("no panic").expect_err("no answer");
        assert!(matches!(error, CommandError::Stopped), "{error}");
        gone(&program, "self").await;
    }
}
