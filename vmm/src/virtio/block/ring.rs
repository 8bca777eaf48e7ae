//! io_uring for what would make the worker wait: reads that miss the page cache, and flushes.
//!
//! A [`Slot`] owns a request's buffers from the submission until the completion was taken: it is
//! neither reused nor dropped before (CH CVE-2026-45782), and the guest memory that the
//! buffers lie in stays mapped as long as the slot's chain exists. The ring waits for all of them
//! before it goes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, types};

use crate::virtio::chain::{Chain, IOV_MAX};

/// Requests that can be with the kernel at once; more wait in the queue.
const ENTRIES: u32 = 128;

/// What a slot's request has asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the chain's writable buffers from this byte of the file on.
    Read(u64),
    /// `fdatasync`.
    Flush,
}

/// A request that the kernel works on.
pub struct Slot {
    /// Its buffers.
    pub chain: Chain,
    /// What was asked.
    pub operation: Operation,
}

/// A completion.
pub struct Completion {
    /// The request, its buffers the worker's again.
    pub slot: Slot,
    /// Bytes moved, or a negative error number.
    pub result: i32,
}

/// An io_uring and the requests in it.
pub struct Ring {
    uring: IoUring,
    /// Indexed by the entries' user data.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
}

impl Ring {
    /// A ring with nothing in it.
    ///
    /// # Errors
    /// When the host has no io_uring, or refuses it to this process.
    pub fn new() -> io::Result<Self> {
        let uring = IoUring::builder()
            // The worker enters the kernel often enough to need no interruption (Linux 5.19).
            .setup_coop_taskrun()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        let slots = (0..ENTRIES).map(|_| None).collect();
        Ok(Self { uring, slots, free: (0..ENTRIES as usize).rev().collect() })
    }

    /// Completions signal `event` from now on.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn notify(&self, event: RawFd) -> io::Result<()> {
        self.uring.submitter().register_eventfd(event)
    }

    /// Undoes [`notify`](Self::notify).
    pub fn silence(&self) {
        // Fails only if nothing was registered.
        let _ = self.uring.submitter().unregister_eventfd();
    }

    /// Requests with the kernel.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another request can be taken.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a request for the next [`enter`](Self::enter).
    ///
    /// # Errors
    /// The slot itself, if there is no room.
    // The error is the request: boxing it would allocate on a way that must not fail.
    #[expect(clippy::result_large_err)]
    pub fn push(&mut self, file: &File, slot: Slot) -> Result<(), Slot> {
        let Some(index) = self.free.pop() else { return Err(slot) };
        let fd = types::Fd(file.as_raw_fd());
        let entry = match slot.operation {
            Operation::Read(offset) => {
                let iovecs = slot.chain.writable.iovecs();
                let count = iovecs.len().min(IOV_MAX) as u32;
                opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(offset).build()
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: the iovecs' array is on the heap and the memory they name is guest RAM; both belong
        // to the slot, which stays in `slots` until its completion is taken. Should the file be
        // closed before, the kernel holds its own reference from the submission on.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(index);
            return Err(slot);
        }
        self.slots[index] = Some(slot);
        Ok(())
    }

    /// Hands what is queued to the kernel and waits for `want` completions. Returns false
    /// if the kernel took nothing for now (it is short of memory, or completions are waiting to be
    /// taken): nothing is lost, try again.
    pub fn enter(&mut self, want: usize) -> bool {
        if want == 0 && self.uring.submission().is_empty() {
            return true;
        }
        self.uring.submit_and_wait(want).is_ok()
    }

    /// The oldest completion, if there is one.
    pub fn complete(&mut self) -> Option<Completion> {
        let entry = self.uring.completion().next()?;
        let index = entry.user_data() as usize;
        let slot = self.slots.get_mut(index).and_then(Option::take)?;
        self.free.push(index);
        Some(Completion { slot, result: entry.result() })
    }
}

impl Drop for Ring {
    /// The worker has drained the ring. If it could not, by a panic for one, what the kernel may
    /// still write to is leaked rather than freed.
    fn drop(&mut self) {
        for slot in self.slots.drain(..).flatten() {
            std::mem::forget(slot);
        }
    }
}
