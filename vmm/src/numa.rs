//! NUMA: the guest's nodes, where their memory lies in the guest and on the host, and how far they are apart.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::native::layout;
use crate::config::{HugepageSize, MemorySize, NumaNodeConfig};

/// A node's distance to itself (ACPI 6.5 §5.2.17).
const LOCAL: u8 = 10;
/// What is assumed between nodes of which nothing is known.
const REMOTE: u8 = 20;
/// Where the kernel describes the host's nodes.
pub const HOST_NODES: &str = "/sys/devices/system/node";

/// A node of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// Its CPUs.
    pub cpus: Range<u8>,
    /// Its memory: guest physical addresses.
    pub memory: Vec<Range<u64>>,
    /// Distances to all nodes, itself included.
    pub distances: Vec<u8>,
}

/// Nodes that this host cannot give.
#[derive(Debug, thiserror::Error)]
pub enum NumaError {
    /// No such node.
    #[error("numa[{index}].host_node: this host has no NUMA node {node} with memory")]
    NoNode {
        /// Which node of the guest.
        index: usize,
        /// Asked for.
        node: u32,
    },
    /// A node that is too small.
    #[error("numa[{index}].memory: {asked} is more than the {total} of the host's NUMA node {node}")]
    TooSmall {
        /// Which node of the guest.
        index: usize,
        /// The host's node.
        node: u32,
        /// Asked for, with other nodes of the guest on the same node.
        asked: MemorySize,
        /// What it has.
        total: MemorySize,
    },
    /// A node with too few free hugepages.
    #[error(
        "numa[{index}].host_node: {needed} free hugepages of {size} are needed on the host's NUMA node {node}, \
         which has {free}; reserve them with: echo {needed} > {}/nr_hugepages", .pool.display()
    )]
    Hugepages {
        /// Which node of the guest.
        index: usize,
        /// The host's node.
        node: u32,
        /// Their size.
        size: MemorySize,
        /// How many, with other nodes of the guest on the same node.
        needed: u64,
        /// How many are free.
        free: u64,
        /// The pool's directory.
        pool: PathBuf,
    },
    /// The kernel refused to bind memory.
    #[error("numa[{index}].host_node: memory cannot be bound to the host's NUMA node {node}: {source}")]
    Bind {
        /// Which node of the guest.
        index: usize,
        /// The host's node.
        node: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The guest's nodes: each has the next CPUs and the next memory. `host` is [`HOST_NODES`] but in tests.
pub fn nodes(config: &[NumaNodeConfig], host: &Path) -> Vec<NumaNode> {
    let (mut cpu, mut offset) = (0_u8, 0_u64);
    let mut nodes = Vec::with_capacity(config.len());
    for node in config {
        let (cpus, memory) = (cpu..cpu.saturating_add(node.cpus), offset..offset + node.memory.bytes());
        (cpu, offset) = (cpus.end, memory.end);
        let distances = config.iter().map(|other| distance(node, other, host)).collect();
        nodes.push(NumaNode { cpus, memory: guest_ranges(&memory), distances });
    }
    for (index, node) in nodes.iter_mut().enumerate() {
        node.distances[index] = LOCAL;
    }
    nodes
}

/// Where a range of RAM, counted without the 32-bit hole, lies in the guest.
fn guest_ranges(ram: &Range<u64>) -> Vec<Range<u64>> {
    let hole = layout::HOLE;
    let above = |offset: u64| hole.end + (offset - hole.start);
    let low = ram.start.min(hole.start)..ram.end.min(hole.start);
    let high = ram.start.max(hole.start)..ram.end.max(hole.start);
    let ranges = [low, above(high.start)..above(high.end)];
    ranges.into_iter().filter(|range| !range.is_empty()).collect()
}

/// As the host's firmware has it. Two of the guest's nodes on one of the host's are the next best to local:
/// Linux believes no table in which different nodes are as near as one to itself.
fn distance(from: &NumaNodeConfig, to: &NumaNodeConfig, host: &Path) -> u8 {
    let (Some(from), Some(to)) = (from.host_node, to.host_node) else { return REMOTE };
    let known = || {
        let online = fs::read_to_string(host.join("online")).ok()?;
        let index = online_nodes(&online).position(|node| node == to)?;
        let row = fs::read_to_string(host.join(format!("node{from}/distance"))).ok()?;
        row.split_whitespace().nth(index)?.parse::<u8>().ok()
    };
    known().unwrap_or(REMOTE).max(LOCAL + 1)
}

/// `0-1,4` as 0, 1, 4.
fn online_nodes(list: &str) -> impl Iterator<Item = u32> {
    list.trim().split(',').flat_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first..last.saturating_add(1),
            _ => 0..0,
        }
    })
}

/// Checks that the host has the nodes, and that they have the memory. `host` is [`HOST_NODES`] but in tests.
///
/// # Errors
/// The first node that it has not, or that is too small.
pub fn check_host(
    config: &[NumaNodeConfig],
    hugepages: Option<HugepageSize>,
    host: &Path,
) -> Result<(), NumaError> {
    for (index, config_node) in config.iter().enumerate() {
        let Some(node) = config_node.host_node else { continue };
        let directory = host.join(format!("node{node}"));
        let total = memory_total(&directory).ok_or(NumaError::NoNode { index, node })?;
        let same = config[..=index].iter().filter(|other| other.host_node == Some(node));
        let asked = same.map(|other| other.memory.bytes()).sum::<u64>();
        if asked > total {
            let (asked, total) = (MemorySize::from_bytes(asked), MemorySize::from_bytes(total));
            return Err(NumaError::TooSmall { index, node, asked, total });
        }
        let Some(page) = hugepages.map(HugepageSize::bytes) else { continue };
        let pool = directory.join(format!("hugepages/hugepages-{}kB", page >> 10));
        let free = fs::read_to_string(pool.join("free_hugepages"));
        let free = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let needed = asked / page;
        if needed > free {
            let size = MemorySize::from_bytes(page);
            return Err(NumaError::Hugepages { index, node, size, needed, free, pool });
        }
    }
    Ok(())
}

/// Bytes of memory on a node; `None` if there is no such node, or it has none.
fn memory_total(directory: &Path) -> Option<u64> {
    let text = fs::read_to_string(directory.join("meminfo")).ok()?;
    let line = text.lines().find(|line| line.contains("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().rev().nth(1)?.parse().ok()?;
    (kib > 0).then_some(kib << 10)
}

/// Has the memory of each node taken from the host's node: to be called before anything touches it.
///
/// # Errors
/// When the kernel refuses.
pub fn bind(memory: &GuestMemoryMmap, config: &[NumaNodeConfig]) -> Result<(), NumaError> {
    let mut offset = 0;
    for (index, config_node) in config.iter().enumerate() {
        let ram = offset..offset + config_node.memory.bytes();
        offset = ram.end;
        let Some(node) = config_node.host_node else { continue };
        for range in guest_ranges(&ram) {
            bind_range(memory, &range, node).map_err(|source| NumaError::Bind { index, node, source })?;
        }
    }
    Ok(())
}

fn bind_range(memory: &GuestMemoryMmap, range: &Range<u64>, node: u32) -> io::Result<()> {
    const MPOL_BIND: libc::c_int = 2;
    /// Bits of the kernel's largest node mask (CONFIG_NODES_SHIFT is 10 at most).
    const NODES: usize = 1024;
    let start = GuestAddress(range.start);
    let length = range.end - range.start;
    let region = memory.find_region(start).filter(|region| {
        length <= region.len() && range.start - region.start_addr().0 <= region.len() - length
    });
    let address = region.and_then(|region| region.get_host_address(region.to_region_addr(start)?).ok());
    let address = address.ok_or(io::ErrorKind::InvalidInput)?;
    let mut mask = [0_u64; NODES / 64];
    let word = mask.get_mut(node as usize / 64).ok_or(io::ErrorKind::InvalidInput)?;
    *word = 1 << (node % 64);
    // SAFETY: the range lies in one mapping, which `memory` holds; a policy changes where its pages come from and
    // not what is in them. The mask is read only, and as long as its length, less one, says.
    let result =
        unsafe { libc::syscall(libc::SYS_mbind, address, length, MPOL_BIND, mask.as_ptr(), NODES + 1, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory;

    const GIB: u64 = 1 << 30;

    fn node(cpus: u8, gib: u64, host_node: Option<u32>) -> NumaNodeConfig {
        NumaNodeConfig { cpus, memory: MemorySize::from_bytes(gib * GIB), host_node }
    }

    /// A host with nodes 0, 2 and 3, of 4 GiB each.
    fn host() -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        fs::write(host.path().join("online"), "0,2-3\n").unwrap();
        for (number, row) in [(0, "10 21 31"), (2, "21 10 16"), (3, "31 16 10")] {
            let directory = host.path().join(format!("node{number}"));
            fs::create_dir_all(directory.join("hugepages/hugepages-2048kB")).unwrap();
            fs::write(directory.join("distance"), row).unwrap();
            let meminfo = format!("Node {number} MemTotal:        4194304 kB\nNode {number} MemFree: 1 kB\n");
            fs::write(directory.join("meminfo"), meminfo).unwrap();
            fs::write(directory.join("hugepages/hugepages-2048kB/free_hugepages"), "512\n").unwrap();
        }
        host
    }

    #[test]
    fn nodes_have_cpus_and_memory_in_turn_around_the_hole() {
        let host = host();
        let nodes = nodes(&[node(2, 2, Some(0)), node(1, 2, Some(3)), node(1, 1, Some(3))], host.path());
        assert_eq!((nodes[0].memory.len(), &nodes[0].memory[0]), (1, &(0..2 * GIB)));
        assert_eq!(nodes[1].memory, [2 * GIB..3 * GIB, 4 * GIB..5 * GIB]);
        assert_eq!((nodes[2].memory.len(), &nodes[2].memory[0]), (1, &(5 * GIB..6 * GIB)));
        assert_eq!((nodes[0].cpus.clone(), nodes[2].cpus.clone()), (0..2, 3..4));
        let distances: Vec<_> = nodes.into_iter().map(|node| node.distances).collect();
        assert_eq!(distances, [[10, 31, 31], [31, 10, 11], [31, 11, 10]]);
    }

    #[test]
    fn nodes_of_unknown_distance_are_remote() {
        let nodes = nodes(&[node(1, 1, None), node(1, 1, Some(9))], Path::new("/nonexistent"));
        assert_eq!((nodes[0].distances.clone(), nodes[1].distances.clone()), (vec![10, 20], vec![20, 10]));
    }

    #[test]
    fn a_host_without_the_node_or_its_memory_is_refused_by_name() {
        let host = host();
        let check = |config: &[NumaNodeConfig], pages| {
            check_host(config, pages, host.path()).map_err(|error| error.to_string())
        };
        assert_eq!(check(&[node(1, 4, Some(0)), node(1, 9, None)], None), Ok(()));
        let missing = check(&[node(1, 1, Some(0)), node(1, 1, Some(1))], None).unwrap_err();
        assert_eq!(missing, "numa[1].host_node: this host has no NUMA node 1 with memory");
        let small = check(&[node(1, 3, Some(2)), node(1, 2, Some(2))], None).unwrap_err();
        assert_eq!(small, "numa[1].memory: 5 GiB is more than the 4 GiB of the host's NUMA node 2");
        assert_eq!(check(&[node(1, 1, Some(0))], Some(HugepageSize::TwoMiB)), Ok(()));
        let pages = check(&[node(1, 2, Some(0))], Some(HugepageSize::TwoMiB)).unwrap_err();
        assert!(
            pages.starts_with("numa[0].host_node: 1024 free hugepages of 2 MiB are needed on"),
            "{pages}"
        );
    }

    #[test]
    fn memory_is_bound_to_a_node_that_is_there_and_to_no_other() {
        let config = MemoryConfig { size: MemorySize::from_mib(64), hugepages: None };
        let memory = memory::allocate(&config).unwrap();
        let half = |host_node| NumaNodeConfig { cpus: 1, memory: MemorySize::from_mib(32), host_node };
        let bound = bind(&memory, &[half(None), half(Some(0))]);
        // A kernel without NUMA has no such call.
        if let Err(NumaError::Bind { source, .. }) = &bound {
            assert_eq!(source.raw_os_error(), Some(libc::ENOSYS), "{source}");
        }
        let error = bind(&memory, &[half(Some(1023)), half(None)]).unwrap_err();
        assert!(error.to_string().starts_with("numa[0].host_node: "), "{error}");
    }
}
