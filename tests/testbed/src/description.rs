//! What an emulated host is made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pci::Device;
use crate::wire::Wire;

/// A host. Written as TOML in a file, or built in code:
///
/// ```
/// use lathe_testbed::HostDescription;
/// let host = HostDescription::new("n1").cpus(4).memory_mib(4096);
/// assert!(host.validate().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct HostDescription {
    /// Host name; also the name by which the testbed knows it.
    pub name: String,
    /// Virtual CPUs. One with a deterministic clock.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// NUMA nodes; none means a machine without NUMA. Their memory has to add up to `memory_mib`, and
    /// their CPUs to `cpus`.
    pub numa: Vec<NumaNode>,
    /// 2 MiB pages that the host reserves at boot.
    pub huge_pages: u32,
    /// Size of the ext4 data disk at `/var/lib/lathe` in MiB; 0 means none.
    pub disk_mib: u32,
    /// The IOMMU.
    pub iommu: Iommu,
    /// The host's clock advances one nanosecond an instruction, whatever the real machine does.
    pub deterministic: bool,
    /// PCI devices beyond the host's own network card, disk and serial ports.
    pub devices: Vec<Device>,
    /// The kernel.
    pub kernel_flavour: KernelFlavour,
    /// Another kernel than these: a bzImage or ELF image with virtio, ext4 and KVM built in, or with
    /// `modules`.
    pub kernel: Option<PathBuf>,
    /// Modules of `kernel`: the directory that belongs at `/lib/modules/RELEASE`, named RELEASE.
    pub modules: Option<PathBuf>,
    /// Added to the kernel's command line.
    pub kernel_args: Vec<String>,
    /// Added to QEMU's command line.
    pub qemu_args: Vec<String>,
    /// Files that are in the host from its first instruction on. The quickest way in.
    pub files: Vec<HostFile>,
    /// A directory of this machine that the host sees, read-only and live, at `/share`.
    pub share: Option<PathBuf>,
}

/// The kernels that images/ has for hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFlavour {
    /// Debian's 6.12, with modules. Its VFIO has groups and containers, and no iommufd.
    #[default]
    Debian,
    /// 6.12 built by `images/kernel/build host`, all built in: VFIO with groups and containers, and with
    /// device cdevs and iommufd.
    Iommufd,
}

/// A file of this machine in the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HostFile {
    /// The file here; its permission bits are kept.
    pub local: PathBuf,
    /// Absolute path in the host.
    pub remote: String,
}

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NumaNode {
    /// How many CPUs; they are numbered from node 0 on.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The IOMMU that QEMU emulates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// VT-d with interrupt remapping, 48 bits wide. The one that passthrough works with.
    #[default]
    Intel,
    /// AMD-Vi. Groups appear, but DMA and interrupts of passed-through devices do not arrive; good
    /// for tests of its aperture, which is narrower than the CPU's addresses.
    Amd,
    /// None.
    None,
}

impl Default for HostDescription {
    fn default() -> Self {
        Self {
            name: "n1".into(),
            cpus: 2,
            memory_mib: 3072,
            numa: Vec::new(),
            huge_pages: 0,
            disk_mib: 16 * 1024,
            iommu: Iommu::default(),
            deterministic: false,
            devices: Vec::new(),
            kernel_flavour: KernelFlavour::default(),
            kernel: None,
            modules: None,
            kernel_args: Vec::new(),
            qemu_args: Vec::new(),
            files: Vec::new(),
            share: None,
        }
    }
}

/// Why a description is not one of a host.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// The name ends up in file names, on command lines and as the host's name.
    #[error("host name {0:?}: use 1 to 32 of a-z, 0-9 and -, starting with a letter")]
    Name(String),
    /// One CPU is what the instruction counter supports.
    #[error("host {name}: a deterministic clock needs exactly 1 CPU, not {cpus}")]
    DeterministicCpus {
        /// The host.
        name: String,
        /// What was asked for.
        cpus: u32,
    },
    /// QEMU and the kernel start with these limits.
    #[error("host {name}: {cpus} CPUs and {memory_mib} MiB; at least 1 and 512, at most 64 CPUs")]
    Size {
        /// The host.
        name: String,
        /// What was asked for.
        cpus: u32,
        /// What was asked for.
        memory_mib: u32,
    },
    /// Nodes are parts of the whole.
    #[error(
        "host {name}: its NUMA nodes have {cpus} CPUs and {memory_mib} MiB together, the host {of_cpus} and \
         {of_memory_mib}"
    )]
    Numa {
        /// The host.
        name: String,
        /// Sum over the nodes.
        cpus: u32,
        /// Sum over the nodes.
        memory_mib: u32,
        /// The host's.
        of_cpus: u32,
        /// The host's.
        of_memory_mib: u32,
    },
    /// A comma separates options on QEMU's command line.
    #[error("host {name}: {value:?} in a device: commas and line breaks have no place there")]
    DeviceValue {
        /// The host.
        name: String,
        /// The offending text.
        value: String,
    },
    /// Files need a place.
    #[error("host {name}: the file {remote:?} needs an absolute path without ..")]
    RemotePath {
        /// The host.
        name: String,
        /// The offending path.
        remote: String,
    },
}

impl HostDescription {
    /// A host of 2 CPUs and 3 GiB with a VT-d IOMMU and a 16 GiB (sparse) data disk.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a NUMA node.
    #[must_use]
    pub fn numa_node(mut self, cpus: u32, memory_mib: u32) -> Self {
        self.numa.push(NumaNode { cpus, memory_mib });
        self
    }

    /// Reserves 2 MiB pages.
    #[must_use]
    pub fn huge_pages(mut self, count: u32) -> Self {
        self.huge_pages = count;
        self
    }

    /// Sets the data disk's size; 0 for none.
    #[must_use]
    pub fn disk_mib(mut self, disk_mib: u32) -> Self {
        self.disk_mib = disk_mib;
        self
    }

    /// Chooses the IOMMU.
    #[must_use]
    pub fn iommu(mut self, iommu: Iommu) -> Self {
        self.iommu = iommu;
        self
    }

    /// Makes the clock count instructions; this takes the host down to one CPU.
    #[must_use]
    pub fn deterministic(mut self) -> Self {
        self.deterministic = true;
        self.cpus = 1;
        self
    }

    /// Adds a PCI device, with what is below it.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Chooses one of the kernels that images/ has.
    #[must_use]
    pub fn kernel_flavour(mut self, flavour: KernelFlavour) -> Self {
        self.kernel_flavour = flavour;
        self
    }

    /// Uses another kernel; see the fields.
    #[must_use]
    pub fn kernel(mut self, vmlinuz: impl Into<PathBuf>, modules: Option<PathBuf>) -> Self {
        self.kernel = Some(vmlinuz.into());
        self.modules = modules;
        self
    }

    /// Adds to the kernel's command line.
    #[must_use]
    pub fn kernel_arg(mut self, argument: impl Into<String>) -> Self {
        self.kernel_args.push(argument.into());
        self
    }

    /// Adds to QEMU's command line.
    #[must_use]
    pub fn qemu_arg(mut self, argument: impl Into<String>) -> Self {
        self.qemu_args.push(argument.into());
        self
    }

    /// Plugs a cable in: a card with the property `netdev` of its name is at the other end.
    #[must_use]
    pub fn wire(self, wire: &Wire) -> Self {
        self.qemu_arg("-netdev").qemu_arg(wire.netdev())
    }

    /// Puts a file of this machine into the host before it starts.
    #[must_use]
    pub fn file(mut self, local: impl Into<PathBuf>, remote: impl Into<String>) -> Self {
        self.files.push(HostFile { local: local.into(), remote: remote.into() });
        self
    }

    /// Shows a directory of this machine at `/share`.
    #[must_use]
    pub fn share(mut self, directory: impl Into<PathBuf>) -> Self {
        self.share = Some(directory.into());
        self
    }

    /// Checks what QEMU would otherwise complain about in its own words, or not at all.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), DescriptionError> {
        let name = &self.name;
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase());
        if !starts_well || name.len() > 32 || !name.chars().all(letters) {
            return Err(DescriptionError::Name(name.clone()));
        }
        if self.deterministic && self.cpus != 1 {
            return Err(DescriptionError::DeterministicCpus { name: name.clone(), cpus: self.cpus });
        }
        if self.cpus == 0 || self.cpus > 64 || self.memory_mib < 512 {
            return Err(DescriptionError::Size {
                name: name.clone(),
                cpus: self.cpus,
                memory_mib: self.memory_mib,
            });
        }
        if !self.numa.is_empty() {
            let cpus = self.numa.iter().fold(0_u32, |sum, node| sum.saturating_add(node.cpus));
            let memory_mib = self.numa.iter().fold(0_u32, |sum, node| sum.saturating_add(node.memory_mib));
            if cpus != self.cpus || memory_mib != self.memory_mib {
                return Err(DescriptionError::Numa {
                    name: name.clone(),
                    cpus,
                    memory_mib,
                    of_cpus: self.cpus,
                    of_memory_mib: self.memory_mib,
                });
            }
        }
        for file in &self.files {
            if !file.remote.starts_with('/') || file.remote.split('/').any(|part| part == "..") {
                return Err(DescriptionError::RemotePath { name: name.clone(), remote: file.remote.clone() });
            }
        }
        for device in &self.devices {
            device.check().map_err(|value| DescriptionError::DeviceValue { name: name.clone(), value })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_gives_defaults_and_refuses_misspelt_fields() {
        let host: HostDescription = toml::from_str("name = \"n7\"\ncpus = 4").unwrap();
        assert_eq!(host, HostDescription::new("n7").cpus(4));
        let error = toml::from_str::<HostDescription>("memory = 4").unwrap_err().to_string();
        assert!(error.contains("memory-mib"), "{error}");
    }

    #[test]
    fn bad_descriptions_name_the_value() {
        for (host, part) in [
            (HostDescription::new("N1"), "\"N1\""),
            (HostDescription::new("n1").deterministic().cpus(2), "not 2"),
            (HostDescription::new("n1").memory_mib(100), "100 MiB"),
            (HostDescription::new("n1").numa_node(1, 1024), "1024 MiB together"),
            (HostDescription::new("n1").file("a", "b"), "\"b\""),
            (HostDescription::new("n1").device(Device::nvme("/a,b", "s")), "/a,b"),
        ] {
            let error = host.validate().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
