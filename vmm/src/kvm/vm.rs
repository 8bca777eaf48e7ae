//! Creating a VM: capabilities, irqchip, memory slots.

use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::native::layout;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` did not open.
    #[error("{0}")]
    Unavailable(String),
    /// A kernel too old, or not KVM.
    #[error("/dev/kvm speaks API version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    /// A capability without which nothing works.
    #[error("this host's KVM lacks {0:?}: Linux 5.10 or later is needed")]
    Missing(Cap),
    /// More CPUs than KVM takes.
    #[error("cpus.count: {count} is more than this host's KVM allows, {limit}")]
    TooManyCpus {
        /// Asked for.
        count: u8,
        /// Allowed.
        limit: usize,
    },
    /// An ioctl failed.
    #[error("{what}: {source}")]
    Ioctl {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// CPUID does not fit.
    #[error("CPUID: {0:?}")]
    CpuId(vmm_sys_util::fam::Error),
}

impl KvmError {
    /// For `map_err`: names the ioctl that failed.
    pub(super) fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { what, source }
    }
}

/// A VM with an irqchip and no CPUs yet.
#[derive(Debug)]
pub struct Vm {
    /// The KVM device.
    pub kvm: Kvm,
    /// The VM.
    pub fd: Arc<VmFd>,
    memory: GuestMemoryMmap,
}

const REQUIRED: [Cap; 5] = [Cap::Irqchip, Cap::Ioeventfd, Cap::Irqfd, Cap::ImmediateExit, Cap::UserMemory];

impl Vm {
    /// Creates a VM whose physical memory is `memory`.
    ///
    /// # Errors
    /// When KVM is not there, too old, or refuses.
    pub fn create(memory: &GuestMemoryMmap, cpus: u8) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| {
            let error = std::io::Error::from_raw_os_error(error.errno());
            KvmError::Unavailable(crate::probe::KvmSupport::Unavailable(error).advice())
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::Version(version));
        }
        if let Some(missing) = REQUIRED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(KvmError::Missing(missing));
        }
        let limit = kvm.get_max_vcpus();
        if usize::from(cpus) > limit {
            return Err(KvmError::TooManyCpus { count: cpus, limit });
        }
        let fd = kvm.create_vm().map_err(KvmError::ioctl("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(KvmError::ioctl("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP"))?;
        let vm = Self { kvm, fd: Arc::new(fd), memory: memory.clone() };
        vm.add_memory_slots()?;
        Ok(vm)
    }

    /// The guest's memory.
    pub fn memory(&self) -> GuestMemoryMmap {
        self.memory.clone()
    }

    fn add_memory_slots(&self) -> Result<(), KvmError> {
        for (slot, region) in self.memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped for its whole length and nothing else maps over it. Guests
            // reach it while a vCPU runs, and each vCPU holds the memory.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(KvmError::ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}
