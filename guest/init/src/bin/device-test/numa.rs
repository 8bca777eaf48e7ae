//! The machine's NUMA nodes as the kernel has them: `numa_node N cpus=LIST memory_mib=SIZE`. Which device is near which
//! node is in [`super::tree`].

use std::fs;

use crate::Failure;

const NODES: &str = "/sys/devices/system/node";

/// Prints a line a node, by number.
pub fn print() -> Result<(), Failure> {
    let entries = fs::read_dir(NODES).map_err(Failure::at(NODES))?;
    let number = |name: &str| name.strip_prefix("node")?.parse::<u32>().ok();
    let mut nodes: Vec<u32> =
        entries.flatten().filter_map(|entry| number(&entry.file_name().to_string_lossy())).collect();
    nodes.sort_unstable();
    for node in nodes {
        let read = |file: &str| {
            let path = format!("{NODES}/node{node}/{file}");
            fs::read_to_string(&path).map_err(Failure::at(path))
        };
        let memory = memory_mib(&read("meminfo")?)
            .ok_or_else(|| Failure::wrong(format!("node {node} does not say how much memory it has")))?;
        println!("numa_node {node} cpus={} memory_mib={memory}", read("cpulist")?.trim());
    }
    Ok(())
}

/// From a node's `meminfo`: `Node 0 MemTotal:   262144 kB`.
fn memory_mib(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("MemTotal:")?;
    rest.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_memory_is_read() {
        let text = "Node 1 MemTotal:          262144 kB\nNode 1 MemFree:           200000 kB\n";
        assert_eq!(memory_mib(text), Some(256));
        assert_eq!(memory_mib("Node 1 MemFree: 1 kB\n"), None);
    }
}
