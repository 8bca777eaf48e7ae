//! QEMU's monitor protocol, as much of it as pausing takes: one JSON object a line.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// QEMU answers at once or is stuck.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs one command and returns its answer's `return`.
pub(crate) fn execute(socket: &Path, command: &str) -> io::Result<Value> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    // The greeting, then out of the mode that accepts nothing but this.
    receive(&mut lines)?;
    send(&stream, "qmp_capabilities")?;
    answer(&mut lines)?;
    send(&stream, command)?;
    answer(&mut lines)
}

fn send(mut to: &UnixStream, command: &str) -> io::Result<()> {
    writeln!(to, "{}", json!({ "execute": command }))
}

fn receive(from: &mut impl BufRead) -> io::Result<Value> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

/// The next message that is not an event.
fn answer(from: &mut impl BufRead) -> io::Result<Value> {
    loop {
        let mut message = receive(from)?;
        if let Some(error) = message.get("error") {
            return Err(io::Error::other(format!("QEMU refused: {error}")));
        }
        if let Some(value) = message.get_mut("return") {
            return Ok(value.take());
        }
    }
}
