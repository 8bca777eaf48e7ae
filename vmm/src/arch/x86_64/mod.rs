//! x86-64: a PC without its past. Hardware-reduced ACPI, local and I/O APIC, no PIT, no CMOS clock,
//! no firmware: the VMM plays the boot loader and enters the kernel directly.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod linux;
pub mod pvh;
pub mod registers;
pub mod topology;
