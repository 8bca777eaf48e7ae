//! The one type through which devices touch the buffers of a descriptor chain.
//!
//! A chain is walked once, under [`ChainLimits`], into two byte streams: what the device may read
//! ([`Readable`]) and what it may write ([`Writable`]). The descriptors are never looked at again,
//! so a guest that changes them afterwards changes nothing. Limits are checked before anything is
//! stored: descriptors may overlap, so their sum says nothing about guest memory (FC#5762).
//!
//! The bytes themselves stay shared with the guest. What must not change between a check and its
//! use is copied out first, with [`Readable::read_obj`].

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// The most buffers the host takes in one vectored call (`IOV_MAX`).
pub const IOV_MAX: usize = 1024;

/// What a device accepts of one chain; a chain beyond it is returned to the driver unused.
#[derive(Clone, Copy, Debug)]
pub struct ChainLimits {
    /// Descriptors, an indirect table's included.
    pub descriptors: usize,
    /// Bytes the device may read.
    pub readable: usize,
    /// Bytes the device may write.
    pub writable: usize,
}

/// A chain that breaks the rules of virtio 1.2 §2.7 or the device's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the device takes.
    #[error("more than {0} descriptors")]
    TooManyDescriptors(usize),
    /// More bytes than the device takes.
    #[error("more than {0} bytes")]
    TooManyBytes(usize),
    /// A buffer outside guest memory.
    #[error("{len:#x} bytes at {address:#x} are not guest memory")]
    NotMemory {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable buffer after a device-writable one (§2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// The chain loops, leaves its table, or has a malformed indirect table.
    #[error("the chain does not end")]
    Endless,
}

/// A list of host buffers inside guest memory, consumed from the front.
#[derive(Default)]
struct Buffers {
    iovecs: Vec<libc::iovec>,
    /// Index of the first buffer that is not wholly consumed; that one is shortened in place.
    first: usize,
    remaining: usize,
    consumed: usize,
}

impl Buffers {
    fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.remaining = 0;
        self.consumed = 0;
    }

    fn push(&mut self, slice: &VolatileSlice) {
        if !slice.is_empty() {
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.iovecs.push(libc::iovec { iov_base: base, iov_len: slice.len() });
            self.remaining += slice.len();
        }
    }

    fn pending(&self) -> &[libc::iovec] {
        &self.iovecs[self.first..]
    }

    /// The front of what is pending, as one call of the host takes it.
    fn batch(&self) -> &[libc::iovec] {
        let pending = self.pending();
        &pending[..pending.len().min(IOV_MAX)]
    }

    fn advance(&mut self, count: usize) {
        let mut left = count.min(self.remaining);
        self.remaining -= left;
        self.consumed += left;
        while left > 0 {
            let iovec = &mut self.iovecs[self.first];
            let step = left.min(iovec.iov_len);
            // Wrapping: the pointer stays inside the buffer or one past it, and is used only below its end.
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            left -= step;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Calls `copy` with consecutive pieces of at most `limit` bytes in all, and consumes them.
    fn consume(&mut self, limit: usize, mut copy: impl FnMut(VolatileSlice<'_>, usize)) -> usize {
        let mut done = 0;
        while done < limit && self.first < self.iovecs.len() {
            let iovec = self.iovecs[self.first];
            let step = iovec.iov_len.min(limit - done);
            // SAFETY: the buffer lies in guest memory, which the chain's `memory` keeps mapped.
            let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast(), step) };
            copy(slice, done);
            self.advance(step);
            done += step;
        }
        done
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The part of a chain that the device reads, as a stream.
#[derive(Default)]
pub struct Readable(Buffers);

impl Readable {
    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Bytes taken so far.
    pub fn consumed(&self) -> usize {
        self.0.consumed
    }

    /// The buffers that are left, for a vectored system call or an io_uring entry.
    /// They stay valid as long as the chain is neither dropped nor loaded again.
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.0.pending()
    }

    /// Skips `count` bytes, or what is left.
    pub fn skip(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// Copies a header out, so that the guest cannot change it any more.
    ///
    /// # Errors
    /// `UnexpectedEof` when the driver's buffers are shorter than `T`.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut value = T::default();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes what is left to a stream, datagram or tap descriptor with one `writev`.
    ///
    /// # Errors
    /// What the host said; nothing is consumed then.
    pub fn writev_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let batch = self.0.batch();
        // SAFETY: every iovec lies in guest memory, which the chain's `memory` keeps mapped.
        let count = unsafe { libc::writev(fd.as_raw_fd(), batch.as_ptr(), batch.len() as libc::c_int) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.0.advance(count);
        Ok(count)
    }
}

impl Readable {
    /// Writes what is left to `offset` of a file with one `pwritev2`; `flags` are its `RWF_` flags.
    ///
    /// # Errors
    /// What the host said; nothing is consumed then.
    pub fn pwritev2_to(&mut self, fd: BorrowedFd<'_>, offset: u64, flags: i32) -> io::Result<usize> {
        let batch = self.0.batch();
        let (count, offset) = (batch.len() as libc::c_int, file_offset(offset)?);
        // SAFETY: every iovec lies in guest memory, which the chain's `memory` keeps mapped.
        let count = unsafe { libc::pwritev2(fd.as_raw_fd(), batch.as_ptr(), count, offset, flags) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.0.advance(count);
        Ok(count)
    }
}

impl Read for Readable {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.consume(buf.len(), |slice, at| {
            slice.copy_to(&mut buf[at..][..slice.len()]);
        }))
    }
}

/// The part of a chain that the device writes, as a stream.
#[derive(Default)]
pub struct Writable {
    buffers: Buffers,
    /// The byte set aside by [`Writable::reserve_last_byte`].
    last: Option<libc::iovec>,
}

impl Writable {
    /// Bytes of room left.
    pub fn remaining(&self) -> usize {
        self.buffers.remaining
    }

    /// Bytes written so far, the reserved last byte not counted: the `len` of the used element
    /// (§2.7.8.2).
    pub fn written(&self) -> usize {
        self.buffers.consumed
    }

    /// The buffers that are left, for a vectored system call or an io_uring entry.
    /// They stay valid as long as the chain is neither dropped nor loaded again.
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.buffers.pending()
    }

    /// Counts `count` bytes as written, by a system call that was given [`Self::iovecs`].
    pub fn advance(&mut self, count: usize) {
        self.buffers.advance(count);
    }

    /// Writes a header.
    ///
    /// # Errors
    /// `WriteZero` when the driver's buffers are shorter than `T`.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> io::Result<()> {
        self.write_all(value.as_slice())
    }

    /// Reads from a stream, datagram or tap descriptor with one `readv`.
    ///
    /// # Errors
    /// What the host said; nothing is written then.
    pub fn readv_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let batch = self.buffers.batch();
        // SAFETY: every iovec lies in guest memory, which the chain's `memory` keeps mapped.
        let count = unsafe { libc::readv(fd.as_raw_fd(), batch.as_ptr(), batch.len() as libc::c_int) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.buffers.advance(count);
        Ok(count)
    }

    /// Reads from `offset` of a file with one `preadv2`; `flags` are its `RWF_` flags.
    ///
    /// # Errors
    /// What the host said; nothing is written then.
    pub fn preadv2_from(&mut self, fd: BorrowedFd<'_>, offset: u64, flags: i32) -> io::Result<usize> {
        let batch = self.buffers.batch();
        let (count, offset) = (batch.len() as libc::c_int, file_offset(offset)?);
        // SAFETY: every iovec lies in guest memory, which the chain's `memory` keeps mapped.
        let count = unsafe { libc::preadv2(fd.as_raw_fd(), batch.as_ptr(), count, offset, flags) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.buffers.advance(count);
        Ok(count)
    }

    /// Sets the last byte aside (a status that is written when all else is done).
    /// Returns false if there is no room for it.
    pub fn reserve_last_byte(&mut self) -> bool {
        let buffers = &mut self.buffers;
        let Some(iovec) = buffers.iovecs[buffers.first..].last_mut() else { return false };
        iovec.iov_len -= 1;
        self.last =
            Some(libc::iovec { iov_base: iovec.iov_base.wrapping_byte_add(iovec.iov_len), iov_len: 1 });
        if iovec.iov_len == 0 {
            buffers.iovecs.pop();
        }
        buffers.remaining -= 1;
        true
    }

    /// Writes the reserved last byte; returns false if none was reserved.
    pub fn write_last_byte(&mut self, value: u8) -> bool {
        let Some(iovec) = self.last.take() else { return false };
        // SAFETY: the byte lies in guest memory, which the chain's `memory` keeps mapped.
        let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast(), 1) };
        slice.copy_from(&[value]);
        true
    }
}

impl Write for Writable {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(self.buffers.consume(buf.len(), |slice, at| slice.copy_from(&buf[at..][..slice.len()])))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The buffers of one request. Made once and loaded again for each request, so that requests
/// cost no allocation; owned by whoever does the I/O until the I/O is over (CH CVE-2026-45782).
pub struct Chain {
    /// What the device may read.
    pub readable: Readable,
    /// What the device may write.
    pub writable: Writable,
    head: u16,
    /// Keeps the buffers mapped.
    memory: Option<Arc<GuestMemoryMmap>>,
}

// SAFETY: the raw pointers in the iovecs point into guest memory, which `memory` keeps mapped and
// which any thread may access.
unsafe impl Send for Chain {}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty chain, to be loaded.
    pub fn new() -> Self {
        Self { readable: Readable::default(), writable: Writable::default(), head: 0, memory: None }
    }

    /// The chain's head, which goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Replaces the contents by those of `descriptors`, which refer to `memory`.
    ///
    /// # Errors
    /// When the chain is malformed or beyond `limits`; the chain is empty then, but for its head.
    pub fn load(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        descriptors: DescriptorChain<&GuestMemoryMmap>,
        limits: &ChainLimits,
    ) -> Result<(), ChainError> {
        self.clear();
        self.head = descriptors.head_index();
        // The buffers are looked up in `memory` itself, so it is what has to stay.
        self.memory = Some(Arc::clone(memory));
        let result = self.walk(memory, descriptors, limits);
        if result.is_err() {
            self.clear();
        }
        result
    }

    /// Forgets the buffers.
    pub fn clear(&mut self) {
        self.readable.0.clear();
        self.writable.buffers.clear();
        self.writable.last = None;
        self.memory = None;
    }

    fn walk(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptors: DescriptorChain<&GuestMemoryMmap>,
        limits: &ChainLimits,
    ) -> Result<(), ChainError> {
        let mut count = 0;
        // The iterator stops at a broken descriptor as it does at the last: the flag tells them apart.
        let mut unfinished = true;
        for descriptor in descriptors {
            count += 1;
            if count > limits.descriptors {
                return Err(ChainError::TooManyDescriptors(limits.descriptors));
            }
            unfinished = descriptor.has_next();
            let len = descriptor.len() as usize;
            let (buffers, access, limit) = if descriptor.is_write_only() {
                (&mut self.writable.buffers, Permissions::Write, limits.writable)
            } else if self.writable.buffers.remaining > 0 {
                return Err(ChainError::Order);
            } else {
                (&mut self.readable.0, Permissions::Read, limits.readable)
            };
            if len > limit - buffers.remaining {
                return Err(ChainError::TooManyBytes(limit));
            }
            let outside = || ChainError::NotMemory { address: descriptor.addr().0, len: descriptor.len() };
            for slice in memory.get_slices(descriptor.addr(), len, access).map_err(|_| outside())? {
                buffers.push(&slice.map_err(|_| outside())?);
            }
        }
        if unfinished { Err(ChainError::Endless) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
