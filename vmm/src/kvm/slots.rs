//! Memory slots of devices: BARs that the guest reaches without an exit.

use std::collections::BTreeSet;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::bus::lock;

/// Slots below are guest memory's.
const FIRST: u32 = 64;
/// KVM has 32,764 slots; a machine whose devices ask for this many is not one.
const MOST: u32 = 4096;

#[derive(Debug)]
pub(super) struct DeviceSlots {
    vm: Arc<VmFd>,
    used: Mutex<BTreeSet<u32>>,
}

impl DeviceSlots {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, used: Mutex::default() }
    }

    /// # Safety
    /// The memory stays mapped, and only a guest or device touches it, until the slot is removed.
    pub(super) unsafe fn add(&self, guest: u64, host: NonNull<u8>, size: u64) -> io::Result<u32> {
        let mut used = lock(&self.used);
        let slot = (FIRST..FIRST + MOST)
            .find(|slot| !used.contains(slot))
            .ok_or_else(|| io::Error::other("no memory slot is left for a BAR"))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: host.as_ptr() as u64,
        };
        // SAFETY: the caller promises that the memory stays, and is no Rust object.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        used.insert(slot);
        Ok(slot)
    }

    pub(super) fn remove(&self, slot: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region { slot, ..kvm_userspace_memory_region::default() };
        // SAFETY: a size of zero takes the slot away; nothing is mapped by it.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        lock(&self.used).remove(&slot);
        Ok(())
    }
}
