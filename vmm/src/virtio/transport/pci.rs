//! A virtio device as a PCI function.

use std::sync::Arc;

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::common::{Action, CommonConfig};
use super::interrupt::PciInterrupt;
use super::layout;
use crate::hypervisor::Hypervisor;
use crate::pci::PciDevice;
use crate::pci::config::{Bar, CAP_VENDOR, CONVENTIONAL_SIZE, ConfigError, ConfigSpace, Identity};
use crate::pci::msix::Msix;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice};

/// Vendor ID of all virtio devices, and what is added to the device type to make the device ID (§4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// Offsets in the PCI configuration access capability (§4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;
const WINDOW_END: u16 = 20;

/// A device that does not fit the transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// More queues than the BAR has room for.
    #[error("{0} queues; a device has {max} at most", max = layout::MAX_QUEUES)]
    TooManyQueues(usize),
    /// The function's configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A queue's notification while the device is active.
struct Kick {
    queue: u16,
    event: EventFd,
    /// Where the kernel signals it without an exit.
    ioevent: Option<u64>,
}

/// A virtio device behind the PCI transport.
pub struct VirtioPci {
    config: ConfigSpace,
    device: Box<dyn VirtioDevice>,
    memory: GuestRam,
    hypervisor: Arc<dyn Hypervisor>,
    common: CommonConfig,
    interrupt: Arc<PciInterrupt>,
    msix_capability: u16,
    window_capability: u16,
    /// Where the BAR answers.
    bar: Option<u64>,
    /// One for each enabled queue of an active device; empty otherwise.
    kicks: Vec<Kick>,
    active: bool,
    activation_error: Option<ActivateError>,
}

impl VirtioPci {
    /// Puts `device` behind a PCI function, to be given to [`crate::pci::root::PciRoot::add`].
    ///
    /// # Errors
    /// When the device has too many queues.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self, TransportError> {
        let queues = device.queue_sizes().len();
        if queues > layout::MAX_QUEUES {
            return Err(TransportError::TooManyQueues(queues));
        }
        let msix = Msix::new(Arc::clone(&hypervisor), queues as u16 + 1);
        let mut config = ConfigSpace::endpoint(&identity(device.device_type()), CONVENTIONAL_SIZE);
        config.add_bar(Bar { index: layout::BAR, size: layout::BAR_SIZE, wide: true, prefetchable: true })?;
        let (table, pending) = (layout::MSIX_TABLE as u32, layout::MSIX_PENDING as u32);
        let msix_capability = msix.add_capability(&mut config, layout::BAR, table, pending)?;
        let window_capability = add_virtio_capabilities(&mut config, queues as u64)?;
        Ok(Self {
            common: CommonConfig::new(device.features(), device.queue_sizes()),
            interrupt: Arc::new(PciInterrupt::new(msix, queues)),
            config,
            device,
            memory,
            hypervisor,
            msix_capability,
            window_capability,
            bar: None,
            kicks: Vec::new(),
            active: false,
            activation_error: None,
        })
    }

    /// The device's type (§5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// Why the last activation failed, if it did; the driver sees DEVICE_NEEDS_RESET.
    pub fn activation_error(&self) -> Option<&ActivateError> {
        self.activation_error.as_ref()
    }

    /// Whether the device works: DRIVER_OK is set, DEVICE_NEEDS_RESET is not.
    pub fn is_running(&self) -> bool {
        let status = u32::from(self.interrupt.status());
        status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// The device's way back to the driver.
    pub fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.interrupt) as Arc<dyn Interrupt>
    }

    /// Interrupts that the host lost.
    pub fn interrupt_failures(&self) -> u64 {
        self.interrupt.msix.failures()
    }

    /// Stops the device's work and waits for what is in flight. The vCPUs are stopped already.
    pub fn pause(&mut self) {
        if self.active {
            self.device.pause();
        }
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&mut self) {
        if self.active {
            self.device.resume();
        }
    }

    /// As if the driver had reset the device: its worker ends, its files are quiet. Call it before
    /// guest memory goes.
    pub fn reset(&mut self) {
        self.disconnect_kicks();
        self.kicks.clear();
        self.device.reset();
        self.active = false;
        self.interrupt.reset();
        self.common.reset();
    }

    /// The driver set DRIVER_OK. Whatever is wrong, the driver learns of it by DEVICE_NEEDS_RESET.
    fn activate(&mut self) {
        self.activation_error = None;
        let result = self.collect_queues().and_then(|(queues, kicks)| {
            self.device.activate(Activation {
                memory: self.memory.clone(),
                features: self.common.features(),
                queues,
                interrupt: self.interrupt(),
            })?;
            Ok(kicks)
        });
        match result {
            Ok(kicks) => {
                self.kicks = kicks;
                self.active = true;
                self.connect_kicks();
            }
            Err(error) => {
                self.activation_error = Some(error);
                self.interrupt.device_failed();
            }
        }
    }

    /// The enabled queues, their rings checked against guest memory.
    fn collect_queues(&self) -> Result<(Vec<ActiveQueue>, Vec<Kick>), ActivateError> {
        let host = |source| ActivateError::Host { what: "no eventfd for a queue's notifications", source };
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        let mut kicks = Vec::new();
        for (index, setup) in (0..).zip(self.common.queues()).filter(|(_, setup)| setup.enabled) {
            let queue = setup
                .build()
                .filter(|queue| queue.is_valid(&*memory))
                .ok_or(ActivateError::BadRings(index))?;
            let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
            let event = kick.try_clone().map_err(host)?;
            queues.push(ActiveQueue { index, queue, kick });
            kicks.push(Kick { queue: index, event, ioevent: None });
        }
        Ok((queues, kicks))
    }

    /// Has the kernel turn notifications into eventfd signals. A failure costs an exit
    /// a notification and nothing else: [`write_notify`](Self::write_notify) does the same.
    fn connect_kicks(&mut self) {
        let Some(base) = self.bar else { return };
        for kick in &mut self.kicks {
            let address = base + layout::NOTIFY + u64::from(kick.queue) * layout::NOTIFY_MULTIPLIER;
            if self.hypervisor.add_ioevent(address, &kick.event).is_ok() {
                kick.ioevent = Some(address);
            }
        }
    }

    fn disconnect_kicks(&mut self) {
        for kick in &mut self.kicks {
            if let Some(address) = kick.ioevent.take() {
                // It was added at this address; the kernel has no other reason to refuse.
                let _ = self.hypervisor.remove_ioevent(address, &kick.event);
            }
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(&self.interrupt, offset, data) {
            Action::None => {}
            Action::Reset => self.reset(),
            Action::Activate => self.activate(),
        }
    }

    fn write_notify(&self, offset: u64) {
        let queue = offset / layout::NOTIFY_MULTIPLIER;
        if let Some(kick) = self.kicks.iter().find(|kick| u64::from(kick.queue) == queue) {
            // Fails only when the counter is full, and then the worker is about to look.
            let _ = kick.event.write(1);
        }
    }

    /// The BAR access that the window in configuration space stands for, if it is a possible one.
    fn window(&self) -> Option<(u64, usize)> {
        let capability = usize::from(self.window_capability);
        let field = |offset: u16| self.config.u32(capability + usize::from(offset));
        let (offset, length) = (u64::from(field(WINDOW_OFFSET)), field(WINDOW_LENGTH));
        let in_bar = field(WINDOW_BAR) & 0xff == u32::from(layout::BAR)
            && offset + u64::from(length) <= layout::BAR_SIZE
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(length));
        in_bar.then_some((offset, length as usize))
    }

    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let start = self.window_capability + WINDOW_DATA;
        let end = self.window_capability + WINDOW_END;
        offset < end && usize::from(offset) + len > usize::from(start)
    }
}

impl PciDevice for VirtioPci {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; 4];
            self.read_bar(layout::BAR, at, &mut value[..len]);
            self.config.set(usize::from(self.window_capability + WINDOW_DATA), &value[..len]);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.interrupt.msix.config_written(&self.config, self.msix_capability);
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let value = self.config.u32(usize::from(self.window_capability + WINDOW_DATA)).to_le_bytes();
            self.write_bar(layout::BAR, at, &value[..len]);
        }
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % layout::PAGE;
        match offset - within {
            layout::COMMON => self.common.read(&self.interrupt, within, data),
            layout::ISR if within == 0 => data[0] = self.interrupt.take_isr(),
            layout::DEVICE => self.device.read_config(within, data),
            layout::MSIX_TABLE => self.interrupt.msix.read_table(within, data),
            layout::MSIX_PENDING => self.interrupt.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let within = offset % layout::PAGE;
        match offset - within {
            layout::COMMON => self.write_common(within, data),
            layout::DEVICE => self.device.write_config(within, data),
            layout::NOTIFY => self.write_notify(within),
            layout::MSIX_TABLE => self.interrupt.msix.write_table(within, data),
            _ => {}
        }
    }

    fn bar_moved(&mut self, _bar: u8, address: Option<u64>) {
        self.disconnect_kicks();
        self.bar = address;
        self.connect_kicks();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.reset();
    }
}

fn identity(device_type: u32) -> Identity {
    const NETWORK: u32 = 0x02_00_00;
    const STORAGE: u32 = 0x01_80_00;
    const CONSOLE: u32 = 0x07_80_00;
    const OTHER: u32 = 0xff_00_00;
    let class = match device_type {
        1 => NETWORK,
        2 => STORAGE,
        3 | 19 => CONSOLE,
        _ => OTHER,
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        // 1 and up: no legacy interface (§4.1.2.1).
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        // 0x40 and up, for the same reason.
        subsystem: 0x40,
    }
}

/// Adds the five capabilities of §4.1.4; returns the offset of the one for access through
/// configuration space.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: u64) -> Result<u16, ConfigError> {
    let multiplier = (layout::NOTIFY_MULTIPLIER as u32).to_le_bytes();
    let notify_size = queues.max(1) * layout::NOTIFY_MULTIPLIER;
    let capabilities = [
        layout::capability(layout::CAP_COMMON, layout::COMMON, layout::COMMON_SIZE, &[]),
        layout::capability(layout::CAP_ISR, layout::ISR, 1, &[]),
        layout::capability(layout::CAP_DEVICE, layout::DEVICE, layout::PAGE, &[]),
        layout::capability(layout::CAP_NOTIFY, layout::NOTIFY, notify_size, &multiplier),
    ];
    for body in capabilities {
        config.add_capability(CAP_VENDOR, &body, &[])?;
    }
    // The driver writes BAR, offset, length and data; masks are relative to the body.
    let mut writable = [0; (WINDOW_END - 2) as usize];
    writable[usize::from(WINDOW_BAR - 2)] = 0xff;
    writable[usize::from(WINDOW_OFFSET - 2)..].fill(0xff);
    config.add_capability(CAP_VENDOR, &layout::capability(layout::CAP_PCI, 0, 0, &[0; 4]), &writable)
}
