//! All connections of a device: who gets a packet, who sends the next one, who is forgotten.
//!
//! Still without system calls: host streams come from a [`Host`]. Everything is bounded: connections
//! by [`MAX_CONNECTIONS`], what each holds by its window, answers to nobody's packets by
//! [`MAX_REPLIES`]. Connections take turns, one packet each, so that a busy one starves none.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::connection::{Connection, HostStream, Outgoing, Ports};
use super::metrics::{VsockMetrics, count};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};

/// Connections and host programs that have yet to name a port, together. At the default window a
/// guest can so make the host hold 64 MiB.
pub const MAX_CONNECTIONS: usize = 1024;

/// Resets owed to packets without a connection. Beyond it the guest's packets wait in its queue.
pub const MAX_REPLIES: usize = 256;

/// What a connection may hold of what its guest sent, in bytes.
pub const DEFAULT_WINDOW: u32 = 64 << 10;

/// How long a host program may take to name a port.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// `CONNECT 4294967295\n`, with room to spare.
const MAX_GREETING: usize = 32;

/// Host ports for connections made by host programs start here, above what services listen on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Names a stream between the multiplexer and whoever watches its readiness. Not reused while a
/// stale event could still carry it.
pub type StreamId = u32;

/// The smallest [`StreamId`]; those below are the device's own.
pub const FIRST_STREAM_ID: StreamId = 16;

/// Where host streams come from.
pub trait Host {
    /// One end of a connection.
    type Stream: HostStream;

    /// Connects to the program that serves `port`, without blocking.
    ///
    /// # Errors
    /// When no program does.
    fn connect(&mut self, port: u32) -> io::Result<Self::Stream>;

    /// Reports the stream's readiness, edge-triggered, as events of `id` until it is dropped.
    ///
    /// # Errors
    /// When the host cannot.
    fn watch(&mut self, stream: &Self::Stream, id: StreamId) -> io::Result<()>;
}

/// A host program that has not named a port yet.
struct Greeting<S> {
    stream: S,
    line: Vec<u8>,
    deadline: Instant,
}

struct Slot<S> {
    connection: Connection<S>,
    /// It is in the ready queue.
    queued: bool,
    /// As entered in the set of deadlines.
    deadline: Option<Instant>,
}

/// See the module.
pub struct Muxer<H: Host> {
    host: H,
    guest_cid: u64,
    window: u32,
    metrics: Arc<VsockMetrics>,
    connections: HashMap<StreamId, Slot<H::Stream>>,
    by_ports: HashMap<Ports, StreamId>,
    greetings: HashMap<StreamId, Greeting<H::Stream>>,
    deadlines: BTreeSet<(Instant, StreamId)>,
    ready: VecDeque<StreamId>,
    replies: VecDeque<Header>,
    next_id: StreamId,
    next_port: u32,
}

impl<H: Host> Muxer<H> {
    /// No connections yet. `window` is what each may hold of what the guest sent, in bytes.
    pub fn new(host: H, guest_cid: u64, window: u32, metrics: Arc<VsockMetrics>) -> Self {
        Self {
            host,
            guest_cid,
            window,
            metrics,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            greetings: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_id: FIRST_STREAM_ID,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// The source of streams.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// False while too many answers wait for the guest to take them: leave its packets in its queue.
    pub fn can_receive(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// Whether [`next_packet`](Self::next_packet) is worth a try.
    pub fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// A packet of the guest, with exactly the payload its header claims.
    /// Only call it when [`can_receive`](Self::can_receive).
    pub fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) {
        count(&self.metrics.packets_from_guest, 1);
        if header.src_cid != self.guest_cid {
            return count(&self.metrics.packets_dropped, 1);
        }
        if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            count(&self.metrics.packets_dropped, 1);
            return self.refuse(header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match (self.by_ports.get(&ports).copied(), header.op) {
            (Some(id), _) => self.receive_for(id, header, payload, now),
            (None, Op::Request) => self.guest_requests(ports, header),
            (None, _) => self.refuse(header),
        }
    }

    /// The next packet for the guest: its header, and `header.len` bytes of payload in `buffer`.
    pub fn next_packet(&mut self, buffer: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            count(&self.metrics.packets_to_guest, 1);
            count(&self.metrics.resets_to_guest, 1);
            return Some(reply);
        }
        // Each at most once: one that has nothing after all goes to the end.
        for _ in 0..self.ready.len() {
            let id = self.ready.pop_front()?;
            let Some(slot) = self.connections.get_mut(&id) else { continue };
            slot.queued = false;
            let outgoing = slot.connection.send(buffer, now);
            let ports = slot.connection.ports();
            self.settle(id);
            if let Some(outgoing) = outgoing {
                return Some(self.header(ports, &outgoing));
            }
        }
        None
    }

    /// The stream `id` is ready. Ids of streams that are gone are ignored.
    pub fn stream_ready(
        &mut self,
        id: StreamId,
        readable: bool,
        writable: bool,
        hung_up: bool,
        now: Instant,
    ) {
        if let Some(slot) = self.connections.get_mut(&id) {
            slot.connection.stream_ready(readable, writable, hung_up, now);
            self.settle(id);
        } else if self.greetings.contains_key(&id) {
            self.read_greeting(id, now);
        }
    }

    /// A host program connected; it has to name a port next. Dropped when there are too many.
    pub fn accept(&mut self, stream: H::Stream, now: Instant) {
        if self.is_full() {
            return count(&self.metrics.connections_refused, 1);
        }
        let id = self.new_id();
        if self.host.watch(&stream, id).is_err() {
            return count(&self.metrics.connections_refused, 1);
        }
        let deadline = now + GREETING_TIMEOUT;
        self.greetings.insert(id, Greeting { stream, line: Vec::new(), deadline });
        self.deadlines.insert((deadline, id));
        // What it has sent already raises no further edge.
        self.read_greeting(id, now);
    }

    /// When [`expire`](Self::expire) is due, if ever.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.deadlines.remove(&(deadline, id));
            self.greetings.remove(&id);
            if let Some(slot) = self.connections.get_mut(&id) {
                slot.deadline = None;
                slot.connection.expire(now);
                self.settle(id);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greetings.len() >= MAX_CONNECTIONS
    }

    fn new_id(&mut self) -> StreamId {
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.checked_add(1).unwrap_or(FIRST_STREAM_ID);
            if !self.connections.contains_key(&id) && !self.greetings.contains_key(&id) {
                return id;
            }
        }
    }

    /// A reset, unless the packet is one: two peers must not reset each other for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset {
            self.replies.push_back(header.reset_reply());
        }
    }

    fn receive_for(&mut self, id: StreamId, header: &Header, payload: &[u8], now: Instant) {
        count(&self.metrics.bytes_from_guest, payload.len() as u64);
        let Some(slot) = self.connections.get_mut(&id) else { return };
        if !slot.connection.receive(header, payload, now) {
            self.refuse(header);
        }
        self.settle(id);
    }

    fn guest_requests(&mut self, ports: Ports, header: &Header) {
        count(&self.metrics.connections_requested, 1);
        let id = self.new_id();
        let stream = if self.is_full() {
            Err(io::Error::from(ErrorKind::QuotaExceeded))
        } else {
            self.host.connect(ports.host).and_then(|stream| {
                self.host.watch(&stream, id)?;
                Ok(stream)
            })
        };
        match stream {
            Ok(stream) => self.insert(id, Connection::accepted(ports, stream, self.window, header)),
            Err(_) => {
                count(&self.metrics.connections_refused, 1);
                self.refuse(header);
            }
        }
    }

    fn insert(&mut self, id: StreamId, connection: Connection<H::Stream>) {
        self.by_ports.insert(connection.ports(), id);
        self.connections.insert(id, Slot { connection, queued: false, deadline: None });
        self.settle(id);
    }

    /// Brings the queue, the deadlines and the maps in line with what a connection has become.
    fn settle(&mut self, id: StreamId) {
        let Some(slot) = self.connections.get_mut(&id) else { return };
        let deadline = slot.connection.deadline();
        if slot.deadline != deadline {
            if let Some(old) = std::mem::replace(&mut slot.deadline, deadline) {
                self.deadlines.remove(&(old, id));
            }
            if let Some(new) = deadline {
                self.deadlines.insert((new, id));
            }
        }
        if slot.connection.is_finished() {
            let ports = slot.connection.ports();
            if slot.queued {
                // A guest that requests and resets without taking packets must not grow the queue.
                self.ready.retain(|queued| *queued != id);
            }
            self.connections.remove(&id);
            self.by_ports.remove(&ports);
        } else if !slot.queued && slot.connection.has_work() {
            slot.queued = true;
            self.ready.push_back(id);
        }
        self.metrics.connections.store(self.connections.len() as u64, Ordering::Relaxed);
    }

    /// Reads up to the end of the line and not a byte further: what follows is for the guest.
    fn read_greeting(&mut self, id: StreamId, now: Instant) {
        let Some(greeting) = self.greetings.get_mut(&id) else { return };
        let mut byte = [0];
        let port = loop {
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break parse_greeting(&greeting.line),
                Ok(1) if greeting.line.len() < MAX_GREETING => greeting.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => break None,
            }
        };
        let Some(greeting) = self.greetings.remove(&id) else { return };
        self.deadlines.remove(&(greeting.deadline, id));
        count(&self.metrics.connections_requested, 1);
        match port {
            Some(guest) => {
                let ports = Ports { host: self.free_host_port(guest), guest };
                self.insert(id, Connection::requested(ports, greeting.stream, self.window, now));
            }
            None => count(&self.metrics.connections_refused, 1),
        }
    }

    /// There are more ports than [`MAX_CONNECTIONS`], so one is free.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = if host == u32::MAX - 1 { FIRST_HOST_PORT } else { host + 1 };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn header(&self, ports: Ports, outgoing: &Outgoing) -> Header {
        count(&self.metrics.packets_to_guest, 1);
        count(&self.metrics.bytes_to_guest, u64::from(outgoing.len));
        if outgoing.op == Op::Reset {
            count(&self.metrics.resets_to_guest, 1);
        }
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: outgoing.len,
            socket_type: TYPE_STREAM,
            op: outgoing.op,
            flags: outgoing.flags,
            buf_alloc: outgoing.buf_alloc,
            fwd_cnt: outgoing.fwd_cnt,
        }
    }
}

/// The port in `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let port = text.strip_suffix('\r').unwrap_or(text).strip_prefix("CONNECT ")?;
    // `parse` alone would take "+5" too.
    port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())?
}
