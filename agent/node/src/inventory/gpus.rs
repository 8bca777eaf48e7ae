//! GPUs, from sysfs. What NVIDIA's driver adds is merged by [`super::nvml`], what stands in the way
//! is found by [`super::preflight`], and who has one is the agent's own knowledge.

use lathe_api::HostPciAddress;
use lathe_api::gpu::{Bar, BarKind, Gpu, GpuHealth, GpuState, GroupMember, PcieLink};

use super::HostFiles;
use crate::pci::{self, Resource, VFIO_PCI};

/// Every GPU of the host, and those of `named` that are there, by address.
pub(super) fn read(host: &HostFiles<'_>, named: &[HostPciAddress]) -> Vec<Gpu> {
    let addresses = host.names("sys/bus/pci/devices").into_iter().filter_map(|name| name.parse().ok());
    let functions = addresses.map(|address| Function { host, address });
    functions.filter(|it| it.is_gpu() || named.contains(&it.address)).map(|it| it.gpu()).collect()
}

/// A PCI function's files.
#[derive(Clone, Copy)]
pub(super) struct Function<'a> {
    pub(super) host: &'a HostFiles<'a>,
    pub(super) address: HostPciAddress,
}

impl Function<'_> {
    /// The path of one of its files.
    pub(super) fn file(&self, name: &str) -> String {
        format!("sys/bus/pci/devices/{}/{name}", self.address)
    }

    pub(super) fn exists(&self) -> bool {
        self.host.path(self.file("")).exists()
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.host.text(self.file(name))
    }

    pub(super) fn id(&self, name: &str) -> u16 {
        u16::try_from(self.host.hex(self.file(name))).unwrap_or(0)
    }

    pub(super) fn class(&self) -> u32 {
        pci::class(&self.text("class"))
    }

    pub(super) fn driver(&self) -> Option<String> {
        self.host.link_name(self.file("driver"))
    }

    pub(super) fn iommu_group(&self) -> Option<u32> {
        self.host.link_name(self.file("iommu_group"))?.parse().ok()
    }

    pub(super) fn is_gpu(&self) -> bool {
        pci::is_gpu(self.class())
    }

    pub(super) fn is_bridge(&self) -> bool {
        self.class() >> 16 == 0x06
    }

    fn gpu(&self) -> Gpu {
        let (vendor, device) = (self.id("vendor"), self.id("device"));
        let bars: Vec<_> = self.resources().iter().map(bar).collect();
        let driver = self.driver();
        Gpu {
            address: self.address,
            vendor,
            device,
            class: self.class(),
            model: format!("{vendor:04x}:{device:04x}"),
            memory_bytes: video_memory(&bars),
            bars,
            numa_node: self.host.number(self.file("numa_node")),
            iommu_group: self.iommu_group(),
            group_members: self.group_members(),
            host_driver: driver.clone().filter(|driver| driver != VFIO_PCI),
            driver,
            link: self.link(),
            reset_methods: self.reset_methods(),
            path: self.bridges(),
            state: GpuState::Free,
            reason: None,
            task: None,
            health: GpuHealth::Healthy,
            nvml: None,
            problems: Vec::new(),
        }
    }

    /// Its BARs.
    pub(super) fn resources(&self) -> Vec<Resource> {
        pci::resources(&self.text("resource")).collect()
    }

    /// The other endpoints of its IOMMU group.
    pub(super) fn group_members(&self) -> Vec<GroupMember> {
        let others = self.group().into_iter().map(|address| Function { address, ..*self });
        let endpoints = others.filter(|other| !other.is_bridge());
        let members = endpoints.map(|other| GroupMember {
            address: other.address,
            class: other.class(),
            driver: other.driver(),
        });
        members.collect()
    }

    /// All other functions of its IOMMU group.
    pub(super) fn group(&self) -> Vec<HostPciAddress> {
        let Some(group) = self.iommu_group() else { return Vec::new() };
        let names = self.host.names(format!("sys/kernel/iommu_groups/{group}/devices")).into_iter();
        names.filter_map(|name| name.parse().ok()).filter(|address| *address != self.address).collect()
    }

    /// The bridges above it.
    pub(super) fn bridges(&self) -> Vec<HostPciAddress> {
        pci::bridges_above(&self.host.path(self.file("")), self.address)
    }

    pub(super) fn reset_methods(&self) -> Vec<String> {
        self.text("reset_method").split_whitespace().map(str::to_owned).collect()
    }

    fn link(&self) -> Option<PcieLink> {
        Some(PcieLink {
            max_speed_mts: megatransfers(&self.text("max_link_speed"))?,
            max_width: self.host.number(self.file("max_link_width"))?,
            speed_mts: megatransfers(&self.text("current_link_speed")),
            width: self.host.number(self.file("current_link_width"))?,
        })
    }
}

fn bar(resource: &Resource) -> Bar {
    let kind = match (resource.is_io(), resource.is_wide()) {
        (true, _) => BarKind::Io,
        (false, true) => BarKind::Memory64,
        (false, false) => BarKind::Memory32,
    };
    let Resource { index, size_bytes, .. } = *resource;
    Bar { index, size_bytes, kind, prefetchable: resource.is_prefetchable() }
}

/// `32.0 GT/s PCIe` in megatransfers a second; none for `Unknown`.
fn megatransfers(text: &str) -> Option<u32> {
    let number = text.split_once(" GT/s")?.0;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let tenths = whole.parse::<u32>().ok()?.checked_mul(10)?.checked_add(tenth.get(..1)?.parse().ok()?)?;
    tenths.checked_mul(100)
}

/// Memory that a GPU without a driver is taken to have. With resizable BARs this is all of it.
fn video_memory(bars: &[Bar]) -> u64 {
    let memory = bars.iter().filter(|bar| bar.prefetchable && bar.kind != BarKind::Io);
    memory.map(|bar| bar.size_bytes).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::fake::{FakeHost, two_gpus};

    #[test]
    fn gpus_are_read_from_sysfs() {
        let host = two_gpus();
        let gpus = read(&HostFiles(host.root()), &[]);
        insta::assert_snapshot!(serde_json::to_string_pretty(&gpus).unwrap());
    }

    #[test]
    fn speeds_are_read_as_any_kernel_prints_them() {
        for (text, speed) in
            [("2.5 GT/s PCIe", Some(2500)), ("8 GT/s", Some(8000)), ("64.0 GT/s PCIe", Some(64000))]
        {
            assert_eq!(megatransfers(text), speed);
        }
        for text in ["Unknown", "", " GT/s", "9999999999 GT/s", "1. GT/s", "4294967295.9 GT/s"] {
            assert_eq!(megatransfers(text), None, "{text}");
        }
    }

    #[test]
    fn nonsense_in_resources_is_left_out() {
        for line in ["0x2 0x1 0x200", "0x0 0xffffffffffffffff 0x200", "a b c", "", "0x0 0xfff 0x0"] {
            let host = FakeHost::new().function("0000:01:00.0", 0x03_00_00).file_of(
                "0000:01:00.0",
                "resource",
                line,
            );
            let files = HostFiles(host.root());
            let function = Function { host: &files, address: "0000:01:00.0".parse().unwrap() };
            assert!(function.resources().is_empty(), "{line}");
        }
    }
}
