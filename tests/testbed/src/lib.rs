//! Emulated bare-metal hosts: QEMU machines with SVM, nested paging and an IOMMU, in which KVM and
//! VFIO are real, on a network of their own.
//!
//! ```no_run
//! # fn main() -> Result<(), lathe_testbed::Error> {
//! use lathe_testbed::{Bed, HostDescription};
//! let bed = Bed::new()?;
//! let host = bed.boot(HostDescription::new("n1"))?;
//! assert_eq!(host.check(["uname", "-n"])?, "n1");
//! # Ok(())
//! # }
//! ```
//!
//! - [`description`] and [`pci`]: what a host is made of; [`qemu`] turns that into a command line.
//! - [`bed`]: the hosts of one test, their network (a private module, `netns`) and what is removed
//!   afterwards.
//! - [`host`]: power, network cuts, consoles, and devices that come and go (`hotplug`); [`Wire`]: the far end
//!   of a card's cable; [`remote`]: commands and files in a host. Its exec channel
//!   is [`frame`] on the wire, `channel` at this end, and the binary `testbed-init` at the host's.
//! - [`supervisor`]: a bed that outlives the command that made it, for `scripts/testbed`.
//! - [`image`]: the archives a host boots.

#![forbid(unsafe_code)]

pub mod bed;
mod channel;
pub mod description;
mod error;
pub mod frame;
pub mod host;
mod hotplug;
pub mod image;
mod netns;
pub mod pci;
pub mod process;
pub mod qemu;
mod qmp;
pub mod remote;
pub mod supervisor;
mod wire;

pub use bed::{Bed, HARNESS_ADDRESS};
pub use channel::ChannelError;
pub use description::{HostDescription, HostFile, Iommu, KernelFlavour, NumaNode};
pub use error::Error;
pub use frame::{Status, Stream};
pub use host::Host;
pub use netns::NetworkError;
pub use pci::{Device, DeviceKind};
pub use remote::{HostCommand, Output, Process, Remote};
pub use wire::Wire;
