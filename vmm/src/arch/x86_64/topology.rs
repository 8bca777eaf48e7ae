//! APIC IDs: a CPU's place in the topology, one bit field a level (Intel SDM 3A §9.9.1).

use crate::config::{CpuConfig, CpuTopology, NumaNodeConfig};

/// A topology with its derived bit fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// The topology of a checked configuration: by default one socket, one thread a core.
    pub fn of(cpus: &CpuConfig) -> Self {
        let CpuTopology { sockets, cores, threads } =
            cpus.topology.unwrap_or(CpuTopology { sockets: 1, cores: cpus.count, threads: 1 });
        Self { sockets: sockets.into(), cores: cores.into(), threads: threads.into() }
    }

    /// The same for a machine with NUMA nodes: unless the configuration says otherwise, nodes of equal size are
    /// sockets, because Linux complains of caches that CPUs of different nodes share.
    pub fn with_nodes(cpus: &CpuConfig, nodes: &[NumaNodeConfig]) -> Self {
        let equal = nodes.iter().all(|node| node.cpus == nodes[0].cpus && node.cpus > 0);
        match nodes {
            [first, _, ..] if equal && cpus.topology.is_none() => {
                Self { sockets: nodes.len() as u32, cores: first.cpus.into(), threads: 1 }
            }
            _ => Self::of(cpus),
        }
    }

    /// Threads a core.
    pub fn threads_per_core(self) -> u32 {
        self.threads
    }

    /// Cores a socket.
    pub fn cores_per_socket(self) -> u32 {
        self.cores
    }

    /// Threads a socket.
    pub fn threads_per_socket(self) -> u32 {
        self.cores * self.threads
    }

    /// Width of the thread field in an APIC ID.
    pub fn thread_bits(self) -> u32 {
        field_bits(self.threads)
    }

    /// Width of the thread and core fields together.
    pub fn core_bits(self) -> u32 {
        self.thread_bits() + field_bits(self.cores)
    }

    /// The APIC ID of CPU `index`: consecutive CPUs share a core first, then a socket.
    ///
    /// Below 255 for every topology of at most 64 CPUs with at most 2 threads a core.
    pub fn apic_id(self, index: u8) -> u32 {
        let index = u32::from(index);
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.threads_per_socket();
        socket << self.core_bits() | core << self.thread_bits() | thread
    }
}

fn field_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemorySize;
    use std::collections::BTreeSet;

    #[test]
    fn apic_ids_are_unique_and_fit_eight_bits() {
        for sockets in 1..=64_u8 {
            for cores in 1..=64 / sockets {
                for threads in 1..=(64 / sockets / cores).min(2) {
                    let count = sockets * cores * threads;
                    let topology = Some(CpuTopology { sockets, cores, threads });
                    let topology = Topology::of(&CpuConfig { count, topology });
                    let ids: BTreeSet<u32> = (0..count).map(|index| topology.apic_id(index)).collect();
                    assert_eq!(ids.len(), usize::from(count));
                    assert!(ids.into_iter().all(|id| id < 255), "{sockets}:{cores}:{threads}");
                }
            }
        }
    }

    #[test]
    fn nodes_of_equal_size_are_sockets_unless_the_description_says_otherwise() {
        let cpus = CpuConfig { count: 6, topology: None };
        let node = |cpus| NumaNodeConfig { cpus, memory: MemorySize::from_mib(2), host_node: None };
        let sockets = |cpus: &CpuConfig, nodes: &[u8]| {
            let nodes: Vec<_> = nodes.iter().map(|count| node(*count)).collect();
            Topology::with_nodes(cpus, &nodes).sockets
        };
        assert_eq!(sockets(&cpus, &[2, 2, 2]), 3);
        assert_eq!([sockets(&cpus, &[]), sockets(&cpus, &[6]), sockets(&cpus, &[4, 2])], [1, 1, 1]);
        let topology = Some(CpuTopology { sockets: 1, cores: 6, threads: 1 });
        assert_eq!(sockets(&CpuConfig { count: 6, topology }, &[3, 3]), 1);
    }

    #[test]
    fn siblings_share_all_but_the_thread_field() {
        let topology = Some(CpuTopology { sockets: 2, cores: 3, threads: 2 });
        let topology = Topology::of(&CpuConfig { count: 12, topology });
        let ids: Vec<u32> = (0..12).map(|index| topology.apic_id(index)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }
}
