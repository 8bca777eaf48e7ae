//! Interrupts and notifications: GSI routing, irqfds, ioeventfds.
//!
//! The in-kernel irqchip has one routing table, replaced as a whole. I/O APIC pins have the GSIs
//! below [`layout::IO_APIC_PINS`], always routed; messages take GSIs from there up.

use std::collections::BTreeMap;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::slots::DeviceSlots;
use crate::arch::native::layout;
use crate::bus::lock;
use crate::hypervisor::{Hypervisor, LevelInterrupt, MsiMessage, MsiVector, PassthroughHypervisor};

/// KVM's table holds 4096 routes; what a guest can make us allocate stops there.
const MAX_GSI: u32 = 4095;

fn error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// GSIs given out, with their messages once routed.
type Routes = BTreeMap<u32, Option<MsiMessage>>;

#[derive(Debug)]
struct Router {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl Router {
    fn allocate(&self) -> io::Result<u32> {
        let mut routes = lock(&self.routes);
        let gsi = (layout::IO_APIC_PINS..=MAX_GSI)
            .find(|gsi| !routes.contains_key(gsi))
            .ok_or_else(|| io::Error::other("no interrupt vector is left in the irqchip"))?;
        routes.insert(gsi, None);
        Ok(gsi)
    }

    fn free(&self, gsi: u32) {
        lock(&self.routes).remove(&gsi);
    }

    /// Routes `gsi`, unless it is routed so already: the kernel waits for all vCPUs to notice a new table.
    fn set(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut routes = lock(&self.routes);
        let before = routes.insert(gsi, Some(message)).flatten();
        if before == Some(message) {
            return Ok(());
        }
        let result = self.write_table(&routes);
        if result.is_err() {
            routes.insert(gsi, before);
        }
        result
    }

    fn write_table(&self, routes: &Routes) -> io::Result<()> {
        let pins = (0..layout::IO_APIC_PINS).map(pin_route);
        let messages = routes.iter().filter_map(|(gsi, message)| Some(message_route(*gsi, (*message)?)));
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("routing table: {error:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(error)
    }
}

fn pin_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
    entry
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// [`Hypervisor`] on a VM with an in-kernel irqchip.
#[derive(Debug)]
pub struct KvmHypervisor {
    router: Arc<Router>,
    slots: DeviceSlots,
}

impl KvmHypervisor {
    /// For a VM whose irqchip exists.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            slots: DeviceSlots::new(Arc::clone(&vm)),
            router: Arc::new(Router { vm, routes: Mutex::default() }),
        }
    }

    /// An eventfd that pulses I/O APIC pin `gsi`, edge-triggered.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn pin(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.router.vm.register_irqfd(&event, gsi).map_err(error)?;
        Ok(event)
    }
}

impl Hypervisor for KvmHypervisor {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let gsi = self.router.allocate()?;
        Ok(Arc::new(KvmMsiVector {
            router: Arc::clone(&self.router),
            gsi,
            event,
            attached: Mutex::new(false),
        }))
    }

    fn add_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.router.vm.register_ioevent(event, &address, NoDatamatch).map_err(error)
    }

    fn remove_ioevent(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.router.vm.unregister_ioevent(event, &address, NoDatamatch).map_err(error)
    }
}

impl PassthroughHypervisor for KvmHypervisor {
    fn level_interrupt(&self, gsi: u32) -> io::Result<Arc<dyn LevelInterrupt>> {
        let vm = Arc::clone(&self.router.vm);
        let (trigger, resample) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        vm.register_irqfd_with_resample(&trigger, &resample, gsi).map_err(error)?;
        Ok(Arc::new(KvmLevelInterrupt { vm, gsi, trigger, resample }))
    }

    unsafe fn add_memory_slot(&self, guest: u64, host: NonNull<u8>, size: u64) -> io::Result<u32> {
        // SAFETY: the caller promises what this asks for.
        unsafe { self.slots.add(guest, host, size) }
    }

    fn remove_memory_slot(&self, slot: u32) -> io::Result<()> {
        self.slots.remove(slot)
    }
}

struct KvmLevelInterrupt {
    vm: Arc<VmFd>,
    gsi: u32,
    trigger: EventFd,
    resample: EventFd,
}

impl LevelInterrupt for KvmLevelInterrupt {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn resample(&self) -> &EventFd {
        &self.resample
    }
}

impl Drop for KvmLevelInterrupt {
    fn drop(&mut self) {
        // It was registered; the kernel has no other reason to refuse.
        let _ = self.vm.unregister_irqfd(&self.trigger, self.gsi);
    }
}

struct KvmMsiVector {
    router: Arc<Router>,
    gsi: u32,
    event: EventFd,
    /// Whether the irqfd is attached, which is what unmasked means.
    attached: Mutex<bool>,
}

impl MsiVector for KvmMsiVector {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        let mut attached = lock(&self.attached);
        self.router.set(self.gsi, message)?;
        if !*attached {
            // A signal that came while masked is delivered by this call.
            self.router.vm.register_irqfd(&self.event, self.gsi).map_err(error)?;
            *attached = true;
        }
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        let mut attached = lock(&self.attached);
        if *attached {
            self.router.vm.unregister_irqfd(&self.event, self.gsi).map_err(error)?;
            *attached = false;
        }
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for KvmMsiVector {
    fn drop(&mut self) {
        // Fails only when the VM itself is gone, and its irqfds with it.
        let _ = self.mask();
        self.router.free(self.gsi);
    }
}
