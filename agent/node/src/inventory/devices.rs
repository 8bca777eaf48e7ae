//! Disks, network interfaces and PCI functions, from sysfs.

use lathe_api::node::{Disk, Nic, PciDevice};

use super::HostFiles;

/// sysfs counts a disk's size in these, whatever its blocks are.
const SECTOR: u64 = 512;

/// Block devices that are hardware or stand for it: not loop devices, RAM disks, and the like.
pub(super) fn disks(host: &HostFiles<'_>) -> Vec<Disk> {
    let software = ["loop", "ram", "zram", "dm-", "md", "nbd", "sr", "fd"];
    let names = host.names("sys/block").into_iter();
    let disks = names.filter(|name| !software.iter().any(|prefix| name.starts_with(prefix))).map(|name| {
        let base = format!("sys/block/{name}");
        Disk {
            size_bytes: host.number::<u64>(format!("{base}/size")).unwrap_or(0).saturating_mul(SECTOR),
            model: host.text(format!("{base}/device/model")),
            rotational: host.text(format!("{base}/queue/rotational")) == "1",
            name,
        }
    });
    disks.collect()
}

/// Interfaces with a device behind them; bridges, taps and veths are the agent's own affair.
pub(super) fn nics(host: &HostFiles<'_>) -> Vec<Nic> {
    let names = host.names("sys/class/net").into_iter();
    let physical = names.filter(|name| host.path(format!("sys/class/net/{name}/device")).exists());
    let nics = physical.map(|name| {
        let base = format!("sys/class/net/{name}");
        Nic {
            mac: host.text(format!("{base}/address")),
            // -1 where the driver does not know or the link is down.
            speed_mbps: host.number(format!("{base}/speed")),
            driver: host.link_name(format!("{base}/device/driver")).unwrap_or_default(),
            name,
        }
    });
    nics.collect()
}

/// Every PCI function.
pub(super) fn pci(host: &HostFiles<'_>) -> Vec<PciDevice> {
    let addresses = host.names("sys/bus/pci/devices").into_iter();
    let devices = addresses.map(|address| {
        let base = format!("sys/bus/pci/devices/{address}");
        let id = |file: &str| host.hex(format!("{base}/{file}"));
        PciDevice {
            vendor: u16::try_from(id("vendor")).unwrap_or(0),
            device: u16::try_from(id("device")).unwrap_or(0),
            class: id("class") & 0x00ff_ffff,
            driver: host.link_name(format!("{base}/driver")),
            iommu_group: host.link_name(format!("{base}/iommu_group")).and_then(|group| group.parse().ok()),
            numa_node: host.number(format!("{base}/numa_node")),
            address,
        }
    });
    devices.collect()
}
