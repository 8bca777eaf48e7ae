//! Hosts made of files, for tests of what is read from sysfs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A host whose files lie in a temporary directory.
pub(crate) struct FakeHost(tempfile::TempDir);

impl FakeHost {
    /// A host with an IOMMU that has no devices yet.
    pub(crate) fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.file("sys/bus/pci/drivers/vfio-pci/bind", "")
            .file("dev/vfio/vfio", "")
            .file(
                "proc/cpuinfo",
                "vendor_id\t: GenuineIntel\naddress sizes\t: 46 bits physical, 48 bits virtual\n",
            )
            .file("proc/interrupts", " 24:   0   IR-PCI-MSI-0000:00:1c.0   0-edge   pciehp\n")
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    pub(crate) fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.path(path), content).unwrap();
        self
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        symlink(target, self.path(path)).unwrap();
        self
    }

    pub(crate) fn without(self, path: &str) -> Self {
        let path = self.path(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap()
        } else {
            fs::remove_file(path).unwrap()
        };
        self
    }

    /// A function at a place in the tree, such as `0000:00:01.0/0000:01:00.0`.
    pub(crate) fn function(self, place: &str, class: u32) -> Self {
        let address = place.rsplit('/').next().unwrap();
        let home = format!("sys/devices/pci0000:00/{place}");
        self.file(&format!("{home}/class"), format!("{class:#08x}\n"))
            .link(&format!("sys/bus/pci/devices/{address}"), &format!("../../../devices/pci0000:00/{place}"))
    }

    /// A file of a function.
    pub(crate) fn file_of(self, address: &str, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.file(&format!("sys/bus/pci/devices/{address}/{name}"), content)
    }

    pub(crate) fn bound(self, address: &str, driver: &str) -> Self {
        self.link(&format!("sys/bus/pci/devices/{address}/driver"), &format!("../../drivers/{driver}"))
    }

    pub(crate) fn group(self, number: u32, addresses: &[&str]) -> Self {
        addresses.iter().fold(self, |host, address| {
            host.link(
                &format!("sys/bus/pci/devices/{address}/iommu_group"),
                &format!("../../kernel/iommu_groups/{number}"),
            )
            .file(&format!("sys/kernel/iommu_groups/{number}/devices/{address}"), "")
        })
    }
}

/// An accelerator below a switch, and a display controller with its sound function on the root complex.
pub(crate) fn two_gpus() -> FakeHost {
    let gpu = "0000:03:00.0";
    let card = "0000:00:05.0";
    FakeHost::new()
        .function("0000:00:01.0", 0x06_04_00)
        .function("0000:00:01.0/0000:01:00.0", 0x06_04_00)
        .function("0000:00:01.0/0000:01:00.0/0000:02:04.0", 0x06_04_00)
        .function("0000:00:01.0/0000:01:00.0/0000:02:04.0/0000:03:00.0", 0x03_02_00)
        .function(card, 0x03_00_00)
        .function("0000:00:05.1", 0x04_03_00)
        .file_of(gpu, "vendor", "0x10de\n")
        .file_of(gpu, "device", "0x2330\n")
        .file_of(gpu, "numa_node", "1\n")
        .file_of(gpu, "reset_method", "flr bus\n")
        .file_of(gpu, "current_link_speed", "2.5 GT/s PCIe\n")
        .file_of(gpu, "current_link_width", "16\n")
        .file_of(gpu, "max_link_speed", "32.0 GT/s PCIe\n")
        .file_of(gpu, "max_link_width", "16\n")
        .file_of(
            gpu,
            "resource",
            "0x0000218042000000 0x0000218042ffffff 0x000000000014220c\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x0000200000000000 0x0000201fffffffff 0x000000000014220c\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x0000000092000000 0x0000000092ffffff 0x0000000000040200\n\
             0x0000000000002000 0x000000000000207f 0x0000000000040101\n\
             0x0000000092000000 0x000000009207ffff 0x000000000004e200\n",
        )
        .bound(gpu, "nvidia")
        .group(12, &[gpu])
        .file_of(card, "vendor", "0x1002\n")
        .file_of(card, "device", "0x73bf\n")
        .file_of(card, "numa_node", "-1\n")
        .file_of(card, "reset_method", "bus\n")
        .file_of(card, "max_link_speed", "Unknown\n")
        .file_of(card, "resource", "0x00000000d0000000 0x00000000dfffffff 0x0000000000042208\n")
        .bound(card, "vfio-pci")
        .bound("0000:00:05.1", "snd_hda_intel")
        .group(3, &[card, "0000:00:05.1"])
}
