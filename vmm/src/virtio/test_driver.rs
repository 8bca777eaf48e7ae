//! A driver for tests: the other side of the rings, in plain guest memory, and an interrupt that
//! can be waited for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActiveQueue, GuestRam, Interrupt};

/// A test that waits longer than this has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest memory from address 0, `size` bytes.
pub fn guest_memory(size: usize) -> (GuestMemoryMmap, GuestRam) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
    (memory.clone(), GuestMemoryAtomic::new(memory))
}

/// One queue as its driver sees it.
pub struct DriverQueue {
    memory: GuestMemoryMmap,
    index: u16,
    size: u16,
    base: u64,
    free: VecDeque<u16>,
    /// The chain that starts at each descriptor.
    chains: Vec<Vec<u16>>,
    avail: u16,
    used: u16,
    /// The kick the device was given.
    pub kick: EventFd,
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

impl DriverQueue {
    /// A queue of `size` descriptors with its rings at `base`; they take 32 bytes a descriptor and 16.
    pub fn new(memory: &GuestMemoryMmap, index: u16, size: u16, base: u64) -> Self {
        Self {
            memory: memory.clone(),
            index,
            size,
            base,
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// What the transport hands the device.
    pub fn activate(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring() as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue { index: self.index, queue, kick: self.kick.try_clone().unwrap() }
    }

    /// The descriptor that will head the next chain.
    pub fn next_head(&self) -> Option<u16> {
        self.free.front().copied()
    }

    /// Makes a chain available, without a kick; returns its head, or `None` if there is no room.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let ids: Vec<u16> = self.free.drain(..buffers.len()).collect();
        for (at, buffer) in buffers.iter().enumerate() {
            let next = ids.get(at + 1);
            let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let descriptor = GuestAddress(self.base + 16 * u64::from(ids[at]));
            self.memory.write_obj(buffer.address, descriptor).unwrap();
            self.memory.write_obj(buffer.len, GuestAddress(descriptor.0 + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(descriptor.0 + 12)).unwrap();
            self.memory.write_obj(*next.unwrap_or(&0), GuestAddress(descriptor.0 + 14)).unwrap();
        }
        let head = ids[0];
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.store(self.avail, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
        self.chains[usize::from(head)] = ids;
        Some(head)
    }

    /// Tells the device to look.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain the device has used: its head, and the bytes written. Asks for an interrupt
    /// at the one after it.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let used_event = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.memory.store(self.used, GuestAddress(used_event), Ordering::SeqCst).unwrap();
        let index: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let ids = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!ids.is_empty(), "chain {head} was used twice");
        self.free.extend(ids);
        Some((head, len))
    }
}

/// An interrupt that is remembered.
#[derive(Default)]
pub struct TestInterrupt {
    raised: Mutex<u64>,
    changed: Condvar,
    /// The device gave up.
    pub failed: AtomicBool,
}

impl TestInterrupt {
    /// For an activation, and to wait for.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Tries `attempt` now and after each interrupt until it gives something.
    pub fn wait_for<T>(&self, what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
        let mut raised = self.raised.lock().unwrap();
        loop {
            let seen = *raised;
            drop(raised);
            if let Some(value) = attempt() {
                return value;
            }
            raised = self.raised.lock().unwrap();
            while *raised == seen {
                let (guard, timeout) = self.changed.wait_timeout(raised, PATIENCE).unwrap();
                assert!(!timeout.timed_out(), "waited in vain for {what}");
                raised = guard;
            }
        }
    }
}

impl Interrupt for TestInterrupt {
    fn notify_queue(&self, _queue: u16) {
        *self.raised.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    fn notify_config(&self) {
        self.notify_queue(0);
    }

    fn queue_irqfd(&self, _queue: u16) -> Option<EventFd> {
        None
    }

    fn device_failed(&self) {
        self.failed.store(true, Ordering::SeqCst);
        self.notify_config();
    }
}
