//! One connection between a guest's socket and a host stream: a state machine without system calls.
//!
//! It is driven from outside: packets of the guest come in through [`Connection::receive`], packets
//! for the guest are asked for with [`Connection::send`], readiness of the host stream is reported
//! with [`Connection::stream_ready`]. Readiness is edge-triggered: the connection remembers it until
//! the stream says `WouldBlock`, so a guest that takes nothing costs nothing.
//!
//! Flow control (virtio 1.2 §5.10.6.3) holds both ways. The guest may have at most `window` bytes
//! here that the host program has not taken, more is a violation and ends the connection; and the
//! host stream is read only as far as the guest has announced room.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::time::{Duration, Instant};

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// How long the guest has to answer a host's request: what Linux gives `connect` by default.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the guest has to acknowledge that the host program is gone: what Linux gives it.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long the host program may take nothing of what a guest sent before it left. Without it a
/// stuck program would hold a connection for ever.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// The host's end of a connection: a stream socket in non-blocking mode, or a test's stand-in.
pub trait HostStream: Read + Write {
    /// Ends one direction or both.
    ///
    /// # Errors
    /// When the stream is gone already.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;
}

/// The two ports that name a connection; the context IDs are always the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// A packet for the guest; the payload is in the buffer that was handed to [`Connection::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is for.
    pub op: Op,
    /// Payload bytes.
    pub len: u32,
    /// [`SHUTDOWN_BOTH`] bits, for a shutdown.
    pub flags: u32,
    /// This side's window.
    pub buf_alloc: u32,
    /// Bytes handed to the host program so far.
    pub fwd_cnt: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host program asked, the guest has not answered.
    Requested,
    Established,
    /// The guest is gone; what it sent is still being handed to the host program.
    Draining,
    /// The host stream is closed and the guest will be told so.
    Resetting,
    Finished,
}

/// What the guest may still be sent.
#[derive(Clone, Copy, Debug, Default)]
struct PeerCredit {
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl PeerCredit {
    /// A guest that claims to have taken more than it was sent gets nothing: the difference wraps
    /// to a number beyond any buffer.
    fn available(&self) -> u32 {
        self.buf_alloc.saturating_sub((self.sent - self.fwd_cnt).0)
    }
}

/// Packets the guest is owed beside data. One bit each, so that no guest can make them pile up.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
}

/// One connection. See the module.
#[derive(Debug)]
pub struct Connection<S> {
    ports: Ports,
    stream: Option<S>,
    phase: Phase,
    peer: PeerCredit,
    credit_requested: bool,
    window: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    pending: VecDeque<u8>,
    owed: Owed,
    readable: bool,
    writable: bool,
    hung_up: bool,
    guest_done: u32,
    host_done: u32,
    deadline: Option<Instant>,
}

impl<S: HostStream> Connection<S> {
    /// A connection that the guest asked for with `request`, and that `stream` answers.
    pub fn accepted(ports: Ports, stream: S, window: u32, request: &Header) -> Self {
        let mut connection = Self::new(ports, stream, window, Phase::Established);
        connection.owed.response = true;
        connection.take_credit(request);
        connection
    }

    /// A connection that the host program behind `stream` asks for.
    pub fn requested(ports: Ports, stream: S, window: u32, now: Instant) -> Self {
        let mut connection = Self::new(ports, stream, window, Phase::Requested);
        connection.owed.request = true;
        connection.deadline = Some(now + REQUEST_TIMEOUT);
        connection
    }

    fn new(ports: Ports, stream: S, window: u32, phase: Phase) -> Self {
        Self {
            ports,
            stream: Some(stream),
            phase,
            peer: PeerCredit::default(),
            credit_requested: false,
            window,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            pending: VecDeque::new(),
            owed: Owed::default(),
            // Until the stream says otherwise: an edge may have passed before this existed.
            readable: true,
            writable: true,
            hung_up: false,
            guest_done: 0,
            host_done: 0,
            deadline: None,
        }
    }

    /// The connection's name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// When [`expire`](Self::expire) is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Nothing is left to do: forget it.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// A packet of the guest; `payload` is exactly the `header.len` bytes that came with it.
    ///
    /// Returns false when the packet does not concern this connection any more, and should be
    /// answered as if there were none.
    pub fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) -> bool {
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Draining | Phase::Finished, _) => return false,
            (Phase::Resetting, Op::Reset) => self.phase = Phase::Finished,
            (Phase::Resetting, _) => {}
            (Phase::Requested, Op::Response) => self.establish(),
            (Phase::Requested, Op::Reset) => self.finish(),
            (Phase::Established, Op::ReadWrite) => self.take_payload(payload, now),
            (Phase::Established | Phase::Requested, Op::CreditUpdate) => {}
            (Phase::Established, Op::CreditRequest) => self.owed.credit_update = true,
            (Phase::Established, Op::Shutdown) => self.guest_shuts_down(header.flags, now),
            (Phase::Established, Op::Reset) => {
                self.phase = Phase::Draining;
                self.deadline = Some(now + LINGER_TIMEOUT);
                self.flush(now);
            }
            (Phase::Established | Phase::Requested, _) => self.abort(),
        }
        true
    }

    /// The stream became readable, writable, or was closed by the host program.
    pub fn stream_ready(&mut self, readable: bool, writable: bool, hung_up: bool, now: Instant) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
        let reads_no_more = self.guest_done & SHUTDOWN_RECEIVE != 0 || self.host_done & SHUTDOWN_SEND != 0;
        if hung_up && self.phase == Phase::Established && reads_no_more {
            // Nobody reads the stream any more, so that its end would go unseen.
            self.host_is_done(SHUTDOWN_BOTH);
        }
        if writable || hung_up {
            self.flush(now);
        }
    }

    /// Whether [`send`](Self::send) may have a packet.
    pub fn has_work(&self) -> bool {
        match self.phase {
            Phase::Resetting => true,
            Phase::Requested => self.owed.request,
            Phase::Established => {
                self.owed.response
                    || self.owed.shutdown
                    || self.owed.credit_update
                    || (self.wants_to_read() && (self.peer.available() > 0 || !self.credit_requested))
            }
            Phase::Draining | Phase::Finished => false,
        }
    }

    /// The next packet for the guest, at most `buffer.len()` bytes of payload in `buffer`.
    pub fn send(&mut self, buffer: &mut [u8], now: Instant) -> Option<Outgoing> {
        match self.phase {
            Phase::Resetting => {
                self.phase = Phase::Finished;
                Some(self.outgoing(Op::Reset, 0, 0))
            }
            Phase::Requested => {
                std::mem::take(&mut self.owed.request).then(|| self.outgoing(Op::Request, 0, 0))
            }
            Phase::Established if std::mem::take(&mut self.owed.response) => {
                Some(self.outgoing(Op::Response, 0, 0))
            }
            Phase::Established => self.send_established(buffer, now),
            Phase::Draining | Phase::Finished => None,
        }
    }

    /// The deadline passed.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.deadline = None;
        match self.phase {
            Phase::Requested | Phase::Established => self.abort(),
            Phase::Draining => self.finish(),
            Phase::Resetting | Phase::Finished => {}
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer.buf_alloc = header.buf_alloc;
        self.peer.fwd_cnt = Wrapping(header.fwd_cnt);
        if self.peer.available() > 0 {
            self.credit_requested = false;
        }
    }

    /// Tells the host program that it is connected, in the one line it waits for.
    fn establish(&mut self) {
        self.deadline = None;
        let line = format!("OK {}\n", self.ports.host);
        let written = self.stream.as_mut().map(|stream| stream.write(line.as_bytes()));
        match written {
            // The stream is fresh: a line this short fits, or the program is gone.
            Some(Ok(count)) if count == line.len() => self.phase = Phase::Established,
            _ => self.abort(),
        }
    }

    fn take_payload(&mut self, payload: &[u8], now: Instant) {
        let room = self.window.saturating_sub((self.received - self.forwarded).0) as usize;
        if payload.len() > room || self.guest_done & SHUTDOWN_SEND != 0 {
            return self.abort();
        }
        // `room` is a u32 in origin, so the length fits.
        self.received += Wrapping(payload.len() as u32);
        if self.host_done & SHUTDOWN_RECEIVE != 0 {
            return self.count_forwarded(payload.len());
        }
        let written = if self.pending.is_empty() { self.write_some(payload, now) } else { 0 };
        self.pending.extend(&payload[written..]);
        if self.host_done & SHUTDOWN_RECEIVE != 0 {
            self.discard_pending();
        }
        // A write that took a part does not promise an edge: only `WouldBlock` does.
        self.flush(now);
    }

    fn guest_shuts_down(&mut self, flags: u32, now: Instant) {
        self.guest_done |= flags & SHUTDOWN_BOTH;
        if self.guest_done & SHUTDOWN_RECEIVE != 0
            && let Some(stream) = self.stream.as_mut()
        {
            // The program's next write fails, as it should. That it may be gone is no matter.
            let _ = stream.shutdown(Shutdown::Read);
        }
        if self.guest_done == SHUTDOWN_BOTH {
            self.deadline = Some(now + LINGER_TIMEOUT);
        }
        self.flush(now);
    }

    /// Hands pending bytes to the host program, and takes the steps that waited for the last one.
    fn flush(&mut self, now: Instant) {
        while self.writable && !self.pending.is_empty() {
            let mut pending = std::mem::take(&mut self.pending);
            let written = self.write_some(pending.as_slices().0, now);
            pending.drain(..written);
            self.pending = pending;
            if self.host_done & SHUTDOWN_RECEIVE != 0 {
                self.discard_pending();
            }
        }
        if !self.pending.is_empty() {
            return;
        }
        self.pending = VecDeque::new();
        match self.phase {
            Phase::Draining => self.finish(),
            Phase::Established if self.guest_done == SHUTDOWN_BOTH => self.abort(),
            Phase::Established if self.guest_done & SHUTDOWN_SEND != 0 => {
                if let Some(stream) = self.stream.as_mut() {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            }
            _ => {}
        }
    }

    /// Writes once; learns from the result whether the stream takes more. Returns what it took.
    fn write_some(&mut self, bytes: &[u8], now: Instant) -> usize {
        if !self.writable || bytes.is_empty() {
            return 0;
        }
        let Some(stream) = self.stream.as_mut() else { return 0 };
        match stream.write(bytes) {
            Ok(count) if count > 0 => {
                if self.deadline.is_some() && self.guest_done == SHUTDOWN_BOTH
                    || self.phase == Phase::Draining
                {
                    self.deadline = Some(now + LINGER_TIMEOUT);
                }
                self.count_forwarded(count);
                count
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.writable = false;
                0
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Ok(_) | Err(_) => {
                self.host_is_done(SHUTDOWN_RECEIVE);
                0
            }
        }
    }

    fn discard_pending(&mut self) {
        self.count_forwarded(self.pending.len());
        self.pending = VecDeque::new();
    }

    /// `count` bytes left the buffer. The guest is told once it could use a quarter of the window:
    /// often enough to keep it sending, and not a packet for each of its packets.
    fn count_forwarded(&mut self, count: usize) {
        self.forwarded += Wrapping(count as u32);
        if (self.forwarded - self.announced).0 >= (self.window / 4).max(1)
            && self.guest_done & SHUTDOWN_SEND == 0
        {
            self.owed.credit_update = true;
        }
    }

    fn host_is_done(&mut self, flags: u32) {
        if self.host_done | flags != self.host_done {
            self.host_done |= flags;
            self.owed.shutdown = true;
        }
    }

    fn wants_to_read(&self) -> bool {
        self.readable && self.host_done & SHUTDOWN_SEND == 0 && self.guest_done & SHUTDOWN_RECEIVE == 0
    }

    fn send_established(&mut self, buffer: &mut [u8], now: Instant) -> Option<Outgoing> {
        if self.wants_to_read() {
            let room = buffer.len().min(self.peer.available() as usize);
            if room > 0 {
                if let Some(count) = self.read_some(&mut buffer[..room]) {
                    return Some(self.outgoing(Op::ReadWrite, count, 0));
                }
            } else if self.peer.available() == 0 && !self.credit_requested {
                self.credit_requested = true;
                return Some(self.outgoing(Op::CreditRequest, 0, 0));
            }
        }
        if std::mem::take(&mut self.owed.shutdown) {
            if self.host_done == SHUTDOWN_BOTH {
                self.deadline = Some(now + CLOSE_TIMEOUT);
            }
            return Some(self.outgoing(Op::Shutdown, 0, self.host_done));
        }
        self.owed.credit_update.then(|| self.outgoing(Op::CreditUpdate, 0, 0))
    }

    /// Reads once. `None` when there was nothing, or the end: then a shutdown is owed.
    fn read_some(&mut self, buffer: &mut [u8]) -> Option<u32> {
        match self.stream.as_mut()?.read(buffer) {
            Ok(0) => {
                let gone = if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                self.host_is_done(gone);
                None
            }
            Ok(count) => {
                // No more than the peer's credit, which is a u32.
                self.peer.sent += Wrapping(count as u32);
                Some(count as u32)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => None,
            Err(_) => {
                self.host_is_done(SHUTDOWN_BOTH);
                None
            }
        }
    }

    /// Every packet carries the buffer state, so every packet settles an owed credit update.
    fn outgoing(&mut self, op: Op, len: u32, flags: u32) -> Outgoing {
        self.announced = self.forwarded;
        self.owed.credit_update = false;
        Outgoing { op, len, flags, buf_alloc: self.window, fwd_cnt: self.forwarded.0 }
    }

    /// Ends the connection on both sides: the stream at once, the guest with a reset.
    fn abort(&mut self) {
        self.finish();
        self.phase = Phase::Resetting;
    }

    fn finish(&mut self) {
        self.phase = Phase::Finished;
        self.stream = None;
        self.pending = VecDeque::new();
        self.deadline = None;
    }
}
