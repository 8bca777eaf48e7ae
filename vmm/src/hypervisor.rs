//! What devices need of the hypervisor, as traits: the machine implements them on KVM,
//! tests implement them on nothing.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt as the device's table holds it (PCIe 6.0 §7.7.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Full 64-bit message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// One interrupt line of the in-kernel irqchip (a GSI with an irqfd). Freed when dropped.
///
/// Thread-safe: vCPU threads route and mask, device threads trigger.
pub trait MsiVector: Send + Sync {
    /// Delivers `message` from now on; unmasks the vector.
    ///
    /// # Errors
    /// What the kernel said of the routing table.
    fn route(&self, message: MsiMessage) -> io::Result<()>;

    /// Detaches the irqfd: signals stay pending in it until the next [`route`](Self::route).
    ///
    /// # Errors
    /// What the kernel said.
    fn mask(&self) -> io::Result<()>;

    /// The irqfd: writing to it raises the interrupt.
    fn eventfd(&self) -> &EventFd;
}

/// What devices ask of the machine they sit in. Callable from any thread.
pub trait Hypervisor: Send + Sync {
    /// A new vector, masked, with no message.
    ///
    /// # Errors
    /// When the irqchip has no GSI left, or no eventfd can be had.
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>>;

    /// From now on a guest write of any size to MMIO `address` signals `event`, without an exit.
    ///
    /// # Errors
    /// What the kernel said.
    fn add_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`add_ioevent`](Self::add_ioevent).
    ///
    /// # Errors
    /// What the kernel said.
    fn remove_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// A level-triggered line of the I/O APIC that a device asserts, and that the guest's end of interrupt
/// deasserts. Released when dropped.
pub trait LevelInterrupt: Send + Sync {
    /// Asserts the line.
    fn trigger(&self) -> &EventFd;

    /// Signalled when the guest has served the interrupt: the line is low again, and the device is asked
    /// whether it still wants it.
    fn resample(&self) -> &EventFd;
}

/// What passed-through devices ask beyond [`Hypervisor`]. Callable from any thread.
pub trait PassthroughHypervisor: Hypervisor {
    /// A line of the I/O APIC. Several devices may share one.
    ///
    /// # Errors
    /// What the kernel said.
    fn level_interrupt(&self, gsi: u32) -> io::Result<Arc<dyn LevelInterrupt>>;

    /// Lets the guest reach `size` bytes at `host` as physical addresses from `guest` on, without exits.
    /// Returns the slot's number. All three are multiples of 4096.
    ///
    /// # Errors
    /// When the slots are used up, or overlap.
    ///
    /// # Safety
    /// The memory stays mapped, and only a guest or device touches it, until the slot is removed.
    unsafe fn add_memory_slot(&self, guest: u64, host: NonNull<u8>, size: u64) -> io::Result<u32>;

    /// Undoes [`add_memory_slot`](Self::add_memory_slot); no vCPU reaches the memory any more.
    ///
    /// # Errors
    /// What the kernel said.
    fn remove_memory_slot(&self, slot: u32) -> io::Result<()>;
}
