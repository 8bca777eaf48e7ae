//! The thread that serves a disk's queue.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::BlockCounters;
use super::disk::Disk;
use super::request::{Extents, Request, Rules, Status};
use super::ring::{Completion, Operation, Ring, Slot};
use crate::virtio::chain::Chain;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ChainQueue, QueueError};
use crate::virtio::worker::{Control, KickHandler};

/// Bytes after which the driver hears of finished requests although more are waiting.
const NOTIFY_BYTES: usize = 256 << 10;

/// Where a disk's ring is while no worker has it.
pub type RingHome = Arc<Mutex<Option<Ring>>>;

/// Serves requests until told to stop.
pub struct Server {
    disk: Arc<Disk>,
    queue: ChainQueue,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<BlockCounters>,
    ring: Option<Ring>,
    home: RingHome,
    /// The driver does not flush, so a write must be durable when it ends (§5.2.6.2).
    write_through: bool,
    /// The host tells when a read of this file would wait.
    nowait: bool,
    /// Chains to be loaded: as many as were ever in use at once.
    spare: Vec<Chain>,
    /// Bytes moved since the driver was last notified.
    unannounced: usize,
    broken: bool,
}

impl Server {
    /// A server that borrows the ring at `home`, if there is one, for its lifetime.
    pub fn new(
        disk: Arc<Disk>,
        queue: ChainQueue,
        interrupt: Arc<dyn Interrupt>,
        counters: Arc<BlockCounters>,
        home: RingHome,
        write_through: bool,
    ) -> Self {
        let ring = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        Self {
            nowait: ring.is_some() && !disk.in_memory,
            disk,
            queue,
            interrupt,
            counters,
            ring,
            home,
            write_through,
            spare: Vec::new(),
            unannounced: 0,
            broken: false,
        }
    }

    fn serve_queue(&mut self) -> Result<bool, QueueError> {
        self.reap()?;
        self.queue.disable_kicks()?;
        let mut full = false;
        for _ in 0..self.queue.size() {
            full = self.ring.as_ref().is_some_and(|ring| !ring.has_room());
            if full {
                break;
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            self.start(chain)?;
            if self.unannounced >= NOTIFY_BYTES {
                self.announce()?;
            }
        }
        self.announce()?;
        let taken = self.ring.as_mut().is_none_or(|ring| ring.enter(0));
        if full {
            // The next completion wakes the worker; kicks meanwhile would only cost exits.
            return Ok(!taken);
        }
        Ok(self.queue.enable_kicks()? || !taken)
    }

    fn announce(&mut self) -> Result<(), QueueError> {
        self.unannounced = 0;
        self.queue.notify()
    }

    fn start(&mut self, mut chain: Chain) -> Result<(), QueueError> {
        let rules = Rules { sectors: self.disk.sectors, read_only: self.disk.read_only };
        let request = match Request::parse(&mut chain, rules) {
            Ok(request) => request,
            Err(status) => return self.finish(chain, status),
        };
        let result = match request {
            Request::Read(offset) => return self.read(chain, offset),
            Request::Flush => return self.flush(chain),
            Request::Write(offset) => self.write(&mut chain, offset),
            Request::GetId => self.get_id(&mut chain),
            Request::Discard(extents) => self.each(&extents, Disk::discard),
            Request::WriteZeroes(extents) => self.each(&extents, Disk::write_zeroes),
        };
        self.finish(chain, status(result))
    }

    /// Reads what the page cache has at once; the ring waits for the rest.
    fn read(&mut self, mut chain: Chain, mut offset: u64) -> Result<(), QueueError> {
        let mut flags = if self.nowait { libc::RWF_NOWAIT } else { 0 };
        while chain.writable.remaining() > 0 {
            match chain.writable.preadv2_from(self.disk.file.as_fd(), offset, flags) {
                // The file has shrunk since it was opened.
                Ok(0) => return self.finish(chain, Status::IoError),
                Ok(count) => offset += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if flags != 0 && error.kind() == io::ErrorKind::WouldBlock => {
                    match self.hand_over(Slot { chain, operation: Operation::Read(offset) }) {
                        None => return Ok(()),
                        Some(slot) => chain = slot.chain,
                    }
                    flags = 0;
                }
                Err(error) if flags != 0 && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.nowait = false;
                    flags = 0;
                }
                Err(_) => return self.finish(chain, Status::IoError),
            }
        }
        add(&self.counters.reads, 1);
        add(&self.counters.read_bytes, chain.writable.written());
        self.unannounced += chain.writable.written();
        self.finish(chain, Status::Ok)
    }

    /// Copies into the page cache, which waits only when the host has too much left to write out;
    /// its kernel would hand such writes to a thread of its own, at more than the copy's price.
    fn write(&mut self, chain: &mut Chain, mut offset: u64) -> io::Result<()> {
        let flags = if self.write_through { libc::RWF_DSYNC } else { 0 };
        while chain.readable.remaining() > 0 {
            match chain.readable.pwritev2_to(self.disk.file.as_fd(), offset, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    self.unannounced += count;
                    add(&self.counters.written_bytes, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        add(&self.counters.writes, 1);
        Ok(())
    }

    fn flush(&mut self, chain: Chain) -> Result<(), QueueError> {
        add(&self.counters.flushes, 1);
        match self.hand_over(Slot { chain, operation: Operation::Flush }) {
            None => Ok(()),
            Some(slot) => self.flush_now(slot.chain),
        }
    }

    fn flush_now(&mut self, chain: Chain) -> Result<(), QueueError> {
        let result = self.disk.file.sync_data();
        self.finish(chain, status(result))
    }

    fn get_id(&self, chain: &mut Chain) -> io::Result<()> {
        let length = chain.writable.remaining().min(self.disk.serial.len());
        chain.writable.write_all(&self.disk.serial[..length])
    }

    fn each(
        &self,
        extents: &Extents,
        action: fn(&Disk, &super::request::Extent) -> io::Result<()>,
    ) -> io::Result<()> {
        extents.as_slice().iter().try_for_each(|extent| action(&self.disk, extent))?;
        if self.write_through { self.disk.file.sync_data() } else { Ok(()) }
    }

    /// Gives a request to the ring; returns it if there is none, or no room.
    fn hand_over(&mut self, slot: Slot) -> Option<Slot> {
        match &mut self.ring {
            Some(ring) => ring.push(&self.disk.file, slot).err(),
            None => Some(slot),
        }
    }

    /// Ends what the ring has finished.
    fn reap(&mut self) -> Result<(), QueueError> {
        while let Some(completion) = self.ring.as_mut().and_then(Ring::complete) {
            self.completed(completion)?;
        }
        Ok(())
    }

    fn completed(&mut self, completion: Completion) -> Result<(), QueueError> {
        let Completion { slot: Slot { mut chain, operation }, result } = completion;
        match (operation, result) {
            (Operation::Flush, 0) => self.finish(chain, Status::Ok),
            (Operation::Flush, error) if retried(error) => self.flush_now(chain),
            (Operation::Read(offset), count) if count > 0 => {
                chain.writable.advance(count as usize);
                // A short read: the rest may be in the page cache now, or must be waited for again.
                self.read(chain, offset + u64::from(count.unsigned_abs()))
            }
            (Operation::Read(offset), error) if retried(error) => {
                self.nowait = false;
                self.read(chain, offset)
            }
            _ => self.finish(chain, Status::IoError),
        }
    }

    fn finish(&mut self, mut chain: Chain, status: Status) -> Result<(), QueueError> {
        if status != Status::Ok {
            add(&self.counters.errors, 1);
        }
        let written = chain.writable.written() as u32;
        let length = if chain.writable.write_last_byte(status as u8) { written + 1 } else { 0 };
        let head = chain.head();
        chain.clear();
        self.spare.push(chain);
        self.queue.push(head, length)
    }
}

impl KickHandler for Server {
    fn serve(&mut self, _control: &Control) -> bool {
        if self.broken {
            return false;
        }
        self.serve_queue().unwrap_or_else(|_| {
            self.broken = true;
            self.interrupt.device_failed();
            false
        })
    }

    fn drain(&mut self) {
        while self.ring.as_ref().is_some_and(|ring| ring.in_flight() > 0) {
            if self.ring.as_mut().is_some_and(|ring| !ring.enter(1)) {
                std::thread::yield_now();
            }
            // The rings may be broken; what matters here is that the kernel is done.
            let _ = self.reap();
        }
        let _ = self.announce();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.drain();
        if let Some(ring) = self.ring.take() {
            ring.silence();
            *self.home.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
        }
    }
}

fn status(result: io::Result<()>) -> Status {
    if result.is_ok() { Status::Ok } else { Status::IoError }
}

/// Errors that say that the ring did not try, rather than that it failed.
fn retried(error: i32) -> bool {
    [libc::EAGAIN, libc::EINTR, libc::ECANCELED, libc::EOPNOTSUPP].contains(&error.wrapping_neg())
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
