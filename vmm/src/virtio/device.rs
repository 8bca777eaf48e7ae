//! What a virtio device is to its transport.

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::worker::Worker;

/// Guest memory as devices see it.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// How a device tells the driver something. Callable from any thread.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `queue` were used. Failures are counted, not returned: a guest that
    /// masks its vectors must not stop the device.
    fn notify_queue(&self, queue: u16);

    /// The device's configuration space changed.
    fn notify_config(&self);

    /// The eventfd that raises queue `queue`'s interrupt in the kernel, for vhost.
    /// `None` while the guest has not given the queue a vector.
    fn queue_irqfd(&self, queue: u16) -> Option<EventFd>;

    /// The device met something it cannot recover from, such as rings the driver broke: sets
    /// DEVICE_NEEDS_RESET and notifies the driver (virtio 1.2 §2.1.2).
    fn device_failed(&self) {
        self.notify_config();
    }
}

/// One queue as the driver set it up. The transport has checked that its rings lie in guest
/// memory and froze its configuration; it does not change until reset (FC CVE-2026-5747).
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index in the device's list of queues.
    pub index: u16,
    /// The rings.
    pub queue: Queue,
    /// Signalled by the driver's notification, through ioeventfd.
    pub kick: EventFd,
}

/// What a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestRam,
    /// The features both sides agreed on.
    pub features: u64,
    /// The enabled queues, in index order; queues the driver left disabled are absent.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device that could not start; the transport then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device cannot work without.
    #[error("the driver left queue {0} disabled")]
    MissingQueue(u16),
    /// A ring misaligned or outside guest memory; found by the transport.
    #[error("the rings of queue {0} are not in guest memory")]
    BadRings(u16),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What the device tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// A virtio device behind a transport.
///
/// Order, guaranteed by the transport: any number of `read_config`/`write_config`; then at most one
/// `activate`; then again any number of `read_config`/`write_config`/`pause`/`resume`; then `reset`,
/// after which the device is as it was made and may be activated again. All calls come from
/// one thread at a time (the transport holds a lock), never from the device's own worker.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.2 §5): 1 net, 2 block, 3 console, 4 entropy, 19 socket.
    fn device_type(&self) -> u32;

    /// The largest size of each queue, each a power of two; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered. `VIRTIO_F_VERSION_1` is added by the transport.
    fn features(&self) -> u64;

    /// Reads the device's configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space; writes to read-only fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: start working. Work happens on the device's own thread, which this starts.
    ///
    /// # Errors
    /// When a queue is missing or the host refuses; the device must then be as if never activated.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker, waits for it and for every request in flight (no buffer of the guest
    /// may be touched afterwards), and returns to the initial state. A no-op when not active.
    fn reset(&mut self);

    /// The threads on which it works; none while it is not active.
    fn workers(&self) -> &[Worker];

    /// Stops taking requests and waits for those in flight; the vCPUs are stopped already.
    fn pause(&mut self) {
        self.workers().iter().for_each(Worker::pause);
    }

    /// Undoes [`pause`](Self::pause), and looks at every queue once: a kick may have come before.
    fn resume(&mut self) {
        self.workers().iter().for_each(Worker::resume);
    }
}
