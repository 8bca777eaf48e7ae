//! The whole device on real Unix sockets, driven through its queues.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{GUEST_CID, byte_at, from_guest};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::test_driver::{Buffer, DriverQueue, PATIENCE, TestInterrupt, guest_memory};
use crate::virtio::vsock::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use crate::virtio::vsock::{Vsock, VsockListener, VsockSocketError};

const SLOT: u64 = 8192;
const QUEUE_SIZE: u16 = 64;

/// A guest with one connection at a time, that keeps to the rules.
struct Guest {
    memory: GuestMemoryMmap,
    interrupt: Arc<TestInterrupt>,
    rx: DriverQueue,
    tx: DriverQueue,
    window: u32,
    ports: (u32, u32),
    peer_window: u32,
    peer_taken: u32,
    sent: u64,
    received: u64,
    /// Bytes of a receive buffer, header included.
    rx_len: u32,
}

impl Guest {
    fn activate(device: &mut Vsock, window: u32, rx_len: u32) -> Self {
        let (memory, ram) = guest_memory(4 << 20);
        let interrupt = TestInterrupt::new();
        let rx = DriverQueue::new(&memory, 0, QUEUE_SIZE, 0x1000);
        let tx = DriverQueue::new(&memory, 1, QUEUE_SIZE, 0x4000);
        let queues = vec![rx.activate(), tx.activate()];
        let features = device.features();
        device.activate(Activation { memory: ram, features, queues, interrupt: interrupt.clone() }).unwrap();
        let mut guest = Self {
            memory,
            interrupt,
            rx,
            tx,
            window,
            ports: (0, 0),
            peer_window: 0,
            peer_taken: 0,
            sent: 0,
            received: 0,
            rx_len,
        };
        for _ in 0..QUEUE_SIZE {
            guest.offer();
        }
        guest.rx.kick();
        guest
    }

    fn rx_address(head: u16) -> u64 {
        0x10_0000 + u64::from(head) * SLOT
    }

    /// Offers a receive buffer, in two pieces so that headers and payloads straddle them.
    fn offer(&mut self) {
        // Chains are taken and given back two descriptors at a time, so the next head is known.
        let first = self.rx_len / 3;
        let buffers = |address| {
            [
                Buffer { address, len: first, writable: true },
                Buffer { address: address + u64::from(first), len: self.rx_len - first, writable: true },
            ]
        };
        if let Some(next) = self.rx.next_head() {
            self.rx.add(&buffers(Self::rx_address(next)));
        }
    }

    fn header(&self, op: Op) -> Header {
        let (guest, host) = self.ports;
        Header { buf_alloc: self.window, fwd_cnt: self.received as u32, ..from_guest(guest, host, op) }
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
        let interrupt = Arc::clone(&self.interrupt);
        let tx = &mut self.tx;
        let head = interrupt.wait_for("room to send", || {
            while tx.used().is_some() {}
            tx.next_head()
        });
        let address = 0x20_0000 + u64::from(head) * SLOT;
        self.memory.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
        self.memory.write_slice(payload, GuestAddress(address + HEADER_SIZE as u64)).unwrap();
        let len = (HEADER_SIZE + payload.len()) as u32;
        tx.add(&[Buffer { address, len, writable: false }]).unwrap();
        tx.kick();
    }

    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.used()?;
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(Self::rx_address(head))).unwrap();
        self.offer();
        self.rx.kick();
        let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
        self.peer_window = header.buf_alloc;
        self.peer_taken = header.fwd_cnt;
        Some((header, bytes.split_off(HEADER_SIZE)))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let interrupt = Arc::clone(&self.interrupt);
        interrupt.wait_for("a packet", || self.try_receive())
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op);
        header
    }

    fn connect(&mut self, guest_port: u32, host_port: u32) {
        self.ports = (guest_port, host_port);
        (self.sent, self.received) = (0, 0);
        self.send(&self.header(Op::Request), &[]);
        self.expect(Op::Response);
    }

    /// Sends and receives `total` recognisable bytes each way at once, then says what it sends no more.
    fn exchange(&mut self, total: u64) {
        let mut ended = false;
        while self.received < total || self.sent < total {
            let room = u64::from(self.peer_window) - (self.sent - u64::from(self.peer_taken));
            let end = total.min(self.sent + room.min(4000));
            if end > self.sent {
                let payload: Vec<u8> = (self.sent..end).map(byte_at).collect();
                self.sent = end;
                let header = Header { len: payload.len() as u32, ..self.header(Op::ReadWrite) };
                self.send(&header, &payload);
            }
            if self.sent == total && !ended {
                ended = true;
                self.send(&Header { flags: SHUTDOWN_SEND, ..self.header(Op::Shutdown) }, &[]);
            }
            let received = if end == self.sent && room == 0 || self.sent == total {
                if self.received == total && self.sent == total {
                    break;
                }
                Some(self.receive())
            } else {
                self.try_receive()
            };
            if let Some((header, payload)) = received {
                assert_ne!(header.op, Op::Reset);
                for byte in payload {
                    assert_eq!(byte, byte_at(self.received), "byte {} to the guest", self.received);
                    self.received += 1;
                }
                if header.op == Op::ReadWrite || header.op == Op::CreditRequest {
                    self.send(&self.header(Op::CreditUpdate), &[]);
                }
            }
        }
        if !ended {
            self.send(&Header { flags: SHUTDOWN_SEND, ..self.header(Op::Shutdown) }, &[]);
        }
    }
}

/// Writes and reads `total` recognisable bytes at once.
fn program_exchange(mut stream: UnixStream, total: u64) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        let bytes: Vec<u8> = (0..total).map(byte_at).collect();
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, total);
    assert!((0..).zip(&bytes).all(|(n, byte)| *byte == byte_at(n)), "bytes arrived out of order");
    writing.join().unwrap();
}

fn device(window: u32) -> (TempDir, PathBuf, Vsock) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let device = Vsock::new(GUEST_CID as u32, VsockListener::bind(&path).unwrap()).with_window(window);
    (dir, path, device)
}

fn exchange_both_ways(window: u32, guest_window: u32, rx_len: u32, total: u64) {
    let (dir, _, mut device) = device(window);
    let listener = UnixListener::bind(dir.path().join("vsock_5000")).unwrap();
    let program = thread::spawn(move || program_exchange(listener.accept().unwrap().0, total));
    let mut guest = Guest::activate(&mut device, guest_window, rx_len);
    guest.connect(40_000, 5000);
    guest.exchange(total);
    program.join().unwrap();
    guest.send(&Header { flags: SHUTDOWN_BOTH, ..guest.header(Op::Shutdown) }, &[]);
    while guest.receive().0.op != Op::Reset {}
    let metrics = device.metrics();
    assert_eq!(metrics.bytes_from_guest.load(Ordering::Relaxed), total);
    assert_eq!(metrics.bytes_to_guest.load(Ordering::Relaxed), total);
    assert_eq!(metrics.connections.load(Ordering::Relaxed), 0);
}

#[test]
fn megabytes_go_both_ways_under_tiny_windows() {
    exchange_both_ways(700, 300, 200, 1 << 20);
}

#[test]
fn megabytes_go_both_ways_under_usual_windows() {
    exchange_both_ways(64 << 10, 256 << 10, 4096, 16 << 20);
}

#[test]
fn a_host_program_reaches_the_guest() {
    let (_dir, path, mut device) = device(64 << 10);
    // Before the guest's driver is there, programs wait.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 77\n").unwrap();
    let mut guest = Guest::activate(&mut device, 10_000, 4096);
    let request = guest.expect(Op::Request);
    guest.ports = (77, request.src_port);
    assert_eq!(request.dst_port, 77);
    guest.send(&guest.header(Op::Response), &[]);
    let mut line = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.src_port));
    let program = thread::spawn(move || program_exchange(stream, 1 << 20));
    guest.exchange(1 << 20);
    program.join().unwrap();
}

#[test]
fn a_reset_ends_connections_and_the_device_works_again() {
    let (dir, path, mut device) = device(64 << 10);
    let listener = UnixListener::bind(dir.path().join("vsock_9")).unwrap();
    for round in 0..2 {
        let mut guest = Guest::activate(&mut device, 10_000, 4096);
        guest.connect(1, 9);
        let mut program = listener.accept().unwrap().0;
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        device.pause();
        let packet = Header { len: 4, ..guest.header(Op::ReadWrite) };
        guest.send(&packet, b"ping");
        device.resume();
        let mut bytes = [0; 4];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping", "what came during a pause is not lost, round {round}");
        device.reset();
        assert_eq!(program.read(&mut bytes).unwrap(), 0, "the program sees the end");
        assert!(path.exists());
    }
    drop(device);
    assert!(!path.exists(), "the socket goes with the device");
}

#[test]
fn malformed_packets_are_dropped_and_counted() {
    let (_dir, _, mut device) = device(1000);
    let mut guest = Guest::activate(&mut device, 10_000, 4096);
    // Claims more than there is, more than any packet may have, and does not even have a header.
    guest.send(&Header { len: 9, ..from_guest(1, 2, Op::ReadWrite) }, b"eight by");
    guest.send(&Header { len: u32::MAX, ..from_guest(1, 2, Op::ReadWrite) }, b"");
    let head = guest.tx.add(&[Buffer { address: 0x20_0000, len: 43, writable: false }]).unwrap();
    guest.tx.kick();
    let interrupt = Arc::clone(&guest.interrupt);
    interrupt
        .wait_for("the short one", || std::iter::from_fn(|| guest.tx.used()).find(|used| used.0 == head));
    assert_eq!(device.metrics().packets_dropped.load(Ordering::Relaxed), 3);
    // Buffers outside memory, and writable ones in the transmit queue.
    guest.tx.add(&[Buffer { address: 1 << 40, len: 100, writable: false }]).unwrap();
    guest.tx.add(&[Buffer { address: 0, len: 100, writable: true }]).unwrap();
    guest.tx.kick();
    for _ in 0..2 {
        interrupt.wait_for("the bad ones", || guest.tx.used());
    }
    guest.send(&from_guest(1, 2, Op::Request), &[]);
    assert_eq!(guest.receive().0.op, Op::Reset, "the device goes on");
}

#[test]
fn broken_rings_are_reported_once_and_cost_nothing() {
    let (_dir, _, mut device) = device(1000);
    let guest = Guest::activate(&mut device, 10_000, 4096);
    // An available index that is ahead by more than the queue holds.
    let avail_index = GuestAddress(0x4000 + 16 * u64::from(QUEUE_SIZE) + 2);
    guest.memory.write_obj(1000_u16, avail_index).unwrap();
    guest.tx.kick();
    guest
        .interrupt
        .wait_for("the device to give up", || guest.interrupt.failed.load(Ordering::SeqCst).then_some(()));
    device.reset();
}

#[test]
fn socket_files_are_replaced_only_when_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let first = VsockListener::bind(&path).unwrap();
    assert!(matches!(VsockListener::bind(&path), Err(VsockSocketError::InUse(_))));
    drop(first);
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left by a dead process");
    let second = VsockListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    drop(second);
    assert!(path.exists(), "not ours any more");
    assert!(matches!(VsockListener::bind(&path), Err(VsockSocketError::NotSocket(_))));
    let long = dir.path().join("x".repeat(100));
    assert!(matches!(VsockListener::bind(&long), Err(VsockSocketError::TooLong { .. })));
}

#[test]
fn the_configuration_space_is_the_context_id() {
    let (_dir, _, device) = device(1000);
    let mut bytes = [0xff; 10];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 10]);
}
