//! The disk as the transport sees it: features, configuration space, life.

use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::disk::{Disk, DiskError, DiskProblem, SECTOR};
use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use super::ring::Ring;
use super::worker::{RingHome, Server};
use crate::config::{DiskConfig, DiskIo};
use crate::virtio::chain::ChainLimits;
use crate::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::virtio::queue::{ChainQueue, RING_FEATURES};
use crate::virtio::worker::{Worker, run_kick};

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];

/// Data buffers of a request: a chain is no longer than its queue (§2.7.5.3.1), and a header and
/// a status go with them.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Bytes of a data buffer.
const SIZE_MAX: u32 = 256 << 10;
/// A driver that respects both never exceeds this; one that does not gets nothing done.
const REQUEST_MAX: usize = SEG_MAX as usize * SIZE_MAX as usize;

const LIMITS: ChainLimits = ChainLimits {
    descriptors: QUEUE_SIZES[0] as usize,
    readable: REQUEST_MAX + 64,
    writable: REQUEST_MAX + 64,
};

/// What a disk has done, since the machine was built.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Bytes they read.
    pub read_bytes: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes that were written.
    pub written_bytes: AtomicU64,
    /// Flushes asked for.
    pub flushes: AtomicU64,
    /// Requests that ended with an error.
    pub errors: AtomicU64,
}

/// A virtio-blk device.
pub struct Block {
    disk: Arc<Disk>,
    features: u64,
    config: [u8; CONFIG_SIZE],
    ring: RingHome,
    counters: Arc<BlockCounters>,
    worker: Option<Worker>,
}

impl Block {
    /// Opens and locks the disk, and sets its I/O engine up.
    ///
    /// # Errors
    /// When the disk is missing, in use or no disk, or io_uring was asked for and is not to be had.
    pub fn new(config: &DiskConfig) -> Result<Self, DiskError> {
        let disk = Disk::open(config)?;
        let ring = match config.io {
            DiskIo::Sync => None,
            DiskIo::Auto => Ring::new().ok(),
            DiskIo::IoUring => Some(Ring::new().map_err(|source| DiskError {
                id: config.id.clone(),
                path: config.path.clone(),
                problem: DiskProblem::IoUring(source),
            })?),
        };
        Ok(Self {
            features: features(disk.read_only),
            config: config_space(&disk),
            disk: Arc::new(disk),
            ring: Arc::new(Mutex::new(ring)),
            counters: Arc::default(),
            worker: None,
        })
    }

    /// What the disk does, to be read at any time.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }
}

fn features(read_only: bool) -> u64 {
    let mut bits =
        vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().fold(RING_FEATURES, |features, bit| features | 1 << bit)
}

const CONFIG_SIZE: usize = 60;

/// `struct virtio_blk_config` (§5.2.4), up to the fields of secure erase.
fn config_space(disk: &Disk) -> [u8; CONFIG_SIZE] {
    let mut space = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| space[at..][..bytes.len()].copy_from_slice(bytes);
    let per_block = u64::from(disk.physical_block) / SECTOR;
    put(0, &disk.sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: logical blocks in a physical one (log2), minimum and optimal I/O size in blocks.
    put(24, &[per_block.trailing_zeros() as u8]);
    put(26, &(per_block as u16).to_le_bytes());
    put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
    put(40, &MAX_SEGMENTS.to_le_bytes());
    put(44, &(per_block as u32).to_le_bytes());
    put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
    put(52, &MAX_SEGMENTS.to_le_bytes());
    // Write-zeroes may unmap.
    put(56, &[1]);
    space
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let active = queues.pop().ok_or(ActivateError::MissingQueue(0))?;
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ring) = &*ring {
            ring.notify(active.kick.as_raw_fd())
                .map_err(|source| ActivateError::Host { what: "io_uring takes no eventfd", source })?;
        }
        drop(ring);
        let queue =
            ChainQueue::new(active.index, active.queue, memory, Arc::clone(&interrupt), features, LIMITS);
        let server = Server::new(
            Arc::clone(&self.disk),
            queue,
            interrupt,
            Arc::clone(&self.counters),
            Arc::clone(&self.ring),
            !self.disk.read_only && features & 1 << VIRTIO_BLK_F_FLUSH == 0,
        );
        let worker = run_kick("blk", active.kick, server)
            .map_err(|source| ActivateError::Host { what: "no thread for a disk", source })?;
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
