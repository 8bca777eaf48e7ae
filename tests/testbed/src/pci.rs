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
    /// QEMU's name for it, by which it can be unplugged; numbered by kind where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
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
    /// `pcie-root-port`; one child, or the functions of one device.
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
        /// How many virtual functions it can have, each with two pairs of queues and their interrupts;
        /// `device-test nvme-sriov` makes them. The disk is then a namespace that all functions share.
        #[serde(default)]
        virtual_functions: u8,
    },
    /// Intel 82574L network card, connected to nothing unless `properties` has a `netdev`.
    E1000e,
    /// QEMU's educational device: DMA engine, INTx and MSI. Its engine takes 48-bit addresses here; 28 bits,
    /// as of old, with the property `dma_mask`.
    Edu,
    /// Shared memory as a large 64-bit prefetchable BAR. It takes memory of this machine as it is touched.
    IvshmemPlain {
        /// BAR size in MiB; a power of two.
        size_mib: u32,
    },
    /// A display controller with VRAM: 16 MiB, or the property `vgamem`. Without an expansion ROM, with
    /// which the firmware would write to its memory.
    BochsDisplay,
    /// Any other of QEMU's devices, by its name there.
    Other {
        /// QEMU's name.
        device: String,
    },
}

impl From<DeviceKind> for Device {
    fn from(kind: DeviceKind) -> Self {
        Self { kind, id: None, properties: BTreeMap::new(), devices: Vec::new() }
    }
}

impl Device {
    /// A root port with one device in it.
    #[must_use]
    pub fn root_port(device: Self) -> Self {
        Self { devices: vec![device], ..DeviceKind::RootPort.into() }
    }

    /// A root port with one device of several functions in it.
    #[must_use]
    pub fn functions(functions: impl IntoIterator<Item = Self>) -> Self {
        let numbered = (0..).zip(functions).map(|(number, function)| {
            let function = function.property("addr", format!("0x0.{number:x}"));
            // Function 0 says for the whole device that there are more.
            if number == 0 { function.property("multifunction", "on") } else { function }
        });
        Self { devices: numbered.collect(), ..DeviceKind::RootPort.into() }
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
        DeviceKind::Nvme { drive: drive.into(), serial: serial.into(), virtual_functions: 0 }.into()
    }

    /// An NVMe disk that can have virtual functions.
    #[must_use]
    pub fn nvme_sriov(drive: impl Into<PathBuf>, serial: impl Into<String>, virtual_functions: u8) -> Self {
        DeviceKind::Nvme { drive: drive.into(), serial: serial.into(), virtual_functions }.into()
    }

    /// A device by QEMU's name.
    #[must_use]
    pub fn other(device: impl Into<String>) -> Self {
        DeviceKind::Other { device: device.into() }.into()
    }

    /// Names it.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
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
        texts.extend(self.id.clone());
        match &self.kind {
            DeviceKind::Nvme { drive, serial, .. } => {
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

    fn id(&mut self, device: &Device, prefix: &'static str) -> String {
        if let Some(id) = &device.id {
            return id.clone();
        }
        let count = self.counts.entry(prefix).or_default();
        *count += 1;
        format!("{prefix}{count}")
    }

    fn option(&mut self, name: &str, value: String) {
        self.arguments.push(name.into());
        self.arguments.push(value);
    }

    /// `-device NAME,id=..,bus=..` and its properties: the device's own win over those given here.
    fn device(&mut self, device: &Device, name: &str, id: &str, bus: &str, more: &[(&str, String)]) {
        let mut value = format!("{name},id={id},bus={bus}");
        let own = |property: &str| device.properties.contains_key(property);
        for (property, setting) in more.iter().filter(|(property, _)| !own(property)) {
            value.push_str(&format!(",{property}={setting}"));
        }
        for (property, setting) in &device.properties {
            value.push_str(&format!(",{property}={setting}"));
        }
        self.option("-device", value);
    }

    fn port(&mut self) -> [(&'static str, String); 2] {
        self.chassis = self.chassis.wrapping_add(1);
        let number = self.chassis.to_string();
        [("chassis", number.clone()), ("slot", number)]
    }

    fn lower(&mut self, device: &Device, bus: &str) {
        match &device.kind {
            DeviceKind::RootPort => {
                let (id, port) = (self.id(device, "rp"), self.port());
                self.device(device, "pcie-root-port", &id, bus, &port);
                self.children(device, &id);
            }
            DeviceKind::Switch => {
                let upstream = self.id(device, "up");
                self.device(device, "x3130-upstream", &upstream, bus, &[]);
                for child in &device.devices {
                    // A port has no description of its own.
                    let downstream = Device::other("xio3130-downstream");
                    let (id, port) = (self.id(&downstream, "down"), self.port());
                    self.device(&downstream, "xio3130-downstream", &id, &upstream, &port);
                    self.lower(child, &id);
                }
            }
            DeviceKind::PciBridge => {
                let id = self.id(device, "pci");
                self.device(device, "pcie-pci-bridge", &id, bus, &[]);
                // The bridge's own slot 0 belongs to its hotplug controller; conventional buses are
                // numbered explicitly because QEMU's own choice depends on the order of options.
                for (slot, child) in (1..).zip(&device.devices) {
                    let child = child.clone().property("addr", format!("{slot:#x}"));
                    self.lower(&child, &id);
                }
            }
            DeviceKind::ExpanderBridge { bus_number, numa_node } => {
                let id = self.id(device, "pxb");
                let mut more = vec![("bus_nr", bus_number.to_string())];
                more.extend(numa_node.map(|node| ("numa_node", node.to_string())));
                self.device(device, "pxb-pcie", &id, bus, &more);
                self.children(device, &id);
            }
            DeviceKind::Nvme { drive, serial, virtual_functions } => {
                self.nvme(device, bus, &drive.display().to_string(), serial, *virtual_functions);
            }
            DeviceKind::IvshmemPlain { size_mib } => {
                let id = self.id(device, "ivshmem");
                // Not reserved: a BAR may be larger than this machine's memory.
                let memory = format!("memory-backend-ram,id={id}-mem,share=on,reserve=off,size={size_mib}M");
                self.option("-object", memory);
                self.device(device, "ivshmem-plain", &id, bus, &[("memdev", format!("{id}-mem"))]);
            }
            DeviceKind::E1000e => self.plain(device, "e1000e", bus, &[]),
            DeviceKind::Edu => {
                let mask = u64::MAX >> 16;
                self.plain(device, "edu", bus, &[("dma_mask", mask.to_string())]);
            }
            DeviceKind::BochsDisplay => {
                self.plain(device, "bochs-display", bus, &[("romfile", String::new())]);
            }
            DeviceKind::Other { device: name } => self.plain(device, name, bus, &[]),
        }
    }

    fn children(&mut self, device: &Device, bus: &str) {
        for child in &device.devices {
            self.lower(child, bus);
        }
    }

    fn nvme(&mut self, device: &Device, bus: &str, drive: &str, serial: &str, functions: u8) {
        let id = self.id(device, "nvme");
        self.option("-drive", format!("file={drive},if=none,id={id}-drive,format=raw,cache=unsafe"));
        let serial = ("serial", serial.to_owned());
        if functions == 0 {
            self.device(device, "nvme", &id, bus, &[("drive", format!("{id}-drive")), serial]);
            return;
        }
        // Resources are counted over all functions. Three pairs of queues, one of them for administration, and
        // as many interrupts are for each virtual one; five stay with the physical one.
        let flexible = 3 * u32::from(functions);
        let more = [
            ("subsys", format!("{id}-subsystem")),
            serial,
            ("sriov_max_vfs", functions.to_string()),
            ("sriov_vq_flexible", flexible.to_string()),
            ("sriov_vi_flexible", flexible.to_string()),
            // Without the pair for administration.
            ("max_ioqpairs", (flexible + 4).to_string()),
            ("msix_qsize", (flexible + 5).to_string()),
        ];
        self.option("-device", format!("nvme-subsys,id={id}-subsystem"));
        self.device(device, "nvme", &id, bus, &more);
        self.option("-device", format!("nvme-ns,bus={id},drive={id}-drive,nsid=1,shared=on"));
    }

    fn plain(&mut self, device: &Device, name: &str, bus: &str, more: &[(&str, String)]) {
        let id = self.id(device, "dev");
        self.device(device, name, &id, bus, more);
    }
}
