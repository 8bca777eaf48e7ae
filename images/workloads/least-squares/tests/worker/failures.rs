//! Ranks that die, never come, or are not ranks at all: a clear end, and no hang.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use crate::support::{complaint, finish, free_port, rank, result, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A dataset that takes a while to read again and again.
fn large(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("d.csv");
    let made = run(&["generate", "--rows", "200000", "--features", "4", "--output", path.to_str().unwrap()]);
    assert!(made.status.success());
    path
}

fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// A member that says hello and then nothing, as a rank that computes for long.
struct Puppet(TcpStream);

impl Puppet {
    fn join(port: u16, rank: u8, world: u8, problem: &str) -> Self {
        let mut stream = connect(port);
        // Hello is the first message; numbers below 128 and short strings are single bytes first.
        let mut body = vec![0, rank, world, u8::try_from(problem.len()).unwrap()];
        body.extend_from_slice(problem.as_bytes());
        stream.write_all(&frame(&body)).unwrap();
        let mut welcome = [0; 13];
        stream.read_exact(&mut welcome).unwrap();
        assert_eq!(welcome[12], 1, "the second kind of message is the welcome");
        Self(stream)
    }
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut frame = b"LSQR\x01\0\0\0".to_vec();
    frame.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    frame.extend_from_slice(body);
    frame
}

fn problem(data: &std::path::Path) -> String {
    let bytes = std::fs::metadata(data).unwrap().len();
    format!("response y on an intercept, x1, x2, x3, x4 in a dataset of {bytes} bytes")
}

#[test]
fn a_rank_that_dies_in_the_middle_ends_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y"];
    let port = free_port();
    let zero = rank(0, 3, port, &args);
    let one = rank(1, 3, port, &args);
    // Rank 2 is in, everyone has it in the books, and it is gone.
    drop(Puppet::join(port, 2, 3, &problem(&data)));
    for (output, name) in [(finish(zero), "lost rank 2"), (finish(one), "rank 0 ended the job: lost rank 2")]
    {
        assert_eq!(output.status.code(), Some(3), "{}", complaint(&output));
        let text = complaint(&output);
        assert!(text.contains(name) && text.contains("the connection was closed"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn a_killed_rank_zero_ends_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y"];
    let port = free_port();
    let mut zero = rank(0, 3, port, &args);
    let _waited_for = Puppet::join(port, 2, 3, &problem(&data));
    let one = rank(1, 3, port, &args);
    std::thread::sleep(Duration::from_millis(500));
    signal(&zero, Signal::SIGKILL);
    zero.wait().unwrap();
    // Whether it was in already or not, it must say that rank 0 is not there.
    let one = finish(one);
    assert_eq!(one.status.code(), Some(3));
    assert!(complaint(&one).contains("rank 0 at 127.0.0.1"), "{}", complaint(&one));
}

#[test]
fn ranks_that_never_come_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y", "--connect-timeout", "1"];
    let zero = finish(rank(0, 4, free_port(), &args));
    assert_eq!(zero.status.code(), Some(3));
    let text = complaint(&zero);
    assert!(text.contains("rank 1, 2, 3 did not connect to rank 0 within 1 s"), "{text}");
    let one = finish(rank(1, 2, free_port(), &args));
    assert_eq!(one.status.code(), Some(3));
    assert!(
        complaint(&one).contains("was not reached within 1 s: Connection refused"),
        "{}",
        complaint(&one)
    );
}

#[test]
fn strangers_on_the_port_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y"];
    let port = free_port();
    let zero = rank(0, 2, port, &args);
    let silent = connect(port);
    let mut strangers = vec![silent];
    for words in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        // The largest length there is; a member's words before a greeting; a rank that is not due.
        b"LSQR\x01\0\0\0\xff\xff\xff\xff".to_vec(),
        frame(&[8]),
        frame(&[0, 5, 2, 1, b'x']),
        frame(&[0, 1, 2, 1, b'x']),
        frame(&[99; 40]),
        vec![0; 100_000],
    ] {
        let mut stream = connect(port);
        // It may hang up while we still speak.
        let _ = stream.write_all(&words);
        strangers.push(stream);
    }
    let one = rank(1, 2, port, &args);
    assert!(finish(one).status.success());
    let fit = result(&finish(zero));
    assert_eq!(fit["rows"], 200_000);
}

/// More connections than are served at a time: the surplus is turned away, and the rank that was
/// among it tries again.
#[test]
fn a_crowd_on_the_port_does_not_keep_ranks_out() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y"];
    let port = free_port();
    let zero = rank(0, 2, port, &args);
    let crowd: Vec<TcpStream> = (0..80).map(|_| connect(port)).collect();
    let one = rank(1, 2, port, &args);
    std::thread::sleep(Duration::from_millis(300));
    drop(crowd);
    assert!(finish(one).status.success());
    result(&finish(zero));
}

#[test]
fn a_rank_that_sends_nonsense_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let args = ["fit", "--data", data.to_str().unwrap(), "--response", "y"];
    let limit_breaker = b"LSQR\x01\0\0\0\xff\xff\xff\x7f".to_vec();
    // A triangle of the wrong shape; a message out of turn; a length beyond the limit.
    for words in [frame(&[3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0]), frame(&[1]), limit_breaker] {
        let port = free_port();
        let zero = rank(0, 2, port, &args);
        let mut puppet = Puppet::join(port, 1, 2, &problem(&data));
        puppet.0.write_all(&words).unwrap();
        let zero = finish(zero);
        assert_eq!(zero.status.code(), Some(3), "{}", complaint(&zero));
        assert!(complaint(&zero).contains("rank 1 at 127.0.0.1"), "{}", complaint(&zero));
    }
}

#[test]
fn a_port_in_use_is_said_so() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    let zero = finish(rank(0, 2, port, &["fit", "--data", data.to_str().unwrap(), "--response", "y"]));
    assert_eq!(zero.status.code(), Some(3));
    assert!(complaint(&zero).contains("cannot listen on 127.0.0.1"), "{}", complaint(&zero));
}

#[test]
fn sigterm_ends_a_waiting_rank() {
    let folder = tempfile::tempdir().unwrap();
    let data = large(&folder);
    let port = free_port();
    let zero = rank(0, 2, port, &["fit", "--data", data.to_str().unwrap(), "--response", "y"]);
    drop(connect(port));
    signal(&zero, Signal::SIGTERM);
    let zero = finish(zero);
    assert_eq!(zero.status.code(), Some(143));
    assert!(complaint(&zero).contains("ended by SIGTERM"), "{}", complaint(&zero));
}
