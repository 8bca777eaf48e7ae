//! What holds whatever guests and programs do.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;

use super::fake::{FakeHost, FakeStream, Pipe, pipe};
use super::{GUEST_CID, byte_at, from_guest};
use crate::virtio::vsock::VsockMetrics;
use crate::virtio::vsock::connection::{Connection, Ports};
use crate::virtio::vsock::muxer::{FIRST_STREAM_ID, Muxer};
use crate::virtio::vsock::packet::{Header, Op, SHUTDOWN_SEND};

/// One thing that a guest, a program or time does.
#[derive(Clone, Debug)]
enum Step {
    Packet { guest_port: u32, host_port: u32, op: u16, len: usize, flags: u32, buf_alloc: u32, fwd_cnt: u32 },
    TakePacket { room: usize },
    Program { port: u32, write: usize, read: usize, end: bool, go: bool },
    Accept { line: &'static [u8] },
    Ready { stream: u32, readable: bool, writable: bool, hung_up: bool },
    Pass { seconds: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let credit = prop_oneof![Just(0), 0u32..500, any::<u32>()];
    prop_oneof![
        6 => (0u32..3, 0u32..5, 0u16..9, 0usize..200, 0u32..4, credit.clone(), credit).prop_map(
            |(guest_port, host_port, op, len, flags, buf_alloc, fwd_cnt)| Step::Packet {
                guest_port, host_port, op, len, flags, buf_alloc, fwd_cnt,
            }
        ),
        4 => (1usize..300).prop_map(|room| Step::TakePacket { room }),
        3 => (0u32..5, 0usize..200, 0usize..200, prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(port, write, read, end, go)| Step::Program { port, write, read, end, go }),
        1 => prop::sample::select(vec![&b"CONNECT 0\n"[..], b"CONNECT 1\n", b"CONN", b"\n"])
            .prop_map(|line| Step::Accept { line }),
        4 => (0u32..12, any::<bool>(), any::<bool>(), prop::bool::weighted(0.1)).prop_map(
            |(stream, readable, writable, hung_up)| Step::Ready { stream, readable, writable, hung_up }
        ),
        1 => (0u64..40).prop_map(|seconds| Step::Pass { seconds }),
    ]
}

/// What a guest knows of a connection: enough to see its credit exceeded.
#[derive(Default)]
struct Seen {
    buf_alloc: u32,
    fwd_cnt: u32,
    received: u32,
}

proptest! {
    #[test]
    fn no_sequence_panics_or_exceeds_the_guest_s_credit(steps in vec(step(), 0..200)) {
        let host = FakeHost::new(64);
        let programs = Rc::clone(&host.programs);
        let mut muxer = Muxer::new(host, GUEST_CID, 100, Arc::new(VsockMetrics::default()));
        let mut now = Instant::now();
        let mut seen: HashMap<Ports, Seen> = HashMap::new();
        let mut clients = Vec::new();
        for step in steps {
            match step {
                Step::Packet { guest_port, host_port, op, len, flags, buf_alloc, fwd_cnt } => {
                    let ports = Ports { host: host_port, guest: guest_port };
                    let header = Header {
                        len: len as u32, flags, buf_alloc, fwd_cnt,
                        ..from_guest(guest_port, host_port, op.into())
                    };
                    let entry = seen.entry(ports).or_default();
                    entry.buf_alloc = buf_alloc;
                    entry.fwd_cnt = fwd_cnt;
                    if muxer.can_receive() {
                        muxer.receive(&header, &vec![0; len], now);
                    }
                }
                Step::TakePacket { room } => {
                    let mut buffer = vec![0; room];
                    if let Some(packet) = muxer.next_packet(&mut buffer, now) {
                        prop_assert!(packet.len as usize <= room);
                        let ports = Ports { host: packet.src_port, guest: packet.dst_port };
                        let entry = seen.entry(ports).or_default();
                        match packet.op {
                            Op::Response | Op::Request => entry.received = 0,
                            Op::ReadWrite => {
                                entry.received = entry.received.wrapping_add(packet.len);
                                let held = entry.received.wrapping_sub(entry.fwd_cnt);
                                prop_assert!(held <= entry.buf_alloc, "{} bytes in a buffer of {}", held, entry.buf_alloc);
                            }
                            _ => prop_assert_eq!(packet.len, 0),
                        }
                    }
                }
                Step::Program { port, write, read, end, go } => {
                    if let Some(program) = programs.borrow().get(&port) {
                        let mut program = program.borrow_mut();
                        if !program.program_ended {
                            program.to_guest.extend(std::iter::repeat_n(0, write));
                        }
                        let read = read.min(program.to_program.len());
                        program.to_program.drain(..read);
                        program.program_ended |= end;
                        program.program_gone |= go;
                    }
                }
                Step::Accept { line } => {
                    let (stream, program) = pipe(64);
                    program.borrow_mut().to_guest.extend(line);
                    muxer.accept(stream, now);
                    clients.push(program);
                }
                Step::Ready { stream, readable, writable, hung_up } => {
                    muxer.stream_ready(FIRST_STREAM_ID + stream, readable, writable, hung_up, now);
                }
                Step::Pass { seconds } => {
                    now += Duration::from_secs(seconds);
                    muxer.expire(now);
                }
            }
        }
        // Everybody leaves: nothing may stay behind.
        for program in programs.borrow().values().chain(&clients) {
            program.borrow_mut().program_gone = true;
        }
        for id in 0..400 {
            muxer.stream_ready(FIRST_STREAM_ID + id, true, true, true, now);
        }
        for host in 0..5 {
            for guest in 0..3 {
                while !muxer.can_receive() {
                    muxer.next_packet(&mut [0; 64], now);
                }
                muxer.receive(&from_guest(guest, host, Op::Reset), &[], now);
            }
        }
        for _ in 0..4 {
            while muxer.next_packet(&mut [0; 64], now).is_some() {}
            now += Duration::from_secs(60);
            muxer.expire(now);
        }
        prop_assert!(!muxer.has_packets());
        prop_assert_eq!(muxer.next_deadline(), None);
    }

    #[test]
    fn every_byte_arrives_in_order_under_any_schedule(
        windows in (1u32..200, 1u32..200, 1usize..200),
        total in 0u64..3000,
        schedule in vec((1usize..300, 1usize..300, any::<bool>()), 1..40),
    ) {
        let (host_window, guest_window, capacity) = windows;
        let (mut connection, program) = established(host_window, guest_window, capacity);
        let mut guest = Guest { window: guest_window, peer_window: host_window, ..Guest::default() };
        let (mut written, mut read) = (0, 0);
        let now = Instant::now();
        let mut schedule = schedule.iter().cycle();
        // Each round moves at least a byte each way unless it is waiting for the other side.
        for round in 0..100_000 {
            let &(chunk, room, lazy) = schedule.next().unwrap();
            guest.send(&mut connection, total.min(guest.sent + chunk as u64), now);
            let mut pipe = program.borrow_mut();
            let end = total.min(written + chunk as u64);
            pipe.to_guest.extend((written..end).map(byte_at));
            written = end;
            let taken = pipe.to_program.len().min(room);
            for byte in pipe.to_program.drain(..taken) {
                prop_assert_eq!(byte, byte_at(read), "byte {} to the program", read);
                read += 1;
            }
            drop(pipe);
            connection.stream_ready(true, true, false, now);
            if !lazy || round % 7 == 0 {
                guest.take(&mut connection, room, now)?;
            }
            if read == total && guest.received == total {
                break;
            }
        }
        prop_assert_eq!((read, guest.received), (total, total));
        let end = Header { flags: SHUTDOWN_SEND, ..guest.header(Op::Shutdown) };
        connection.receive(&end, &[], now);
        prop_assert!(program.borrow().device_ended);
    }
}

fn established(
    window: u32,
    guest_window: u32,
    capacity: usize,
) -> (Connection<FakeStream>, Rc<RefCell<Pipe>>) {
    let (stream, program) = pipe(capacity);
    let request = Header { buf_alloc: guest_window, ..from_guest(1, 2, Op::Request) };
    let mut connection = Connection::accepted(Ports { host: 2, guest: 1 }, stream, window, &request);
    let response = connection.send(&mut [0; 1], Instant::now()).unwrap();
    assert_eq!(response.op, Op::Response);
    (connection, program)
}

/// A guest that keeps to the rules and reads at once; written apart from the device's own half.
#[derive(Default)]
struct Guest {
    window: u32,
    peer_window: u32,
    peer_taken: u32,
    sent: u64,
    received: u64,
}

impl Guest {
    fn header(&self, op: Op) -> Header {
        Header { buf_alloc: self.window, fwd_cnt: self.received as u32, ..from_guest(1, 2, op) }
    }

    fn send(&mut self, connection: &mut Connection<FakeStream>, up_to: u64, now: Instant) {
        let room = u64::from(self.peer_window) - (self.sent - u64::from(self.peer_taken));
        let end = up_to.min(self.sent + room);
        let payload: Vec<u8> = (self.sent..end).map(byte_at).collect();
        if !payload.is_empty() {
            let header = Header { len: payload.len() as u32, ..self.header(Op::ReadWrite) };
            assert!(connection.receive(&header, &payload, now));
            self.sent = end;
        }
    }

    fn take(
        &mut self,
        connection: &mut Connection<FakeStream>,
        room: usize,
        now: Instant,
    ) -> Result<(), TestCaseError> {
        let mut buffer = vec![0; room];
        while let Some(packet) = connection.send(&mut buffer, now) {
            prop_assert_ne!(packet.op, Op::Reset);
            self.peer_taken = packet.fwd_cnt;
            for byte in &buffer[..packet.len as usize] {
                prop_assert_eq!(*byte, byte_at(self.received), "byte {} to the guest", self.received);
                self.received += 1;
            }
            if packet.op == Op::ReadWrite || packet.op == Op::CreditRequest {
                connection.receive(&self.header(Op::CreditUpdate), &[], now);
            }
        }
        Ok(())
    }
}
