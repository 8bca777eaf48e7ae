//! Who answers what, one rule a test.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fake::{FakeHost, Pipe, pipe};
use super::{GUEST_CID, from_guest};
use crate::virtio::vsock::VsockMetrics;
use crate::virtio::vsock::connection::{CLOSE_TIMEOUT, LINGER_TIMEOUT, REQUEST_TIMEOUT};
use crate::virtio::vsock::muxer::{FIRST_STREAM_ID, GREETING_TIMEOUT, MAX_CONNECTIONS, MAX_REPLIES, Muxer};
use crate::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const WINDOW: u32 = 100;

struct Bench {
    muxer: Muxer<FakeHost>,
    metrics: Arc<VsockMetrics>,
    programs: Rc<RefCell<HashMap<u32, Rc<RefCell<Pipe>>>>>,
    now: Instant,
    payload: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let host = FakeHost::new(50);
        let programs = Rc::clone(&host.programs);
        let metrics = Arc::new(VsockMetrics::default());
        let muxer = Muxer::new(host, GUEST_CID, WINDOW, Arc::clone(&metrics));
        Self { muxer, metrics, programs, now: Instant::now(), payload: Vec::new() }
    }

    fn send(&mut self, header: Header) {
        self.muxer.receive(&header, &[], self.now);
    }

    fn send_bytes(&mut self, header: Header, bytes: &[u8]) {
        let header = Header { len: bytes.len() as u32, op: Op::ReadWrite, ..header };
        self.muxer.receive(&header, bytes, self.now);
    }

    fn next(&mut self) -> Option<Header> {
        let mut buffer = [0; 256];
        let header = self.muxer.next_packet(&mut buffer, self.now)?;
        self.payload = buffer[..header.len as usize].to_vec();
        Some(header)
    }

    fn next_op(&mut self) -> Option<Op> {
        self.next().map(|header| header.op)
    }

    /// The guest connects from port 1000 to host port `port`.
    fn connect(&mut self, port: u32) -> Rc<RefCell<Pipe>> {
        self.send(from_guest(1000, port, Op::Request));
        assert_eq!(self.next_op(), Some(Op::Response));
        Rc::clone(&self.programs.borrow()[&port])
    }

    fn ready(&mut self, hung_up: bool) {
        for id in FIRST_STREAM_ID..FIRST_STREAM_ID + 4 {
            self.muxer.stream_ready(id, true, true, hung_up, self.now);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time + Duration::from_millis(1);
        self.muxer.expire(self.now);
    }

    fn open(&self) -> u64 {
        self.metrics.connections.load(Ordering::Relaxed)
    }
}

#[test]
fn bytes_go_both_ways_and_credit_comes_back() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), b"hello");
    assert_eq!(program.borrow_mut().to_program.drain(..).collect::<Vec<_>>(), b"hello");
    program.borrow_mut().to_guest.extend(b"good day");
    bench.ready(false);
    let packet = bench.next().unwrap();
    assert_eq!((packet.op, &bench.payload[..]), (Op::ReadWrite, &b"good day"[..]));
    assert_eq!((packet.buf_alloc, packet.fwd_cnt), (WINDOW, 5));
    bench.send(from_guest(1000, 2, Op::CreditRequest));
    assert_eq!(bench.next_op(), Some(Op::CreditUpdate));
}

#[test]
fn a_slow_program_stops_the_guest_and_a_greedy_guest_loses_its_connection() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    // 50 bytes fit the program's socket, 100 more fit the window.
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), &[1; 100]);
    assert_eq!(bench.next().map(|update| (update.op, update.fwd_cnt)), Some((Op::CreditUpdate, 50)));
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), &[2; 50]);
    assert_eq!(bench.next_op(), None);
    assert_eq!(program.borrow_mut().to_program.drain(..).count(), 50);
    bench.ready(false);
    assert_eq!(bench.next().map(|update| (update.op, update.fwd_cnt)), Some((Op::CreditUpdate, 100)));
    // 50 are held: 50 more are allowed, 51 are not.
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), &[3; 51]);
    assert_eq!(bench.next_op(), Some(Op::Reset));
    assert_eq!(bench.open(), 0);
    assert!(program.borrow().device_ended);
}

#[test]
fn the_guest_s_credit_is_never_exceeded() {
    let mut bench = Bench::new();
    let request = Header { buf_alloc: 10, ..from_guest(1000, 2, Op::Request) };
    bench.send(request);
    assert_eq!(bench.next_op(), Some(Op::Response));
    let program = Rc::clone(&bench.programs.borrow()[&2]);
    program.borrow_mut().to_guest.extend([9; 25]);
    bench.ready(false);
    assert_eq!(bench.next().map(|packet| (packet.op, packet.len)), Some((Op::ReadWrite, 10)));
    assert_eq!(bench.next_op(), Some(Op::CreditRequest), "asked once");
    assert_eq!(bench.next_op(), None, "and not again");
    bench.send(Header { buf_alloc: 10, fwd_cnt: 4, ..from_guest(1000, 2, Op::CreditUpdate) });
    assert_eq!(bench.next().map(|packet| packet.len), Some(4));
    // A guest that claims to have taken more than it got is given nothing.
    bench.send(Header { buf_alloc: 10, fwd_cnt: 15, ..from_guest(1000, 2, Op::CreditUpdate) });
    assert_eq!(bench.next_op(), Some(Op::CreditRequest));
    assert_eq!(bench.next_op(), None);
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let programs = [2, 4, 6].map(|port| bench.connect(port));
    while bench.next().is_some() {}
    for program in programs {
        program.borrow_mut().to_guest.extend([1; 600]);
    }
    bench.ready(false);
    let order: Vec<u32> = (0..6).map(|_| bench.next().unwrap().src_port).collect();
    assert_eq!(order[..3], order[3..], "each had one packet before any had a second");
}

#[test]
fn packets_without_a_connection_are_reset_and_resets_are_not() {
    let mut bench = Bench::new();
    for op in [Op::Response, Op::ReadWrite, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest, Op::Unknown(9)]
    {
        bench.send(from_guest(1, 2, op));
        let reply = bench.next().unwrap();
        assert_eq!((reply.op, reply.src_port, reply.dst_port), (Op::Reset, 2, 1), "{op:?}");
    }
    bench.send(from_guest(1, 2, Op::Reset));
    assert_eq!(bench.next_op(), None);
    bench.send(Header { socket_type: 2, ..from_guest(1, 2, Op::Request) });
    assert_eq!(bench.next().map(|reply| (reply.op, reply.socket_type)), Some((Op::Reset, 2)));
    bench.send(Header { dst_cid: 9, ..from_guest(1, 2, Op::Request) });
    assert_eq!(bench.next().map(|reply| (reply.op, reply.src_cid)), Some((Op::Reset, 9)));
    bench.send(Header { src_cid: 8, ..from_guest(1, 2, Op::Request) });
    assert_eq!(bench.next_op(), None, "a forged sender is ignored");
    bench.send(from_guest(1, 3, Op::Request));
    assert_eq!(bench.next_op(), Some(Op::Reset), "nobody listens at odd ports");
}

#[test]
fn both_limits_hold() {
    let mut bench = Bench::new();
    for guest_port in 0..MAX_CONNECTIONS as u32 + 1 {
        bench.send(from_guest(guest_port, 2, Op::Request));
    }
    assert_eq!(bench.open(), MAX_CONNECTIONS as u64);
    assert_eq!(bench.next_op(), Some(Op::Reset));
    let (stream, program) = pipe(50);
    bench.muxer.accept(stream, bench.now);
    assert!(program.borrow().device_ended, "no room for a program either");
    for _ in 0..MAX_REPLIES {
        assert!(bench.muxer.can_receive());
        bench.send(from_guest(1 << 20, 3, Op::Request));
    }
    assert!(!bench.muxer.can_receive());
    bench.next();
    assert!(bench.muxer.can_receive());
}

#[test]
fn a_half_closed_connection_still_carries_the_other_half() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), b"question");
    bench.send(Header { flags: SHUTDOWN_SEND, ..from_guest(1000, 2, Op::Shutdown) });
    assert!(program.borrow().device_ended, "the program sees the end");
    program.borrow_mut().to_guest.extend(b"answer");
    program.borrow_mut().program_ended = true;
    bench.ready(false);
    assert_eq!(bench.next_op(), Some(Op::ReadWrite));
    assert_eq!(bench.payload, b"answer");
    assert_eq!(bench.next().map(|packet| (packet.op, packet.flags)), Some((Op::Shutdown, SHUTDOWN_SEND)));
    bench.send(Header { flags: SHUTDOWN_BOTH, ..from_guest(1000, 2, Op::Shutdown) });
    assert_eq!(bench.next_op(), Some(Op::Reset));
    assert_eq!(bench.open(), 0);
}

#[test]
fn what_a_guest_sent_before_it_left_reaches_a_slow_program() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), &[5; 80]);
    bench.send(Header { flags: SHUTDOWN_BOTH, ..from_guest(1000, 2, Op::Shutdown) });
    bench.next();
    assert_eq!(bench.next_op(), None, "no reset before the last byte is out");
    bench.send(from_guest(1000, 2, Op::Reset));
    assert_eq!(program.borrow_mut().to_program.drain(..).count(), 50);
    assert!(!program.borrow().device_ended);
    bench.ready(false);
    assert_eq!(program.borrow_mut().to_program.drain(..).count(), 30);
    assert!(program.borrow().device_ended);
    assert_eq!(bench.open(), 0);
}

#[test]
fn a_program_that_takes_nothing_does_not_keep_a_dead_connection() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    bench.send_bytes(from_guest(1000, 2, Op::ReadWrite), &[5; 80]);
    bench.send(from_guest(1000, 2, Op::Reset));
    assert_eq!(bench.open(), 1);
    bench.pass(LINGER_TIMEOUT);
    assert_eq!(bench.open(), 0);
    assert!(program.borrow().device_ended);
}

#[test]
fn a_program_that_goes_takes_the_connection_with_it() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    program.borrow_mut().to_guest.extend(b"last words");
    program.borrow_mut().program_gone = true;
    bench.ready(true);
    assert_eq!(bench.next_op(), Some(Op::ReadWrite));
    assert_eq!(bench.next().map(|packet| (packet.op, packet.flags)), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    // The guest does not answer.
    bench.pass(CLOSE_TIMEOUT);
    assert_eq!(bench.next_op(), Some(Op::Reset));
    assert_eq!(bench.open(), 0);
}

#[test]
fn a_program_that_goes_is_noticed_though_the_guest_reads_no_more() {
    let mut bench = Bench::new();
    let program = bench.connect(2);
    bench.send(Header { flags: SHUTDOWN_RECEIVE, ..from_guest(1000, 2, Op::Shutdown) });
    program.borrow_mut().program_gone = true;
    bench.ready(true);
    assert_eq!(bench.next().map(|packet| (packet.op, packet.flags)), Some((Op::Shutdown, SHUTDOWN_BOTH)));
}

#[test]
fn a_program_reaches_a_guest_s_port() {
    let mut bench = Bench::new();
    let (stream, program) = pipe(50);
    program.borrow_mut().to_guest.extend(b"CONNECT 52");
    bench.muxer.accept(stream, bench.now);
    assert_eq!(bench.next_op(), None);
    program.borrow_mut().to_guest.extend(b"00\nfirst bytes");
    bench.ready(false);
    let request = bench.next().unwrap();
    assert_eq!((request.op, request.dst_port), (Op::Request, 5200));
    assert_eq!(bench.next_op(), None, "nothing before the guest answers");
    bench.send(from_guest(5200, request.src_port, Op::Response));
    let greeting: Vec<u8> = program.borrow_mut().to_program.drain(..).collect();
    assert_eq!(greeting, format!("OK {}\n", request.src_port).as_bytes());
    assert_eq!(bench.next_op(), Some(Op::ReadWrite));
    assert_eq!(bench.payload, b"first bytes");
}

#[test]
fn a_program_is_turned_away_when_the_guest_refuses_or_is_silent() {
    let mut bench = Bench::new();
    for silent in [false, true] {
        let (stream, program) = pipe(50);
        program.borrow_mut().to_guest.extend(b"CONNECT 1\n");
        bench.muxer.accept(stream, bench.now);
        let request = bench.next().unwrap();
        if silent {
            bench.pass(REQUEST_TIMEOUT);
            assert_eq!(bench.next_op(), Some(Op::Reset));
        } else {
            bench.send(from_guest(1, request.src_port, Op::Reset));
        }
        assert!(program.borrow().device_ended);
        assert!(program.borrow().to_program.is_empty());
        assert_eq!(bench.open(), 0);
    }
}

#[test]
fn bad_greetings_are_turned_away() {
    for text in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT +1\n",
        "GET / HTTP/1.1\r\n",
        &"x".repeat(99),
    ] {
        let mut bench = Bench::new();
        let (stream, program) = pipe(50);
        program.borrow_mut().to_guest.extend(text.as_bytes());
        bench.muxer.accept(stream, bench.now);
        assert!(program.borrow().device_ended, "{text:?}");
        assert_eq!(bench.next_op(), None);
        assert_eq!(bench.muxer.next_deadline(), None);
    }
    let mut bench = Bench::new();
    let (stream, program) = pipe(50);
    bench.muxer.accept(stream, bench.now);
    bench.pass(GREETING_TIMEOUT);
    assert!(program.borrow().device_ended, "silence is turned away, too");
}

#[test]
fn requests_and_resets_without_end_grow_nothing() {
    let mut bench = Bench::new();
    for _ in 0..10_000 {
        bench.send(from_guest(1000, 2, Op::Request));
        bench.send(from_guest(1000, 2, Op::Reset));
    }
    assert_eq!(bench.open(), 0);
    assert!(!bench.muxer.has_packets());
    assert_eq!(bench.muxer.next_deadline(), None);
}
