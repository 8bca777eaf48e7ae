//! Who on the host uses a function: processes with its device files open, filesystems, interfaces.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use lathe_api::gpu::GpuProblem;

use super::HostFiles;
use super::gpus::Function;
use super::preflight::blocks;
use crate::pci::VFIO_PCI;

/// At most so many are named; more would make a page of a line.
const SHOWN: usize = 3;

/// Processes by the device file that they have open.
pub(super) struct Users {
    holders: BTreeMap<String, Vec<String>>,
    mounts: String,
}

impl Users {
    /// Looks at every process, once for all functions.
    pub(super) fn read(host: &HostFiles<'_>) -> Self {
        let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pid in host.names("proc").into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
            let files = open_devices(&host.path(format!("proc/{pid}/fd")));
            if files.is_empty() {
                continue;
            }
            let name = host.text(format!("proc/{pid}/comm"));
            for file in files {
                holders.entry(file).or_default().push(format!("{name} (process {pid})"));
            }
        }
        Self { holders, mounts: host.text("proc/self/mounts") }
    }

    /// Whoever uses it through its driver on the host: it cannot be taken away from under them.
    pub(super) fn of_driver(&self, function: &Function<'_>) -> Vec<GpuProblem> {
        let driver = function.driver().unwrap_or_default();
        if driver == VFIO_PCI {
            return Vec::new();
        }
        let mut problems = Vec::new();
        let processes = self.holders_of(&device_files(function, &driver));
        if !processes.is_empty() {
            let mut fix = "end them, or move their work to another GPU".to_owned();
            if processes.iter().any(|process| process.starts_with("nvidia-persiste")) {
                // The kernel cuts names of processes off at 15 characters.
                fix.push_str("; systemctl stop nvidia-persistenced");
            }
            problems.push(blocks(format!("driver {driver} has it in use: {}", join(&processes)), fix));
        }
        let mounted: Vec<_> = self.mounts_of(function);
        if !mounted.is_empty() {
            problems
                .push(blocks(format!("a filesystem of it is mounted at {}", join(&mounted)), "umount it"));
        }
        let claimed = |disk: &String| is_claimed(&function.host.path(format!("dev/{disk}")));
        if mounted.is_empty()
            && let Some(disk) = disks(function).into_iter().find(claimed)
        {
            let what = format!("the host uses the disk {disk}: for a filesystem, volume group, RAID or swap");
            problems.push(blocks(what, format!("lsblk /dev/{disk} shows which; take it out of that")));
        }
        let up: Vec<_> = interfaces(function);
        if !up.is_empty() {
            let fix = format!("if the host can do without: ip link set {} down", up[0]);
            problems.push(blocks(format!("the host's network interface {} is up", join(&up)), fix));
        }
        problems
    }

    /// A guest that has it. No problem of the device's, but one for who wants it now.
    pub(super) fn of_vfio(&self, function: &Function<'_>) -> Option<GpuProblem> {
        let group = function.iommu_group().map(|group| format!("/dev/vfio/{group}"));
        let devices = function.host.names(function.file("vfio-dev")).into_iter();
        let files: Vec<_> =
            group.into_iter().chain(devices.map(|it| format!("/dev/vfio/devices/{it}"))).collect();
        let processes = self.holders_of(&files);
        (!processes.is_empty())
            .then(|| blocks(format!("a guest has it: {}", join(&processes)), "wait until the guest ends"))
    }

    fn holders_of(&self, files: &[String]) -> Vec<String> {
        let mut holders: Vec<_> =
            files.iter().filter_map(|file| self.holders.get(file)).flatten().cloned().collect();
        holders.sort();
        holders.dedup();
        holders
    }

    fn mounts_of(&self, function: &Function<'_>) -> Vec<String> {
        let disks = disks(function);
        let lines = self.mounts.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let disk = words.next()?.strip_prefix("/dev/")?;
            // The disk itself or a partition of it, but not n10 for n1.
            let of = |name: &String| {
                disk.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
            };
            disks.iter().any(of).then(|| words.next().map(str::to_owned)).flatten()
        });
        lines.collect()
    }
}

/// Namespaces of an NVMe controller, by the names of their block devices.
fn disks(function: &Function<'_>) -> Vec<String> {
    let controllers = function.host.names(function.file("nvme")).into_iter();
    controllers
        .flat_map(|name| function.host.names(function.file(&format!("nvme/{name}"))))
        .filter_map(|entry| disk_name(&entry))
        .collect()
}

/// The disk of an entry below a controller: `nvme0n1`, or `nvme0c1n1` where the kernel is ready for several
/// paths to one disk, which is then `nvme0n1` all the same.
fn disk_name(entry: &str) -> Option<String> {
    let (controller, namespace) = entry.strip_prefix("nvme")?.split_once('n')?;
    let subsystem = controller.split('c').next()?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (number(subsystem) && number(namespace)).then(|| format!("nvme{subsystem}n{namespace}"))
}

/// Whether the kernel itself uses a block device or a part of it: filesystems of all mount namespaces, volume
/// groups, RAID, swap. Each of them has claimed it, and a second claim is refused.
fn is_claimed(disk: &Path) -> bool {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(disk);
    matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
}

/// Device files of GPUs and guests among a process's open ones. A process may end meanwhile.
fn open_devices(fds: &Path) -> Vec<String> {
    let entries = fs::read_dir(fds).into_iter().flatten().flatten();
    let targets =
        entries.filter_map(|entry| fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok());
    let devices = targets.filter(|target| {
        ["/dev/nvidia", "/dev/dri/", "/dev/kfd", "/dev/vfio/"].iter().any(|prefix| target.starts_with(prefix))
    });
    let mut devices: Vec<_> = devices.collect();
    devices.sort();
    devices.dedup();
    devices
}

/// The files through which programs use a GPU.
fn device_files(function: &Function<'_>, driver: &str) -> Vec<String> {
    let cards = function.host.names(function.file("drm")).into_iter();
    let mut files: Vec<_> = cards
        .filter(|name| name.starts_with("card") || name.starts_with("renderD"))
        .map(|name| format!("/dev/dri/{name}"))
        .collect();
    if driver == "nvidia" {
        let information =
            function.host.text(format!("proc/driver/nvidia/gpus/{}/information", function.address));
        let minor = information.lines().find_map(|line| line.strip_prefix("Device Minor:"));
        files.extend(minor.map(|minor| format!("/dev/nvidia{}", minor.trim())));
    }
    files
}

fn interfaces(function: &Function<'_>) -> Vec<String> {
    let names = function.host.names(function.file("net")).into_iter();
    // Up by will, whether or not a cable is in it (include/uapi/linux/if.h).
    const IFF_UP: u32 = 1;
    let up = |name: &String| function.host.hex(function.file(&format!("net/{name}/flags"))) & IFF_UP != 0;
    names.filter(up).collect()
}

fn join(names: &[String]) -> String {
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_known_by_their_own_names() {
        for (entry, disk) in [
            ("nvme0n1", Some("nvme0n1")),
            ("nvme3c12n20", Some("nvme3n20")),
            ("numa_node", None),
            ("nvme0", None),
            ("nvmenn1", None),
        ] {
            assert_eq!(disk_name(entry).as_deref(), disk, "{entry}");
        }
    }
}
