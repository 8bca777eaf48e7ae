//! PCI devices of an emulated host and where they sit: a tree of bridges with endpoints at its
//! leaves, turned into QEMU's flat list of `-device` options.
//!
//! IOMMU groups follow from the tree: a device under its own [root port](DeviceKind::RootPort) has a
//! group of its own; one under a [switch](DeviceKind::Switch), which lacks ACS, shares it with its
//! downstream port; all devices under one [PCI bridge](DeviceKind::PciBridge) share one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A device and, below a bridge, its children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// What it is.
    #[serde(flatten)]
    pub kind: DeviceKind,
    /// More of QEMU's properties for it, such as `addr` or `romfile`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// What sits below it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
}

/// The devices that QEMU emulates and tests have a use for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum DeviceKind {
    /// `pcie-root-port`; one child.
    RootPort,
    /// `x3130-upstream` with an `xio3130-downstream` port for each child.
    Switch,
    /// `pcie-pci-bridge`: children sit on one conventional PCI bus.
    PciBridge,
    /// `pxb-pcie`: another host bridge, on a NUMA node. Children are root ports.
    ExpanderBridge {
        /// Number of its first bus; below 256, and with room for the buses behind it.
        bus_number: u8,
        /// Its NUMA node.
        numa_node: Option<u32>,
    },
    /// A disk.
    Nvme {
        /// Raw image on this machine.
        drive: PathBuf,
        /// Serial number.
        serial: String,
    },
    /// Intel 82574L network card, connected to nothing unless `properties` has a `netdev`.
    E1000e,
    /// QEMU's educational device: DMA engine, INTx and MSI.
    Edu,
    /// Shared memory as a large 64-bit prefetchable BAR.
    IvshmemPlain {
        /// BAR size in MiB; a power of two.
        size_mib: u32,
    },
    /// A display controller with VRAM.
    BochsDisplay,
    /// Any other of QEMU's devices, by its name there.
    Other {
        /// QEMU's name.
        device: String,
    },
}

impl From<DeviceKind> for Device {
    fn from(kind: DeviceKind) -> Self {
        Self { kind, properties: BTreeMap::new(), devices: Vec::new() }
    }
}

impl Device {
    /// A root port with one device in it.
    #[must_use]
    pub fn root_port(device: Self) -> Self {
        Self { devices: vec![device], ..DeviceKind::RootPort.into() }
    }

    /// A switch with a device at each downstream port. It has to sit below a root port.
    #[must_use]
    pub fn switch(devices: impl IntoIterator<Item = Self>) -> Self {
        Self { devices: devices.into_iter().collect(), ..DeviceKind::Switch.into() }
    }

    /// A bridge to a conventional PCI bus.
    #[must_use]
    pub fn pci_bridge(devices: impl IntoIterator<Item = Self>) -> Self {
        Self { devices: devices.into_iter().collect(), ..DeviceKind::PciBridge.into() }
    }

    /// Another host bridge, with root ports below.
    #[must_use]
    pub fn expander_bridge(
        bus_number: u8,
        numa_node: Option<u32>,
        ports: impl IntoIterator<Item = Self>,
    ) -> Self {
        Self {
            devices: ports.into_iter().collect(),
            ..DeviceKind::ExpanderBridge { bus_number, numa_node }.into()
        }
    }

    /// An NVMe disk backed by a raw image.
    #[must_use]
    pub fn nvme(drive: impl Into<PathBuf>, serial: impl Into<String>) -> Self {
        DeviceKind::Nvme { drive: drive.into(), serial: serial.into() }.into()
    }

    /// A device by QEMU's name.
    #[must_use]
    pub fn other(device: impl Into<String>) -> Self {
        DeviceKind::Other { device: device.into() }.into()
    }

    /// Sets one of QEMU's properties.
    #[must_use]
    pub fn property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.insert(name.into(), value.into());
        self
    }

    /// The first text in the tree that would break out of its option, if there is one.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut texts: Vec<String> =
            self.properties.iter().flat_map(|(n, v)| [n.clone(), v.clone()]).collect();
        match &self.kind {
            DeviceKind::Nvme { drive, serial } => {
                texts.push(drive.display().to_string());
                texts.push(serial.clone());
            }
            DeviceKind::Other { device } => texts.push(device.clone()),
            _ => {}
        }
        if let Some(bad) = texts.into_iter().find(|t| t.contains([',', '\n', '\0'])) {
            return Err(bad);
        }
        self.devices.iter().try_for_each(Self::check)
    }
}

/// Turns trees into options, numbering ports as it goes.
#[derive(Default)]
pub(crate) struct Lowering {
    arguments: Vec<String>,
    /// Identifiers given so far, by prefix.
    counts: BTreeMap<&'static str, u32>,
    /// Chassis numbers have to differ between ports.
    chassis: u8,
}

impl Lowering {
    /// QEMU's arguments for the host's devices.
    pub(crate) fn arguments(devices: &[Device]) -> Vec<String> {
        let mut lowering = Self::default();
        for device in devices {
            lowering.lower(device, "pcie.0");
        }
        lowering.arguments
    }

    fn id(&mut self, prefix: &'static str) -> String {
        let count = self.counts.entry(prefix).or_default();
        *count += 1;
        format!("{prefix}{count}")
    }

    fn option(&mut self, name: &str, value: String) {
        self.arguments.push(name.into());
        self.arguments.push(value);
    }

    /// `-device NAME,id=..,bus=..` and the properties.
    fn device(&mut self, device: &Device, name: &str, id: &str, bus: &str, more: &str) {
        let mut value = format!("{name},id={id},bus={bus}{more}");
        for (property, setting) in &device.properties {
            value.push_str(&format!(",{property}={setting}"));
        }
        self.option("-device", value);
    }

    fn port(&mut self) -> String {
        self.chassis = self.chassis.wrapping_add(1);
        format!(",chassis={},slot={}", self.chassis, self.chassis)
    }

    fn lower(&mut self, device: &Device, bus: &str) {
        match &device.kind {
            DeviceKind::RootPort => {
                let (id, port) = (self.id("rp"), self.port());
                self.device(device, "pcie-root-port", &id, bus, &port);
                self.children(device, &id);
            }
            DeviceKind::Switch => {
                let upstream = self.id("up");
                self.device(device, "x3130-upstream", &upstream, bus, "");
                for child in &device.devices {
                    let (id, port) = (self.id("down"), self.port());
                    self.option("-device", format!("xio3130-downstream,id={id},bus={upstream}{port}"));
                    self.lower(child, &id);
                }
            }
            DeviceKind::PciBridge => {
                let id = self.id("pci");
                self.device(device, "pcie-pci-bridge", &id, bus, "");
                // The bridge's own slot 0 belongs to its hotplug controller; conventional buses are
                // numbered explicitly because QEMU's own choice depends on the order of options.
                for (slot, child) in (1..).zip(&device.devices) {
                    let child = child.clone().property("addr", format!("{slot:#x}"));
                    self.lower(&child, &id);
                }
            }
            DeviceKind::ExpanderBridge { bus_number, numa_node } => {
                let id = self.id("pxb");
                let node = numa_node.map_or_else(String::new, |node| format!(",numa_node={node}"));
                self.device(device, "pxb-pcie", &id, bus, &format!(",bus_nr={bus_number}{node}"));
                self.children(device, &id);
            }
            endpoint => self.endpoint(device, endpoint, bus),
        }
    }

    fn children(&mut self, device: &Device, bus: &str) {
        for child in &device.devices {
            self.lower(child, bus);
        }
    }

    fn endpoint(&mut self, device: &Device, kind: &DeviceKind, bus: &str) {
        match kind {
            DeviceKind::Nvme { drive, serial } => {
                let id = self.id("nvme");
                let drive = drive.display();
                self.option("-drive", format!("file={drive},if=none,id={id}-drive,format=raw,cache=unsafe"));
                self.device(device, "nvme", &id, bus, &format!(",drive={id}-drive,serial={serial}"));
            }
            DeviceKind::IvshmemPlain { size_mib } => {
                let id = self.id("ivshmem");
                self.option("-object", format!("memory-backend-ram,id={id}-mem,share=on,size={size_mib}M"));
                self.device(device, "ivshmem-plain", &id, bus, &format!(",memdev={id}-mem"));
            }
            DeviceKind::E1000e => self.plain(device, "e1000e", bus),
            DeviceKind::Edu => self.plain(device, "edu", bus),
            DeviceKind::BochsDisplay => self.plain(device, "bochs-display", bus),
            DeviceKind::Other { device: name } => self.plain(device, name, bus),
            // Bridges are lowered with their children.
            DeviceKind::RootPort
            | DeviceKind::Switch
            | DeviceKind::PciBridge
            | DeviceKind::ExpanderBridge { .. } => {}
        }
    }

    fn plain(&mut self, device: &Device, name: &str, bus: &str) {
        let id = self.id("dev");
        self.device(device, name, &id, bus, "");
    }
}
