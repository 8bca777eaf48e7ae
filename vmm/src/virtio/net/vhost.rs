//! vhost-net: the host's kernel moves the frames, between the rings and the tap.
//!
//! One vhost device a pair, as QEMU does it: its ring 0 receives, its ring 1 transmits.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::tap::Tap;
use crate::config::VhostMode;
use crate::virtio::device::{ActiveQueue, GuestRam};

const VHOST_NET: &str = "/dev/vhost-net";

/// vhost-net was asked for and is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot open {VHOST_NET} (is the vhost_net module loaded?): load it, or set vhost to \"auto\" or \"off\""
)]
pub struct VhostError(#[source] io::Error);

/// Opens one vhost device for each of `pairs` queue pairs; none where `mode` says so, or allows it
/// and the host has none.
///
/// # Errors
/// When `mode` insists.
pub fn open_vhost(mode: VhostMode, pairs: u8) -> Result<Vec<File>, VhostError> {
    let open = || {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(VHOST_NET)
    };
    if mode == VhostMode::Off {
        return Ok(Vec::new());
    }
    let files: Result<Vec<File>, io::Error> = (0..pairs).map(|_| open()).collect();
    match files {
        Err(_) if mode == VhostMode::Auto => Ok(Vec::new()),
        other => other.map_err(VhostError),
    }
}

/// The features of the rings and the data path that the host's vhost-net has.
///
/// # Errors
/// What the kernel said.
pub fn features(file: &File) -> io::Result<u64> {
    let mut features = 0_u64;
    let request = vhost::vhost_kern::vhost_binding::VHOST_GET_FEATURES();
    // SAFETY: the kernel writes a u64.
    let result = unsafe { vmm_sys_util::ioctl::ioctl_with_mut_ref(file, request as _, &mut features) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(features) }
}

/// A descriptor and the memory whose addresses it takes: what the vhost crate builds on.
struct Device {
    file: File,
    memory: GuestRam,
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Device {
    type AS = GuestRam;

    fn mem(&self) -> &GuestRam {
        &self.memory
    }
}

impl Device {
    /// Starts ring `ring` on the tap, or stops it: the kernel has finished with it on return.
    fn set_backend(&self, ring: usize, tap: Option<&Tap>) -> io::Result<()> {
        let fd = tap.map_or(-1, |tap| tap.file().as_raw_fd());
        let backend = vhost_vring_file { index: ring as u32, fd };
        // SAFETY: the kernel reads a vhost_vring_file.
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A pair of queues in the kernel's hands. Dropping it takes them back.
pub struct VhostPair {
    device: Device,
    tap: Arc<Tap>,
    kicks: [EventFd; 2],
}

impl VhostPair {
    /// Hands over `queues`, which are a receive and a transmit queue; `calls` are signalled when the
    /// kernel has used buffers.
    ///
    /// # Errors
    /// What the kernel said; it holds nothing then.
    pub fn start(
        file: &File,
        memory: &GuestRam,
        features: u64,
        tap: &Arc<Tap>,
        queues: [&ActiveQueue; 2],
        calls: [&EventFd; 2],
    ) -> io::Result<Self> {
        let device = Device { file: file.try_clone()?, memory: memory.clone() };
        device.set_owner().map_err(other)?;
        // From here on the kernel has things of ours, which dropping takes back.
        let kicks = [queues[0].kick.try_clone()?, queues[1].kick.try_clone()?];
        let pair = Self { device, tap: Arc::clone(tap), kicks };
        let device = &pair.device;
        device.set_features(features & device.get_features().map_err(other)?).map_err(other)?;
        device.set_mem_table(&regions(memory)).map_err(other)?;
        for (ring, (active, call)) in queues.into_iter().zip(calls).enumerate() {
            let queue = &active.queue;
            device.set_vring_num(ring, queue.size()).map_err(other)?;
            device.set_vring_base(ring, queue.next_avail()).map_err(other)?;
            let addresses = VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                used_ring_addr: queue.used_ring(),
                avail_ring_addr: queue.avail_ring(),
                log_addr: None,
            };
            device.set_vring_addr(ring, &addresses).map_err(other)?;
            device.set_vring_call(ring, call).map_err(other)?;
            device.set_vring_kick(ring, &active.kick).map_err(other)?;
        }
        pair.resume()?;
        Ok(pair)
    }

    /// Has the kernel stop, and finish what it does.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn pause(&self) -> io::Result<()> {
        self.device.set_backend(0, None)?;
        self.device.set_backend(1, None)
    }

    /// Has the kernel go on, and look at both rings: it takes no notice of kicks while it is paused.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn resume(&self) -> io::Result<()> {
        for (ring, kick) in self.kicks.iter().enumerate() {
            self.device.set_backend(ring, Some(&self.tap))?;
            // Fails only when the counter is full, and then the kernel is about to look.
            let _ = kick.write(1);
        }
        Ok(())
    }
}

impl Drop for VhostPair {
    fn drop(&mut self) {
        // Stopped rings are not an error, nor is a device that forgets more than it knew.
        let _ = self.pause();
        let _ = self.device.reset_owner();
    }
}

fn regions(memory: &GuestRam) -> Vec<VhostUserMemoryRegionInfo> {
    let memory = memory.memory();
    let region = |region: &vm_memory::GuestRegionMmap| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        mmap_offset: 0,
        // Only a backend in another process maps it.
        mmap_handle: -1,
    };
    memory.iter().map(region).collect()
}

/// What is behind the crate's error, if it is the host's.
fn other(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(source) | vhost::Error::IOError(source) => source,
        other => io::Error::other(other.to_string()),
    }
}
