//! Where the structures of virtio 1.2 §4.1.4 lie in the BAR. Each has a page of its own, so
//! that each can be mapped, trapped or handed on alone.

/// The BAR that holds everything.
pub const BAR: u8 = 0;
/// Its size in bytes.
pub const BAR_SIZE: u64 = 0x8000;

/// Common configuration (§4.1.4.3).
pub const COMMON: u64 = 0x0000;
/// Its length, to the end of `queue_device`: the fields after it belong to features not offered.
pub const COMMON_SIZE: u64 = 0x38;
/// ISR status (§4.1.4.5).
pub const ISR: u64 = 0x1000;
/// Device-specific configuration (§4.1.4.6).
pub const DEVICE: u64 = 0x2000;
/// Notification addresses (§4.1.4.4).
pub const NOTIFY: u64 = 0x3000;
/// Bytes between the notification addresses of two queues: each has an ioeventfd of its own.
pub const NOTIFY_MULTIPLIER: u64 = 4;
/// MSI-X table.
pub const MSIX_TABLE: u64 = 0x4000;
/// MSI-X pending bits.
pub const MSIX_PENDING: u64 = 0x5000;
/// The unit in which the BAR is divided.
pub const PAGE: u64 = 0x1000;

/// Queues that the notification page and the MSI-X table have room for.
pub const MAX_QUEUES: usize = 255;

/// Capability types (§4.1.4): `cfg_type` of `struct virtio_pci_cap`.
pub const CAP_COMMON: u8 = 1;
/// Notifications.
pub const CAP_NOTIFY: u8 = 2;
/// ISR status.
pub const CAP_ISR: u8 = 3;
/// Device-specific configuration.
pub const CAP_DEVICE: u8 = 4;
/// Access to the BAR through configuration space.
pub const CAP_PCI: u8 = 5;

/// The body of a `struct virtio_pci_cap` (§4.1.4), without the two bytes every capability begins
/// with; `extra` is what follows it (a multiplier, a data window).
pub fn capability(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    const HEADER: u8 = 16;
    let mut body = vec![HEADER + extra.len() as u8, kind, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body.extend_from_slice(extra);
    body
}
