//! The passed-through devices of one machine, from opening to giving back.
//!
//! The order matters and is kept by the types: [`Opened`] has its devices open and reset, so that what the
//! IOMMU translates is known before BARs are placed; [`Opened::map`] then maps guest memory, once for all.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_ioctls::VfioDeviceFd;
use vm_memory::GuestMemoryMmap;

use super::VfioError;
use super::device::VfioPci;
use super::dma::Dma;
use super::host::HostDevice;
use super::interrupts::InterruptCounters;
use super::iommu::{self, Iommu};
use super::kernel::KernelFunction;
use super::reset::{self, ResetReport};
use crate::bus::lock;
use crate::config::{HostPciAddress, PassthroughConfig, VfioConfig};
use crate::hypervisor::PassthroughHypervisor;

/// A function open and reset, with its place in the machine's description.
pub struct Device {
    /// As described.
    pub config: PassthroughConfig,
    /// As the host sees it.
    pub host: HostDevice,
    /// As the guest's bus sees it.
    pub pci: Arc<Mutex<VfioPci>>,
    /// How it was reset before the guest got it.
    pub reset: ResetReport,
    /// What its interrupts did.
    pub interrupts: Arc<InterruptCounters>,
    /// The function itself.
    pub kernel: Arc<KernelFunction>,
    /// It answers no more, which was said: it is given back without a reset, for which its removal from the host
    /// would wait.
    pub lost: bool,
}

/// How long each stage of giving devices to a machine took; the agent's binding comes before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachTimes {
    /// Opening the devices and reading what they have.
    pub open: Duration,
    /// Resetting them.
    pub reset: Duration,
    /// Providing guest memory.
    pub populate: Duration,
    /// Pinning it and writing the IOMMU's tables.
    pub map: Duration,
    /// Mapping BARs into the VMM.
    pub bar_map: Duration,
}

impl AttachTimes {
    /// The stages' names and times, in order.
    pub fn stages(&self) -> [(&'static str, Duration); 5] {
        [
            ("open", self.open),
            ("reset", self.reset),
            ("populate", self.populate),
            ("map", self.map),
            ("bar_map", self.bar_map),
        ]
    }
}

/// What devices are opened with.
#[derive(Clone)]
pub struct Context {
    /// The machine's memory.
    pub memory: GuestMemoryMmap,
    /// Its hypervisor.
    pub hypervisor: Arc<dyn PassthroughHypervisor>,
    /// The VM, which is told of its devices for what they imply: coherency of caches, posted interrupts.
    pub vm: Arc<VmFd>,
    /// The VM's VFIO device, of which KVM has one for the VM's whole life. Made with the first device.
    pub kvm: Arc<OnceLock<Arc<VfioDeviceFd>>>,
    /// How devices reach memory.
    pub vfio: VfioConfig,
}

impl Context {
    fn kvm_device(&self) -> Result<Arc<VfioDeviceFd>, VfioError> {
        if let Some(device) = self.kvm.get() {
            return Ok(Arc::clone(device));
        }
        let mut device =
            kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..kvm_create_device::default() };
        let fd = self.vm.create_device(&mut device).map_err(|error| {
            VfioError::kernel("KVM_CREATE_DEVICE for VFIO")(io::Error::from_raw_os_error(error.errno()))
        })?;
        Ok(Arc::clone(self.kvm.get_or_init(|| Arc::new(VfioDeviceFd::new_from_kvm(fd)))))
    }
}

/// The devices of a machine: open, reset, in one I/O address space.
pub struct Opened {
    iommu: Arc<dyn Iommu>,
    dma: Option<Arc<Dma>>,
    devices: Vec<Device>,
    times: AttachTimes,
    context: Context,
}

impl Opened {
    /// Opens and resets `devices`; `None` without any.
    ///
    /// # Errors
    /// When one is in use, cannot be reset, or the kernel refuses; those opened before are closed again.
    pub fn new(
        context: &Context,
        devices: Vec<(PassthroughConfig, HostDevice)>,
    ) -> Result<Option<Self>, VfioError> {
        let Some((_, first)) = devices.first() else { return Ok(None) };
        let iommu = iommu::open(context.vfio.backend, first, context.kvm_device()?)?;
        let context = context.clone();
        let mut opened =
            Self { iommu, dma: None, devices: Vec::new(), times: AttachTimes::default(), context };
        let start = Instant::now();
        let mut kernels = Vec::with_capacity(devices.len());
        for (index, (_, host)) in devices.iter().enumerate() {
            kernels.push(opened.open(host, &format!("passthrough[{index}].address"))?);
        }
        opened.times.open = start.elapsed();
        // All are open before the first is reset: a bus is reset only if all on it are ours.
        let groups: Vec<u32> = devices.iter().map(|(_, host)| host.group).collect();
        for (index, ((config, host), kernel)) in devices.into_iter().zip(kernels).enumerate() {
            let reset =
                opened.reset((&host, &format!("passthrough[{index}].address")), &kernel, &groups, &[])?;
            opened.add(config, host, kernel, reset)?;
        }
        Ok(Some(opened))
    }

    fn open(&self, host: &HostDevice, field: &str) -> Result<Arc<KernelFunction>, VfioError> {
        let device = self.iommu.open(host).map_err(|error| {
            let cause = iommu::cause(&error);
            let problem = match (cause.raw_os_error(), &error) {
                (Some(libc::EBUSY), _) => "is in use by another process; end that first: \
                                           `fuser -v /dev/vfio/* /dev/vfio/devices/*` names it"
                    .to_owned(),
                (_, vfio_ioctls::VfioError::GroupViable) => {
                    format!(
                        "a driver of the host has another function of its IOMMU group {}; bind all of the group to \
                         vfio-pci",
                        host.group
                    )
                }
                _ => format!("cannot be opened with {}: {cause}", self.iommu.name()),
            };
            VfioError::Device { field: field.to_owned(), address: host.address, problem }
        })?;
        Ok(Arc::new(KernelFunction::new(Arc::new(device))))
    }

    fn reset(
        &self,
        device: (&HostDevice, &str),
        kernel: &KernelFunction,
        groups: &[u32],
        running: &[HostPciAddress],
    ) -> Result<ResetReport, VfioError> {
        reset::reset(device, kernel, &*self.iommu, groups, running)
    }

    fn add(
        &mut self,
        config: PassthroughConfig,
        host: HostDevice,
        kernel: Arc<KernelFunction>,
        reset: ResetReport,
    ) -> Result<(), VfioError> {
        self.times.reset += reset.duration;
        let start = Instant::now();
        let hypervisor = Arc::clone(&self.context.hypervisor);
        let mut pci = VfioPci::new(Arc::clone(&kernel) as _, kernel.parts(), hypervisor)
            .map_err(|source| VfioError::Config { address: host.address, source })?;
        self.times.open += start.elapsed();
        let start = Instant::now();
        pci.map_bars(kernel.file(), |region| kernel.region_offset(region))
            .map_err(VfioError::kernel(format!("mapping the BARs of {}", host.address)))?;
        self.times.bar_map += start.elapsed();
        let interrupts = pci.interrupt_counters();
        let pci = Arc::new(Mutex::new(pci));
        self.devices.push(Device { config, host, pci, reset, interrupts, kernel, lost: false });
        Ok(())
    }

    /// Adds a device to a machine that runs, behind the others in [`devices`](Self::devices): opened, reset, reached by the mappings that are there.
    ///
    /// # Errors
    /// When it is in use, cannot be reset without one that runs, or the kernel refuses.
    pub fn plug(&mut self, config: PassthroughConfig, host: HostDevice) -> Result<(), VfioError> {
        let start = Instant::now();
        let kernel = self.open(&host, "address")?;
        self.times.open = start.elapsed();
        let running: Vec<_> = self.devices.iter().map(|device| device.host.address).collect();
        let mut groups = self.groups();
        groups.push(host.group);
        let reset = self.reset((&host, "address"), &kernel, &groups, &running)?;
        self.add(config, host, kernel, reset)?;
        self.connect_peers();
        Ok(())
    }

    /// Gives a device back that the guest's bus has no longer: quiet, reset, closed. The mappings stay for
    /// those that are left. Returns whether it was there.
    pub fn remove(&mut self, id: &str) -> bool {
        let Some(index) = self.devices.iter().position(|device| device.config.id == id) else { return false };
        let groups = self.groups();
        let device = self.devices.remove(index);
        let running: Vec<_> = self.devices.iter().map(|device| device.host.address).collect();
        lock(&device.pci).set_dma(None);
        lock(&device.pci).quiesce();
        self.reset_after_use(&device, &groups, &running);
        self.connect_peers();
        true
    }

    fn reset_after_use(&self, device: &Device, groups: &[u32], running: &[HostPciAddress]) {
        if device.lost {
            return;
        }
        if let Err(error) = self.reset((&device.host, "after use"), &device.kernel, groups, running) {
            crate::notice(format_args!("{error}"));
        }
    }

    fn groups(&self) -> Vec<u32> {
        self.devices.iter().map(|device| device.host.group).collect()
    }

    /// The devices, in the order of the description.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// A device by its ID.
    pub fn device(&mut self, id: &str) -> Option<&mut Device> {
        self.devices.iter_mut().find(|device| device.config.id == id)
    }

    /// The kernel's interface in use.
    pub fn backend(&self) -> &'static str {
        self.iommu.name()
    }

    /// Whether devices reach each other.
    pub fn peer_to_peer(&self) -> bool {
        self.devices.len() > 1 && self.dma.as_ref().is_some_and(|dma| dma.peer_to_peer())
    }

    /// How long the stages took so far.
    pub fn times(&self) -> AttachTimes {
        self.times
    }

    /// The addresses that all devices reach; empty where the kernel does not say.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn apertures(&self) -> Result<Vec<Range<u64>>, VfioError> {
        self.iommu.apertures().map_err(VfioError::kernel("asking what addresses the IOMMU translates"))
    }

    /// Maps guest memory for all devices, and lets them reach each other if that is wanted.
    ///
    /// # Errors
    /// When limits or the kernel do not allow it.
    pub fn map(&mut self) -> Result<(), VfioError> {
        let peers = self.context.vfio.peer_to_peer;
        let (dma, times) = Dma::map(Arc::clone(&self.iommu), &self.context.memory, peers)?;
        (self.times.populate, self.times.map) = (times.populate, times.map);
        self.dma = Some(Arc::new(dma));
        self.connect_peers();
        Ok(())
    }

    /// Devices reach each other's BARs as long as there are several: mapping a large BAR takes time, and for one
    /// device alone nobody would use it.
    fn connect_peers(&self) {
        let dma = self.dma.as_ref().filter(|_| self.devices.len() > 1);
        for device in &self.devices {
            lock(&device.pci).set_dma(dma.map(Arc::clone));
        }
    }

    /// Ends all DMA and interrupts, and resets the devices so that nothing of the guest is left running in
    /// them. What cannot be reset is said; the host's agent resets again before it gives a device on.
    pub fn stop(&mut self) {
        let groups = self.groups();
        for device in &self.devices {
            lock(&device.pci).set_dma(None);
            lock(&device.pci).quiesce();
        }
        for device in &self.devices {
            self.reset_after_use(device, &groups, &[]);
        }
        self.devices.clear();
        self.dma = None;
    }
}
