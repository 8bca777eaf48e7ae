//! A queue as a device's worker uses it: take a [`Chain`], do it, give it back, notify if asked to.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};

use super::chain::{Chain, ChainLimits};
use super::device::{GuestRam, Interrupt};

/// What a [`ChainQueue`] implements of the rings, for a device to offer: notification
/// suppression by index, and indirect tables (as long as the device's [`ChainLimits`] allow).
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Sizes in the rings, in bytes (virtio 1.2 §2.7.6, §2.7.8).
const RING_HEADER_SIZE: u64 = 4;
const AVAIL_ELEMENT_SIZE: u64 = 2;
const USED_ELEMENT_SIZE: u64 = 8;

/// A queue that cannot go on: the driver broke its rings. The device stops serving it and
/// calls [`Interrupt::device_failed`].
#[derive(Debug, thiserror::Error)]
#[error("queue {index} is broken")]
pub struct QueueError {
    /// Index of the queue.
    pub index: u16,
    /// What was wrong.
    #[source]
    pub source: virtio_queue::Error,
}

/// One queue, its memory, and its way back to the driver. Used by one thread.
pub struct ChainQueue {
    index: u16,
    queue: Queue,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    limits: ChainLimits,
    malformed: u64,
    /// The used index when the driver was last asked whether it wants a notification.
    notified: u16,
}

impl ChainQueue {
    /// Wraps `queue`, whose chains shall keep to `limits`; `features` are those negotiated.
    pub fn new(
        index: u16,
        mut queue: Queue,
        memory: GuestRam,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
        limits: ChainLimits,
    ) -> Self {
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let notified = queue.next_used();
        Self { index, queue, memory, interrupt, limits, malformed: 0, notified }
    }

    /// The queue's index in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The size the driver chose. A worker serves no more chains than this before it looks at
    /// its other duties: a guest that refills the queue for ever must not starve them.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains that were malformed or beyond the limits so far.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Loads the next available chain into `chain`; false when there is none. Malformed chains
    /// are given back with a length of 0 and counted.
    ///
    /// # Errors
    /// When the rings themselves are broken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let memory = self.memory.memory().into_inner();
        for _ in 0..self.queue.size() {
            let index = self.index;
            let mut available = self.queue.iter(&*memory).map_err(|source| QueueError { index, source })?;
            let Some(descriptors) = available.next() else { return Ok(false) };
            match chain.load(&memory, descriptors, &self.limits) {
                Ok(()) => return Ok(true),
                Err(_) => {
                    self.malformed += 1;
                    self.push(chain.head(), 0)?;
                }
            }
        }
        Ok(false)
    }

    /// Makes the chain that was popped last available again. Only valid for the last one, before
    /// anything of it was used.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, `len` bytes of it written. Notifies nobody yet.
    ///
    /// # Errors
    /// When the used ring cannot be written, or `head` is no index of the descriptor table.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        self.queue.add_used(&*memory, head, len).map_err(|source| QueueError { index: self.index, source })
    }

    /// Returns several chains at once: the driver sees all of them or none. For what spans chains,
    /// such as a frame in mergeable buffers: a driver that saw the first alone would drop it.
    ///
    /// # Errors
    /// As [`push`](Self::push); some may have been returned then.
    pub fn push_all(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(last_head, last_len), others)) = used.split_last() else { return Ok(()) };
        let size = self.queue.size();
        let memory = self.memory.memory();
        let failed = |source| QueueError { index: self.index, source };
        let first = self.queue.next_used();
        for (&(head, len), at) in others.iter().zip(0_u16..) {
            if head >= size {
                return Err(failed(virtio_queue::Error::InvalidDescriptorIndex));
            }
            // Entries behind the index are the device's (§2.7.8): the driver does not look at them.
            let entry = u64::from(first.wrapping_add(at) % size);
            let offset = RING_HEADER_SIZE + entry * USED_ELEMENT_SIZE;
            let address = GuestAddress(self.queue.used_ring())
                .checked_add(offset)
                .ok_or_else(|| failed(virtio_queue::Error::AddressOverflow))?;
            memory
                .write_obj([u32::from(head).to_le(), len.to_le()], address)
                .map_err(|error| failed(virtio_queue::Error::GuestMemory(error)))?;
        }
        drop(memory);
        self.queue.set_next_used(first.wrapping_add(others.len() as u16));
        self.push(last_head, last_len)
    }

    /// Notifies the driver of the chains pushed since the last call, if it wants to know.
    ///
    /// # Errors
    /// When the rings cannot be read.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if self.wants_notification().map_err(|source| QueueError { index: self.index, source })? {
            self.interrupt.notify_queue(self.index);
        }
        Ok(())
    }

    /// Not `Queue::needs_notification`: that one does not see what [`push_all`](Self::push_all)
    /// did, and does not know the flag.
    fn wants_notification(&mut self) -> Result<bool, virtio_queue::Error> {
        let memory = self.memory.memory();
        let avail = self.queue.avail_ring();
        let load = |address| memory.load(GuestAddress(address), Ordering::Relaxed).map(u16::from_le);
        // The used index must be out before the driver's wish is read (§2.7.7.2, §2.7.10).
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags = load(avail).map_err(virtio_queue::Error::GuestMemory)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event = avail + RING_HEADER_SIZE + u64::from(self.queue.size()) * AVAIL_ELEMENT_SIZE;
        let event = load(used_event).map_err(virtio_queue::Error::GuestMemory)?;
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.notified, new);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver for a kick when it adds chains. Returns true when it did so meanwhile:
    /// then look again before sleeping.
    ///
    /// # Errors
    /// When the rings cannot be reached.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        self.queue.enable_notification(&*memory).map_err(|source| QueueError { index: self.index, source })
    }

    /// Tells the driver that no kick is needed, as the worker is looking anyway.
    ///
    /// # Errors
    /// When the rings cannot be written.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        self.queue.disable_notification(&*memory).map_err(|source| QueueError { index: self.index, source })
    }
}
