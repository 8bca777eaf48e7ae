//! What the host's sysfs says of a function, and whether it can be passed through.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::VfioError;
use crate::config::HostPciAddress;

const DEVICES: &str = "/sys/bus/pci/devices";
const VFIO_DRIVER: &str = "vfio-pci";
/// Base class of bridges.
const BRIDGE: u32 = 0x06;
/// Drivers that do no DMA of their own: the kernel lets them keep members of a group that is passed through
/// (`driver_managed_dma`).
const HARMLESS_DRIVERS: [&str; 3] = [VFIO_DRIVER, "pci-stub", "pcieport"];

/// A member of a group that is the host's.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Foreign {
    address: String,
    driver: String,
    bridge: bool,
}

/// A function that is bound to `vfio-pci`, as is all of its IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Its address.
    pub address: HostPciAddress,
    /// Its directory in sysfs.
    pub path: PathBuf,
    /// Its IOMMU group's number.
    pub group: u32,
    /// 24-bit class code.
    pub class: u32,
    /// Vendor and device ID.
    pub ids: (u16, u16),
}

impl HostDevice {
    /// Looks the function up and checks that it is ours to take. `field` is where it stands in `vm.json`.
    ///
    /// # Errors
    /// Says what is in the way and what to do.
    pub fn find(address: HostPciAddress, field: &str) -> Result<Self, VfioError> {
        Self::find_in(Path::new(DEVICES), address, field)
    }

    fn find_in(devices: &Path, address: HostPciAddress, field: &str) -> Result<Self, VfioError> {
        let refused = |problem: String| VfioError::Device { field: field.to_owned(), address, problem };
        let path = devices.join(address.to_string());
        if !path.exists() {
            return Err(refused("this host has no such PCI function; `lspci -D` lists them".to_owned()));
        }
        if is_silent(&path) {
            return Err(refused(
                "does not answer: its configuration space reads as ones, as of a device that is off, hung or pulled \
                 out; turn its slot off and on, or restart the host"
                    .to_owned(),
            ));
        }
        let class = number(&path.join("class")).unwrap_or(0);
        if class >> 16 == BRIDGE {
            return Err(refused(format!(
                "is a bridge (class {class:06x}), which stays the host's; pass what is behind it"
            )));
        }
        let Some(group) = link_name(&path.join("iommu_group")) else {
            return Err(refused(
                "has no IOMMU group; turn on VT-d or AMD-Vi in the firmware and boot the host with \
                 intel_iommu=on (Intel; AMD's is on by default)"
                    .to_owned(),
            ));
        };
        let bound = link_name(&path.join("driver"));
        if bound.as_deref() != Some(VFIO_DRIVER) {
            let now = bound.map_or("no driver".to_owned(), |driver| format!("the driver {driver}"));
            return Err(refused(format!(
                "is bound to {now}, not to {VFIO_DRIVER}; bind it first: echo {VFIO_DRIVER} > \
                 {DEVICES}/{address}/driver_override, unbind it there, and echo {address} > \
                 /sys/bus/pci/drivers_probe"
            )));
        }
        if resets_are_forbidden(&path) {
            return Err(refused(format!(
                "must not be reset: its reset_method is empty, and what is not reset is passed to no guest; allow it: \
                 echo default > {DEVICES}/{address}/reset_method"
            )));
        }
        let others = foreign_members(&path, address);
        if !others.is_empty() {
            let names: Vec<String> =
                others.iter().map(|it| format!("{} (driver {})", it.address, it.driver)).collect();
            return Err(refused(format!(
                "shares IOMMU group {group} with {}, which the host uses; {}",
                names.join(" and "),
                advice(&others)
            )));
        }
        let id = |name: &str| number(&path.join(name)).unwrap_or(0) as u16;
        let group = group.parse().map_err(|_| refused(format!("its IOMMU group {group:?} is no number")))?;
        Ok(Self { address, ids: (id("vendor"), id("device")), path, group, class })
    }
}

/// Whether the function itself answers with ones. The kernel would find out too, after a minute of waiting for its
/// reset. Read at the class code: the vendor ID of a virtual function is ones (PCIe 6.0 §9.3.4.1.1).
fn is_silent(path: &Path) -> bool {
    let mut class = [0; 4];
    let read = File::open(path.join("config")).and_then(|file| file.read_exact_at(&mut class, 8));
    read.is_ok() && class == [0xff; 4]
}

/// Whether somebody emptied the list of ways to reset it, "which disables the ability to reset the device" (Linux
/// Documentation/ABI/testing/sysfs-bus-pci). The kernel holds to that for the function alone; its bus it would reset.
/// One that never had a way of its own lacks the file.
fn resets_are_forbidden(path: &Path) -> bool {
    fs::read_to_string(path.join("reset_method")).is_ok_and(|methods| methods.trim().is_empty())
}

/// Members of the group that a driver of the host's has. The kernel lets those of [`HARMLESS_DRIVERS`] stay, on
/// bridges too: one with `shpchp` (a bridge to conventional PCI with hotplug) keeps the group the host's.
fn foreign_members(path: &Path, address: HostPciAddress) -> Vec<Foreign> {
    let Ok(entries) = fs::read_dir(path.join("iommu_group/devices")) else { return Vec::new() };
    let mut foreign: Vec<Foreign> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy() != address.to_string())
        .filter_map(|entry| {
            let driver = link_name(&entry.path().join("driver"))?;
            let bridge = number(&entry.path().join("class")).is_some_and(|class| class >> 16 == BRIDGE);
            let address = entry.file_name().to_string_lossy().into_owned();
            (!HARMLESS_DRIVERS.contains(&driver.as_str())).then_some(Foreign { address, driver, bridge })
        })
        .collect();
    foreign.sort();
    foreign
}

/// What to do so that the host uses none of them.
fn advice(foreign: &[Foreign]) -> String {
    let unbind = |member: &Foreign| {
        let Foreign { address, driver, .. } = member;
        format!("take the driver from the bridge: echo {address} > /sys/bus/pci/drivers/{driver}/unbind")
    };
    let mut steps: Vec<String> = foreign.iter().filter(|member| member.bridge).map(unbind).collect();
    if foreign.iter().any(|member| !member.bridge) {
        steps.push(format!("bind all other devices of the group to {VFIO_DRIVER}"));
    }
    format!("{}, or move the card to a slot of its own", steps.join(", "))
}

fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_string_lossy().into_owned())
}

fn number(path: &Path) -> Option<u32> {
    let text = fs::read_to_string(path).ok()?;
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Host(tempfile::TempDir);

    impl Host {
        fn add(&self, address: &str, class: &str, group: Option<u32>, driver: Option<&str>) {
            let path = self.0.path().join("devices").join(address);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("class"), format!("0x{class}\n")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../drivers/{driver}"), path.join("driver")).unwrap();
            }
            if let Some(group) = group {
                let members = self.0.path().join(format!("groups/{group}/devices"));
                fs::create_dir_all(&members).unwrap();
                symlink(self.0.path().join(format!("groups/{group}")), path.join("iommu_group")).unwrap();
                symlink(&path, members.join(address)).unwrap();
            }
        }

        fn find(&self, address: &str) -> Result<HostDevice, String> {
            let address = address.parse().unwrap();
            HostDevice::find_in(&self.0.path().join("devices"), address, "passthrough[0].address")
                .map_err(|error| error.to_string())
        }
    }

    #[test]
    fn a_function_is_refused_with_the_reason_and_the_way_out() {
        let host = Host(tempfile::tempdir().unwrap());
        host.add("0000:01:00.0", "030000", Some(4), Some("vfio-pci"));
        host.add("0000:02:00.0", "010802", Some(5), Some("nvme"));
        host.add("0000:03:00.0", "060400", Some(6), Some("pcieport"));
        host.add("0000:04:00.0", "020000", None, Some("e1000e"));
        host.add("0000:05:01.0", "00ff00", Some(7), Some("vfio-pci"));
        host.add("0000:05:02.0", "020000", Some(7), Some("e1000e"));
        host.add("0000:05:00.0", "060400", Some(7), Some("pcieport"));
        host.add("0000:06:00.0", "060400", Some(8), Some("shpchp"));
        host.add("0000:07:01.0", "00ff00", Some(8), Some("vfio-pci"));
        host.add("0000:08:00.0", "030000", Some(9), Some("vfio-pci"));
        let config = |address: &str| host.0.path().join("devices").join(address).join("config");
        fs::write(config("0000:08:00.0"), [0xff; 64]).unwrap();
        // A virtual function.
        let mut registers = [0; 64];
        registers[..4].fill(0xff);
        fs::write(config("0000:01:00.0"), registers).unwrap();
        host.add("0000:0a:00.0", "030000", Some(10), Some("vfio-pci"));
        let methods = |address: &str| host.0.path().join("devices").join(address).join("reset_method");
        fs::write(methods("0000:0a:00.0"), "\n").unwrap();
        fs::write(methods("0000:01:00.0"), "flr bus\n").unwrap();
        let found = host.find("0000:01:00.0").unwrap();
        assert_eq!((found.group, found.class), (4, 0x03_00_00));
        for (address, words) in [
            ("0000:09:00.0", "passthrough[0].address: 0000:09:00.0: this host has no such PCI function"),
            ("0000:02:00.0", "is bound to the driver nvme, not to vfio-pci; bind it first"),
            ("0000:03:00.0", "is a bridge (class 060400)"),
            ("0000:04:00.0", "has no IOMMU group; turn on VT-d or AMD-Vi"),
            ("0000:08:00.0", "does not answer: its configuration space reads as ones"),
            (
                "0000:0a:00.0",
                "must not be reset: its reset_method is empty, and what is not reset is passed to no guest; allow it: \
                 echo default > /sys/bus/pci/devices/0000:0a:00.0/reset_method",
            ),
            (
                "0000:05:01.0",
                "shares IOMMU group 7 with 0000:05:02.0 (driver e1000e), which the host uses; bind all other",
            ),
            (
                "0000:07:01.0",
                "shares IOMMU group 8 with 0000:06:00.0 (driver shpchp), which the host uses; take the driver from \
                 the bridge: echo 0000:06:00.0 > /sys/bus/pci/drivers/shpchp/unbind, or move",
            ),
        ] {
            let message = host.find(address).unwrap_err();
            assert!(message.contains(words), "{message}");
            assert!(!message.contains('\n'));
        }
    }
}
