//! The devices' counters under common names, for `/metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::block::BlockCounters;
use crate::virtio::console::ConsoleCounters;
use crate::virtio::net::NetMetrics;
use crate::virtio::vsock::VsockMetrics;

/// One device's counters.
#[derive(Clone, Debug)]
pub enum DeviceCounters {
    /// A disk's.
    Block {
        /// Its ID.
        id: String,
        /// What it counts.
        counters: Arc<BlockCounters>,
    },
    /// A network interface's.
    Net {
        /// Its ID.
        id: String,
        /// What it counts.
        counters: Arc<NetMetrics>,
    },
    /// The vsock device's.
    Vsock {
        /// What it counts.
        counters: Arc<VsockMetrics>,
    },
    /// The virtio console's.
    Console {
        /// What it counts.
        counters: Arc<ConsoleCounters>,
    },
    /// A device that counts nothing.
    Nothing,
}

/// One value of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The device, as `disk:root`.
    pub device: String,
    /// What was counted.
    pub name: &'static str,
    /// How often, or how much.
    pub value: u64,
}

impl DeviceCounters {
    /// The values now.
    pub fn samples(&self) -> Vec<Sample> {
        let (device, counters): (String, Vec<(&'static str, &AtomicU64)>) = match self {
            Self::Block { id, counters } => (format!("disk:{id}"), block(counters)),
            Self::Net { id, counters } => (format!("net:{id}"), net(counters)),
            Self::Vsock { counters } => ("vsock".to_owned(), vsock(counters)),
            Self::Console { counters } => ("console".to_owned(), console(counters)),
            Self::Nothing => return Vec::new(),
        };
        let sample = |(name, counter): (&'static str, &AtomicU64)| Sample {
            device: device.clone(),
            name,
            value: counter.load(Ordering::Relaxed),
        };
        counters.into_iter().map(sample).collect()
    }
}

fn block(counters: &BlockCounters) -> Vec<(&'static str, &AtomicU64)> {
    vec![
        ("reads", &counters.reads),
        ("read_bytes", &counters.read_bytes),
        ("writes", &counters.writes),
        ("written_bytes", &counters.written_bytes),
        ("flushes", &counters.flushes),
        ("errors", &counters.errors),
    ]
}

fn net(counters: &NetMetrics) -> Vec<(&'static str, &AtomicU64)> {
    vec![
        ("frames_to_guest", &counters.frames_to_guest),
        ("bytes_to_guest", &counters.bytes_to_guest),
        ("dropped_to_guest", &counters.dropped_to_guest),
        ("frames_from_guest", &counters.frames_from_guest),
        ("bytes_from_guest", &counters.bytes_from_guest),
        ("dropped_from_guest", &counters.dropped_from_guest),
    ]
}

fn vsock(counters: &VsockMetrics) -> Vec<(&'static str, &AtomicU64)> {
    vec![
        ("packets_from_guest", &counters.packets_from_guest),
        ("packets_to_guest", &counters.packets_to_guest),
        ("bytes_from_guest", &counters.bytes_from_guest),
        ("bytes_to_guest", &counters.bytes_to_guest),
        ("connections_requested", &counters.connections_requested),
        ("connections_refused", &counters.connections_refused),
        ("resets_to_guest", &counters.resets_to_guest),
        ("packets_dropped", &counters.packets_dropped),
    ]
}

fn console(counters: &ConsoleCounters) -> Vec<(&'static str, &AtomicU64)> {
    vec![("written_bytes", &counters.written), ("lost_bytes", &counters.lost), ("read_bytes", &counters.read)]
}
