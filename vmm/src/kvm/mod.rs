//! The machine on KVM: the VM with its memory slots and irqchip, interrupts and notifications for
//! devices, and the threads that run vCPUs.

mod interrupts;
mod slots;
mod vcpu;
mod vm;

pub use interrupts::KvmHypervisor;
pub use vcpu::{Buses, EXIT_KINDS, ExitCounters, KickError, Vcpu, VcpuControl, VcpuThread};
pub use vm::{KvmError, Vm};
