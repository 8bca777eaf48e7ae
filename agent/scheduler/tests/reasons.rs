//! The reason that a user reads when a gang has no room, and where gangs go that ask for more than room.

use std::collections::BTreeMap;

use lathe_scheduler::model::*;
use lathe_scheduler::placement::{PlaceRequest, Placer, Span};
use lathe_scheduler::policy::Strategy;

fn gpu(index: u8) -> Gpu {
    Gpu {
        id: String::new(),
        model: "H100".to_owned(),
        memory_bytes: 80 << 30,
        numa: Some(index / 4),
        switch: Some(index / 2),
        link: None,
        partition: None,
        sharing: Sharing::Whole,
    }
}

fn node(name: &str, leaf: &str) -> Node {
    let amount = |cpu_milli: u64| Amount { cpu_milli, memory_bytes: cpu_milli << 20, ..Amount::default() };
    Node {
        name: name.to_owned(),
        total: Amount { sandboxes: 99, ..amount(64_000) },
        numa: vec![NumaNode { total: amount(32_000) }; 2],
        gpus: (0..8).map(gpu).collect(),
        classes: vec![Gang::default().class],
        labels: BTreeMap::from([("zone".to_owned(), "b".to_owned())]),
        leaf: Some(leaf.to_owned()),
        rack: Some("r".to_owned()),
        ..Node::default()
    }
}

fn gang(tasks: u32, gpus: u32) -> Gang {
    Gang {
        tenant: "t".to_owned(),
        pool: "p".to_owned(),
        tasks: Size::exactly(tasks),
        task: TaskRequest {
            amount: Amount { cpu_milli: 1000, memory_bytes: 1 << 20, hugepage_bytes: 0, sandboxes: 1 },
            gpus: (gpus > 0).then(|| GpuRequest::whole(gpus)),
        },
        ..Gang::default()
    }
}

fn place(cluster: &mut Cluster, gang: &Gang) -> Result<Vec<TaskPlace>, String> {
    let span = Some(Span::of(gang, 0));
    let request = PlaceRequest { gang, tasks: gang.tasks.max, admits: &|_| true, admits_key: None, span };
    let mut placer = Placer::new(Strategy::Balanced, 1);
    placer.place_request(cluster, &request).map_err(|shortage| shortage.to_string())
}

fn reason(nodes: Vec<Node>, gang: &Gang) -> String {
    place(&mut Cluster::new(nodes), gang).expect_err("there is no room")
}

#[test]
fn each_filter_that_leaves_no_node_is_named() {
    let nodes = || vec![node("n1", "a"), node("n2", "a")];
    assert_eq!(reason(Vec::new(), &gang(1, 0)), "no node is ready");
    let operator = Operator::In(vec!["a".to_owned(), "c".to_owned()]);
    let zone = Constraint { label: "zone".to_owned(), operator };
    let constrained = Gang { constraints: vec![zone], ..gang(1, 1) };
    assert_eq!(
        reason(nodes(), &constrained),
        "constraint `zone in [a, c]` holds on no ready node that the others leave"
    );
    let mut other = gang(1, 1);
    other.task.gpus = Some(GpuRequest { models: vec!["B200".to_owned()], ..GpuRequest::whole(1) });
    assert_eq!(reason(nodes(), &other), "no ready node has a GPU of model B200; there are H100");
    let mut cordoned = nodes();
    for node in &mut cordoned {
        node.offer = Offer::Cordoned { reason: "new disks".to_owned() };
    }
    assert_eq!(reason(cordoned, &gang(1, 1)), "all 2 nodes that match are cordoned (n1: new disks)");
    let mut tainted = vec![node("n1", "a")];
    tainted[0].taints = vec![Taint { key: "team".to_owned(), value: "x".to_owned() }];
    assert_eq!(
        reason(tainted, &gang(1, 1)),
        "the only node that matches has taints that it does not tolerate: team=x"
    );
    let mut closing = vec![node("n1", "a")];
    closing[0].maintenance = vec![Window { from_ms: 1000, until_ms: 2000, reason: "BIOS".to_owned() }];
    let long = Gang { estimate_ms: Some(1500), ..gang(1, 1) };
    assert_eq!(
        reason(closing.clone(), &long),
        "the only node that matches has maintenance before it would have ended: BIOS"
    );
    assert!(place(&mut Cluster::new(closing), &Gang { estimate_ms: Some(900), ..gang(1, 1) }).is_ok());
}

#[test]
fn groups_that_are_too_small_are_named() {
    let mut cluster = Cluster::new(vec![node("n4", "a"), node("n5", "b")]);
    let switch = Gang { scope: Scope::Switch, ..gang(1, 2) };
    for index in [0, 2, 4, 6] {
        for node in 0..2 {
            let part = GpuFree::ALL;
            let taken = TaskPlace { node, gpus: vec![GpuPlace { index, part }], numa: None };
            cluster.take(&gang(1, 1), &taken).expect("it is free");
        }
    }
    assert_eq!(
        place(&mut cluster, &switch),
        Err("needs 2 GPUs on one switch; the largest free group is 1 on node n4".to_owned())
    );
    let leaf = Gang { scope: Scope::Leaf, ..gang(6, 1) };
    assert_eq!(
        place(&mut cluster, &leaf),
        Err("needs room for 6 tasks of 1 CPU, 1 MiB and 1 GPU on one leaf switch; the largest free group has \
             room for 4, with node n5"
            .to_owned())
    );
    let alone = Gang { tenant: "other".to_owned(), isolation: Isolation::Node, ..gang(1, 1) };
    assert_eq!(
        place(&mut cluster, &alone),
        Err("needs nodes without other tenants; 0 of 1 tasks fit".to_owned())
    );
}

#[test]
fn devices_of_a_task_are_close_and_its_cpus_are_beside_them() {
    let mut cluster = Cluster::new(vec![node("n1", "a")]);
    let pair = place(&mut cluster, &gang(1, 2)).expect("it fits");
    let indices: Vec<u8> = pair[0].gpus.iter().map(|gpu| gpu.index).collect();
    assert_eq!(indices[0] / 2, indices[1] / 2);
    assert_eq!(pair[0].numa, Some(indices[0] / 4));
    // Four go to the NUMA node that has four, not to what the pair left.
    let four = place(&mut cluster, &gang(1, 4)).expect("it fits");
    assert!(four[0].gpus.iter().all(|gpu| gpu.index / 4 != indices[0] / 4));
}

#[test]
fn partitions_are_given_whole() {
    let mut switched = node("n1", "a");
    for gpu in &mut switched.gpus {
        gpu.partition = gpu.switch;
    }
    let mut cluster = Cluster::new(vec![switched]);
    assert!(place(&mut cluster, &gang(1, 1)).is_err());
    let pair = place(&mut cluster, &gang(1, 4)).expect("it fits");
    let halves: Vec<u8> = pair[0].gpus.iter().map(|gpu| gpu.index / 2).collect();
    assert!(halves.chunks(2).all(|half| half[0] == half[1]));
}

#[test]
fn data_and_neighbours_decide_between_equal_nodes() {
    let mut nodes: Vec<Node> =
        (0..4).map(|index| node(&format!("n{index}"), ["a", "b"][index % 2])).collect();
    nodes[2].artefacts.insert("data".to_owned(), 100 << 30);
    let mut cluster = Cluster::new(nodes);
    let reader = Gang { inputs: vec![Input { digest: "data".to_owned(), bytes: 100 << 30 }], ..gang(1, 1) };
    assert_eq!(place(&mut cluster, &reader).expect("it fits")[0].node, 2);
    // Sixteen GPUs that talk stay below one leaf although three nodes elsewhere are as free.
    let ring = Gang { communication: Communication::Ring, ..gang(12, 1) };
    let places = place(&mut cluster, &ring).expect("it fits");
    let leaves: Vec<u32> = places.iter().map(|place| place.node % 2).collect();
    assert!(leaves.iter().all(|leaf| *leaf == leaves[0]), "{leaves:?}");
}
