//! PCI devices as sysfs shows them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::options::Options;

/// Where every function has a link.
const DEVICES: &str = "/sys/bus/pci/devices";

/// How long the kernel may take to find a device and start its driver; emulated ones are slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The base class of bridges (PCI Code and ID Assignment Specification 1.1 §1.7).
const BRIDGE: u32 = 0x06;

/// Red Hat's virtio: what the VMM itself emulates.
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Red Hat's ivshmem has virtio's vendor and is none.
const IVSHMEM: (u16, u16) = (VIRTIO_VENDOR, 0x1110);
/// pvpanic, another of the VMM's own.
const PVPANIC: (u16, u16) = (0x1b36, 0x0011);

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `0000:01:00.0`.
    pub address: String,
    /// Its directory, by its place in the tree of buses.
    pub path: PathBuf,
    /// Vendor and device ID.
    pub id: (u16, u16),
    /// Base class, subclass and programming interface.
    pub class: u32,
}

impl Device {
    fn read(link: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(link)?;
        let address = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let id = (hex(&path.join("vendor"))? as u16, hex(&path.join("device"))? as u16);
        let class = hex(&path.join("class"))? as u32;
        Ok(Self { address, path, id, class })
    }

    /// The base class.
    pub fn base_class(&self) -> u32 {
        self.class >> 16
    }

    /// Whether the device is none that the VMM emulates itself.
    pub fn passed_through(&self) -> bool {
        let own = self.id.0 == VIRTIO_VENDOR && self.id != IVSHMEM || self.id == PVPANIC;
        !own && self.base_class() != BRIDGE
    }

    /// A file of its directory, as text without the line's end.
    pub fn text(&self, file: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.path.join(file))?.trim_end().to_owned())
    }

    /// Writes to a file of its directory.
    pub fn set(&self, file: &str, value: &str) -> Result<(), Failure> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(Failure::at(format!("writing {value:?} to {}", path.display())))
    }

    /// The name of the driver that has it.
    pub fn driver(&self) -> Option<String> {
        let driver = fs::read_link(self.path.join("driver")).ok()?;
        Some(driver.file_name()?.to_string_lossy().into_owned())
    }

    /// Size of each region in bytes by its index: the BARs are 0 to 5.
    pub fn region_sizes(&self) -> io::Result<BTreeMap<usize, u64>> {
        let regions = parse_resources(&self.text("resource")?);
        Ok(regions.into_iter().map(|region| (region.index, region.size)).collect())
    }
}

/// A line of a function's `resource` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its place in the file.
    pub index: usize,
    /// The first address.
    pub start: u64,
    /// In bytes.
    pub size: u64,
    /// Linux's `IORESOURCE_` bits.
    pub flags: u64,
}

/// The regions of a `resource` file that are in use.
pub fn parse_resources(text: &str) -> Vec<Region> {
    let parse = |(index, line): (usize, &str)| {
        let mut fields =
            line.split_whitespace().map(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16).ok());
        let (start, end, flags) = (fields.next()??, fields.next()??, fields.next()??);
        (flags != 0 && end >= start).then(|| Region { index, start, size: end - start + 1, flags })
    };
    text.lines().enumerate().filter_map(parse).collect()
}

fn hex(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16)
        .map_err(|_| io::Error::other(format!("{} has {text:?}", path.display())))
}

/// All functions, by address. One that goes while it is read is left out.
pub fn devices() -> Result<Vec<Device>, Failure> {
    let entries = fs::read_dir(DEVICES).map_err(Failure::at(DEVICES))?;
    let mut devices: Vec<Device> =
        entries.flatten().filter_map(|entry| Device::read(&entry.path()).ok()).collect();
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(devices)
}

/// The function at the address that the option `device` has, or the first that is `wanted`; waits for it.
pub fn find(options: &Options, what: &str, wanted: impl Fn(&Device) -> bool) -> Result<Device, Failure> {
    let address = options.text("device");
    let fits = |device: &Device| match address {
        Some(address) => device.address == address,
        None => wanted(device),
    };
    let nothing =
        format!("no {what}{} on the PCI bus", address.map(|a| format!(" at {a}")).unwrap_or_default());
    wait_for(&nothing, || Ok(devices()?.into_iter().find(|device| fits(device))))
}

/// Tries until there is something; the failure says what there was not.
pub fn wait_for<T>(
    nothing: &str,
    mut attempt: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(Failure::wrong(format!("{nothing} after {} s", PATIENCE.as_secs())));
        }
        sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: (u16, u16), class: u32) -> Device {
        Device { address: "0000:00:01.0".into(), path: PathBuf::new(), id, class }
    }

    #[test]
    fn regions_in_use() {
        let text = "0x0000004000000000 0x00000043ffffffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000fe800000 0x00000000fe800fff 0x0000000000040200\n";
        let regions = parse_resources(text);
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[0], Region { index: 0, start: 1 << 38, size: 16 << 30, flags: 0x14_220c });
        assert_eq!((regions[1].index, regions[1].size), (2, 4096));
    }

    #[test]
    fn the_vmms_own_devices_are_not_passed_through() {
        assert!(!device((0x1af4, 0x1042), 0x018000).passed_through());
        assert!(!device((0x1b36, 0x0011), 0x088000).passed_through());
        assert!(!device((0x1b36, 0x000c), 0x060400).passed_through());
        assert!(device((0x1af4, 0x1110), 0x050000).passed_through());
        assert!(device((0x1234, 0x11e8), 0x00ff00).passed_through());
    }
}
