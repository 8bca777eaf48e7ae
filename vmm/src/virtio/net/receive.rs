//! Frames for the guest: from the tap straight into the guest's buffers.
//!
//! How long the next frame is, nobody says. So each is read into as many buffers as recent frames
//! needed, followed by a host buffer that catches the rest of a longer one; the rest is then copied
//! to further buffers of the guest. When the guest has none, the frame waits for them ([`Wait`]); but not
//! for ever, as a driver whose whole queue is smaller than the frame would never get another one.
//!
//! While the guest has no buffers the tap is neither read nor polled: its queue in the kernel fills, and
//! drops (FC CVE-2020-16843 is what comes of doing it otherwise).

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::HEADER_SIZE;
use super::metrics::{NetMetrics, count};
use crate::virtio::chain::{Chain, ChainLimits};
use crate::virtio::queue::{ChainQueue, QueueError};

/// Chains of the receive queue. Buffers are only ever written, and the frame bounds what is.
pub const LIMITS: ChainLimits =
    ChainLimits { descriptors: MAX_DESCRIPTORS, readable: 0, writable: u32::MAX as usize };

/// More than any driver needs for the largest frame, and few enough for one `readv`.
const MAX_DESCRIPTORS: usize = 256;

/// Room for a frame of 64 KiB with its Ethernet header and VLAN tags. No tap gives a larger one.
const OVERFLOW: usize = (64 << 10) + 64;

/// Frames in one go, before the other direction has its turn.
const BATCH: usize = 128;

/// How long a frame waits for the rest of the buffers it needs. Longer than any guest leaves its
/// queue alone that still works, as what is dropped has to be sent again.
const FRAME_TIMEOUT: Duration = Duration::from_millis(500);

/// Buffers in one `readv`; the header and the overflow come on top, within `IOV_MAX`.
const MAX_IOVECS: usize = 1000;

/// Why receiving stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The batch is full: call again soon.
    None,
    /// The tap has nothing: poll it.
    Frames,
    /// The guest has no buffers: its kick is asked for. Do not poll the tap.
    Buffers,
    /// A frame is held until this instant, for buffers.
    BuffersUntil(Instant),
    /// The queue is detached from its tap, or the tap is gone. Do not poll it.
    Detached,
}

/// A frame that was read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// Bytes, header included.
    len: usize,
    /// Of these, bytes that are in the guest's buffers, header included; the rest is in the overflow.
    placed: usize,
    deadline: Instant,
}

/// The receiving half of a pair.
pub struct Receiver {
    queue: ChainQueue,
    mergeable: bool,
    metrics: Arc<NetMetrics>,
    /// Taken from the guest and not given back, in order.
    chains: VecDeque<Chain>,
    spare: Vec<Chain>,
    /// How many bytes the next frame is expected to need.
    window: usize,
    header: [u8; HEADER_SIZE],
    overflow: Vec<u8>,
    iovecs: Iovecs,
    held: Option<Frame>,
    used: Vec<(u16, u32)>,
}

/// Filled and used within one call, kept for its allocation.
#[derive(Default)]
struct Iovecs(Vec<libc::iovec>);

// SAFETY: the pointers are only followed within the call that stored them.
unsafe impl Send for Iovecs {}

impl Receiver {
    /// Receives into the buffers of `queue`, over several of them if `mergeable`.
    pub fn new(queue: ChainQueue, mergeable: bool, metrics: Arc<NetMetrics>) -> Self {
        Self {
            queue,
            mergeable,
            metrics,
            chains: VecDeque::new(),
            spare: Vec::new(),
            window: 0,
            header: [0; HEADER_SIZE],
            overflow: vec![0; OVERFLOW],
            iovecs: Iovecs::default(),
            held: None,
            used: Vec::new(),
        }
    }

    /// Moves frames from `tap` to the guest until something is lacking.
    ///
    /// # Errors
    /// When the driver broke the rings.
    pub fn run(&mut self, tap: BorrowedFd<'_>, now: Instant) -> Result<Wait, QueueError> {
        self.queue.disable_kicks()?;
        let wait = self.run_batch(tap, now);
        self.queue.notify()?;
        wait
    }

    /// A pause is over: the guest could give no buffers meanwhile.
    pub fn resumed(&mut self, now: Instant) {
        if let Some(frame) = self.held.as_mut() {
            frame.deadline = now + FRAME_TIMEOUT;
        }
    }

    fn run_batch(&mut self, tap: BorrowedFd<'_>, now: Instant) -> Result<Wait, QueueError> {
        for _ in 0..BATCH {
            if let Some(frame) = self.held {
                if !self.complete(frame)? {
                    if now < frame.deadline {
                        return Ok(Wait::BuffersUntil(frame.deadline));
                    }
                    self.drop_frame();
                }
                continue;
            }
            if !self.fill(self.window)? {
                return Ok(Wait::Buffers);
            }
            match self.read(tap) {
                Ok(len) => self.take(len, now),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Wait::Frames),
                    Some(libc::EBADFD | libc::EIO) => return Ok(Wait::Detached),
                    // The kernel could not turn this one frame into what we take, and dropped it.
                    _ if error.kind() == ErrorKind::Interrupted => {}
                    _ => count(&self.metrics.dropped_to_guest, 1),
                },
            }
        }
        Ok(Wait::None)
    }

    fn room(&self) -> usize {
        self.chains.iter().map(|chain| chain.writable.remaining()).sum()
    }

    /// Takes buffers of the guest until there are `room` bytes, or none is left; without mergeable
    /// buffers until there is one. False when there is none at all: its kick is asked for then.
    fn fill(&mut self, room: usize) -> Result<bool, QueueError> {
        let mut have = self.room();
        while self.chains.is_empty() || (self.mergeable && have < room) {
            match self.next_chain()? {
                Some(chain) => {
                    have += chain.writable.remaining();
                    self.chains.push_back(chain);
                }
                None if !self.chains.is_empty() => break,
                None if self.queue.enable_kicks()? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// A buffer with room for more than a header, as each must have (§5.1.6.3.1).
    fn next_chain(&mut self) -> Result<Option<Chain>, QueueError> {
        let mut chain = self.spare.pop().unwrap_or_default();
        while self.queue.pop(&mut chain)? {
            if chain.writable.remaining() > HEADER_SIZE {
                return Ok(Some(chain));
            }
            self.queue.push(chain.head(), 0)?;
        }
        self.spare.push(chain);
        Ok(None)
    }

    /// Reads one frame: its header to the host, so that nobody changes it, the rest to the guest.
    fn read(&mut self, tap: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = &mut self.iovecs.0;
        iovecs.clear();
        iovecs.push(iovec(&mut self.header));
        let mut skip = HEADER_SIZE;
        for buffer in self.chains.iter().flat_map(|chain| chain.writable.iovecs()).take(MAX_IOVECS) {
            let skipped = skip.min(buffer.iov_len);
            skip -= skipped;
            iovecs.push(libc::iovec {
                iov_base: buffer.iov_base.wrapping_byte_add(skipped),
                iov_len: buffer.iov_len - skipped,
            });
        }
        iovecs.push(iovec(&mut self.overflow));
        let count = iovecs.len() as libc::c_int;
        // SAFETY: the first and the last buffer are fields of `self`, those between are guest memory,
        // which the chains keep mapped.
        let read = unsafe { libc::readv(tap.as_raw_fd(), iovecs.as_ptr(), count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// A frame of `len` bytes has been read.
    fn take(&mut self, len: usize, now: Instant) {
        // As much of the guest's buffers as `read` used: all, but for absurdly scattered ones.
        let room: usize = self.iovecs.0[1..self.iovecs.0.len() - 1].iter().map(|buffer| buffer.iov_len).sum();
        let room = room + HEADER_SIZE;
        let fits = if self.mergeable { len < room + OVERFLOW } else { len <= room };
        if len <= HEADER_SIZE || !fits || (len > room && room < self.room()) {
            return count(&self.metrics.dropped_to_guest, 1);
        }
        // Grows at once, shrinks slowly: buffers taken in vain cost less than a copy.
        self.window = if len > self.window { len } else { self.window - (self.window - len) / 16 };
        self.held = Some(Frame { len, placed: len.min(room), deadline: now + FRAME_TIMEOUT });
    }

    fn drop_frame(&mut self) {
        self.held = None;
        count(&self.metrics.dropped_to_guest, 1);
    }

    /// Gives `frame` to the guest; false if that takes more buffers than the guest has.
    fn complete(&mut self, frame: Frame) -> Result<bool, QueueError> {
        while self.room() < frame.len {
            match self.next_chain()? {
                Some(chain) => self.chains.push_back(chain),
                None if self.queue.enable_kicks()? => {}
                None => return Ok(false),
            }
        }
        self.held = None;
        self.set_buffer_count(frame.len);
        let (mut left, mut placed, mut tail) = (frame.len, frame.placed, 0);
        self.used.clear();
        while let Some(mut chain) = (left > 0).then(|| self.chains.pop_front()).flatten() {
            let share = left.min(chain.writable.remaining());
            let mut in_place = share.min(placed);
            if left == frame.len {
                // The first buffer has room for it: `next_chain` has seen to that.
                let _ = chain.writable.write_all(&self.header);
                in_place -= HEADER_SIZE;
                placed -= HEADER_SIZE;
            }
            chain.writable.advance(in_place);
            placed -= in_place;
            let copied = left.min(share) - chain.writable.written();
            let _ = chain.writable.write_all(&self.overflow[tail..tail + copied]);
            tail += copied;
            left -= share;
            self.used.push((chain.head(), share as u32));
            chain.clear();
            self.spare.push(chain);
        }
        self.queue.push_all(&self.used)?;
        count(&self.metrics.frames_to_guest, 1);
        count(&self.metrics.bytes_to_guest, frame.len - HEADER_SIZE);
        Ok(true)
    }

    /// `num_buffers`, the last two bytes of the header (§5.1.6): the tap does not know it.
    fn set_buffer_count(&mut self, len: usize) {
        let mut left = len;
        let mut buffers = 0_u16;
        for chain in &self.chains {
            if left == 0 {
                break;
            }
            left -= left.min(chain.writable.remaining());
            buffers += 1;
        }
        self.header[HEADER_SIZE - 2..].copy_from_slice(&buffers.to_le_bytes());
    }
}

fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}
