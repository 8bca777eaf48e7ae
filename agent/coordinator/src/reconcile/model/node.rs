//! Nodes, as the planner knows them.

use std::collections::{BTreeMap, BTreeSet};

use lathe_api::HostPciAddress;
use lathe_api::gpu::{self, GpuHealth, GpuState, Severity};
use lathe_api::node::{Inventory, LEAF_LABEL, NodeOffer, RACK_LABEL};
use lathe_scheduler::Amount;
use lathe_scheduler::model::{Free, Gpu, GpuFree, Node, NumaNode, Offer, Sharing, Taint, Window};

use crate::coordinator::Live;
use crate::network::SANDBOXES_PER_NODE;
use crate::records::{Allocations, NodeRecord, Operations};

/// Memory of a node that tasks do not get: its kernel, agent and page cache, and what each VMM needs
/// beyond its guest's memory. A sixteenth, and no less than this.
const RESERVED_BYTES_MIN: u64 = 256 << 20;
/// As many as the planner numbers.
const MAX_GPUS: usize = 64;

/// A node as it is when nothing runs there.
pub fn node(record: &NodeRecord, operations: &Operations, live: &Live, now_ms: u64) -> Node {
    let inventory = &record.inventory;
    let labels = operations.labels_of(inventory);
    let numa = if inventory.numa.len() > 1 { numa(inventory) } else { Vec::new() };
    Node {
        name: record.name.clone(),
        total: total(inventory),
        gpus: gpus(inventory),
        numa,
        classes: inventory.classes.clone(),
        class_problems: inventory.class_problems.clone(),
        gpu_problems: gpu_problems(inventory),
        leaf: labels.get(LEAF_LABEL).cloned(),
        rack: labels.get(RACK_LABEL).cloned(),
        labels,
        taints: operations
            .taints
            .iter()
            .map(|taint| Taint { key: taint.key.clone(), value: taint.value.clone() })
            .collect(),
        fetch_mbps: inventory.nics.iter().filter_map(|nic| nic.speed_mbps).max().unwrap_or(0),
        artefacts: inventory.artefacts.iter().map(|one| (one.digest.to_string(), one.bytes)).collect(),
        offer: match offer(operations, live, now_ms) {
            NodeOffer::Open => Offer::Open,
            NodeOffer::Cordoned(reason) => Offer::Cordoned { reason },
            NodeOffer::Draining(reason) => Offer::Draining { reason },
            NodeOffer::Suspected(reason) => Offer::Suspected { reason },
        },
        maintenance: operations
            .maintenance
            .iter()
            .filter(|window| window.until_ms > now_ms)
            .map(|window| Window {
                from_ms: window.from_ms,
                until_ms: window.until_ms,
                reason: window.reason.clone(),
            })
            .collect(),
    }
}

/// What an operator wants goes before what is suspected.
pub fn offer(operations: &Operations, live: &Live, now_ms: u64) -> NodeOffer {
    match (&operations.offer, live.refusals.suspected(now_ms)) {
        (NodeOffer::Open, Some(reason)) => NodeOffer::Suspected(reason.to_owned()),
        (offer, _) => offer.clone(),
    }
}

/// What tasks can have of it when it runs none.
pub fn total(inventory: &Inventory) -> Amount {
    let memory = inventory.memory.map_or(0, |memory| memory.bytes());
    Amount {
        cpu_milli: u64::from(inventory.cpus.online) * 1000,
        memory_bytes: memory.saturating_sub(RESERVED_BYTES_MIN.max(memory / 16)),
        hugepage_bytes: inventory
            .hugepages
            .iter()
            .fold(0, |sum, pool| sum.saturating_add(pool.total.saturating_mul(pool.page_bytes))),
        sandboxes: SANDBOXES_PER_NODE,
    }
}

fn numa(inventory: &Inventory) -> Vec<NumaNode> {
    let amount = |numa: &lathe_api::node::NumaNode| Amount {
        cpu_milli: u64::try_from(numa.cpus.len()).unwrap_or(u64::MAX).saturating_mul(1000),
        memory_bytes: numa.memory_bytes,
        hugepage_bytes: 0,
        sandboxes: 0,
    };
    inventory.numa.iter().map(|numa| NumaNode { total: amount(numa) }).collect()
}

/// GPUs that can be given away, whoever has them now; their order is the inventory's.
pub fn usable(inventory: &Inventory) -> impl Iterator<Item = &gpu::Gpu> {
    inventory.gpus.iter().filter(|gpu| gpu.is_usable()).take(MAX_GPUS)
}

fn gpus(inventory: &Inventory) -> Vec<Gpu> {
    let links = links(inventory);
    let switches: Vec<HostPciAddress> =
        usable(inventory).filter_map(switch).collect::<BTreeSet<_>>().into_iter().collect();
    usable(inventory)
        .map(|gpu| Gpu {
            id: gpu.address.to_string(),
            model: gpu.model.clone(),
            memory_bytes: gpu.memory_bytes,
            // The planner counts NUMA nodes by their place in the list.
            numa: gpu.numa_node.and_then(|id| {
                let at = inventory.numa.iter().position(|numa| numa.id == id)?;
                u8::try_from(at).ok()
            }),
            switch: switch(gpu).and_then(|of| {
                let at = switches.iter().position(|one| *one == of)?;
                u8::try_from(at).ok()
            }),
            link: links.get(&gpu.address).copied(),
            partition: None,
            // A device that is partitioned already is given whole with its partitions: agents report no
            // instances, so none can be given.
            sharing: Sharing::Whole,
        })
        .collect()
}

/// The PCIe switch that a GPU hangs below: below the root port come the switch's upstream port and its
/// downstream port. One directly below a root port has none; a bridge there is a switch of its own.
fn switch(gpu: &gpu::Gpu) -> Option<HostPciAddress> {
    match gpu.path.as_slice() {
        [] | [_] => None,
        [_, bridge] => Some(*bridge),
        [.., upstream, _] => Some(*upstream),
    }
}

/// Groups of GPUs that reach each other over NVLink, directly or through NVSwitches.
fn links(inventory: &Inventory) -> BTreeMap<HostPciAddress, u8> {
    let mut groups: Vec<BTreeSet<HostPciAddress>> = Vec::new();
    for gpu in &inventory.gpus {
        let peers = gpu.nvml.iter().flat_map(|nvml| &nvml.nvlink_peers).copied();
        let mut group: BTreeSet<_> = peers.collect();
        if group.is_empty() {
            continue;
        }
        group.insert(gpu.address);
        // Groups with a member in common are one.
        groups.retain(|other| {
            let joined = !other.is_disjoint(&group);
            if joined {
                group.extend(other);
            }
            !joined
        });
        groups.push(group);
    }
    groups.sort_unstable();
    let numbered = groups.into_iter().zip(0_u8..);
    numbered.flat_map(|(group, number)| group.into_iter().map(move |address| (address, number))).collect()
}

/// Why GPUs cannot be used: for each the first thing in the way.
fn gpu_problems(inventory: &Inventory) -> Vec<String> {
    let unusable = inventory.gpus.iter().filter(|gpu| !gpu.is_usable());
    let reasons = unusable.map(|gpu| {
        let blocking = || gpu.problems.iter().find(|problem| problem.severity == Severity::Blocks);
        let reason = match &gpu.health {
            GpuHealth::Failed(reason) => Some(reason),
            _ => gpu.reason.as_ref().or_else(|| blocking().map(|problem| &problem.what)),
        };
        format!("{}: {}", gpu.address, reason.map_or("quarantined", String::as_str))
    });
    reasons.collect()
}

/// Whether a GPU is in nobody's hands but those of whom it was promised to. The promise and the node's
/// report do not come at one moment: one that is promised counts as given, whatever the node says, and
/// one that nobody was promised is free only when the node says so.
pub fn is_offered(gpu: &gpu::Gpu, allocations: &Allocations) -> bool {
    gpu.state == GpuState::Free || is_promised(gpu.address, allocations)
}

/// Whether a GPU was promised to a sandbox.
pub fn is_promised(address: HostPciAddress, allocations: &Allocations) -> bool {
    allocations.sandboxes.values().any(|one| one.gpus.contains(&address))
}

/// What is free of a node beside nothing: what the planner then takes for each sandbox is the rest.
pub fn free(node: &Node, record: &NodeRecord, allocations: &Allocations, live: &Live) -> Free {
    let mut free = Free::all(node);
    for (gpu, left) in usable(&record.inventory).zip(&mut free.gpus) {
        if !is_offered(gpu, allocations) {
            *left = GpuFree::NONE;
        }
    }
    if live.strays > 0 {
        // What they use is unknown to the records: nothing is placed beside them.
        free.amount = Amount::default();
        free.gpus.fill(GpuFree::NONE);
    }
    free
}
