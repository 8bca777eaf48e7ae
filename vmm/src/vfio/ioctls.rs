//! The ioctls that `vfio-ioctls` and `iommufd-ioctls` lack: interrupts from a first one on, resets whose
//! result is known, and what addresses an IOMMU translates.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_TYPE, iommu_ioas_iova_ranges, iommu_iova_range,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FLAGS_RESET, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE, vfio_device_info, vfio_iommu_type1_info,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_IOVA_RANGES);

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `VFIO_DEVICE_SET_IRQS`: `header` is flags, index, start, count; `events` follow as descriptors.
///
/// # Errors
/// What the kernel said.
pub fn set_irqs(device: &dyn AsRawFd, header: [u32; 4], events: &[Option<&EventFd>]) -> io::Result<()> {
    let size = 20 + events.len() * 4;
    let mut words = Vec::with_capacity(5 + events.len());
    words.push(size as u32);
    words.extend(header);
    words.extend(events.iter().map(|event| event.map_or(-1, |event| event.as_raw_fd()) as u32));
    // SAFETY: `words` is a vfio_irq_set of the size that it says; the kernel reads it and no more.
    check(unsafe { ioctl_with_ptr(&device.as_raw_fd(), VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
}

/// Whether the kernel knows a way to reset this function alone.
///
/// # Errors
/// What the kernel said.
pub fn can_reset(device: &dyn AsRawFd) -> io::Result<bool> {
    let mut info =
        vfio_device_info { argsz: size_of::<vfio_device_info>() as u32, ..vfio_device_info::default() };
    // SAFETY: `info` is what this ioctl fills, and says its size.
    check(unsafe { ioctl_with_mut_ref(&device.as_raw_fd(), VFIO_DEVICE_GET_INFO(), &mut info) })?;
    Ok(info.flags & VFIO_DEVICE_FLAGS_RESET != 0)
}

/// `VFIO_DEVICE_RESET`.
///
/// # Errors
/// What the kernel said.
pub fn reset(device: &dyn AsRawFd) -> io::Result<()> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(&device.as_raw_fd(), VFIO_DEVICE_RESET()) })
}

/// A function that a reset of the bus would reset too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affected {
    /// Its IOMMU group; with iommufd instead an ID, or a negative number as the kernel's header has it.
    pub group: i32,
    /// Domain.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
}

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`. The flags come first.
///
/// # Errors
/// `ENODEV` where the bus cannot be reset, and what else the kernel says.
pub fn hot_reset_info(device: &dyn AsRawFd) -> io::Result<(u32, Vec<Affected>)> {
    /// A bus has 256 functions.
    const MOST: usize = 256;
    let mut words = vec![0_u32; 3 + 2 * MOST];
    words[0] = (words.len() * 4) as u32;
    let number = VFIO_DEVICE_GET_PCI_HOT_RESET_INFO();
    // SAFETY: `words` is a vfio_pci_hot_reset_info with room for as much as it says.
    check(unsafe { ioctl_with_mut_ptr(&device.as_raw_fd(), number, words.as_mut_ptr()) })?;
    let count = (words[2] as usize).min(MOST);
    let affected = words[3..].chunks_exact(2).take(count).map(|pair| Affected {
        group: pair[0] as i32,
        domain: pair[1] as u16,
        bus: (pair[1] >> 16) as u8,
        devfn: (pair[1] >> 24) as u8,
    });
    Ok((words[1], affected.collect()))
}

/// `VFIO_DEVICE_PCI_HOT_RESET`; `groups` are the groups' files, none with iommufd.
///
/// # Errors
/// What the kernel said.
pub fn hot_reset(device: &dyn AsRawFd, groups: &[RawFd]) -> io::Result<()> {
    let mut words = vec![12 + 4 * groups.len() as u32, 0, groups.len() as u32];
    words.extend(groups.iter().map(|fd| *fd as u32));
    // SAFETY: `words` is a vfio_pci_hot_reset of the size that it says.
    check(unsafe { ioctl_with_ptr(&device.as_raw_fd(), VFIO_DEVICE_PCI_HOT_RESET(), words.as_ptr()) })
}

/// What a container's IOMMU can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerInfo {
    /// Addresses it translates; empty where the kernel does not say (before Linux 5.4).
    pub apertures: Vec<Range<u64>>,
    /// How many more mappings it takes; `None` where the kernel does not say (before Linux 5.10).
    pub mappings_left: Option<u32>,
}

/// `VFIO_IOMMU_GET_INFO`.
///
/// # Errors
/// What the kernel said.
pub fn container_info(container: &dyn AsRawFd) -> io::Result<ContainerInfo> {
    /// Room for some hundred ranges; an IOMMU has a handful.
    const SIZE: usize = 8192;
    let mut bytes = vec![0_u64; SIZE / 8];
    bytes[0] = SIZE as u64;
    // SAFETY: the buffer is a vfio_iommu_type1_info with room for as much as it says, aligned for it.
    check(unsafe { ioctl_with_mut_ptr(&container.as_raw_fd(), VFIO_IOMMU_GET_INFO(), bytes.as_mut_ptr()) })?;
    let bytes: Vec<u8> = bytes.into_iter().flat_map(u64::to_le_bytes).collect();
    Ok(parse_container_info(&bytes))
}

fn parse_container_info(bytes: &[u8]) -> ContainerInfo {
    let word = |offset: usize| crate::pci::capabilities::u32_at(bytes, offset);
    let long = |offset: usize| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
    let mut info = ContainerInfo::default();
    let mut offset = word(std::mem::offset_of!(vfio_iommu_type1_info, cap_offset)) as usize;
    // A header is ID and version, and the next one's offset: at most one in 8 bytes.
    for _ in 0..bytes.len() / 8 {
        if offset < size_of::<vfio_iommu_type1_info>() || offset + 16 > bytes.len() {
            break;
        }
        match word(offset) & 0xffff {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = word(offset + 8) as usize;
                let ranges = (0..count.min(bytes.len() / 16)).map(|index| offset + 16 + index * 16);
                info.apertures = ranges
                    .take_while(|at| at + 16 <= bytes.len())
                    .map(|at| long(at)..long(at + 8).saturating_add(1))
                    .collect();
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.mappings_left = Some(word(offset + 8)),
            _ => {}
        }
        offset = word(offset + 4) as usize;
    }
    info
}

/// `IOMMU_IOAS_IOVA_RANGES`: the addresses that all devices attached to an I/O address space reach.
///
/// # Errors
/// What the kernel said.
pub fn ioas_ranges(iommufd: &dyn AsRawFd, ioas: u32) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = vec![iommu_iova_range { start: 0, last: 0 }; 256];
    let mut request = iommu_ioas_iova_ranges {
        size: size_of::<iommu_ioas_iova_ranges>() as u32,
        ioas_id: ioas,
        num_iovas: ranges.len() as u32,
        __reserved: 0,
        allowed_iovas: ranges.as_mut_ptr() as u64,
        out_iova_alignment: 0,
    };
    let number = IOMMU_IOAS_IOVA_RANGES();
    // SAFETY: the request says its size, and points to room for as many ranges as it says.
    check(unsafe { ioctl_with_mut_ref(&iommufd.as_raw_fd(), number, &mut request) })?;
    ranges.truncate(request.num_iovas as usize);
    Ok(ranges.into_iter().map(|range| range.start..range.last.saturating_add(1)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_and_limits_of_a_container_are_read() {
        let mut bytes = vec![0; 128];
        let mut put =
            |offset: usize, value: u64| bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        put(0, 128);
        put(16, 24);
        put(24, u64::from(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) | 80 << 32);
        put(32, 2);
        put(40, 0);
        put(48, 0xfedf_ffff);
        put(56, 0xfef0_0000);
        put(64, (1 << 39) - 1);
        put(80, u64::from(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL));
        put(88, 65_535);
        let info = parse_container_info(&bytes);
        assert_eq!(info.apertures, [0..0xfee0_0000, 0xfef0_0000..1 << 39]);
        assert_eq!(info.mappings_left, Some(65_535));
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_end(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let info = parse_container_info(&bytes);
            prop_assert!(info.apertures.len() <= bytes.len() / 16);
        }
    }
}
