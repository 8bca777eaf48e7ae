//! Building: memory, VM, kernel, tables, devices, CPUs, in this order.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::devices::VirtioDevices;
use super::passthrough::{Passthrough, PlugError};
use super::pci;
use super::running::{Controls, Parts};
use super::{Ending, Prepared, RunningMachine};
use crate::arch::native::registers::{self, Entry};
use crate::arch::native::topology::Topology;
use crate::arch::native::{acpi, cpuid::CpuIdTemplate, layout, linux, pvh};
use crate::boot::{self, LoadError, LoadedKernel};
use crate::bus::{Bus, BusDevice, BusError, SharedDevice, lock};
use crate::config::{ConsoleConfig, VmConfig};
use crate::devices::{ConsoleOutput, KeyboardController, PanicNotifier, PowerRegisters, Serial};
use crate::exit::ExitReason;
use crate::hypervisor::Hypervisor;
use crate::kvm::{Buses, KvmError, KvmHypervisor, Vcpu, VcpuControl, Vm};
use crate::memory::{self, MemoryError};
use crate::numa::{self, NumaError};
use crate::pci::root::PciError;
use crate::pci::sysfs::SysfsError;
use crate::vfio::VfioError;
use crate::vfio::passthrough::{Context, Opened};
use crate::virtio::transport::TransportError;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

/// A machine that could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// NUMA nodes.
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel, the initramfs or the command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Tables in guest memory.
    #[error("guest memory: {0}")]
    Tables(#[from] GuestMemoryError),
    /// The boot protocol's structures.
    #[error("boot protocol: {0}")]
    Protocol(#[from] linux_loader::configurator::Error),
    /// Two devices at one address.
    #[error("bus: {0}")]
    Bus(#[from] BusError),
    /// The PCI bus.
    #[error("PCI: {0}")]
    Pci(#[from] PciError),
    /// A passed-through device.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// Watching passed-through devices.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// What the host says of a passed-through device.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// A virtio device.
    #[error("virtio: {0}")]
    Transport(#[from] TransportError),
    /// The host has no descriptor or thread left.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl MachineError {
    /// For `map_err`: names what was tried.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// The process's exit status for it.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::Memory(_)
            | Self::Vfio(_)
            | Self::Numa(_)
            | Self::Load(_)
            | Self::Kvm(KvmError::TooManyCpus { .. })
            | Self::Pci(PciError::Placement(_)) => ExitReason::BadConfig,
            Self::Kvm(KvmError::Unavailable(_) | KvmError::Version(_) | KvmError::Missing(_)) => {
                ExitReason::Unsupported
            }
            _ => ExitReason::Internal,
        }
    }
}

/// A serial port and, when somebody can type, the event that says there is room for more.
pub(super) struct SerialPort {
    pub(super) device: Arc<Mutex<Serial>>,
    pub(super) drained: Option<EventFd>,
}

impl SerialPort {
    fn new(pin: EventFd, output: ConsoleOutput, input: bool) -> Result<Self, MachineError> {
        let (device, drained) = if input {
            let (device, drained) =
                Serial::with_input(pin, output).map_err(MachineError::host("the serial port"))?;
            (device, Some(drained))
        } else {
            (Serial::new(pin, output), None)
        };
        Ok(Self { device: Arc::new(Mutex::new(device)), drained })
    }
}

/// A machine whose guest has not run yet.
pub struct Machine {
    config: VmConfig,
    ending: Arc<Ending>,
    buses: Buses,
    vcpus: Vec<Vcpu>,
    power_button: EventFd,
    serial: SerialPort,
    devices: VirtioDevices,
    passthrough: Arc<Passthrough>,
}

impl Machine {
    /// Builds what `prepared` describes.
    ///
    /// # Errors
    /// When the host refuses; nothing is left behind.
    pub fn build(prepared: Prepared, ending: Arc<Ending>) -> Result<Self, MachineError> {
        let Prepared { config, mut kernel, mut initramfs, serial, devices, passthrough } = prepared;
        let memory = memory::allocate(&config.memory)?;
        numa::bind(&memory, &config.numa)?;
        let vm = Vm::create(&memory, config.cpus.count)?;
        let ram = config.memory.size.bytes();
        let initramfs = initramfs.as_mut().map(|(path, file)| (path.as_path(), file));
        let loaded = boot::load(&memory, ram, &mut kernel, initramfs, &config.boot.cmdline)?;

        let topology = Topology::with_nodes(&config.cpus, &config.numa);
        let cpuid = CpuIdTemplate::of_host(&vm.kvm, topology)
            .map_err(|source| KvmError::Ioctl { what: "KVM_GET_SUPPORTED_CPUID", source })?;
        let hypervisor = Arc::new(KvmHypervisor::new(Arc::clone(&vm.fd)));
        let buses = Buses { ports: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        let context = Context {
            memory: memory.clone(),
            hypervisor: Arc::clone(&hypervisor) as _,
            vm: Arc::clone(&vm.fd),
            kvm: Arc::default(),
            vfio: config.vfio.clone(),
        };
        let described = config.passthrough.iter().cloned().zip(passthrough).collect();
        let mut opened = Opened::new(&context, described)?;
        let site = pci::Site {
            config: &config,
            physical_bits: cpuid.physical_bits(),
            hypervisor: Arc::clone(&hypervisor) as _,
            mmio: &buses.mmio,
        };
        let pci = pci::root(&site, opened.as_ref())?;
        if let Some(opened) = &mut opened {
            opened.map()?;
        }
        let description = acpi::Description {
            cpus: config.cpus.count,
            topology,
            host_bridges: lock(&pci).host_bridges().to_vec(),
            nodes: numa::nodes(&config.numa, Path::new(numa::HOST_NODES)),
        };
        acpi::write(&memory, &description)?;
        write_boot_protocol(&memory, ram, &loaded)?;

        let pin = |gsi| hypervisor.pin(gsi).map_err(MachineError::host("an interrupt pin"));
        let power_button = pin(layout::EVENT_GSI)?;
        let serial = SerialPort::new(pin(layout::COM1_GSI)?, serial, config.serial == ConsoleConfig::Stdio)?;
        add_platform(&buses.ports, &serial, &ending)?;
        let hypervisor: Arc<dyn Hypervisor> = hypervisor;
        let devices = VirtioDevices::attach(devices, &memory, &hypervisor, &pci)?;
        let passthrough = Passthrough::new(context, pci, opened, config.hotplug_slots)?;
        let vcpus = create_vcpus(&vm, topology, cpuid, config.cpus.count, loaded.entry)?;
        Ok(Self { config, ending, buses, vcpus, power_button, serial, devices, passthrough })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When the host has no thread left; those started are stopped again.
    pub fn start(self) -> Result<RunningMachine, MachineError> {
        let control = Arc::new(VcpuControl::default());
        let started = Instant::now();
        let mut threads = Vec::with_capacity(self.vcpus.len());
        for vcpu in self.vcpus {
            let thread = vcpu.start(self.buses.clone(), Arc::clone(&control), Arc::clone(&self.ending));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    // The error at hand says more than that of stopping.
                    let _ = control.stop(&threads);
                    return Err(MachineError::Host { what: "a vCPU's thread", source });
                }
            }
        }
        let counters = lock(&self.serial.device).counters();
        let controls = Controls::new(Parts {
            config: self.config,
            started,
            ending: self.ending,
            control,
            threads,
            power_button: self.power_button,
            serial: counters,
            devices: self.devices,
            passthrough: self.passthrough,
        });
        Ok(RunningMachine::new(Arc::new(controls), self.serial, self.buses))
    }
}

fn write_boot_protocol(
    memory: &GuestMemoryMmap,
    ram: u64,
    kernel: &LoadedKernel,
) -> Result<(), MachineError> {
    match kernel.entry {
        Entry::Pvh { .. } => pvh::write_start_info(memory, ram, kernel.initramfs)?,
        Entry::Linux64 { .. } => linux::write_zero_page(memory, ram, kernel.header, kernel.initramfs)?,
    }
    registers::write_reset_vector(memory)?;
    Ok(kernel.entry.write_tables(memory)?)
}

fn add_platform(ports: &Bus, serial: &SerialPort, ending: &Arc<Ending>) -> Result<(), BusError> {
    fn shared(device: impl BusDevice + 'static) -> SharedDevice {
        Arc::new(Mutex::new(device))
    }
    let ending = || Arc::clone(ending);
    let keyboard = layout::I8042;
    ports.insert(layout::COM1.into(), 8, Arc::clone(&serial.device) as SharedDevice)?;
    ports.insert(keyboard.start.into(), keyboard.len() as u64, shared(KeyboardController::new(ending())))?;
    ports.insert(layout::PVPANIC.into(), 1, shared(PanicNotifier::new(ending())))?;
    ports.insert(layout::ACPI_POWER.into(), PowerRegisters::LENGTH, shared(PowerRegisters::new(ending())))
}

fn create_vcpus(
    vm: &Vm,
    topology: Topology,
    mut cpuid: CpuIdTemplate,
    count: u8,
    entry: Entry,
) -> Result<Vec<Vcpu>, KvmError> {
    let vcpus: Vec<Vcpu> =
        (0..count).map(|index| Vcpu::create(vm, index, topology.apic_id(index))).collect::<Result<_, _>>()?;
    if let Some(khz) = vcpus.first().and_then(Vcpu::tsc_khz) {
        cpuid.set_tsc_khz(khz);
    }
    for (index, vcpu) in vcpus.iter().enumerate() {
        vcpu.configure(&cpuid, (index == 0).then_some(entry))?;
    }
    Ok(vcpus)
}
