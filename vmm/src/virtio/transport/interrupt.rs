//! Interrupts and status bits that a device raises from its own thread.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vmm_sys_util::eventfd::EventFd;

use crate::pci::msix::Msix;
use crate::virtio::device::Interrupt;

/// `VIRTIO_MSI_NO_VECTOR` (§4.1.5.1.2): no interrupt for this event.
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the transport and the device's threads share.
pub struct PciInterrupt {
    /// The function's vectors.
    pub(super) msix: Msix,
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
}

impl PciInterrupt {
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// The device status field.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Adds status bits: none is ever taken away but by [`reset`](Self::reset).
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// Back to the state after power-on; MSI-X belongs to the PCI function and stays as it is.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    /// Reading the ISR status clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.valid(vector), Ordering::Release);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.valid(vector), Ordering::Release);
        }
    }

    /// A vector that is not in the table reads back as `NO_VECTOR`, which is how the driver
    /// learns that it was refused (§4.1.5.1.2).
    fn valid(&self, vector: u16) -> u16 {
        if vector < self.msix.len() { vector } else { NO_VECTOR }
    }
}

impl Interrupt for PciInterrupt {
    fn notify_queue(&self, queue: u16) {
        // NO_VECTOR is beyond any table. There is no INTx; drivers without MSI-X poll the bit.
        if !self.msix.trigger(self.queue_vector(queue)) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
    }

    fn notify_config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.trigger(self.config_vector());
    }

    fn queue_irqfd(&self, queue: u16) -> Option<EventFd> {
        match self.queue_vector(queue) {
            NO_VECTOR => None,
            vector => self.msix.irqfd(vector),
        }
    }

    fn device_failed(&self) {
        self.add_status(VIRTIO_CONFIG_S_NEEDS_RESET as u8);
        self.notify_config();
    }
}
