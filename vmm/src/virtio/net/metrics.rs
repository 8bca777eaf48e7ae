//! What a network device counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counters of one device since it was made. Read at any time, from any thread. Frames that the
/// kernel moves (`vhost`) pass uncounted: the tap's own statistics have them.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Frames the guest was given.
    pub frames_to_guest: AtomicU64,
    /// Their bytes, without the virtio header.
    pub bytes_to_guest: AtomicU64,
    /// Frames for the guest that were dropped: no buffers of its could hold them.
    pub dropped_to_guest: AtomicU64,
    /// Frames the guest sent.
    pub frames_from_guest: AtomicU64,
    /// Their bytes, without the virtio header.
    pub bytes_from_guest: AtomicU64,
    /// Frames of the guest that were dropped: malformed, or refused by the host.
    pub dropped_from_guest: AtomicU64,
    /// The kernel moves the frames at present.
    pub vhost: AtomicBool,
}

/// Adds to a counter. Relaxed: a counter orders nothing.
pub(super) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}
