//! The 64-bit Linux boot protocol's zero page (Linux Documentation/arch/x86/boot.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams, Error};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::layout;
use crate::boot::Initramfs;

/// "HdrS" and the boot sector's signature, for ELF kernels, which carry no setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page; `header` is the bzImage's own.
///
/// # Errors
/// When low memory is missing.
pub fn write_zero_page(
    memory: &GuestMemoryMmap,
    ram: u64,
    header: Option<setup_header>,
    initramfs: Option<Initramfs>,
) -> Result<(), Error> {
    let mut page = boot_params { hdr: header.unwrap_or_default(), ..Default::default() };
    page.hdr.header = HEADER_MAGIC;
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some(initramfs) = initramfs {
        // Always below 4 GiB: `boot::load` places it below the hole.
        page.hdr.ramdisk_image = initramfs.address as u32;
        page.hdr.ramdisk_size = initramfs.size as u32;
    }
    page.acpi_rsdp_addr = layout::ACPI.start;
    let map = layout::memory_map(ram);
    page.e820_entries = map.len() as u8;
    for (entry, (range, kind)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind as u32 };
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&page, GuestAddress(layout::ZERO_PAGE)), memory)
}
