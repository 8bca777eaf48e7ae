//! The IOMMU behind one trait, with the kernel's two interfaces to it: iommufd, and containers of groups.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioIommufd, VfioOps};

use super::VfioError;
use super::host::HostDevice;
use super::ioctls;
use crate::config::VfioBackend;

/// One address space that all devices of the machine share, and the devices in it.
///
/// Mappings stay until they are unmapped or the last device is dropped. Thread-safe.
pub trait Iommu: Send + Sync {
    /// Its name, for people and metrics.
    fn name(&self) -> &'static str;

    /// Opens a device and puts it into the address space.
    ///
    /// # Errors
    /// When another process has it, or the kernel refuses.
    fn open(&self, device: &HostDevice) -> Result<VfioDevice, vfio_ioctls::VfioError>;

    /// Devices reach `size` bytes at `host` as `iova` from now on; the pages are pinned.
    ///
    /// # Errors
    /// `EINVAL` outside the apertures; `ENOMEM` beyond the limit of locked memory; `EFAULT` or `EINVAL` for
    /// device memory, where the kernel cannot map it.
    ///
    /// # Safety
    /// The memory stays mapped, and only guests and devices touch it, until it is unmapped here.
    unsafe fn map(&self, iova: u64, host: NonNull<u8>, size: u64) -> io::Result<()>;

    /// Undoes a [`map`](Self::map) of the same range.
    ///
    /// # Errors
    /// When nothing was mapped there.
    fn unmap(&self, iova: u64, size: u64) -> io::Result<()>;

    /// The addresses that every device in it can reach; empty where the kernel does not say.
    /// They are known once a device is open, and may shrink with each.
    ///
    /// # Errors
    /// What the kernel said.
    fn apertures(&self) -> io::Result<Vec<Range<u64>>>;

    /// How many more mappings it takes, where there is a limit.
    fn mappings_left(&self) -> Option<u32>;

    /// The files that stand for ownership of these groups when a bus is reset; none with iommufd, where the
    /// kernel knows by itself.
    fn group_files(&self, groups: &[u32]) -> Vec<RawFd>;
}

/// Opens the address space for a machine. `device` is one of its devices, by which the kernel is asked
/// whether it has character devices; `kvm` is the VM's VFIO device.
///
/// # Errors
/// When the kernel has not what `backend` asks for, or has neither.
pub fn open(
    backend: VfioBackend,
    device: &HostDevice,
    kvm: Arc<VfioDeviceFd>,
) -> Result<Arc<dyn Iommu>, VfioError> {
    let cdev = Path::new("/dev/iommu").exists() && device.path.join("vfio-dev").exists();
    match backend {
        VfioBackend::Auto if cdev => Ok(Arc::new(Iommufd::new(kvm)?)),
        VfioBackend::Auto | VfioBackend::Container => Ok(Arc::new(Container::new(kvm)?)),
        VfioBackend::Iommufd if cdev => Ok(Arc::new(Iommufd::new(kvm)?)),
        VfioBackend::Iommufd => Err(VfioError::Backend(
            "iommufd is not there: it takes Linux 6.6 or later with CONFIG_IOMMUFD and \
             CONFIG_VFIO_DEVICE_CDEV; use container"
                .to_owned(),
        )),
    }
}

/// What the kernel said underneath.
pub(super) fn cause(error: &vfio_ioctls::VfioError) -> io::Error {
    let mut source: &dyn std::error::Error = error;
    loop {
        if let Some(error) = source.downcast_ref::<vmm_sys_util::errno::Error>() {
            return io::Error::from_raw_os_error(error.errno());
        }
        if let Some(code) = source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return io::Error::from_raw_os_error(code);
        }
        match source.source() {
            Some(next) => source = next,
            None => return io::Error::other(error.to_string()),
        }
    }
}

struct Container {
    container: Arc<VfioContainer>,
}

impl Container {
    fn new(kvm: Arc<VfioDeviceFd>) -> Result<Self, VfioError> {
        if !Path::new("/dev/vfio/vfio").exists() {
            let advice = "/dev/vfio/vfio is not there; load the module: modprobe vfio-pci";
            return Err(VfioError::Backend(advice.to_owned()));
        }
        let container = VfioContainer::new(Some(kvm))
            .map_err(|error| VfioError::kernel("/dev/vfio/vfio")(cause(&error)))?;
        Ok(Self { container: Arc::new(container) })
    }
}

impl Iommu for Container {
    fn name(&self) -> &'static str {
        "container"
    }

    fn open(&self, device: &HostDevice) -> Result<VfioDevice, vfio_ioctls::VfioError> {
        let container = Arc::clone(&self.container) as Arc<dyn VfioOps>;
        VfioDevice::new(&device.path, container, false)
    }

    unsafe fn map(&self, iova: u64, host: NonNull<u8>, size: u64) -> io::Result<()> {
        // SAFETY: the caller promises what this asks for.
        unsafe { self.container.vfio_dma_map(iova, size as usize, host.as_ptr()) }
            .map_err(|error| cause(&error))
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        self.container.vfio_dma_unmap(iova, size as usize).map_err(|error| cause(&error))
    }

    fn apertures(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(ioctls::container_info(&*self.container)?.apertures)
    }

    fn mappings_left(&self) -> Option<u32> {
        ioctls::container_info(&*self.container).ok()?.mappings_left
    }

    /// The library keeps them to itself, so they are looked for among this process's descriptors: a group can
    /// be opened only once.
    fn group_files(&self, groups: &[u32]) -> Vec<RawFd> {
        let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
        let wanted: Vec<_> = groups.iter().map(|group| format!("/dev/vfio/{group}")).collect();
        let is_wanted = |path: &Path| wanted.iter().any(|name| path == Path::new(name));
        entries
            .flatten()
            .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| is_wanted(&target)))
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }
}

struct Iommufd {
    iommufd: Arc<VfioIommufd>,
}

impl Iommufd {
    fn new(kvm: Arc<VfioDeviceFd>) -> Result<Self, VfioError> {
        let file =
            IommuFd::new().map_err(|error| VfioError::kernel("/dev/iommu")(io::Error::other(error)))?;
        let iommufd = VfioIommufd::new(Arc::new(file), None, Some(kvm))
            .map_err(|error| VfioError::kernel("an I/O address space of /dev/iommu")(cause(&error)))?;
        Ok(Self { iommufd: Arc::new(iommufd) })
    }
}

struct Fd(RawFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Iommu for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn open(&self, device: &HostDevice) -> Result<VfioDevice, vfio_ioctls::VfioError> {
        let iommufd = Arc::clone(&self.iommufd) as Arc<dyn VfioOps>;
        VfioDevice::new(&device.path, iommufd, true)
    }

    unsafe fn map(&self, iova: u64, host: NonNull<u8>, size: u64) -> io::Result<()> {
        // SAFETY: the caller promises what this asks for.
        unsafe { self.iommufd.vfio_dma_map(iova, size as usize, host.as_ptr()) }
            .map_err(|error| cause(&error))
    }

    fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        self.iommufd.vfio_dma_unmap(iova, size as usize).map_err(|error| cause(&error))
    }

    fn apertures(&self) -> io::Result<Vec<Range<u64>>> {
        let fd = Fd(self.iommufd.iommufd().as_raw_fd());
        ioctls::ioas_ranges(&fd, self.iommufd.ioas().id())
    }

    fn mappings_left(&self) -> Option<u32> {
        None
    }

    fn group_files(&self, _groups: &[u32]) -> Vec<RawFd> {
        Vec::new()
    }
}
