//! One direction at a time, on a datagram socket in a tap's place.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{frame, with_header};
use crate::virtio::net::HEADER_SIZE;
use crate::virtio::net::metrics::NetMetrics;
use crate::virtio::net::receive::{self, Receiver};
use crate::virtio::net::transmit::{self, Transmitter};
use crate::virtio::queue::{ChainQueue, RING_FEATURES};
use crate::virtio::test_driver::{Buffer, DriverQueue, TestInterrupt, guest_memory};

const QUEUE_SIZE: u16 = 64;
const BUFFERS: u64 = 0x10_0000;
const SLOT: u64 = 0x1_1000;

struct Bench {
    memory: GuestMemoryMmap,
    driver: DriverQueue,
    queue: Option<ChainQueue>,
    metrics: Arc<NetMetrics>,
    /// What the device takes for a tap, and the network behind it.
    tap: UnixDatagram,
    network: UnixDatagram,
    now: Instant,
}

impl Bench {
    fn new(limits: crate::virtio::chain::ChainLimits) -> Self {
        let (memory, ram) = guest_memory(8 << 20);
        let driver = DriverQueue::new(&memory, 0, QUEUE_SIZE, 0x1000);
        let queue =
            ChainQueue::new(0, driver.activate().queue, ram, TestInterrupt::new(), RING_FEATURES, limits);
        let (tap, network) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        network.set_nonblocking(true).unwrap();
        let queue = Some(queue);
        Self { memory, driver, queue, metrics: Arc::default(), tap, network, now: Instant::now() }
    }

    fn receiver(&mut self, mergeable: bool) -> Receiver {
        Receiver::new(self.queue.take().unwrap(), mergeable, Arc::clone(&self.metrics))
    }

    /// Offers a buffer of `len` bytes.
    fn offer(&mut self, len: u32) {
        let address = BUFFERS + u64::from(self.driver.next_head().unwrap()) * SLOT;
        self.driver.add(&[Buffer { address, len, writable: true }]).unwrap();
    }

    fn offer_many(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            self.offer(len);
        }
    }

    /// The next frame that the driver finds, put together as the driver does it, and the number of
    /// buffers it came in.
    fn received(&mut self) -> Option<(Vec<u8>, u16)> {
        let (head, len) = self.driver.used()?;
        let mut bytes = self.buffer(head, len);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let (head, len) = self.driver.used().expect("all buffers of a frame come at once");
            bytes.extend(self.buffer(head, len));
        }
        assert_eq!(bytes[..10], [0xee; 10], "the tap's header");
        Some((bytes.split_off(HEADER_SIZE), count))
    }

    fn buffer(&self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + u64::from(head) * SLOT)).unwrap();
        bytes
    }

    fn arrives(&self, frame: &[u8]) {
        self.network.send(&with_header(frame)).unwrap();
    }

    fn dropped(&self) -> u64 {
        self.metrics.dropped_to_guest.load(Ordering::Relaxed)
    }
}

#[test]
fn a_frame_takes_the_buffers_it_needs() {
    let mut bench = Bench::new(receive::LIMITS);
    let mut receiver = bench.receiver(true);
    bench.offer_many(40, 1526);
    // The second large one goes straight to the guest, as the first has taught how many it takes.
    for (seed, len) in [(1, 60), (2, 9000), (3, 9000), (4, 1514), (5, 1515), (6, 9000)] {
        bench.arrives(&frame(seed, len));
        assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Frames);
        let (bytes, count) = bench.received().unwrap();
        assert_eq!(bytes, frame(seed, len));
        assert_eq!(usize::from(count), (len + HEADER_SIZE).div_ceil(1526));
    }
    assert_eq!(bench.dropped(), 0);
    assert_eq!(bench.metrics.frames_to_guest.load(Ordering::Relaxed), 6);
}

#[test]
fn without_buffers_the_tap_is_left_alone_and_nothing_is_lost() {
    let mut bench = Bench::new(receive::LIMITS);
    let mut receiver = bench.receiver(true);
    for seed in 0..5 {
        bench.arrives(&frame(seed, 100));
    }
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Buffers);
    bench.offer_many(2, 1526);
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Buffers);
    bench.offer_many(4, 1526);
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Frames);
    for seed in 0..5 {
        assert_eq!(bench.received().unwrap().0, frame(seed, 100));
    }
    assert!(bench.received().is_none());
}

#[test]
fn a_frame_waits_for_the_rest_of_its_buffers_but_not_for_ever() {
    let mut bench = Bench::new(receive::LIMITS);
    let mut receiver = bench.receiver(true);
    bench.offer_many(2, 1000);
    bench.arrives(&frame(1, 3500));
    let receive::Wait::BuffersUntil(deadline) = receiver.run(bench.tap.as_fd(), bench.now).unwrap() else {
        panic!("it should wait");
    };
    assert!(bench.received().is_none(), "half a frame is none");
    bench.offer_many(2, 1000);
    assert_eq!(receiver.run(bench.tap.as_fd(), deadline).unwrap(), receive::Wait::Buffers);
    assert_eq!(bench.received().unwrap(), (frame(1, 3500), 4));
    // A driver whose whole queue is too small gets smaller frames still.
    bench.offer_many(3, 1000);
    bench.arrives(&frame(2, 3500));
    bench.arrives(&frame(3, 800));
    assert!(matches!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::BuffersUntil(_)));
    bench.now += Duration::from_secs(1);
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Frames);
    assert_eq!(bench.received().unwrap(), (frame(3, 800), 1));
    assert_eq!(bench.dropped(), 1);
}

#[test]
fn without_mergeable_buffers_a_frame_fits_one_or_is_dropped() {
    let mut bench = Bench::new(receive::LIMITS);
    let mut receiver = bench.receiver(false);
    bench.offer_many(3, 1526);
    bench.arrives(&frame(1, 1515));
    bench.arrives(&frame(2, 1514));
    bench.arrives(&frame(3, 14));
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Frames);
    assert_eq!(bench.received().unwrap(), (frame(2, 1514), 1));
    assert_eq!(bench.received().unwrap(), (frame(3, 14), 1));
    assert_eq!(bench.dropped(), 1);
}

#[test]
fn buffers_without_room_are_given_back() {
    let mut bench = Bench::new(receive::LIMITS);
    let mut receiver = bench.receiver(true);
    bench.offer_many(2, HEADER_SIZE as u32);
    bench.offer(1000);
    bench.arrives(&frame(1, 60));
    assert_eq!(receiver.run(bench.tap.as_fd(), bench.now).unwrap(), receive::Wait::Buffers);
    assert_eq!(bench.driver.used().map(|used| used.1), Some(0));
    assert_eq!(bench.driver.used().map(|used| used.1), Some(0));
    assert_eq!(bench.received().unwrap().0, frame(1, 60));
}

#[test]
fn the_guest_s_frames_reach_the_tap_and_bad_ones_do_not() {
    let mut bench = Bench::new(transmit::LIMITS);
    let metrics = Arc::clone(&bench.metrics);
    let mut transmitter = Transmitter::new(bench.queue.take().unwrap(), metrics);
    let bytes = with_header(&frame(1, 5000));
    bench.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let part = |from: usize, to: usize| Buffer {
        address: BUFFERS + from as u64,
        len: (to - from) as u32,
        writable: false,
    };
    bench.driver.add(&[part(0, 5), part(5, 12), part(12, 3000), part(3000, bytes.len())]).unwrap();
    bench.driver.add(&[part(0, HEADER_SIZE + 13)]).unwrap();
    bench.driver.add(&[Buffer { address: 1 << 40, len: 100, writable: false }]).unwrap();
    bench.driver.add(&[Buffer { writable: true, ..part(0, 100) }]).unwrap();
    bench.driver.add(&[part(0, 70_000)]).unwrap();
    bench.driver.add(&[part(0, 1000)]).unwrap();
    assert_eq!(transmitter.run(bench.tap.as_fd()).unwrap(), transmit::Wait::Frames);
    let mut arrived = vec![0; 10_000];
    let len = bench.network.recv(&mut arrived).unwrap();
    assert_eq!(arrived[..len], bytes);
    assert_eq!(bench.network.recv(&mut arrived).unwrap(), 1000);
    assert_eq!(bench.network.recv(&mut arrived).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(std::iter::from_fn(|| bench.driver.used()).count(), 6);
    assert_eq!(bench.metrics.dropped_from_guest.load(Ordering::Relaxed), 4);
    assert_eq!(bench.metrics.bytes_from_guest.load(Ordering::Relaxed), 5000 + 1000 - 12);
}

#[test]
fn a_full_tap_holds_frames_back() {
    let mut bench = Bench::new(transmit::LIMITS);
    let metrics = Arc::clone(&bench.metrics);
    let mut transmitter = Transmitter::new(bench.queue.take().unwrap(), metrics);
    for n in 0..QUEUE_SIZE {
        let address = BUFFERS + u64::from(n) * SLOT;
        bench.memory.write_slice(&[n as u8; 1000], GuestAddress(address)).unwrap();
        bench.driver.add(&[Buffer { address, len: 1000, writable: false }]).unwrap();
    }
    let mut arrived = Vec::new();
    let mut bytes = [0; 2000];
    while arrived.len() < usize::from(QUEUE_SIZE) {
        let wait = transmitter.run(bench.tap.as_fd()).unwrap();
        let before = arrived.len();
        while let Ok(len) = bench.network.recv(&mut bytes) {
            assert_eq!(len, 1000);
            arrived.push(u16::from(bytes[0]));
        }
        assert!(arrived.len() > before);
        assert_eq!(wait == transmit::Wait::Frames, arrived.len() == usize::from(QUEUE_SIZE));
    }
    assert_eq!(arrived, (0..QUEUE_SIZE).collect::<Vec<_>>());
}

proptest! {
    #[test]
    fn frames_arrive_whole_and_in_order(
        frames in vec(14_usize..20_000, 1..20),
        // A full queue of the smallest holds the largest frame.
        buffers in vec(400_u32..5000, 1..30),
        at_a_time in 1_usize..30,
    ) {
        let mut bench = Bench::new(receive::LIMITS);
        let mut receiver = bench.receiver(true);
        let mut buffers = buffers.into_iter().cycle();
        let (mut sent, mut received) = (0, 0);
        for _ in 0..10_000 {
            for _ in 0..at_a_time {
                if bench.driver.next_head().is_some() {
                    bench.offer(buffers.next().unwrap());
                }
            }
            if sent < frames.len() && bench.network.send(&with_header(&frame(sent as u8, frames[sent]))).is_ok() {
                sent += 1;
            }
            receiver.run(bench.tap.as_fd(), bench.now).unwrap();
            while let Some((bytes, _)) = bench.received() {
                prop_assert_eq!(&bytes, &frame(received as u8, frames[received]));
                received += 1;
            }
            if received == frames.len() {
                break;
            }
        }
        prop_assert_eq!(received, frames.len());
        prop_assert_eq!(bench.dropped(), 0);
    }
}
