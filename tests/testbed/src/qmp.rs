//! QEMU's monitor protocol, as much of it as pausing and plugging take: one JSON object a line.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// QEMU answers at once or is stuck.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs one command with its arguments, an object or null, and returns its answer's `return`.
pub(crate) fn execute(socket: &Path, command: &str, arguments: &Value) -> io::Result<Value> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    // The greeting, then out of the mode that accepts nothing but this.
    receive(&mut lines)?;
    send(&stream, &json!({ "execute": "qmp_capabilities" }))?;
    answer(&mut lines)?;
    let mut message = json!({ "execute": command });
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    send(&stream, &message)?;
    answer(&mut lines)
}

fn send(mut to: &UnixStream, message: &Value) -> io::Result<()> {
    writeln!(to, "{message}")
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
