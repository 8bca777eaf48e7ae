//! Feature bits of the device, and what they mean for the tap behind it.

use virtio_bindings::virtio_net::*;

/// `VIRTIO_NET_F_*` bits as a mask.
const fn bits(list: &[u32]) -> u64 {
    let mut mask = 0;
    let mut at = 0;
    while at < list.len() {
        mask |= 1 << list[at];
        at += 1;
    }
    mask
}

/// What a tap can do in any kernel that has VFIO. Checksums and segmentation of what the guest sends
/// are the host's, and the guest may get frames that are not finished either.
const ALWAYS: u64 = bits(&[
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
]);

/// UDP segmentation, since Linux 6.2.
const USO: u64 = bits(&[VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]);

/// The offloads that [`USO`] stands for, to find out whether the kernel has them.
pub const USO_OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// What a device offers.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// It announces an MTU.
    pub mtu: bool,
    /// It has more than one pair of queues, hence a control queue.
    pub multi_queue: bool,
    /// The tap segments UDP.
    pub uso: bool,
}

impl Offer {
    /// As feature bits, those of the rings apart.
    pub fn features(self) -> u64 {
        let optional = |wanted: bool, mask: u64| if wanted { mask } else { 0 };
        ALWAYS
            | optional(self.mtu, bits(&[VIRTIO_NET_F_MTU]))
            | optional(self.multi_queue, bits(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]))
            | optional(self.uso, USO)
    }
}

/// Whether `features` has the bit numbered `bit`.
pub fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// What the tap may leave to the guest (`TUN_F_*`). A driver that took a feature without those it
/// depends on (virtio 1.2 §5.1.3.1) does not get what it took, as the kernel would refuse the lot.
pub fn offloads(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    let mut add = |wanted: bool, bit: u32| {
        if wanted {
            offloads |= bit;
        }
    };
    let (tso4, tso6) = (has(features, VIRTIO_NET_F_GUEST_TSO4), has(features, VIRTIO_NET_F_GUEST_TSO6));
    add(tso4, libc::TUN_F_TSO4);
    add(tso6, libc::TUN_F_TSO6);
    add((tso4 || tso6) && has(features, VIRTIO_NET_F_GUEST_ECN), libc::TUN_F_TSO_ECN);
    add(has(features, VIRTIO_NET_F_GUEST_UFO), libc::TUN_F_UFO);
    // The kernel knows the two together only.
    let uso = has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6);
    add(uso, libc::TUN_F_USO4 | libc::TUN_F_USO6);
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_what_was_negotiated_with_what_it_needs() {
        let all = Offer { mtu: true, multi_queue: true, uso: true }.features();
        let every =
            USO_OFFLOADS | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN | libc::TUN_F_UFO;
        assert_eq!(offloads(all), every);
        assert_eq!(offloads(all & !bits(&[VIRTIO_NET_F_GUEST_CSUM])), 0);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN])), libc::TUN_F_CSUM);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4])), libc::TUN_F_CSUM);
    }
}
