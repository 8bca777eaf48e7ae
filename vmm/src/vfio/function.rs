//! One function of the host as the rules of passthrough need it: registers, regions, interrupts.
//!
//! [`HostFunction`] is implemented on VFIO by [`super::kernel::KernelFunction`]; tests and fuzz
//! targets implement it on a few bytes, hostile ones included.

use std::io;
use std::ops::Range;

use vmm_sys_util::eventfd::EventFd;

/// VFIO's number of the expansion ROM's region, which is also its BAR index here.
pub const ROM_REGION: u8 = 6;

/// The unit in which regions are mapped: the host's page and the guest's.
pub const PAGE: u64 = 4096;

/// The register with class code and revision. Virtual functions have it too, while their vendor ID reads as ones
/// (PCIe 6.0 §9.3.4.1.1).
const CLASS_AND_REVISION: u16 = 0x08;

/// A kind of interrupt that a function can be told to use; one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// The pin.
    Intx,
    /// Message signalled.
    Msi,
    /// Message signalled, with a table.
    Msix,
}

/// How many interrupts of each kind the function can be told to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// Whether the pin is connected and can be masked.
    pub intx: bool,
    /// Messages.
    pub msi: u16,
    /// Entries of the table.
    pub msix: u16,
    /// Entries can be added while others are in use (Linux 6.5 and later).
    pub msix_grows: bool,
}

/// A BAR or the expansion ROM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// BAR index, or [`ROM_REGION`].
    pub index: u8,
    /// Size in bytes.
    pub size: u64,
    /// Parts that can be mapped, page-aligned offsets in the region; the rest is read and written.
    pub mappable: Vec<Range<u64>>,
}

/// What a function has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionParts {
    /// Size of configuration space in bytes: 256 or 4096.
    pub config_size: u16,
    /// Its regions, empty ones left out.
    pub regions: Vec<Region>,
    /// Its interrupts.
    pub interrupts: InterruptCounts,
}

/// A function of the host, ours alone. Callable from any thread.
///
/// Accesses to a function that has gone read as ones and write nothing, as on the bus.
pub trait HostFunction: Send + Sync {
    /// Reads configuration space; `data` stays as it is where there is none.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// Reads a region; `data` stays as it is where that fails.
    fn read_region(&self, region: u8, offset: u64, data: &mut [u8]);

    /// Writes a region.
    fn write_region(&self, region: u8, offset: u64, data: &[u8]);

    /// Has interrupts from `first` on signal `events`, turning the kind on if it was off; `None` leaves
    /// one without effect.
    ///
    /// # Errors
    /// What the kernel said: another kind is on, or no vectors are left.
    fn connect(&self, kind: InterruptKind, first: u16, events: &[Option<&EventFd>]) -> io::Result<()>;

    /// Has `event` unmask the pin, which the kernel masks whenever it fires.
    ///
    /// # Errors
    /// What the kernel said.
    fn unmask_by(&self, event: &EventFd) -> io::Result<()>;

    /// Turns a kind off.
    ///
    /// # Errors
    /// What the kernel said: it was off.
    fn disconnect(&self, kind: InterruptKind) -> io::Result<()>;

    /// Resets this function alone, by whichever way the kernel has for it.
    ///
    /// # Errors
    /// When there is none, or it failed.
    fn reset(&self) -> io::Result<()>;

    /// Whether it answers: reads of one that is off, hung or gone are ones. The class is asked, because the kernel
    /// answers for the IDs of a function whose own read as ones, a virtual one's.
    fn answers(&self) -> bool {
        let mut class = [0xff; 4];
        self.read_config(CLASS_AND_REVISION, &mut class);
        class != [0xff; 4]
    }
}
