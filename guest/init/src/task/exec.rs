//! From the forked child to the task's program.

use std::ffi::{CString, NulError};
use std::fs::{self, File};
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use lathe_guest_protocol::TaskSpec;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, fchown, setsid};

use super::privileges;
use super::shepherd::Streams;
use super::user::{self, Identity, UserError};

/// Where programs are looked for when the environment has no `PATH` (what OCI runtimes use).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Read at most of passwd and group; images are hostile.
const MAX_DATABASE: u64 = 1 << 20;

/// The program could not be executed.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("the task has no program: argv is empty")]
    NoProgram,
    #[error("{0:?} cannot be passed to a program: it contains a NUL byte")]
    Nul(String),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("no program {program:?} in PATH={path}")]
    NotFound { program: String, path: String },
    #[error("cannot execute {program}: {source}")]
    Exec {
        program: String,
        #[source]
        source: Errno,
    },
    #[error("cannot use the working directory {dir:?}: {source}")]
    WorkingDirectory {
        dir: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot prepare the task's process: {step}: {source}")]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Turns the calling process into the task; what fails is written to `failure`.
pub fn become_task(spec: &TaskSpec, streams: Streams, mut failure: PipeWriter) -> ! {
    if let Err(error) = prepare_and_execute(spec, &streams) {
        let _ = failure.write_all(error.to_string().as_bytes());
    }
    std::process::exit(127)
}

fn prepare_and_execute(spec: &TaskSpec, streams: &Streams) -> Result<(), ExecError> {
    let identity = identity(&spec.user.user)?;
    let environment = environment(spec, &identity);
    let dir = if spec.cwd.is_empty() { "/" } else { &spec.cwd };
    let at_dir = |source| ExecError::WorkingDirectory { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(at_dir)?;

    attach(streams, &identity)?;
    reset_signals().map_err(step("signals"))?;
    setsid().map_err(step("session"))?;
    fs::write("/proc/self/oom_score_adj", "0").map_err(step("oom_score_adj"))?;
    privileges::set_resource_limits(&spec.limits).map_err(step("resource limits"))?;
    privileges::drop_to(&identity, spec.drives_devices).map_err(step("privileges"))?;
    // As the user, who may not be allowed in.
    chdir(dir).map_err(|errno| at_dir(errno.into()))?;
    execute(&spec.argv, &environment)
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ExecError {
    move |source| ExecError::Step { step, source: source.into() }
}

fn identity(spec: &str) -> Result<Identity, UserError> {
    let database = |path| {
        let mut text = Vec::new();
        // An image without the file is an image without names.
        let _ = File::open(path).and_then(|file| file.take(MAX_DATABASE).read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    };
    user::resolve(spec, &database("/etc/passwd"), &database("/etc/group"))
}

/// The environment as asked for, with `PATH` and `HOME` if they are missing.
fn environment(spec: &TaskSpec, identity: &Identity) -> Vec<(String, String)> {
    let mut environment = spec.env.clone();
    let home = identity.home.as_deref().unwrap_or("/");
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOME", home)] {
        if !environment.iter().any(|(found, _)| found == name) {
            environment.push((name.to_owned(), value.to_owned()));
        }
    }
    environment
}

/// Standard input from nowhere, output into the pipes, which become the user's so that it can
/// reopen them as /dev/stdout.
fn attach(streams: &Streams, identity: &Identity) -> Result<(), ExecError> {
    let null = File::open("/dev/null").map_err(step("/dev/null"))?;
    dup2_stdin(&null).map_err(step("standard input"))?;
    dup2_stdout(&streams.stdout).map_err(step("standard output"))?;
    dup2_stderr(&streams.stderr).map_err(step("standard error"))?;
    for pipe in [streams.stdout.as_fd(), streams.stderr.as_fd()] {
        let owner = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        fchown(pipe, Some(owner.0), Some(owner.1)).map_err(step("owner of the output pipes"))?;
    }
    Ok(())
}

/// Undoes what Rust's runtime and the shepherd changed and an exec would keep.
fn reset_signals() -> Result<(), Errno> {
    // SAFETY: the default action is no handler of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    SigSet::empty().thread_set_mask()
}

fn execute(argv: &[String], environment: &[(String, String)]) -> Result<(), ExecError> {
    let program = argv.first().ok_or(ExecError::NoProgram)?;
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path);
    let arguments = argv.iter().map(|argument| c_string(argument)).collect::<Result<Vec<_>, _>>()?;
    let variables = environment
        .iter()
        .map(|(name, value)| c_string(&format!("{name}={value}")))
        .collect::<Result<Vec<_>, _>>()?;
    let mut refused = None;
    for candidate in candidates(program, path) {
        let Err(errno) = execve(&c_string(&candidate)?, &arguments, &variables);
        match errno {
            // As execvp(3): the search goes on, but a program that exists is the better message.
            Errno::ENOENT | Errno::ENOTDIR => {}
            source => _ = refused.get_or_insert(ExecError::Exec { program: candidate, source }),
        }
        if errno != Errno::EACCES && refused.is_some() {
            break;
        }
    }
    Err(refused.unwrap_or_else(|| {
        if program.contains('/') {
            ExecError::Exec { program: program.clone(), source: Errno::ENOENT }
        } else {
            ExecError::NotFound { program: program.clone(), path: path.to_owned() }
        }
    }))
}

/// The paths to try for a program.
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.is_empty() {
        return Vec::new();
    }
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    // An empty entry is the working directory.
    path.split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir })
        .map(|dir| format!("{}/{program}", dir.trim_end_matches('/')))
        .collect()
}

fn c_string(text: &str) -> Result<CString, ExecError> {
    CString::new(text).map_err(|_: NulError| ExecError::Nul(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_as_execvp_does() {
        assert_eq!(candidates("sh", "/a:/b/::/"), ["/a/sh", "/b/sh", "./sh", "/sh"]);
        assert_eq!(candidates("./run", "/a"), ["./run"]);
        assert_eq!(candidates("/bin/sh", "/a"), ["/bin/sh"]);
        assert!(candidates("", "/a").is_empty());
    }

    #[test]
    fn missing_path_and_home_are_filled_in() {
        let identity = Identity { uid: 1, gid: 1, groups: vec![], home: Some("/home/ada".to_owned()) };
        let mut spec = TaskSpec { env: vec![("HOME".to_owned(), "/x".to_owned())], ..TaskSpec::default() };
        let found = environment(&spec, &identity);
        assert_eq!(
            found,
            [("HOME".to_owned(), "/x".to_owned()), ("PATH".to_owned(), DEFAULT_PATH.to_owned())]
        );
        spec.env.clear();
        assert!(environment(&spec, &identity).contains(&("HOME".to_owned(), "/home/ada".to_owned())));
    }

    #[test]
    fn failures_name_the_program() {
        let none = [("PATH".to_owned(), "/nonexistent".to_owned())];
        let error = execute(&["lathe-no-such".to_owned()], &none).unwrap_err().to_string();
        assert_eq!(error, "no program \"lathe-no-such\" in PATH=/nonexistent");
        let error = execute(&["/etc/passwd".to_owned()], &none).unwrap_err().to_string();
        assert!(error.starts_with("cannot execute /etc/passwd: EACCES"), "{error}");
        assert!(matches!(execute(&[], &none), Err(ExecError::NoProgram)));
        assert!(matches!(execute(&["/a\0b".to_owned()], &none), Err(ExecError::Nul(_))));
    }
}
