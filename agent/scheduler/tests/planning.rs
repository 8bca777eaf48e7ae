//! What users rely on: no over-commitment, whole gangs, order, the same plan every time, and
//! reasons that say what is missing.

use lathe_api::job::IsolationClass::{self, Container, Microvm};
use lathe_scheduler::old::{Capacity, Gang, Node, Plan, Policy, Reason, plan};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn capacity(cpus: u32, mib: u64, sandboxes: u32) -> Capacity {
    Capacity { cpus, memory_bytes: mib * MIB, gpus: 0, sandboxes }
}

fn node(name: &str, cpus: u32, mib: u64) -> Node {
    let total = capacity(cpus, mib, 253);
    Node {
        name: name.to_owned(),
        total,
        free: total,
        classes: vec![Microvm, Container],
        class_problems: Vec::new(),
        gpu_problems: Vec::new(),
    }
}

/// A node with GPUs, of which some are free.
fn gpu_node(name: &str, gpus: u32, free: u32) -> Node {
    let mut node = node(name, 16, 8192);
    (node.total.gpus, node.free.gpus) = (gpus, free);
    node
}

fn gpu_gang(id: &str, tasks: u32, gpus: u32) -> Gang {
    let mut gang = gang(id, tasks, 1, 256);
    gang.task.gpus = gpus;
    gang
}

fn gang(id: &str, tasks: u32, cpus: u32, mib: u64) -> Gang {
    Gang { id: id.to_owned(), class: Microvm, tasks, task: capacity(cpus, mib, 1) }
}

fn fcfs(nodes: &[Node], gangs: &[Gang]) -> Plan {
    plan(nodes, gangs, Policy::FirstComeFirstServed)
}

fn reason(nodes: &[Node], gangs: &[Gang], id: &str) -> String {
    let plan = fcfs(nodes, gangs);
    let waiting = plan.waiting.iter().find(|waiting| waiting.gang == id).expect("it waits");
    waiting.reason.to_string()
}

#[test]
fn a_gang_is_spread_evenly_with_neighbouring_ranks_together() {
    let nodes = [node("n1", 8, 8192), node("n2", 8, 8192), node("n3", 1, 8192)];
    let plan = fcfs(&nodes, &[gang("a", 5, 1, 256)]);
    assert_eq!(plan.placements[0].nodes, ["n1", "n1", "n2", "n2", "n3"]);
    assert!(plan.waiting.is_empty());
}

#[test]
fn later_gangs_do_not_overtake_one_that_waits_for_room() {
    let mut nodes = [node("n1", 4, 8192)];
    nodes[0].free.cpus = 2;
    let gangs = [gang("big", 4, 1, 256), gang("small", 1, 1, 256)];
    assert!(fcfs(&nodes, &gangs).placements.is_empty());
    assert_eq!(reason(&nodes, &gangs, "big"), "needs 4 CPUs in total across nodes; 2 are free");
    assert_eq!(reason(&nodes, &gangs, "small"), "behind job big, which came first");
}

#[test]
fn a_gang_larger_than_the_cluster_waits_without_holding_up_others() {
    let nodes = [node("n1", 2, 2048), node("n2", 2, 2048)];
    let gangs = [gang("huge", 8, 1, 512), gang("small", 4, 1, 256)];
    let plan = fcfs(&nodes, &gangs);
    assert_eq!(plan.placements.len(), 1);
    assert_eq!(plan.placements[0].gang, "small");
    assert_eq!(
        reason(&nodes, &gangs, "huge"),
        "larger than the whole cluster: needs 8 tasks of 1 CPU and 512 MiB, the ready nodes hold 4 of \
         them when empty; waits until nodes are added"
    );
}

#[test]
fn every_kind_of_shortage_is_named() {
    assert_eq!(reason(&[], &[gang("a", 1, 1, 64)], "a"), "no node is ready");

    let mut containers_only = node("n1", 2, 1024);
    containers_only.classes = vec![Container];
    containers_only.class_problems = vec!["microvm: no /dev/kvm".to_owned()];
    assert_eq!(
        reason(&[containers_only], &[gang("a", 1, 1, 64)], "a"),
        "no ready node runs class microvm: n1: microvm: no /dev/kvm"
    );

    let mut full = node("n1", 8, 1024);
    full.free.memory_bytes = 256 * MIB;
    assert_eq!(
        reason(&[full], &[gang("a", 2, 1, 256)], "a"),
        "needs 512 MiB of memory in total across nodes; 256 MiB are free"
    );

    let mut pieces = [node("n1", 4, 1024), node("n2", 4, 1024)];
    pieces[0].free.cpus = 1;
    pieces[1].free.cpus = 3;
    assert_eq!(
        reason(&pieces, &[gang("a", 2, 2, 64)], "a"),
        "needs room for 2 tasks of 2 CPUs and 64 MiB; only 1 of them fit beside what runs now"
    );
}

#[test]
fn shortages_of_gpus_are_named() {
    let mut blocked = gpu_node("n1", 0, 0);
    blocked.gpu_problems = vec!["0000:01:00.0: the IOMMU is off".to_owned()];
    assert_eq!(
        reason(&[blocked], &[gpu_gang("a", 1, 1)], "a"),
        "needs 1 GPU, the most that a ready node can give is 0: n1: 0000:01:00.0: the IOMMU is off"
    );
    let nodes = [gpu_node("n1", 4, 1), gpu_node("n2", 4, 1)];
    assert_eq!(
        reason(&nodes, &[gpu_gang("a", 1, 2)], "a"),
        "needs 2 GPUs, the largest number free on one node is 1"
    );
    assert_eq!(reason(&nodes, &[gpu_gang("a", 4, 1)], "a"), "needs 4 GPUs in total across nodes; 2 are free");
    assert_eq!(
        reason(&nodes, &[gpu_gang("a", 3, 4)], "a"),
        "larger than the whole cluster: needs 3 tasks of 1 CPU, 256 MiB and 4 GPUs, the ready nodes hold \
         2 of them when empty; waits until nodes are added"
    );
}

#[test]
fn work_without_gpus_leaves_nodes_with_free_ones_alone() {
    let nodes = [gpu_node("a1", 8, 8), gpu_node("b2", 8, 0), node("c3", 2, 2048)];
    let placed = |gang: Gang| fcfs(&nodes, &[gang]).placements[0].nodes.clone();
    assert_eq!(placed(gang("plain", 1, 1, 256)), ["b2"]);
    assert_eq!(placed(gang("wide", 3, 1, 256)), ["a1", "b2", "c3"]);
    assert_eq!(placed(gpu_gang("gpus", 1, 2)), ["a1"]);
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    let one = (1_u32..16, 64_u64..4096, 0_u32..8, 0_u32..=100, prop::bool::ANY, 0_u32..9);
    prop::collection::vec(one, 0..12).prop_map(|specs| {
        type Spec = (u32, u64, u32, u32, bool, u32);
        let build = |(index, (cpus, mib, sandboxes, used, microvm, gpus)): (usize, Spec)| {
            let classes: Vec<IsolationClass> =
                if microvm { vec![Microvm, Container] } else { vec![Container] };
            let share = |amount: u64| amount - amount * u64::from(used) / 100;
            Node {
                name: format!("n{index:02}"),
                total: Capacity { gpus, ..capacity(cpus, mib, sandboxes) },
                free: Capacity {
                    cpus: u32::try_from(share(cpus.into())).expect("smaller"),
                    memory_bytes: share(mib * MIB),
                    gpus: u32::try_from(share(gpus.into())).expect("smaller"),
                    sandboxes,
                },
                classes,
                class_problems: Vec::new(),
                gpu_problems: Vec::new(),
            }
        };
        specs.into_iter().enumerate().map(build).collect()
    })
}

fn gangs() -> impl Strategy<Value = Vec<Gang>> {
    let one = (prop::bool::ANY, 1_u32..10, 1_u32..6, 16_u64..1024, 0_u32..4);
    prop::collection::vec(one, 0..12).prop_map(|specs| {
        type Spec = (bool, u32, u32, u64, u32);
        let build = |(index, (microvm, tasks, cpus, mib, gpus)): (usize, Spec)| Gang {
            id: format!("g{index:02}"),
            class: if microvm { Microvm } else { Container },
            tasks,
            task: Capacity { gpus, ..capacity(cpus, mib, 1) },
        };
        specs.into_iter().enumerate().map(build).collect()
    })
}

proptest! {
    #[test]
    fn no_node_is_promised_more_than_it_has_and_gangs_stay_whole(nodes in nodes(), gangs in gangs()) {
        let plan = fcfs(&nodes, &gangs);
        let mut free: Vec<_> = nodes.iter().map(|node| node.free).collect();
        for placement in &plan.placements {
            let gang = gangs.iter().find(|gang| gang.id == placement.gang).expect("a known gang");
            prop_assert_eq!(placement.nodes.len(), gang.tasks as usize);
            for name in &placement.nodes {
                let index = nodes.iter().position(|node| &node.name == name).expect("a known node");
                prop_assert!(nodes[index].classes.contains(&gang.class));
                prop_assert!(free[index].holds(gang.task) >= 1, "{} is over-committed", name);
                free[index].cpus -= gang.task.cpus;
                free[index].memory_bytes -= gang.task.memory_bytes;
                free[index].gpus -= gang.task.gpus;
                free[index].sandboxes -= gang.task.sandboxes;
            }
        }
        let mut seen: Vec<_> = plan.placements.iter().map(|p| p.gang.clone())
            .chain(plan.waiting.iter().map(|w| w.gang.clone())).collect();
        seen.sort();
        let all: Vec<_> = gangs.iter().map(|gang| gang.id.clone()).collect();
        prop_assert_eq!(seen, all, "each gang is placed or has a reason, once");
    }

    #[test]
    fn the_order_of_nodes_in_the_snapshot_does_not_matter(
        (nodes, shuffled) in nodes().prop_flat_map(|nodes| (Just(nodes.clone()), Just(nodes).prop_shuffle())),
        gangs in gangs(),
    ) {
        let (one, other) = (fcfs(&nodes, &gangs), fcfs(&shuffled, &gangs));
        prop_assert_eq!(&one.placements, &other.placements);
        prop_assert_eq!(one, fcfs(&nodes, &gangs));
    }

    #[test]
    fn nothing_that_fits_now_waits_unless_it_would_overtake(nodes in nodes(), gangs in gangs()) {
        let plan = fcfs(&nodes, &gangs);
        let position = |id: &str| gangs.iter().position(|gang| gang.id == id).expect("known");
        let head = plan.waiting.iter().find(|w| matches!(
            w.reason, Reason::GpusOnOneNode { .. } | Reason::Gpus { .. } | Reason::Cpus { .. } | Reason::Memory { .. } | Reason::Fragmented { .. }));
        for waiting in &plan.waiting {
            if let Reason::Behind { gang } = &waiting.reason {
                prop_assert_eq!(Some(gang), head.map(|head| &head.gang));
                prop_assert!(position(gang) < position(&waiting.gang));
            }
        }
        if let Some(head) = head {
            for placement in &plan.placements {
                prop_assert!(position(&placement.gang) < position(&head.gang), "overtaken");
            }
        }
    }
}
