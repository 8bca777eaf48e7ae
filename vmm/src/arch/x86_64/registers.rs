//! The first CPU's registers at a kernel's entry point.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always one; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Selectors that the 64-bit Linux protocol fixes (`__BOOT_CS`, `__BOOT_DS`); PVH leaves them open.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Protected mode without paging, EBX at the start info (Xen's PVH specification).
    Pvh {
        /// The entry point.
        address: u64,
    },
    /// Long mode with the first GiB identity-mapped, RSI at the zero page
    /// (Linux Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux64 {
        /// The entry point.
        address: u64,
    },
}

impl Entry {
    /// General registers.
    pub fn registers(self) -> kvm_regs {
        match self {
            Self::Pvh { address } => {
                kvm_regs { rflags: RFLAGS, rip: address, rbx: layout::PVH_START_INFO, ..Default::default() }
            }
            Self::Linux64 { address } => kvm_regs {
                rflags: RFLAGS,
                rip: address,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                ..Default::default()
            },
        }
    }

    /// Changes `sregs`, which hold KVM's reset values, to this entry's mode.
    pub fn set_mode(self, sregs: &mut kvm_sregs) {
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(CODE_SELECTOR, 0xb, long);
        let data = segment(DATA_SELECTOR, 0x3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task_state(TSS_SELECTOR);
        sregs.idt = kvm_dtable::default();
        if long {
            sregs.gdt = kvm_dtable { base: layout::GDT, limit: 8 * 5 - 1, ..Default::default() };
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        } else {
            // The segment caches are loaded directly: the specification asks for no GDT.
            sregs.gdt = kvm_dtable::default();
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }

    /// Writes what the mode needs in memory: descriptor and page tables, for long mode.
    ///
    /// # Errors
    /// When low memory is missing.
    pub fn write_tables(self, memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
        let Self::Linux64 { .. } = self else { return Ok(()) };
        let gdt: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
        memory.write_slice(&bytes(&gdt), GuestAddress(layout::GDT))?;
        const PRESENT_WRITABLE: u64 = 0x3;
        const LARGE: u64 = 1 << 7;
        let [pml4, pdpt, directory] = [0, 0x1000, 0x2000].map(|offset| layout::PAGE_TABLES + offset);
        memory.write_slice(&bytes(&[pdpt | PRESENT_WRITABLE]), GuestAddress(pml4))?;
        memory.write_slice(&bytes(&[directory | PRESENT_WRITABLE]), GuestAddress(pdpt))?;
        let entries: Vec<u64> = (0..512).map(|index| index << 21 | LARGE | PRESENT_WRITABLE).collect();
        memory.write_slice(&bytes(&entries), GuestAddress(directory))
    }
}

/// Writes real-mode code that pulls the reset line, at the address of the BIOS. On hardware-reduced
/// ACPI without EFI, Linux reboots by jumping there, and never tries the reset register.
///
/// # Errors
/// When low memory is missing.
pub fn write_reset_vector(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    // mov al, 0xfe; out 0x64, al; hlt; jmp back to the hlt
    let code = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, GuestAddress(layout::RESET_VECTOR))
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A flat 4 GiB segment, as the processor caches it.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A busy TSS: entering protected mode without one is refused by VMX.
fn task_state(selector: u16) -> kvm_segment {
    kvm_segment { base: 0, limit: 0x67, selector, type_: 0xb, present: 1, ..Default::default() }
}
