//! virtio-rng, the entropy device (virtio 1.2 §5.4): random bytes from the host's `getrandom`.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chain::{Chain, ChainLimits};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{ChainQueue, QueueError, RING_FEATURES};
use super::worker::{Control, KickHandler, Worker, run_kick};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];

/// Bytes given for one request; the driver's buffers may be longer. Without a cap a guest whose
/// descriptors overlap has the host compute gigabytes of randomness in one uninterruptible go.
const MAX_REQUEST: usize = 64 << 10;
/// Bytes a guest may take at once, and how fast it earns more. Linux wants 64 bytes at a time; a
/// guest that wants megabytes a second is burning the host's CPU.
const BURST: u64 = 256 << 10;
const BYTES_PER_SECOND: u64 = 1 << 20;

const LIMITS: ChainLimits =
    ChainLimits { descriptors: QUEUE_SIZES[0] as usize, readable: 0, writable: 16 << 20 };

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl Rng {
    /// A device; it needs nothing of the host until it is used.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let active = queues.pop().ok_or(ActivateError::MissingQueue(0))?;
        let queue =
            ChainQueue::new(active.index, active.queue, memory, Arc::clone(&interrupt), features, LIMITS);
        let server = Server { queue, interrupt, chain: Chain::new(), budget: Budget::new(), broken: false };
        let worker = run_kick("rng", active.kick, server)
            .map_err(|source| ActivateError::Host { what: "no thread for the entropy device", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }
}

struct Server {
    queue: ChainQueue,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    budget: Budget,
    broken: bool,
}

impl Server {
    fn serve_chains(&mut self, control: &Control) -> Result<bool, QueueError> {
        self.queue.disable_kicks()?;
        for _ in 0..self.queue.size() {
            let wait = self.budget.wait();
            if !wait.is_zero() {
                self.queue.notify()?;
                control.sleep(wait);
                return Ok(true);
            }
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            let length = self.chain.writable.remaining().min(MAX_REQUEST);
            // The host's generator cannot fail once it is seeded; if it does, what was written counts.
            let _ = fill(&mut self.chain.writable, length);
            let written = self.chain.writable.written();
            self.budget.spend(written as u64);
            self.queue.push(self.chain.head(), written as u32)?;
        }
        self.queue.notify()?;
        self.queue.enable_kicks()
    }
}

impl KickHandler for Server {
    fn serve(&mut self, control: &Control) -> bool {
        if self.broken {
            return false;
        }
        self.serve_chains(control).unwrap_or_else(|_| {
            self.broken = true;
            self.interrupt.device_failed();
            false
        })
    }
}

/// Writes `length` random bytes.
fn fill(target: &mut impl Write, length: usize) -> io::Result<()> {
    let mut buffer = [0u8; 256];
    let mut left = length;
    while left > 0 {
        let piece = &mut buffer[..left.min(256)];
        // SAFETY: `piece` is valid for writes of its length.
        let count = unsafe { libc::getrandom(piece.as_mut_ptr().cast(), piece.len(), 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        target.write_all(&piece[..count])?;
        left -= count;
    }
    Ok(())
}

/// A token bucket in bytes. It may go below zero by one request.
struct Budget {
    tokens: i64,
    updated: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { tokens: BURST as i64, updated: Instant::now() }
    }

    fn spend(&mut self, bytes: u64) {
        self.tokens -= bytes as i64;
    }

    /// How long to wait until there are tokens again; zero while there are some.
    fn wait(&mut self) -> Duration {
        if self.tokens > 0 {
            return Duration::ZERO;
        }
        let now = Instant::now();
        self.refill(now.duration_since(self.updated));
        self.updated = now;
        let missing = u64::try_from(1 - self.tokens).unwrap_or(0);
        Duration::from_micros(missing * 1_000_000 / BYTES_PER_SECOND)
    }

    fn refill(&mut self, elapsed: Duration) {
        let earned = elapsed.as_micros() * u128::from(BYTES_PER_SECOND) / 1_000_000;
        let earned = i64::try_from(earned).unwrap_or(i64::MAX);
        self.tokens = self.tokens.saturating_add(earned).min(BURST as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_finite_and_earned_back() {
        let mut budget = Budget::new();
        assert_eq!(budget.wait(), Duration::ZERO);
        budget.spend(BURST + MAX_REQUEST as u64);
        let wait = budget.wait();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(63), "{wait:?}");
        budget.refill(Duration::from_secs(3600));
        assert_eq!(budget.tokens, BURST as i64, "no more than a burst is saved up");
    }

    #[test]
    fn bytes_are_random() {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        fill(&mut first, 1000).unwrap();
        fill(&mut second, 1000).unwrap();
        assert_eq!((first.len(), second.len()), (1000, 1000));
        assert_ne!(first, second);
    }
}
