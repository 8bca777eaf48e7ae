//! From files to a kernel in guest memory: recognise the image, check it, load it with its
//! initramfs and command line. How it is then entered is `arch`'s part.

mod image;
mod load;

pub use image::{ImageError, KernelImage, KernelKind};
pub use load::{LoadError, LoadedKernel, load};

/// Where an initramfs was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}
