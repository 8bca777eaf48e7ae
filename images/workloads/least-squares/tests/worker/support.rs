//! Runs the worker binary, alone or as a gang on loopback.

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// NIST's names of Longley's predictors.
pub const LONGLEY_FEATURES: &str = "GNPDEFL,GNP,UNEMP,ARMED,POP,YEAR";

/// The data that is shipped as an example.
pub fn longley() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/longley.csv")
}

/// The worker with arguments, free of what the caller's environment says about gangs.
pub fn worker(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_least-squares"));
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the worker alone.
pub fn run(args: &[&str]) -> Output {
    worker(args).output().expect("the worker starts")
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One rank of a gang on loopback.
pub fn rank(rank: u32, world: u32, port: u16, args: &[&str]) -> Child {
    worker(args)
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .spawn()
        .expect("the worker starts")
}

/// Waits for a process that must end by itself; one that hangs is killed and fails the test.
pub fn finish(mut child: Child) -> Output {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
            child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
            return Output { status, stdout, stderr };
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the worker hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a whole gang, later ranks first, so that they wait for rank 0; outputs in rank order.
pub fn gang(world: u32, args: &[&str]) -> Vec<Output> {
    let port = free_port();
    let mut children: Vec<Child> = (0..world).rev().map(|r| rank(r, world, port, args)).collect();
    children.reverse();
    children.into_iter().map(finish).collect()
}

/// What was written to standard error.
pub fn complaint(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The result line of a rank 0 that succeeded.
pub fn result(output: &Output) -> Value {
    assert!(output.status.success(), "{}", complaint(output));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line.strip_prefix("RESULT ").expect("the last line is the result")).unwrap()
}

/// A list of numbers in a result.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Correct significant digits: -log10 of the relative error, NIST's LRE.
pub fn digits(value: f64, certified: f64) -> f64 {
    if value == certified { 16.0 } else { -((value - certified) / certified).abs().log10() }
}
