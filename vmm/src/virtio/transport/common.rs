//! The common configuration structure (virtio 1.2 §4.1.4.3) and the rules of §2.1 and §3.1 for it.
//!
//! What the driver writes is taken only in the phase of initialisation where it belongs: features
//! between DRIVER and FEATURES_OK, queues between FEATURES_OK and DRIVER_OK. After that
//! nothing of it changes until reset (FC CVE-2026-5747). A write out of order is ignored.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::interrupt::PciInterrupt;
use super::layout::COMMON_SIZE;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_END: u64 = 0x38;

/// A queue as the driver has set it up so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// The largest size that the device takes.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }

    /// The queue with its rings, or `None` if a size or an alignment is against §2.7.
    /// Whether the rings lie in guest memory is for the caller to check.
    pub fn build(&self) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        queue.set_ready(true);
        Some(queue)
    }
}

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing more.
    None,
    /// Reset the device, then call [`CommonConfig::reset`].
    Reset,
    /// The driver set DRIVER_OK: activate the device.
    Activate,
}

/// The state behind the registers.
#[derive(Debug)]
pub struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// For a device with these features and queues; VERSION_1 is added.
    pub fn new(features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: features | 1 << VIRTIO_F_VERSION_1,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueSetup::new).collect(),
        }
    }

    /// Features the driver accepted.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues as set up.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// The driver reads, any size at any offset.
    pub fn read(&self, interrupt: &PciInterrupt, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_SIZE as usize];
        let mut put = |at: u64, bytes: &[u8]| image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.accepted, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &interrupt.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[interrupt.status()]);
        put(CONFIG_GENERATION, &[interrupt.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0 (§4.1.4.3.1).
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &interrupt.queue_vector(self.queue_select).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(image.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    /// The driver writes. Fields take their own width only (§4.1.3.1), 64-bit ones halves as well.
    pub fn write(&mut self, interrupt: &PciInterrupt, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else { return Action::None };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (DEVICE_STATUS, 1) => return self.write_status(interrupt, value as u8),
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => self.accept(interrupt.status(), value as u32),
            (CONFIG_VECTOR, 2) => interrupt.set_config_vector(value as u16),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => interrupt.set_queue_vector(self.queue_select, value as u16),
            (QUEUE_SIZE..QUEUE_END, len) => self.write_queue(interrupt.status(), offset, len, value),
            _ => {}
        }
        Action::None
    }

    fn accept(&mut self, status: u8, value: u32) {
        if status & DRIVER == 0 || status & FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, status: u8, offset: u64, len: usize, value: u64) {
        let configurable = status & FEATURES_OK != 0 && status & DRIVER_OK == 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        // A queue is configured before it is enabled, and never disabled (§4.1.4.3.2).
        if !configurable || queue.enabled {
            return;
        }
        match (offset, len) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESC..QUEUE_DRIVER, _) => {
                set_address(&mut queue.descriptors, offset - QUEUE_DESC, len, value)
            }
            (QUEUE_DRIVER..QUEUE_DEVICE, _) => {
                set_address(&mut queue.available, offset - QUEUE_DRIVER, len, value)
            }
            (QUEUE_DEVICE..QUEUE_END, _) => set_address(&mut queue.used, offset - QUEUE_DEVICE, len, value),
            _ => {}
        }
    }

    fn write_status(&mut self, interrupt: &PciInterrupt, value: u8) -> Action {
        let old = interrupt.status();
        if value == 0 {
            return Action::Reset;
        }
        // The driver must not clear bits (§2.1.1); NEEDS_RESET is the device's alone.
        let new = value & !NEEDS_RESET | old;
        let added = new & !old;
        if value & old & !NEEDS_RESET != old & !NEEDS_RESET || added == 0 {
            return Action::None;
        }
        let unknown = !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        let after = |step: u8, needed: u8| added & step == 0 || new & needed == needed;
        let in_order = after(DRIVER, ACKNOWLEDGE)
            && after(FEATURES_OK, ACKNOWLEDGE | DRIVER)
            // FEATURES_OK must have been read back before (§3.1.1 step 6), so be old.
            && (added & DRIVER_OK == 0 || old & FEATURES_OK != 0);
        if added & unknown != 0 || !in_order || old & FAILED != 0 {
            return Action::None;
        }
        if added & FEATURES_OK != 0 && !self.acceptable() {
            interrupt.add_status(added & !FEATURES_OK);
            return Action::None;
        }
        interrupt.add_status(added);
        if added & DRIVER_OK != 0 { Action::Activate } else { Action::None }
    }

    /// Nothing that was not offered, and no legacy driver.
    fn acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_address(field: &mut u64, at: u64, len: usize, value: u64) {
    match (at, len) {
        (0, 8) => *field = value,
        (0, 4) => *field = *field & !0xffff_ffff | value,
        (4, 4) => *field = *field & 0xffff_ffff | value << 32,
        _ => {}
    }
}
