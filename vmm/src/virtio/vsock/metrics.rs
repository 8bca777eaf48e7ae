//! What a vsock device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one device since it was made. Read at any time, from any thread.
#[derive(Debug, Default)]
pub struct VsockMetrics {
    /// Packets the guest sent.
    pub packets_from_guest: AtomicU64,
    /// Packets the guest was given.
    pub packets_to_guest: AtomicU64,
    /// Payload bytes the guest sent.
    pub bytes_from_guest: AtomicU64,
    /// Payload bytes the guest was given.
    pub bytes_to_guest: AtomicU64,
    /// Connections asked for, by either side.
    pub connections_requested: AtomicU64,
    /// Requests turned down because of the limit, or because no host program answers at the port.
    pub connections_refused: AtomicU64,
    /// Connections that exist now.
    pub connections: AtomicU64,
    /// Resets the guest was sent.
    pub resets_to_guest: AtomicU64,
    /// Packets that were dropped: malformed, or not for the host.
    pub packets_dropped: AtomicU64,
}

/// Adds to a counter. Relaxed: a counter orders nothing.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
