//! What a host has, read from the kernel's files below a root (`/` but in tests).

mod classes;
mod config_space;
mod devices;
#[cfg(test)]
pub(crate) mod fake;
mod gpus;
mod health;
mod known;
mod nvml;
mod preflight;
mod room;
mod users;
mod xid;

pub use classes::{ClassInputs, classes};

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use lathe_api::gpu::{DeviceCheck, Gpu};
use lathe_api::node::{Cpus, HugepagePool, Inventory, NumaNode};
use lathe_api::{HostPciAddress, MemorySize};
use preflight::Preflight;

/// Everything a host has but what can run on it. `devices` count as GPUs even if they are none: an operator
/// named them.
pub fn read(root: &Path, devices: &[HostPciAddress]) -> Inventory {
    let host = HostFiles(root);
    Inventory {
        hostname: host.text("proc/sys/kernel/hostname"),
        kernel: host.text("proc/sys/kernel/osrelease"),
        boot_id: boot_id(root),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        cpus: cpus(&host),
        memory: meminfo(&host.text("proc/meminfo"), "MemTotal:").map(MemorySize::from_bytes),
        numa: numa(&host),
        hugepages: hugepages(&host),
        disks: devices::disks(&host),
        nics: devices::nics(&host),
        pci: devices::pci(&host),
        gpus: gpus(&host, devices),
        classes: Vec::new(),
        class_problems: Vec::new(),
        // What the agent was told, and what is in its caches, are not the host's.
        labels: Default::default(),
        artefacts: Vec::new(),
    }
}

/// The GPUs with what stands in the way of each, as far as files tell.
fn gpus(host: &HostFiles<'_>, devices: &[HostPciAddress]) -> Vec<Gpu> {
    let mut gpus = gpus::read(host, devices);
    if !gpus.is_empty() {
        let preflight = Preflight::new(host);
        for gpu in &mut gpus {
            gpu.problems = preflight.check(gpu.address);
        }
    }
    gpus
}

/// Asks NVIDIA's driver about the GPUs that it runs, through the program `nvml`, and judges their
/// health; what it once said of the others is in the file `known`. Where it runs none the program is
/// not started. May take a minute.
pub fn ask_nvml(root: &Path, gpus: &mut [Gpu], nvml: &Path, known: &Path) {
    nvml::enrich(gpus, nvml, nvml::LIMIT, || xid::gravest_xids(root));
    known::complete(gpus, known);
}

/// Until NVIDIA's driver was asked about a GPU, nobody knows whether it works.
pub fn hold_back_unasked(gpus: &mut [Gpu]) {
    for gpu in gpus.iter_mut().filter(|gpu| nvml::driven(gpu)) {
        gpu.problems.push(preflight::blocks(
            "its driver has not yet answered whether it works",
            "wait; a driver that is asked for the first time takes some seconds",
        ));
    }
}

/// Whether functions can be given to sandboxes, in the order asked; all GPUs where none is named.
pub fn check(root: &Path, addresses: &[HostPciAddress]) -> Vec<DeviceCheck> {
    let host = HostFiles(root);
    let preflight = Preflight::new(&host);
    if addresses.is_empty() {
        return preflight::gpu_addresses(&host).into_iter().map(|it| preflight.report(it)).collect();
    }
    addresses.iter().map(|it| preflight.report(*it)).collect()
}

/// This boot's ID: processes, interfaces and cgroups of another one do not exist any more.
pub fn boot_id(root: &Path) -> String {
    HostFiles(root).text("proc/sys/kernel/random/boot_id")
}

/// The kernel's files. What cannot be read is empty: an inventory with a gap beats none.
struct HostFiles<'a>(&'a Path);

impl HostFiles<'_> {
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    fn text(&self, path: impl AsRef<Path>) -> String {
        let bytes = self.bytes(path);
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// A file's bytes, as far as they can be read.
    fn bytes(&self, path: impl AsRef<Path>) -> Vec<u8> {
        crate::files::read_bounded(&self.path(path), 4 << 20).unwrap_or_default()
    }

    /// Whether a line of a file contains `words`. The file is read as far as that, whatever its size: on hosts with
    /// hundreds of CPUs `/proc/interrupts` has many MiB.
    fn has(&self, path: impl AsRef<Path>, words: &str) -> bool {
        let Ok(file) = fs::File::open(self.path(path)) else { return false };
        let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
        lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(words))
    }

    fn number<T: std::str::FromStr>(&self, path: impl AsRef<Path>) -> Option<T> {
        self.text(path).parse().ok()
    }

    fn hex(&self, path: impl AsRef<Path>) -> u32 {
        u32::from_str_radix(self.text(path).trim_start_matches("0x"), 16).unwrap_or(0)
    }

    /// Names in a directory, sorted.
    fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The last component that a link points to, such as a device's driver.
    fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        crate::files::link_name(&self.path(path))
    }
}

/// A line of /proc/meminfo or a node's meminfo, in bytes.
fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| Some(line.split_once(field)?.1))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// A kernel list such as `0-3,8`.
fn cpu_list(text: &str) -> Vec<u32> {
    let ranges = text.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.trim().parse::<u32>().ok()?..=last.trim().parse::<u32>().ok()?)
    });
    // No machine has more; a broken file must not fill memory.
    ranges.flatten().take(8192).collect()
}

fn cpus(host: &HostFiles<'_>) -> Cpus {
    let info = host.text("proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let online = cpu_list(&host.text("sys/devices/system/cpu/online"));
    let mut sockets = std::collections::BTreeSet::new();
    let mut cores = std::collections::BTreeSet::new();
    for cpu in &online {
        let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
        let socket: i32 = host.number(format!("{topology}/physical_package_id")).unwrap_or(0);
        let core: i32 = host.number(format!("{topology}/core_id")).unwrap_or(0);
        sockets.insert(socket);
        cores.insert((socket, core));
    }
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Cpus {
        model: model.map_or(String::new(), |(_, name)| name.trim().to_owned()),
        online: count(online.len()),
        sockets: count(sockets.len()),
        cores: count(cores.len()),
    }
}

fn numa(host: &HostFiles<'_>) -> Vec<NumaNode> {
    let base = "sys/devices/system/node";
    let mut nodes: Vec<_> = host
        .names(base)
        .iter()
        .filter_map(|name| {
            let id = name.strip_prefix("node")?.parse().ok()?;
            let cpus = cpu_list(&host.text(format!("{base}/{name}/cpulist")));
            let memory_bytes =
                meminfo(&host.text(format!("{base}/{name}/meminfo")), "MemTotal:").unwrap_or(0);
            Some(NumaNode { id, cpus, memory_bytes })
        })
        .collect();
    nodes.sort_by_key(|node| node.id);
    nodes
}

fn hugepages(host: &HostFiles<'_>) -> Vec<HugepagePool> {
    let base = "sys/kernel/mm/hugepages";
    let pools = host.names(base).into_iter().filter_map(|name| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        Some(HugepagePool {
            page_bytes: kib * 1024,
            total: host.number(format!("{base}/{name}/nr_hugepages")).unwrap_or(0),
            free: host.number(format!("{base}/{name}/free_hugepages")).unwrap_or(0),
        })
    });
    let mut pools: Vec<_> = pools.collect();
    pools.sort_by_key(|pool| pool.page_bytes);
    pools
}

/// A GPU of which nothing but its place is known.
#[cfg(test)]
pub(crate) fn fake_gpu(address: HostPciAddress) -> Gpu {
    let host = fake::FakeHost::new().function(&address.to_string(), 0x03_02_00);
    gpus::read(&HostFiles(host.root()), &[]).remove(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A host made of files. `-> ` in front of the content makes a link.
    pub(crate) fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match content.strip_prefix("-> ") {
                Some(target) => symlink(target, path).unwrap(),
                None => fs::write(path, content).unwrap(),
            }
        }
        root
    }

    #[test]
    fn a_host_is_read_from_its_files() {
        let root = host(&[
            ("proc/sys/kernel/hostname", "n1\n"),
            ("proc/meminfo", "MemTotal:        2048 kB\nMemFree: 1 kB\n"),
            ("proc/cpuinfo", "processor\t: 0\nmodel name\t: EPYC 9 \nflags\t: svm\n"),
            ("sys/devices/system/cpu/online", "0-2\n"),
            ("sys/devices/system/cpu/cpu0/topology/physical_package_id", "0"),
            ("sys/devices/system/cpu/cpu0/topology/core_id", "0"),
            ("sys/devices/system/cpu/cpu1/topology/physical_package_id", "0"),
            ("sys/devices/system/cpu/cpu1/topology/core_id", "0"),
            ("sys/devices/system/cpu/cpu2/topology/physical_package_id", "1"),
            ("sys/devices/system/cpu/cpu2/topology/core_id", "0"),
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            ("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal:    1024 kB\n"),
            ("sys/devices/system/node/node10/cpulist", "\n"),
            ("sys/devices/system/node/node2/cpulist", "2\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "7"),
            ("sys/block/nvme0n1/size", "2048"),
            ("sys/block/nvme0n1/queue/rotational", "0"),
            ("sys/block/nvme0n1/device/model", "Fast One  \n"),
            ("sys/block/loop0/size", "99"),
            ("sys/block/ram0/size", "99"),
            ("sys/class/net/eth0/address", "02:00:00:00:00:01\n"),
            ("sys/class/net/eth0/speed", "100000\n"),
            ("sys/class/net/eth0/device/driver", "-> ../../drivers/mlx5_core"),
            ("sys/class/net/wlan0/speed", "-1\n"),
            ("sys/class/net/wlan0/device/x", ""),
            ("sys/class/net/lo/address", "00:00:00:00:00:00\n"),
            ("sys/class/net/lsb0123456789ab/address", "02:00:00:00:00:02\n"),
            ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n"),
            ("sys/bus/pci/devices/0000:01:00.0/device", "0x2330\n"),
            ("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n"),
            ("sys/bus/pci/devices/0000:01:00.0/numa_node", "-1\n"),
            ("sys/bus/pci/devices/0000:01:00.0/iommu_group", "-> ../../kernel/iommu_groups/12"),
            ("sys/bus/pci/devices/0000:01:00.0/driver", "-> ../drivers/vfio-pci"),
        ]);
        insta::assert_snapshot!(serde_json::to_string_pretty(&read(root.path(), &[])).unwrap());
    }

    #[test]
    fn an_empty_host_is_an_empty_inventory() {
        let root = tempfile::tempdir().unwrap();
        let inventory = read(root.path(), &[]);
        assert_eq!((inventory.cpus.online, inventory.memory), (0, None));
    }

    #[test]
    fn kernel_lists_are_read_and_bounded() {
        assert_eq!(cpu_list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(cpu_list(""), [] as [u32; 0]);
        assert_eq!(cpu_list("0-4294967295").len(), 8192);
    }
}
