//! Guest memory near the devices that a guest gets: DMA that crosses to another socket is slower.
//!
//! A guest whose devices are on one of the host's NUMA nodes has one node, with all of its memory from there;
//! one with devices on several has as many, and an equal share of its CPUs and memory near each. It is for the
//! better only: where a node's memory would not do, or it is not known where a device is, the guest has no nodes and
//! the kernel takes its memory from wherever it is free.

use std::collections::BTreeSet;
use std::path::Path;

use lathe_api::{HostPciAddress, MemorySize};
use lathe_vmm::config::NumaNodeConfig;

use super::machine::GRANULE;
use crate::files;

/// Of a node's free memory this share stays for the host's kernel: memory is bound to the node, and a node that runs
/// out ends whoever asks next.
const KEPT_FREE: u64 = 16;

/// The machine's nodes, with memory near `functions`; `root` is `/` but in tests.
pub fn near(root: &Path, functions: &[HostPciAddress], cpus: u8, memory: MemorySize) -> Vec<NumaNodeConfig> {
    if memory_nodes(root) < 2 {
        return Vec::new();
    }
    let of = |address| node_of(root, address);
    let Some(nodes) = functions.iter().map(of).collect::<Option<BTreeSet<u32>>>() else { return Vec::new() };
    let shares = share(&nodes, cpus, memory);
    let fits = |node: &NumaNodeConfig| {
        let free = node.host_node.map_or(0, |node| free_bytes(root, node));
        node.memory.bytes() <= free - free / KEPT_FREE
    };
    if let Some(short) = shares.iter().find(|node| !fits(node)) {
        let (node, wanted) = (short.host_node, short.memory);
        tracing::warn!(node, %wanted, "too little free memory near the GPUs: the guest's comes from anywhere");
        return Vec::new();
    }
    shares
}

/// The same for each of `nodes`, in the order of their numbers; the first ones have the CPUs and granules that are
/// left over. None where there are fewer CPUs than nodes: Linux takes no node without one.
fn share(nodes: &BTreeSet<u32>, cpus: u8, memory: MemorySize) -> Vec<NumaNodeConfig> {
    let count = nodes.len() as u64;
    let granules = memory.bytes() / GRANULE;
    if u64::from(cpus) < count || granules < count {
        return Vec::new();
    }
    let part = |of: u64, index: u64| of / count + u64::from(index < of % count);
    let node = |(index, node): (u64, &u32)| NumaNodeConfig {
        cpus: u8::try_from(part(cpus.into(), index)).unwrap_or(u8::MAX),
        memory: MemorySize::from_bytes(part(granules, index) * GRANULE),
        host_node: Some(*node),
    };
    (0..).zip(nodes).map(node).collect()
}

fn text(path: &Path) -> String {
    let bytes = files::read_bounded(path, 64 << 10).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// The node of a function; the kernel says -1 where the firmware does not tell.
fn node_of(root: &Path, address: &HostPciAddress) -> Option<u32> {
    text(&root.join(format!("sys/bus/pci/devices/{address}/numa_node"))).parse().ok()
}

/// How many of the host's nodes have memory.
fn memory_nodes(root: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(root.join("sys/devices/system/node")) else { return 0 };
    let number = |name: &str| name.strip_prefix("node")?.parse::<u32>().ok();
    let nodes = entries.flatten().filter_map(|entry| number(&entry.file_name().to_string_lossy()));
    nodes.filter(|node| field(root, *node, "MemTotal:") > 0).count()
}

/// What a node has free, and in the page cache of files: that is given up for others.
fn free_bytes(root: &Path, node: u32) -> u64 {
    ["MemFree:", "Active(file):", "Inactive(file):"].map(|name| field(root, node, name)).iter().sum()
}

/// A line of a node's meminfo in bytes: `Node 0 MemFree:  123 kB`.
fn field(root: &Path, node: u32, name: &str) -> u64 {
    let text = text(&root.join(format!("sys/devices/system/node/node{node}/meminfo")));
    let line = text.lines().find_map(|line| line.split_once(name));
    let kib = line.and_then(|(_, value)| value.trim().split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::fake::FakeHost;

    const MIB: u64 = 1 << 20;

    /// Two nodes with memory, of 4 GiB with 2 GiB free, and one that has CPUs alone.
    fn host() -> FakeHost {
        let meminfo = |node: u32| {
            format!(
                "Node {node} MemTotal:       4194304 kB\nNode {node} MemFree:        1048576 kB\n\
                 Node {node} Active(file):    524288 kB\nNode {node} Inactive(file):  524288 kB\n"
            )
        };
        let host = FakeHost::new()
            .file("sys/devices/system/node/node0/meminfo", meminfo(0))
            .file("sys/devices/system/node/node1/meminfo", meminfo(1))
            .file("sys/devices/system/node/node2/meminfo", "Node 2 MemTotal: 0 kB\n")
            .file("sys/devices/system/node/online", "0-2\n");
        [(1, "0"), (2, "1"), (3, "1"), (4, "-1"), (5, "2")].into_iter().fold(host, |host, (bus, node)| {
            let address = format!("0000:{bus:02x}:00.0");
            host.function(&address, 0x03_02_00).file_of(&address, "numa_node", format!("{node}\n"))
        })
    }

    fn near_in(host: &FakeHost, buses: &[u8], cpus: u8, mib: u64) -> Vec<(u8, u64, u32)> {
        let functions: Vec<_> =
            buses.iter().map(|bus| format!("0000:{bus:02x}:00.0").parse().unwrap()).collect();
        let nodes = near(host.root(), &functions, cpus, MemorySize::from_mib(mib));
        nodes.iter().map(|node| (node.cpus, node.memory.bytes() / MIB, node.host_node.unwrap())).collect()
    }

    #[test]
    fn memory_comes_from_the_node_of_the_devices() {
        let host = host();
        assert_eq!(near_in(&host, &[1], 4, 1024), [(4, 1024, 0)]);
        assert_eq!(near_in(&host, &[3, 2], 1, 512), [(1, 512, 1)]);
        assert_eq!(near_in(&host, &[], 1, 512), [], "without devices nothing is near");
    }

    #[test]
    fn devices_of_two_nodes_have_half_of_it_each() {
        let host = host();
        assert_eq!(near_in(&host, &[2, 1, 3], 4, 2048), [(2, 1024, 0), (2, 1024, 1)]);
        assert_eq!(near_in(&host, &[1, 2], 3, 514), [(2, 258, 0), (1, 256, 1)], "whole granules");
        assert_eq!(near_in(&host, &[1, 2], 1, 512), [], "no node without a CPU");
    }

    #[test]
    fn it_comes_from_anywhere_where_a_node_is_unknown_or_short() {
        let host = host();
        assert_eq!(near_in(&host, &[4], 4, 512), [], "the firmware does not say");
        assert_eq!(near_in(&host, &[1, 4], 4, 512), []);
        assert_eq!(near_in(&host, &[9], 4, 512), [], "there is no such device");
        assert_eq!(near_in(&host, &[5], 4, 512), [], "a node without memory");
        assert_eq!(near_in(&host, &[1], 4, 1920), [(4, 1920, 0)]);
        assert_eq!(near_in(&host, &[1], 4, 1922), [], "some of what is free stays free");
        assert_eq!(near_in(&host, &[1, 2], 4, 3840), [(2, 1920, 0), (2, 1920, 1)]);
    }

    #[test]
    fn a_host_with_one_node_is_left_alone() {
        let host = host().without("sys/devices/system/node/node1");
        assert_eq!(near_in(&host, &[1], 4, 512), []);
        assert_eq!(near_in(&FakeHost::new(), &[1], 4, 512), []);
    }
}
