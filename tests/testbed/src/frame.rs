//! The wire format between the harness and a host's PID 1: length-prefixed postcard frames over one
//! virtio-serial port, on which any number of commands run side by side.
//!
//! Every frame names a session, which is one command. Bulk data goes in chunks that the receiver
//! acknowledges when it has consumed them; a sender has at most [`WINDOW`] chunks of a stream under
//! way. So a command that does not read its stdin, or a caller that does not read its output, holds
//! up itself and nobody else on the port.

use std::fmt;
use std::io::{self, Read, Write};

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most bytes in one [`Body::Data`].
pub const MAX_CHUNK: usize = 32 * 1024;

/// Unacknowledged chunks a stream may have under way.
pub const WINDOW: usize = 16;

/// Longest frame either side accepts: a chunk, or a command with long arguments. A peer that sends
/// a larger length is broken, and believing it would allocate whatever it says.
pub const MAX_FRAME: usize = 512 * 1024;

/// Raised on every incompatible change, because a host may run an older PID 1 than the harness.
pub const VERSION: u32 = 1;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// The session; chosen by the harness, unique while the session lasts. 0 for the port itself.
    pub id: u32,
    /// What is said.
    pub body: Body,
}

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// Host to harness, session 0, once the host is set up: commands are accepted from here on.
    Hello {
        /// [`VERSION`] of the host's side.
        version: u32,
    },
    /// Harness to host: start a command.
    Exec(Exec),
    /// Harness to host: send a signal to the session's process.
    Signal {
        /// Signal number.
        signal: i32,
        /// Whether the whole process group gets it.
        group: bool,
    },
    /// Harness to host, session 0: stop every process, unmount, power off.
    PowerOff,
    /// Host to harness: the command runs.
    Started {
        /// Its process id in the host.
        pid: u32,
    },
    /// Host to harness, last of the session: the command ended and all its output was sent.
    Ended(Status),
    /// Host to harness, last of the session: the command could not be started.
    Refused(String),
    /// A chunk of a stream, in either direction.
    Data(Stream, Bytes),
    /// No more chunks in this stream.
    End(Stream),
    /// The oldest unacknowledged chunk of the stream was consumed.
    Ack(Stream),
}

/// A command to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment on top of the host's default one.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub directory: Option<String>,
    /// Whether stdin chunks follow; otherwise stdin is empty.
    pub stdin: bool,
    /// Write stdout and stderr to the end of this file in the host, and let the command outlive its caller.
    pub output: Option<String>,
}

/// A stream of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Harness to host.
    Stdin,
    /// Host to harness.
    Stdout,
    /// Host to harness.
    Stderr,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
}

impl Status {
    /// Whether the command exited with code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }

    /// The code a shell would report: the exit code, or 128 and the signal.
    #[must_use]
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signaled(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Bytes that serde handles as one piece; a plain `Vec<u8>` goes element by element, which costs
/// seconds per file where the CPU is emulated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl<'de> Visitor<'de> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Bytes, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = elements.next_element()? {
                    bytes.push(byte);
                }
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_bytes(BytesVisitor)
    }
}

/// Writes one frame. Callers on several threads hold a lock around it.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for a frame beyond [`MAX_FRAME`], and the writer's own errors.
pub fn write(to: &mut impl Write, frame: &Frame) -> io::Result<()> {
    // One write a frame: the length goes in front of the encoded bytes.
    let mut bytes = postcard::to_extend(frame, vec![0; 4]).map_err(io::Error::other)?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a frame of {length} bytes is beyond the limit of {MAX_FRAME}; shorten the arguments"),
        ));
    }
    bytes[..4].copy_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_le_bytes());
    to.write_all(&bytes)?;
    to.flush()
}

/// Reads one frame; `None` when the stream ended between two frames.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for a length beyond [`MAX_FRAME`] or bytes that are no frame,
/// [`io::ErrorKind::UnexpectedEof`] for a stream that ended inside one, and the reader's own errors.
pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut length = [0; 4];
    let mut got = 0;
    while got < length.len() {
        match from.read(&mut length[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame claims {length} bytes")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    let (frame, rest) =
        postcard::take_from_bytes(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    if !rest.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} bytes too many in a frame", rest.len()),
        ));
    }
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream() -> impl Strategy<Value = Stream> {
        prop_oneof![Just(Stream::Stdin), Just(Stream::Stdout), Just(Stream::Stderr)]
    }

    fn exec() -> impl Strategy<Value = Exec> {
        (
            prop::collection::vec(".*", 0..4),
            prop::collection::vec((".*", ".*"), 0..4),
            proptest::option::of(".*"),
            any::<bool>(),
            proptest::option::of(".*"),
        )
            .prop_map(|(argv, env, directory, stdin, output)| Exec {
                argv,
                env,
                directory,
                stdin,
                output,
            })
    }

    fn body() -> impl Strategy<Value = Body> {
        prop_oneof![
            any::<u32>().prop_map(|version| Body::Hello { version }),
            exec().prop_map(Body::Exec),
            (any::<i32>(), any::<bool>()).prop_map(|(signal, group)| Body::Signal { signal, group }),
            Just(Body::PowerOff),
            any::<u32>().prop_map(|pid| Body::Started { pid }),
            any::<i32>().prop_map(|code| Body::Ended(Status::Exited(code))),
            any::<i32>().prop_map(|signal| Body::Ended(Status::Signaled(signal))),
            ".*".prop_map(Body::Refused),
            (stream(), prop::collection::vec(any::<u8>(), 0..MAX_CHUNK))
                .prop_map(|(stream, bytes)| Body::Data(stream, Bytes(bytes))),
            stream().prop_map(Body::End),
            stream().prop_map(Body::Ack),
        ]
    }

    /// Hands out a few bytes at a time, as a serial port does.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buffer.len()).min(self.0.len());
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn frames_survive_any_split(
            frames in prop::collection::vec((any::<u32>(), body()), 0..6),
            step in 1usize..5000,
        ) {
            let frames: Vec<_> = frames.into_iter().map(|(id, body)| Frame { id, body }).collect();
            let mut bytes = Vec::new();
            for frame in &frames {
                write(&mut bytes, frame).unwrap();
            }
            let mut reader = Trickle(&bytes, step);
            for frame in &frames {
                let got = read(&mut reader).unwrap();
                prop_assert_eq!(got.as_ref(), Some(frame));
            }
            prop_assert_eq!(read(&mut reader).unwrap(), None);
        }

        #[test]
        fn noise_is_an_error_or_a_frame_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = bytes.as_slice();
            while let Ok(Some(_)) = read(&mut reader) {}
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_allocated() {
        let error = read(&mut [0xff_u8; 64].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_stream_that_ends_inside_a_frame_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Frame { id: 7, body: Body::PowerOff }).unwrap();
        bytes.pop();
        assert_eq!(read(&mut bytes.as_slice()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
