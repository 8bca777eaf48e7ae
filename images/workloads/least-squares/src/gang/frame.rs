//! Messages on the wire: a 12-byte header (magic, version, length), then the message in postcard.
//!
//! The length is checked against the caller's bound before a byte is allocated for it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::Message;

const MAGIC: [u8; 4] = *b"LSQR";
const VERSION: u32 = 1;
const HEADER: usize = 12;

/// Bound on a greeting, which holds the names of all columns.
pub(super) const HELLO_LIMIT: usize = 128 << 10;

/// Why no message came or went.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("the connection was closed")]
    Closed,
    #[error("{}", transport(.0))]
    Io(#[from] std::io::Error),
    #[error("no whole message in time")]
    Late,
    #[error("bytes that are not this protocol")]
    Magic,
    #[error("protocol version {0}, not {VERSION}: all ranks must run the same program")]
    Version(u32),
    #[error("a message of {length} bytes, more than the {limit} allowed")]
    TooLong { length: usize, limit: usize },
    #[error("a malformed message")]
    Malformed(#[from] postcard::Error),
}

/// What keepalive reports reads like a failed connect otherwise.
fn transport(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::TimedOut => "its machine no longer answers".to_owned(),
        _ => error.to_string(),
    }
}

/// Sends one message.
pub(super) fn send(stream: &mut TcpStream, message: &Message) -> Result<(), FrameError> {
    let body = postcard::to_allocvec(message)?;
    let length = u32::try_from(body.len())
        .map_err(|_| FrameError::TooLong { length: body.len(), limit: u32::MAX as usize })?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    stream.write_all(&frame)?;
    Ok(())
}

/// Receives one message of at most `limit` bytes, within `patience` if there is one.
pub(super) fn receive(
    stream: &mut TcpStream,
    limit: usize,
    patience: Option<Duration>,
) -> Result<Message, FrameError> {
    let deadline = patience.map(|p| Instant::now() + p);
    let mut header = [0; HEADER];
    read_exact(stream, &mut header, deadline)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..4] != MAGIC {
        return Err(FrameError::Magic);
    }
    if word(4) != VERSION {
        return Err(FrameError::Version(word(4)));
    }
    let length = usize::try_from(word(8)).unwrap_or(usize::MAX);
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    let mut body = vec![0; length];
    read_exact(stream, &mut body, deadline)?;
    Ok(postcard::from_bytes(&body)?)
}

/// The deadline holds for the whole, so that a byte now and then buys no time.
fn read_exact(
    stream: &mut TcpStream,
    mut buffer: &mut [u8],
    deadline: Option<Instant>,
) -> Result<(), FrameError> {
    while !buffer.is_empty() {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        if left.is_some_and(|l| l.is_zero()) {
            return Err(FrameError::Late);
        }
        stream.set_read_timeout(left)?;
        match stream.read(buffer) {
            Ok(0) => return Err(FrameError::Closed),
            Ok(read) => buffer = &mut buffer[read..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Err(FrameError::Late),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (mut a, mut b) = pair();
        let message = Message::Refine(vec![1.0, -0.0, 1e-300]);
        send(&mut a, &message).unwrap();
        assert_eq!(receive(&mut b, 1000, None).unwrap(), message);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_unread() {
        let (mut a, mut b) = pair();
        let mut header = [MAGIC, VERSION.to_le_bytes()].concat();
        header.extend(u32::MAX.to_le_bytes());
        a.write_all(&header).unwrap();
        assert!(matches!(receive(&mut b, 1000, None), Err(FrameError::TooLong { length: 0xffff_ffff, .. })));
    }

    #[test]
    fn other_protocols_and_versions_are_told_apart() {
        let (mut a, mut b) = pair();
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(matches!(receive(&mut b, 1000, None), Err(FrameError::Magic)));
        let (mut a, mut b) = pair();
        a.write_all(b"LSQR\x09\0\0\0\0\0\0\0").unwrap();
        assert!(matches!(receive(&mut b, 1000, None), Err(FrameError::Version(9))));
    }

    #[test]
    fn a_cut_message_and_a_lying_length_are_errors() {
        let (mut a, mut b) = pair();
        a.write_all(b"LSQR\x01\0\0\0\x08\0\0\0\x04").unwrap();
        drop(a);
        assert!(matches!(receive(&mut b, 1000, None), Err(FrameError::Closed)));
        let (mut a, mut b) = pair();
        // A refinement request that claims 2^28 numbers in a body of six bytes.
        a.write_all(b"LSQR\x01\0\0\0\x06\0\0\0\x04\xff\xff\xff\xff\x00").unwrap();
        assert!(matches!(receive(&mut b, 1000, None), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (_a, mut b) = pair();
        let patience = Some(Duration::from_millis(20));
        assert!(matches!(receive(&mut b, 1000, patience), Err(FrameError::Late)));
    }
}
