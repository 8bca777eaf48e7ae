//! [`HostFunction`] on a VFIO device of the kernel.

use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::function::{
    FunctionParts, HostFunction, InterruptCounts, InterruptKind, PAGE, ROM_REGION, Region,
};
use super::ioctls;

/// A function of the host behind VFIO.
pub struct KernelFunction {
    device: Arc<VfioDevice>,
}

impl KernelFunction {
    /// Wraps an open device.
    pub fn new(device: Arc<VfioDevice>) -> Self {
        Self { device }
    }

    /// What the kernel says it has.
    pub fn parts(&self) -> FunctionParts {
        let regions = (0..=ROM_REGION).map(|index| self.region(index)).filter(|region| region.size > 0);
        FunctionParts {
            config_size: self.device.get_region_size(VFIO_PCI_CONFIG_REGION_INDEX).min(4096) as u16,
            regions: regions.collect(),
            interrupts: self.interrupts(),
        }
    }

    fn region(&self, index: u8) -> Region {
        let size = self.device.get_region_size(index.into());
        let mappable = if self.device.get_region_flags(index.into()) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            self.sparse(index.into()).unwrap_or_else(|| iter::once(0..size).collect())
        };
        // A BAR that shares its page with something else is not for mapping, in whole or in part.
        let pages =
            |range: Range<u64>| range.start.next_multiple_of(PAGE)..(range.end.min(size) / PAGE * PAGE);
        Region { index, size, mappable: mappable.into_iter().map(pages).filter(|r| !r.is_empty()).collect() }
    }

    fn sparse(&self, index: u32) -> Option<Vec<Range<u64>>> {
        self.device.get_region_caps(index).into_iter().find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(sparse) => {
                let range = |area: &vfio_ioctls::VfioRegionSparseMmapArea| {
                    area.offset..area.offset.saturating_add(area.size)
                };
                Some(sparse.areas.iter().map(range).collect())
            }
            _ => None,
        })
    }

    fn interrupts(&self) -> InterruptCounts {
        let info = |index| self.device.get_irq_info(index).copied();
        let count = |index| {
            let usable = info(index).filter(|irq| irq.flags & VFIO_IRQ_INFO_EVENTFD != 0);
            usable.map_or(0, |irq| irq.count.min(2048) as u16)
        };
        let masks = |index| info(index).is_some_and(|irq| irq.flags & VFIO_IRQ_INFO_AUTOMASKED != 0);
        InterruptCounts {
            intx: count(VFIO_PCI_INTX_IRQ_INDEX) == 1 && masks(VFIO_PCI_INTX_IRQ_INDEX),
            msi: count(VFIO_PCI_MSI_IRQ_INDEX),
            msix: count(VFIO_PCI_MSIX_IRQ_INDEX),
            msix_grows: info(VFIO_PCI_MSIX_IRQ_INDEX)
                .is_some_and(|irq| irq.flags & VFIO_IRQ_INFO_NORESIZE == 0),
        }
    }

    /// Where a region begins in the device's file, for mapping it.
    pub fn region_offset(&self, region: u8) -> u64 {
        self.device.get_region_offset(region.into())
    }

    /// The device's file. Closed when the last clone of the device is dropped.
    pub fn file(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the device's, which is borrowed along.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }

    /// The device, for ioctls.
    pub fn file_descriptor(&self) -> impl AsRawFd + '_ {
        self.file()
    }

    /// Has `requested` signalled when the host wants the device back, and `failed` on an uncorrectable
    /// error. Kernels without one of the two are no reason to refuse the device.
    pub fn watch(&self, requested: &EventFd, failed: &EventFd) {
        for (index, event) in [(VFIO_PCI_REQ_IRQ_INDEX, requested), (VFIO_PCI_ERR_IRQ_INDEX, failed)] {
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
            let _ = ioctls::set_irqs(&*self.device, [flags, index, 0, 1], &[Some(event)]);
        }
    }

    fn io<T>(&self, region: u32, offset: u64, length: usize, call: impl FnOnce(&File, u64) -> io::Result<T>) {
        let size = self.device.get_region_size(region);
        if offset.checked_add(length as u64).is_none_or(|end| end > size) {
            return;
        }
        // SAFETY: the descriptor is the device's and stays its own: the file is never dropped.
        let file = std::mem::ManuallyDrop::new(unsafe { file_of(self.device.as_raw_fd()) });
        // A device that has gone fails here: reads leave ones, writes go nowhere.
        let _ = call(&file, self.device.get_region_offset(region) + offset);
    }
}

/// # Safety
/// The descriptor stays open while the file is used, and the file is not dropped.
unsafe fn file_of(fd: i32) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: as the caller promises.
    unsafe { File::from_raw_fd(fd) }
}

fn index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Intx => VFIO_PCI_INTX_IRQ_INDEX,
        InterruptKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

impl HostFunction for KernelFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let length = data.len();
        self.io(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), length, |file, at| file.read_exact_at(data, at));
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let length = data.len();
        self.io(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), length, |file, at| file.write_all_at(data, at));
    }

    fn read_region(&self, region: u8, offset: u64, data: &mut [u8]) {
        let length = data.len();
        self.io(region.into(), offset, length, |file, at| file.read_exact_at(data, at));
    }

    fn write_region(&self, region: u8, offset: u64, data: &[u8]) {
        self.io(region.into(), offset, data.len(), |file, at| file.write_all_at(data, at));
    }

    fn connect(&self, kind: InterruptKind, first: u16, events: &[Option<&EventFd>]) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        ioctls::set_irqs(&*self.device, [flags, index(kind), first.into(), events.len() as u32], events)
    }

    fn unmask_by(&self, event: &EventFd) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
        ioctls::set_irqs(&*self.device, [flags, VFIO_PCI_INTX_IRQ_INDEX, 0, 1], &[Some(event)])
    }

    fn disconnect(&self, kind: InterruptKind) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        ioctls::set_irqs(&*self.device, [flags, index(kind), 0, 0], &[])
    }

    fn reset(&self) -> io::Result<()> {
        ioctls::reset(&*self.device)
    }
}
