//! What differs between processor architectures: address map, firmware tables, first register
//! values. The rest of the crate names `arch::` and never an architecture.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as native;
