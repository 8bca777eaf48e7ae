//! Several hosts: their network, and what is left when a test or the whole harness dies.

#![allow(clippy::unwrap_used, reason = "in tests a panic is the message")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use std::{fs, thread};

use lathe_testbed::process::ProcessId;
use lathe_testbed::{Bed, Error, Host, HostDescription, image};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn two_hosts_on_a_network() {
    let bed = Bed::new().unwrap();
    let small = |name| HostDescription::new(name).cpus(1).memory_mib(768).disk_mib(64);
    let hosts = bed.boot_all(vec![small("n1"), small("n2")]).unwrap();
    let [n1, n2] = hosts.as_slice() else { panic!("two were asked for") };

    let reaches = |from: &Host, to: &str| from.exec(["ping", "-c1", "-W5", to]).unwrap().status.success();
    assert!(reaches(n1, &n2.address()));
    assert!(reaches(n2, "10.88.0.1"), "this machine is on their network");
    n1.cut_network().unwrap();
    assert!(!reaches(n1, &n2.address()));
    assert!(!reaches(n2, &n1.address()));
    n1.restore_network().unwrap();
    assert!(reaches(n1, &n2.address()));

    // A program of this machine that speaks to a host.
    let _listener = n1.spawn(["nc", "-l", "-p", "700", "-e", "echo", "hello"], "/tmp/nc.log").unwrap();
    n1.shell("for _ in $(seq 100); do netstat -lnt | grep -q :700 && exit; sleep 0.1; done; false").unwrap();
    let output = bed.command("busybox").args(["nc", "-w", "10", &n1.address(), "700"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n", "{output:?}");

    assert!(matches!(bed.boot(small("n1")), Err(Error::Duplicate(_))));
    assert!(n1.is_running(), "the refused host took nothing from the one of its name");

    // A host that fails to come up says why and leaves nothing.
    let error = bed.boot(small("n3").qemu_arg("-no-such-option")).err().unwrap().to_string();
    assert!(error.contains("no-such-option"), "{error}");

    let (name, namespace) = (bed.name().to_owned(), bed.namespace());
    let result = catch_unwind(AssertUnwindSafe(move || {
        let _kept = (bed, hosts);
        panic!("a test fails");
    }));
    assert!(result.is_err());
    assert_eq!(common::leftovers(&name, &namespace), Vec::<String>::new());
    let consoles = image::repository().join("target/testbed-consoles").join(&name);
    assert!(consoles.join("n1-console.log").exists() && consoles.join("n2-console.log").exists());
    fs::remove_dir_all(consoles).unwrap();
}

/// The command for people, with directories of its own.
struct Cli {
    directory: tempfile::TempDir,
}

impl Cli {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lathe-testbed"));
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .env("TMPDIR", self.directory.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn a_bed_by_hand_and_after_its_harness_was_killed() {
    let cli = Cli { directory: tempfile::tempdir().unwrap() };
    let up = cli.succeed(&["up", "--bare", "--cpus", "1", "--memory", "768"]);
    assert!(up.contains("10.88.0.11"), "{up}");
    assert_eq!(cli.run(&["up", "--bare"]).status.code(), Some(1), "it is up already");

    let output = cli.run(&["exec", "n1", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let file = cli.directory.path().join("file").display().to_string();
    fs::write(&file, "content").unwrap();
    cli.succeed(&["put", "n1", &file, "/tmp/there"]);
    cli.succeed(&["get", "n1", "/tmp/there", &file]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    let error = String::from_utf8(cli.run(&["pause", "n9"]).stderr).unwrap();
    assert!(error.contains("no host \"n9\"; there are: n1"), "{error}");

    let record = cli.directory.path().join("lathe-testbed/hand/bed.json");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    let process = |value: &serde_json::Value| serde_json::from_value::<ProcessId>(value.clone()).unwrap();
    let (owner, qemu) = (process(&record["owner"]), process(&record["processes"][0]));
    assert!(owner.is_alive() && qemu.is_alive());
    kill(Pid::from_raw(owner.pid), Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while qemu.is_alive() {
        assert!(Instant::now() < deadline, "QEMU outlived its harness");
        thread::sleep(Duration::from_millis(50));
    }
    let error = String::from_utf8(cli.run(&["exec", "n1", "--", "true"]).stderr).unwrap();
    assert!(error.contains("scripts/testbed up"), "{error}");
    let down = cli.succeed(&["down"]);
    assert!(down.contains("removed what was left of bed hand"), "{down}");
    let namespace = record["namespace"].as_str().unwrap();
    assert!(!std::path::Path::new("/run/netns").join(namespace).exists());
    assert!(!cli.directory.path().join("lathe-testbed").exists());
}

#[test]
fn a_machine_that_cannot_get_the_emulator_is_told_what_to_do() {
    let cli = Cli { directory: tempfile::tempdir().unwrap() };
    let tools = cli.directory.path().join("tools");
    fs::create_dir(&tools).unwrap();
    // What every Debian has.
    for tool in ["bash", "cat", "cut", "find", "grep", "sha256sum"] {
        std::os::unix::fs::symlink(format!("/usr/bin/{tool}"), tools.join(tool)).unwrap();
    }
    let cache = cli.directory.path().join("cache");
    let output =
        cli.command(&["up", "--bare"]).env("PATH", &tools).env("XDG_CACHE_HOME", &cache).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("mmdebstrap is missing; run scripts/setup"), "{message}");
    assert!(!cli.directory.path().join("lathe-testbed").exists(), "nothing was made");
    assert!(!cache.exists(), "nothing was left in the cache");
}
