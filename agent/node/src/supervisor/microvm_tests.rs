//! Guests made of a socket, and VMMs made of a sleep: honest ones, dying ones, hostile ones.

use super::*;
use crate::supervisor::SPOOL;
use crate::supervisor::spool::SpoolReader;
use lathe_guest_protocol::{TaskSpec, VERSION};
use tokio::net::UnixStream;
use tokio::process::Command;

struct Outcome {
    end: End,
    output: Vec<String>,
}

/// Runs a session in which `guest` talks, and the VMM is `sleep SECONDS`.
async fn session<F>(seconds: &str, stop: bool, guest: impl FnOnce(UnixStream) -> F) -> Outcome
where
    F: Future<Output = UnixStream> + Send + 'static,
{
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock_1024");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = Command::new("sleep").arg(seconds).kill_on_drop(true).spawn().unwrap();
    let mut recorder = Recorder::new(dir.path()).unwrap();
    let task = TaskSpec { argv: vec!["/worker".into()], ..TaskSpec::default() };
    let mut machine = Machine {
        session: Session::new(task),
        grace: Duration::ZERO,
        verdict: None,
        stopping: false,
        killed: None,
        deadline: Some(Instant::now() + HELLO_PATIENCE),
        to_guest: None,
    };
    let (sender, mut requests) = mpsc::channel(4);
    if stop {
        sender.send(Request::Stop).await.unwrap();
    }
    let talking = tokio::spawn(guest(UnixStream::connect(&path).await.unwrap()));
    let status = machine.serve(&listener, &mut child, &mut requests, &mut recorder).await.unwrap();
    talking.abort();
    let end =
        machine.end(status, "lathe-vmm: the last word\n", Path::new("/nonexistent"), recorder.last_usage());
    recorder.finish(&end);
    let lines = SpoolReader::open(&dir.path().join(SPOOL)).unwrap().read("s", 99).unwrap();
    Outcome { end, output: lines.into_iter().map(|line| line.text).collect() }
}

async fn say(stream: &mut UnixStream, message: FromGuest) {
    stream.write_all(&encode(&message).unwrap()).await.unwrap();
}

fn hello() -> FromGuest {
    FromGuest::Hello { version: VERSION, software: "test".into(), since_boot_ns: 0 }
}

#[tokio::test]
async fn an_honest_guest_is_heard_to_the_end() {
    let outcome = session("1", false, async |mut stream: UnixStream| {
        say(&mut stream, hello()).await;
        let length = stream.read_u32_le().await.unwrap();
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await.unwrap();
        let ToGuest::Start { task, .. } = decode(&body).unwrap() else { panic!("no start") };
        say(&mut stream, FromGuest::Started { since_boot_ns: 1 }).await;
        let data = format!("{} runs\n", task.argv[0]).into_bytes();
        say(&mut stream, FromGuest::Output { stream: Output::Stdout, data }).await;
        let usage = Resources { cpu_us: 7, ..Resources::default() };
        say(&mut stream, FromGuest::Exited { status: ExitStatus::Code(3), usage }).await;
        stream
    })
    .await;
    assert_eq!(outcome.output, ["/worker runs"]);
    assert_eq!((outcome.end.exit, outcome.end.lost), (Some(TaskExit::Code(3)), false));
    assert_eq!(outcome.end.usage.cpu_us, 7);
}

#[tokio::test]
async fn a_frame_that_is_too_long_ends_the_machine_at_once() {
    let outcome = session("1000", false, async |mut stream: UnixStream| {
        stream.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        stream
    })
    .await;
    let reason = outcome.end.reason.unwrap();
    assert!(reason.contains("over the limit") && !outcome.end.lost, "{reason}");
}

#[tokio::test]
async fn a_guest_out_of_order_is_named_and_killed() {
    let outcome = session("1000", false, async |mut stream: UnixStream| {
        say(&mut stream, FromGuest::Started { since_boot_ns: 0 }).await;
        stream
    })
    .await;
    assert!(outcome.end.reason.unwrap().contains("Started"));
}

#[tokio::test]
async fn a_guest_that_powers_off_early_is_a_failure_of_the_task() {
    let outcome = session("0", false, async |mut stream: UnixStream| {
        say(&mut stream, hello()).await;
        stream
    })
    .await;
    assert!(outcome.end.reason.unwrap().contains("powered off before") && !outcome.end.lost);
}

#[tokio::test]
async fn one_that_does_not_stop_is_killed_and_told_as_its_signal() {
    let outcome = session("1000", true, async |stream: UnixStream| stream).await;
    assert_eq!(outcome.end.exit, Some(TaskExit::Signal(9)));
    assert_eq!(outcome.end.state, TaskState::Exited);
}

#[test]
fn the_vmm_s_end_tells_whose_fault_it_was() {
    use std::os::unix::process::ExitStatusExt;
    let end = |raw: i32| {
        let machine = Machine {
            session: Session::new(TaskSpec::default()),
            grace: Duration::ZERO,
            verdict: None,
            stopping: false,
            killed: None,
            deadline: None,
            to_guest: None,
        };
        let status = ProcessExit::from_raw(raw);
        let end = machine.end(status, "lathe-vmm: no KVM\n", Path::new("/nonexistent"), Usage::default());
        (end.lost, end.reason.unwrap())
    };
    for (raw, lost, words) in [
        (9, true, "killed by signal 9"),
        (1 << 8, true, "no KVM"),
        (2 << 8, false, "refused the machine"),
        (10 << 8, false, "rebooted"),
        (11 << 8, false, "crashed"),
        (13 << 8, true, "no KVM"),
    ] {
        let (was_lost, reason) = end(raw);
        assert!(was_lost == lost && reason.contains(words), "{raw}: {was_lost} {reason}");
    }
}
