//! A PCI device driven from user space through VFIO without an IOMMU (include/uapi/linux/vfio.h): a guest has
//! none, so the device is given physical addresses.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::Failure;
use crate::sysfs::{self, Device};

/// The driver that gives a device to user space.
const DRIVER: &str = "vfio-pci";
/// Lets devices be driven that no IOMMU confines.
const UNSAFE_MODE: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// `_IO(';', 100 + n)` of vfio.h.
const SET_IOMMU: libc::Ioctl = 0x3b66;
const GROUP_SET_CONTAINER: libc::Ioctl = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::Ioctl = 0x3b6a;
const DEVICE_GET_REGION_INFO: libc::Ioctl = 0x3b6c;
const DEVICE_SET_IRQS: libc::Ioctl = 0x3b6e;

/// `VFIO_NOIOMMU_IOMMU`.
const NO_IOMMU: libc::c_ulong = 8;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIGURATION: u32 = 7;
/// `PCI_COMMAND` and its bits for memory decoding and for DMA.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0x6;

/// `VFIO_IRQ_SET_` flags.
const DATA_NONE: u32 = 1;
const DATA_EVENTFD: u32 = 4;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// How a device interrupts (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// A level-triggered line, masked by the kernel each time it fires.
    Intx = 0,
    /// A message.
    Msi = 1,
    /// No interrupt of the device: the kernel wants it back.
    Request = 4,
}

/// `struct vfio_region_info`.
#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

/// `struct vfio_irq_set` with room for one descriptor.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: RawFd,
}

/// An open device. Dropping it resets the device and gives it back.
pub struct VfioDevice {
    device: File,
    // The kernel keeps the device as long as these are open.
    _group: File,
    _container: File,
    regions: [u64; 8],
}

impl VfioDevice {
    /// Takes a device from whatever driver has it.
    pub fn open(device: &Device) -> Result<Self, Failure> {
        bind(device)?;
        let name = device.path.join("iommu_group");
        let group = sysfs::wait_for(&format!("no VFIO group for {}", device.address), || {
            let Ok(group) = fs::read_link(&name) else { return Ok(None) };
            let number = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let path = format!("/dev/vfio/noiommu-{number}");
            Ok(Path::new(&path).exists().then_some(path))
        })?;
        let open = |path: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(Failure::at(format!("opening {path}")))
        };
        let (container, group) = (open("/dev/vfio/vfio")?, open(&group)?);
        let raw = container.as_raw_fd();
        // SAFETY: the argument points to a descriptor that lives over the call.
        let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const raw) };
        call(result, "setting the container")?;
        // SAFETY: the argument is a number.
        call(unsafe { libc::ioctl(raw, SET_IOMMU, NO_IOMMU) }, "choosing no IOMMU")?;
        let name = std::ffi::CString::new(device.address.as_str())
            .map_err(|_| Failure::wrong("a NUL in an address"))?;
        // The driver's link is there before its probe has added the device to the group (ENODEV), and while the
        // kernel still plugs the device it holds the lock that opening resets it under (EAGAIN).
        let fd = sysfs::wait_for(&format!("{} cannot be opened", device.address), || {
            // SAFETY: the argument is a string that lives over the call.
            let fd = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
            let error = io::Error::last_os_error().raw_os_error();
            let missing = fd < 0 && matches!(error, Some(libc::ENODEV | libc::EAGAIN));
            if missing { Ok(None) } else { call(fd, "opening the device").map(|_| Some(fd)) }
        })?;
        // SAFETY: the call returned a new descriptor, which nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut opened = Self { device: fd.into(), _group: group, _container: container, regions: [0; 8] };
        for index in [0, CONFIGURATION] {
            opened.regions[index as usize] = opened.region_offset(index)?;
        }
        opened.start()?;
        Ok(opened)
    }

    fn region_offset(&self, index: u32) -> Result<u64, Failure> {
        let argsz = size_of::<RegionInfo>() as u32;
        let mut info = RegionInfo { argsz, index, ..RegionInfo::default() };
        // SAFETY: the argument is a structure of the size it says, which lives over the call.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info) };
        call(result, "asking for a region")?;
        Ok(info.offset)
    }

    /// Lets the device decode its memory and do DMA.
    fn start(&self) -> Result<(), Failure> {
        let at = self.regions[CONFIGURATION as usize] + COMMAND;
        let mut command = [0; 2];
        self.device.read_exact_at(&mut command, at).map_err(Failure::at("reading the command register"))?;
        let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
        self.device
            .write_all_at(&command.to_le_bytes(), at)
            .map_err(Failure::at("writing the command register"))
    }

    /// Reads a 32-bit register of BAR 0.
    pub fn read(&self, register: u64) -> Result<u32, Failure> {
        let mut bytes = [0; 4];
        self.device
            .read_exact_at(&mut bytes, self.regions[0] + register)
            .map_err(Failure::at(format!("reading register {register:#x}")))?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a 32-bit register of BAR 0.
    pub fn write(&self, register: u64, value: u32) -> Result<(), Failure> {
        self.write_bytes(register, &value.to_le_bytes())
    }

    /// Writes a 64-bit register of BAR 0, in one access.
    pub fn write_long(&self, register: u64, value: u64) -> Result<(), Failure> {
        self.write_bytes(register, &value.to_le_bytes())
    }

    fn write_bytes(&self, register: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.device
            .write_all_at(bytes, self.regions[0] + register)
            .map_err(Failure::at(format!("writing register {register:#x}")))
    }

    /// Has interrupts of one kind delivered, and those of the other kinds no longer.
    pub fn listen(&self, interrupt: Interrupt) -> Result<Listener<'_>, Failure> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags).map_err(Failure::at("making an eventfd"))?;
        self.set_irqs(DATA_EVENTFD | ACTION_TRIGGER, interrupt, 1, event.as_fd().as_raw_fd())?;
        Ok(Listener { device: self, interrupt, event })
    }

    fn set_irqs(&self, flags: u32, interrupt: Interrupt, count: u32, eventfd: RawFd) -> Result<(), Failure> {
        let argsz = size_of::<IrqSet>() as u32;
        let set = IrqSet { argsz, flags, index: interrupt as u32, start: 0, count, eventfd };
        // SAFETY: the argument is a structure of the size it says, which lives over the call.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), DEVICE_SET_IRQS, &raw const set) };
        call(result, &format!("setting the interrupt {interrupt:?}"))
    }
}

/// Interrupts that arrive. Dropping it turns them off.
pub struct Listener<'a> {
    device: &'a VfioDevice,
    interrupt: Interrupt,
    event: EventFd,
}

impl Listener<'_> {
    /// Waits for the next one; `false` when none came.
    pub fn wait(&self, limit: Duration) -> Result<bool, Failure> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut events = [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut events, limit).map_err(Failure::at("waiting for an interrupt"))?;
        if ready > 0 {
            self.event.read().map_err(Failure::at("reading an eventfd"))?;
        }
        Ok(ready > 0)
    }

    /// Lets a line that has fired fire again; the device has to have been told to lower it.
    pub fn unmask(&self) -> Result<(), Failure> {
        self.device.set_irqs(DATA_NONE | ACTION_UNMASK, self.interrupt, 1, -1)
    }
}

impl Drop for Listener<'_> {
    fn drop(&mut self) {
        // A device that is gone has none left to turn off.
        let _ = self.device.set_irqs(DATA_NONE | ACTION_TRIGGER, self.interrupt, 0, -1);
    }
}

/// Makes `vfio-pci` the device's driver.
fn bind(device: &Device) -> Result<(), Failure> {
    fs::write(UNSAFE_MODE, "Y").map_err(Failure::at(format!("writing {UNSAFE_MODE}")))?;
    match device.driver().as_deref() {
        Some(DRIVER) => return Ok(()),
        Some(_) => device.set("driver/unbind", &device.address)?,
        None => {}
    }
    device.set("driver_override", DRIVER)?;
    let probe = "/sys/bus/pci/drivers_probe";
    // Writing succeeds whether or not the driver took it, and it takes no device that the kernel is still
    // adding, as after a plug.
    sysfs::wait_for(&format!("{} does not get the driver {DRIVER}", device.address), || {
        fs::write(probe, &device.address)
            .map_err(Failure::at(format!("writing {} to {probe}", device.address)))?;
        Ok((device.driver().as_deref() == Some(DRIVER)).then_some(()))
    })
}

fn call(result: libc::c_int, what: &str) -> Result<(), Failure> {
    if result < 0 { Err(Failure::at(format!("VFIO: {what}"))(io::Error::last_os_error())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<RegionInfo>(), size_of::<IrqSet>()), (32, 24));
    }
}
