//! The host's PCI functions, as the kernel shows them and obeys.
//!
//! A trait, because what matters here is the order of effects and what is left when they stop half-way:
//! the tests run the same steps against a model of the kernel that can be stopped after each.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use lathe_api::HostPciAddress;

use super::scrub::{self, Bar, BarScrub, ScrubError};
use crate::files::link_name;
use crate::pci::{VFIO_PCI, bridges_above};

/// How long a driver may take to let a function go or to take it up. NVIDIA's takes seconds for each;
/// one whose device is held open by a process waits for it for ever.
const DRIVER_LIMIT: Duration = Duration::from_secs(120);

/// The kernel itself waits up to 60 s for a device to come back from a reset.
const RESET_LIMIT: Duration = Duration::from_secs(90);

/// What binding, reset and scrub need of the host. Calls block; those that the kernel may hold up for ever
/// end with [`io::ErrorKind::TimedOut`].
pub trait PciHost: Send + Sync {
    /// All functions.
    fn functions(&self) -> Vec<HostPciAddress>;
    /// Whether the function is there and answers: a device that was pulled reads as all ones.
    fn answers(&self, function: HostPciAddress) -> bool;
    /// An attribute's text, trimmed.
    ///
    /// # Errors
    /// When it is not there.
    fn read(&self, function: HostPciAddress, attribute: &str) -> io::Result<String>;
    /// Whether the attribute is there, readable or not.
    fn has(&self, function: HostPciAddress, attribute: &str) -> bool;
    /// Writes an attribute.
    ///
    /// # Errors
    /// What the kernel says.
    fn write(&self, function: HostPciAddress, attribute: &str, value: &str) -> io::Result<()>;
    /// The driver that is bound.
    fn driver(&self, function: HostPciAddress) -> Option<String>;
    /// All functions of its IOMMU group, itself included; `None` without an IOMMU.
    fn group(&self, function: HostPciAddress) -> Option<Vec<HostPciAddress>>;
    /// Bridges above it, the one at the root first.
    fn path(&self, function: HostPciAddress) -> Vec<HostPciAddress>;
    /// Makes the bound driver let go.
    ///
    /// # Errors
    /// What the kernel says.
    fn unbind(&self, function: HostPciAddress) -> io::Result<()>;
    /// Offers it to the drivers. The kernel tells nothing of how that went: read it back.
    ///
    /// # Errors
    /// What the kernel says.
    fn probe(&self, function: HostPciAddress) -> io::Result<()>;
    /// Offers it to one driver, for its word on why it does not take it.
    ///
    /// # Errors
    /// What the driver says.
    fn bind(&self, function: HostPciAddress, driver: &str) -> io::Result<()>;
    /// Makes `vfio-pci` available.
    ///
    /// # Errors
    /// When the kernel has it not.
    fn load_vfio(&self) -> io::Result<()>;
    /// Whether no process has it open through VFIO.
    fn is_idle(&self, function: HostPciAddress) -> bool;
    /// Writes zeros to the memory behind a BAR and reads all of them back. The function is enabled and no
    /// driver has it.
    ///
    /// # Errors
    /// When that could not be proven, or taken for impossible.
    fn scrub(&self, function: HostPciAddress, bar: Bar) -> Result<BarScrub, ScrubError>;
}

/// The real one: sysfs below a root.
#[derive(Debug)]
pub struct KernelHost {
    root: PathBuf,
}

impl KernelHost {
    /// The host whose `/sys` is below `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn bus(&self) -> PathBuf {
        self.root.join("sys/bus/pci")
    }

    fn device(&self, function: HostPciAddress) -> PathBuf {
        self.bus().join("devices").join(function.to_string())
    }
}

/// Writes in one call, as attributes want it, without making a file where there is none.
fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// The same, given up after `limit`. The thread stays behind with what the kernel does not finish.
fn write_within(limit: Duration, path: PathBuf, value: String) -> io::Result<()> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("gpu-sysfs".into()).spawn(move || {
        let _ = sender.send(write(&path, &value));
    })?;
    receiver.recv_timeout(limit).unwrap_or_else(|_| {
        let text = format!("the kernel did not finish within {} s", limit.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

impl PciHost for KernelHost {
    fn functions(&self) -> Vec<HostPciAddress> {
        let entries = fs::read_dir(self.bus().join("devices")).into_iter().flatten().flatten();
        let mut all: Vec<_> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        all.sort_unstable();
        all
    }

    fn answers(&self, function: HostPciAddress) -> bool {
        // A virtual function's vendor and device ID are always ones (PCIe 6.0 §9.3.4.1.1), its class code never.
        const CLASS_AND_REVISION: u64 = 8;
        let mut class = [0; 4];
        let config = fs::File::open(self.device(function).join("config"));
        let read = config.and_then(|file| file.read_exact_at(&mut class, CLASS_AND_REVISION));
        read.is_ok() && class != [0xff; 4]
    }

    fn read(&self, function: HostPciAddress, attribute: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.device(function).join(attribute))?.trim().to_owned())
    }

    fn has(&self, function: HostPciAddress, attribute: &str) -> bool {
        self.device(function).join(attribute).exists()
    }

    fn write(&self, function: HostPciAddress, attribute: &str, value: &str) -> io::Result<()> {
        write_within(RESET_LIMIT, self.device(function).join(attribute), value.to_owned())
    }

    fn driver(&self, function: HostPciAddress) -> Option<String> {
        link_name(&self.device(function).join("driver"))
    }

    fn group(&self, function: HostPciAddress) -> Option<Vec<HostPciAddress>> {
        let members = fs::read_dir(self.device(function).join("iommu_group/devices")).ok()?;
        let mut all: Vec<_> =
            members.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        all.sort_unstable();
        Some(all)
    }

    fn path(&self, function: HostPciAddress) -> Vec<HostPciAddress> {
        bridges_above(&self.device(function), function)
    }

    fn unbind(&self, function: HostPciAddress) -> io::Result<()> {
        write_within(DRIVER_LIMIT, self.device(function).join("driver/unbind"), function.to_string())
    }

    fn probe(&self, function: HostPciAddress) -> io::Result<()> {
        write_within(DRIVER_LIMIT, self.bus().join("drivers_probe"), function.to_string())
    }

    fn bind(&self, function: HostPciAddress, driver: &str) -> io::Result<()> {
        write_within(DRIVER_LIMIT, self.bus().join("drivers").join(driver).join("bind"), function.to_string())
    }

    fn load_vfio(&self) -> io::Result<()> {
        let driver = self.bus().join("drivers").join(VFIO_PCI);
        if !driver.exists() {
            let mut modprobe = Command::new("modprobe");
            modprobe.args(["-q", VFIO_PCI]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            modprobe.status()?;
        }
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the kernel has no driver vfio-pci");
        if driver.exists() { Ok(()) } else { Err(missing()) }
    }

    fn is_idle(&self, function: HostPciAddress) -> bool {
        let Some(number) = link_name(&self.device(function).join("iommu_group")) else { return true };
        // A group can be opened once; the open file of a device in it counts as well.
        let node = self.root.join("dev/vfio").join(number);
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(node);
        !matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
    }

    fn scrub(&self, function: HostPciAddress, bar: Bar) -> Result<BarScrub, ScrubError> {
        let dir = self.device(function);
        // Write combining, where the kernel offers it, makes the zeros arrive in whole bursts.
        let combining = dir.join(format!("resource{}_wc", bar.index));
        let plain = dir.join(format!("resource{}", bar.index));
        scrub::in_child(if combining.exists() { &combining } else { &plain }, bar.size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_the_kernel_does_not_finish_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("attribute");
        // Opening a pipe without a reader blocks like an attribute whose driver waits.
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = write_within(Duration::from_millis(50), fifo.clone(), "1".into()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Let the thread go.
        drop(OpenOptions::new().read(true).open(&fifo).unwrap());
        assert!(write(&dir.path().join("absent"), "1").is_err(), "no file is made");
    }

    #[test]
    fn a_function_is_read_from_sysfs() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let real = root.path().join("sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0");
        fs::create_dir_all(&real).unwrap();
        fs::create_dir_all(root.path().join("sys/kernel/iommu_groups/7/devices/0000:01:00.0")).unwrap();
        fs::create_dir_all(root.path().join("sys/bus/pci/devices")).unwrap();
        symlink(&real, root.path().join("sys/bus/pci/devices/0000:01:00.0")).unwrap();
        symlink(root.path().join("sys/kernel/iommu_groups/7"), real.join("iommu_group")).unwrap();
        symlink("../../drivers/nouveau", real.join("driver")).unwrap();
        fs::write(real.join("class"), "0x030200\n").unwrap();
        let host = KernelHost::new(root.path());
        let gpu = "0000:01:00.0".parse().unwrap();
        assert_eq!(host.functions(), [gpu]);
        assert_eq!(host.path(gpu), ["0000:00:02.0".parse().unwrap()]);
        assert_eq!(host.group(gpu).unwrap(), [gpu]);
        assert_eq!(host.driver(gpu).as_deref(), Some("nouveau"));
        assert_eq!(host.read(gpu, "class").unwrap(), "0x030200");
        fs::write(real.join("config"), [0xff; 64]).unwrap();
        assert!(!host.answers(gpu), "all ones is a device that is gone");
        let virtual_function = [[0xff; 4], [0; 4], [0, 0, 2, 3]].concat();
        fs::write(real.join("config"), virtual_function).unwrap();
        assert!(host.answers(gpu));
    }
}
