//! Frames of the guest: from its buffers straight to the tap.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::HEADER_SIZE;
use super::metrics::{NetMetrics, count};
use crate::virtio::chain::{Chain, ChainLimits};
use crate::virtio::queue::{ChainQueue, QueueError};

/// Chains of the transmit queue: a header and at most 64 KiB with an Ethernet header and VLAN tags.
/// Few enough buffers for one `writev`: a frame that was cut in two would be two.
pub const LIMITS: ChainLimits =
    ChainLimits { descriptors: 512, readable: HEADER_SIZE + (64 << 10) + 64, writable: 0 };

/// An Ethernet header: the kernel takes nothing shorter.
const MIN_FRAME: usize = 14;

/// Frames in one go, before the other direction has its turn.
const BATCH: usize = 128;

/// Why transmitting stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The batch is full: call again soon.
    None,
    /// The guest has no more; its kick is asked for.
    Frames,
    /// The tap takes no more: poll it.
    Tap,
}

/// The transmitting half of a pair.
pub struct Transmitter {
    queue: ChainQueue,
    metrics: Arc<NetMetrics>,
    chain: Chain,
    malformed: u64,
}

impl Transmitter {
    /// Transmits what comes in `queue`.
    pub fn new(queue: ChainQueue, metrics: Arc<NetMetrics>) -> Self {
        Self { queue, metrics, chain: Chain::new(), malformed: 0 }
    }

    /// Moves frames from the guest to `tap` until something is lacking.
    ///
    /// # Errors
    /// When the driver broke the rings.
    pub fn run(&mut self, tap: BorrowedFd<'_>) -> Result<Wait, QueueError> {
        self.queue.disable_kicks()?;
        let wait = self.run_batch(tap);
        self.queue.notify()?;
        let malformed = self.queue.malformed();
        count(&self.metrics.dropped_from_guest, (malformed - self.malformed) as usize);
        self.malformed = malformed;
        wait
    }

    fn run_batch(&mut self, tap: BorrowedFd<'_>) -> Result<Wait, QueueError> {
        for _ in 0..BATCH {
            if !self.queue.pop(&mut self.chain)? {
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Wait::Frames);
            }
            if !self.send(tap) {
                self.queue.undo_pop();
                return Ok(Wait::Tap);
            }
            self.queue.push(self.chain.head(), 0)?;
        }
        Ok(Wait::None)
    }

    /// False when the tap is full. The kernel copies the header before it checks it.
    fn send(&mut self, tap: BorrowedFd<'_>) -> bool {
        let len = self.chain.readable.remaining();
        if len < HEADER_SIZE + MIN_FRAME {
            count(&self.metrics.dropped_from_guest, 1);
            return true;
        }
        match self.chain.readable.writev_to(tap) {
            Ok(_) => {
                count(&self.metrics.frames_from_guest, 1);
                count(&self.metrics.bytes_from_guest, len - HEADER_SIZE);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            // The interface is down, or the guest's header makes no sense.
            Err(_) => {
                count(&self.metrics.dropped_from_guest, 1);
                true
            }
        }
    }
}
