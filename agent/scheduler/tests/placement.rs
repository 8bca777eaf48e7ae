//! What holds wherever gangs are placed: nothing is given away twice, gangs are whole, every demand is
//! met, the same input gives the same places, and what fits is found.

use std::collections::{BTreeMap, BTreeSet};

use lathe_api::job::IsolationClass::{Container, Microvm};
use lathe_scheduler::model::*;
use lathe_scheduler::placement::{Demand, PlaceRequest, Placer, Span, Ties};
use lathe_scheduler::policy::Strategy as Policy;
use proptest::prelude::*;

const POLICIES: [Policy; 8] = [
    Policy::Balanced,
    Policy::Random,
    Policy::DotProduct,
    Policy::GpuClustering,
    Policy::GpuPacking,
    Policy::BestFit,
    Policy::FragmentationGradientDescent,
    Policy::Spread,
];

fn profiles() -> Vec<Profile> {
    let profile = |name: &str, slots, compute, starts: &[u8]| Profile {
        name: name.to_owned(),
        slots,
        compute,
        starts: starts.to_vec(),
    };
    vec![
        profile("1g.10gb", 1, 1, &[0, 1, 2, 3, 4, 5, 6]),
        profile("2g.20gb", 2, 2, &[0, 2, 4]),
        profile("3g.40gb", 4, 3, &[0, 4]),
        profile("7g.80gb", 8, 7, &[0]),
    ]
}

fn gpu(index: u8, sharing: Sharing, grouped: bool) -> Gpu {
    Gpu {
        id: format!("0000:{index:02x}:00.0"),
        model: if index.is_multiple_of(2) { "A" } else { "B" }.to_owned(),
        memory_bytes: 80 << 30,
        numa: grouped.then_some(index / 4),
        switch: grouped.then_some(index / 2),
        link: None,
        partition: None,
        sharing,
    }
}

fn node() -> impl Strategy<Value = Node> {
    (1_u64..16, 0_u8..6, 0_u8..4, any::<bool>(), 0_u8..12, 0_u8..6).prop_map(
        |(cpus, gpus, kind, grouped, flags, place)| {
            let sharing = match kind {
                0 => Sharing::Mig(profiles()),
                1 => Sharing::Milli,
                _ => Sharing::Whole,
            };
            let amount = |cpus: u64| Amount {
                cpu_milli: cpus * 1000,
                memory_bytes: cpus << 30,
                hugepage_bytes: 0,
                sandboxes: 20,
            };
            let taint = Taint { key: "broken".to_owned(), value: String::new() };
            let window = Window { from_ms: 100, until_ms: 200, reason: String::new() };
            Node {
                total: amount(cpus),
                gpus: (0..gpus).map(|index| gpu(index, sharing.clone(), grouped)).collect(),
                numa: if grouped { vec![NumaNode { total: amount(cpus / 2) }; 2] } else { Vec::new() },
                classes: if flags == 0 { vec![Container] } else { vec![Microvm, Container] },
                labels: BTreeMap::from([("zone".to_owned(), (place % 2).to_string())]),
                taints: if flags == 1 { vec![taint] } else { Vec::new() },
                offer: if flags == 2 { Offer::Cordoned { reason: String::new() } } else { Offer::Open },
                maintenance: if flags == 3 { vec![window] } else { Vec::new() },
                leaf: (place < 5).then(|| (place / 2).to_string()),
                rack: (place < 5).then(|| (place / 4).to_string()),
                ..Node::default()
            }
        },
    )
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    prop::collection::vec(node(), 1..7).prop_map(|mut nodes| {
        for (index, node) in nodes.iter_mut().enumerate() {
            node.name = format!("n{index}");
        }
        nodes
    })
}

fn request() -> impl Strategy<Value = Option<GpuRequest>> {
    (0_u8..8, 1_u32..4, any::<bool>()).prop_map(|(kind, count, model)| {
        let one = |share| GpuRequest { share, ..GpuRequest::whole(1) };
        let mut request = match kind {
            0 | 1 => return None,
            2 => one(Share::Milli(300)),
            3 => one(Share::Profile("2g.20gb".to_owned())),
            4 => one(Share::Profile("3g.40gb".to_owned())),
            5 => one(Share::Profile("1g.10gb".to_owned())),
            _ => GpuRequest::whole(count),
        };
        if model {
            request.models = vec!["A".to_owned()];
        }
        Some(request)
    })
}

fn gang() -> impl Strategy<Value = Gang> {
    let demands = (0_usize..5, 0_usize..6, 0_usize..3, 0_u8..4, any::<bool>());
    (1_u32..6, 500_u64..4000, request(), demands, 0_u8..3, any::<bool>()).prop_map(
        |(tasks, cpu_milli, gpus, (scope, isolation, talk, constraint, class), tenant, estimate)| Gang {
            tenant: format!("t{tenant}"),
            class: if class { Microvm } else { Container },
            tasks: Size::exactly(tasks),
            task: TaskRequest {
                amount: Amount { cpu_milli, memory_bytes: 1 << 28, hugepage_bytes: 0, sandboxes: 1 },
                gpus,
            },
            scope: [Scope::Any, Scope::Rack, Scope::Leaf, Scope::Node, Scope::Switch][scope],
            isolation: [
                Isolation::Shared,
                Isolation::Shared,
                Isolation::Shared,
                Isolation::Cores,
                Isolation::Switch,
                Isolation::Node,
            ][isolation],
            communication: [Communication::None, Communication::Ring, Communication::AllToAll][talk],
            constraints: if constraint == 0 {
                let operator = Operator::In(vec!["1".to_owned()]);
                vec![Constraint { label: "zone".to_owned(), operator }]
            } else {
                Vec::new()
            },
            estimate_ms: estimate.then_some(150),
            ..Gang::default()
        },
    )
}

/// Gangs to start, some of which end later.
fn history() -> impl Strategy<Value = Vec<(Gang, bool)>> {
    prop::collection::vec((gang(), any::<bool>()), 1..14).prop_map(|mut gangs| {
        for (index, (gang, _)) in gangs.iter_mut().enumerate() {
            gang.id = format!("g{index}");
        }
        gangs
    })
}

/// All that runs, checked from nothing but the nodes and the places.
fn check(cluster: &Cluster) -> Result<(), TestCaseError> {
    let mut used: BTreeMap<u32, Amount> = BTreeMap::new();
    let mut parts: BTreeMap<(u32, u8), Vec<GpuFree>> = BTreeMap::new();
    for running in cluster.running().values() {
        for place in &running.tasks {
            let node = &cluster.nodes()[place.node as usize];
            let amount = used.entry(place.node).or_default();
            *amount = amount.plus(&running.gang.taken());
            for gpu in &place.gpus {
                parts.entry((place.node, gpu.index)).or_default().push(gpu.part);
                prop_assert!(usize::from(gpu.index) < node.gpus.len());
            }
        }
    }
    for (index, amount) in &used {
        prop_assert!(cluster.nodes()[*index as usize].total.fits(amount), "over-committed");
    }
    for ((node, index), parts) in &parts {
        let milli: u32 = parts.iter().map(|part| u32::from(part.milli)).sum();
        prop_assert!(milli <= 1000, "GPU {index} of node {node} is given twice");
        let slots: u32 = parts.iter().map(|part| part.slots.count_ones()).sum();
        let together = parts.iter().fold(0_u8, |slots, part| slots | part.slots).count_ones();
        prop_assert_eq!(slots, together, "MIG instances overlap");
        prop_assert!(parts.iter().map(|part| u32::from(part.compute)).sum::<u32>() <= 7);
    }
    Ok(())
}

/// Whether each demand of a gang that was placed is met.
fn check_demands(
    cluster: &Cluster,
    gang: &Gang,
    places: &[TaskPlace],
    span: Span,
) -> Result<(), TestCaseError> {
    let node = |place: &TaskPlace| &cluster.nodes()[place.node as usize];
    prop_assert_eq!(places.len(), gang.tasks.max as usize, "a gang is whole");
    let mut seen = BTreeSet::new();
    for (at, place) in places.iter().enumerate() {
        if at == 0 || places[at - 1].node != place.node {
            prop_assert!(seen.insert(place.node), "ranks of one node are consecutive");
        }
        let node = node(place);
        prop_assert!(node.offer == Offer::Open && node.classes.contains(&gang.class));
        prop_assert!(node.taints.is_empty() && span.hits(node).is_none());
        prop_assert!(gang.constraints.iter().all(|one| one.holds(&node.name, &node.labels)));
        prop_assert_eq!(place.gpus.len(), gang.task.gpu_count() as usize);
        for taken in &place.gpus {
            let request = gang.task.gpus.as_ref().expect("it is there");
            let gpu = &node.gpus[usize::from(taken.index)];
            prop_assert!(request.accepts(gpu));
            if let Share::Profile(name) = &request.share {
                let profile = gpu.profile(name).expect("it is there");
                let start = u8::try_from(taken.part.slots.trailing_zeros()).expect("it is there");
                prop_assert!(profile.starts.contains(&start));
                prop_assert_eq!(taken.part.slots.count_ones(), u32::from(profile.slots));
            }
        }
    }
    let same = |of: &dyn Fn(&TaskPlace) -> String| places.iter().map(of).collect::<BTreeSet<_>>().len() == 1;
    let switches = |place: &TaskPlace| {
        let node = node(place);
        place.gpus.iter().map(|gpu| node.gpus[usize::from(gpu.index)].switch).collect::<BTreeSet<_>>()
    };
    match gang.scope {
        Scope::Any => {}
        Scope::Rack => {
            let together = places.len() == 1 || same(&|place| format!("{:?}", node(place).rack));
            prop_assert!(together);
        }
        Scope::Leaf => {
            let together = places.len() == 1 || same(&|place| format!("{:?}", node(place).leaf));
            prop_assert!(together);
        }
        Scope::Node => prop_assert!(same(&|place| place.node.to_string())),
        Scope::Switch => {
            prop_assert!(same(&|place| place.node.to_string()));
            let all: BTreeSet<_> = places.iter().flat_map(switches).collect();
            prop_assert!(all.len() <= 1);
        }
    }
    Ok(())
}

/// Whether nobody who demands to be alone is beside another tenant.
fn check_isolation(cluster: &Cluster) -> Result<(), TestCaseError> {
    let tasks = || {
        cluster
            .running()
            .values()
            .flat_map(|running| running.tasks.iter().map(|place| (&running.gang, place)))
    };
    for (gang, place) in tasks() {
        for (other, beside) in tasks().filter(|(other, _)| other.tenant != gang.tenant) {
            if beside.node != place.node {
                continue;
            }
            prop_assert!(gang.isolation != Isolation::Node, "{} is beside {}", gang.id, other.id);
            if gang.isolation == Isolation::Switch {
                let node = &cluster.nodes()[place.node as usize];
                let switch = |gpu: &GpuPlace| node.gpus[usize::from(gpu.index)].switch;
                let shared =
                    place.gpus.iter().any(|one| beside.gpus.iter().any(|two| switch(one) == switch(two)));
                prop_assert!(!shared, "{} shares a switch with {}", gang.id, other.id);
            }
        }
    }
    Ok(())
}

fn start(placer: &mut Placer, cluster: &mut Cluster, gang: &Gang) -> Option<Vec<TaskPlace>> {
    let span = Span::of(gang, 0);
    let tasks = gang.tasks.max;
    let request = PlaceRequest { gang, tasks, admits: &|_| true, admits_key: Some(0), span: Some(span) };
    let places = placer.place_request(cluster, &request).ok()?;
    let running = Running {
        gang: gang.clone().into(),
        tasks: places.clone(),
        started_ms: 0,
        expected_end_ms: None,
        stopping: false,
    };
    cluster.started(running).expect("it is there");
    Some(places)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn places_keep_every_promise(nodes in nodes(), history in history(), policy in 0_usize..8, seed in any::<u64>()) {
        let mut cluster = Cluster::new(nodes);
        let empty = cluster.fingerprint();
        let mut placer = Placer::new(POLICIES[policy], seed);
        for (gang, ends) in &history {
            let before = cluster.fingerprint();
            match start(&mut placer, &mut cluster, gang) {
                Some(places) => check_demands(&cluster, gang, &places, Span::of(gang, 0))?,
                None => prop_assert_eq!(cluster.fingerprint(), before, "what is not placed changes nothing"),
            }
            check(&cluster)?;
            check_isolation(&cluster)?;
            if *ends {
                let first = cluster.running().keys().next().cloned();
                first.and_then(|first| cluster.end(&first));
            }
        }
        let running: Vec<String> = cluster.running().keys().cloned().collect();
        running.iter().for_each(|gang| drop(cluster.end(gang)));
        prop_assert_eq!(cluster.fingerprint(), empty, "all is given back");
    }

    #[test]
    fn the_same_seed_gives_the_same_places(nodes in nodes(), history in history(), policy in 0_usize..8, seed in any::<u64>()) {
        let run = || {
            let mut cluster = Cluster::new(nodes.clone());
            let mut placer = Placer::new(POLICIES[policy], seed);
            history.iter().map(|(gang, _)| start(&mut placer, &mut cluster, gang)).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }

    /// What a placer remembers makes it faster, and changes nothing.
    #[test]
    fn a_fresh_placer_finds_the_same_place(nodes in nodes(), history in history(), policy in 0_usize..8) {
        prop_assume!(POLICIES[policy] != Policy::Random);
        let demand = Demand::of(history.iter().map(|(gang, _)| (&gang.task, 1.0)));
        let fresh = || {
            let mut placer = Placer::new(POLICIES[policy], 0).with_ties(Ties::ByName);
            placer.set_demand(&demand);
            placer
        };
        let (mut cluster, mut old) = (Cluster::new(nodes), fresh());
        for (gang, ends) in &history {
            let mut copy = cluster.clone();
            let expected = start(&mut fresh(), &mut copy, gang);
            prop_assert_eq!(start(&mut old, &mut cluster, gang), expected);
            // A copy that goes another way does not mislead it.
            if let Some(first) = copy.running().keys().next().cloned() {
                copy.end(&first);
                let again = Gang { id: "again".to_owned(), ..gang.clone() };
                start(&mut old, &mut copy, &again);
            }
            if *ends {
                let first = cluster.running().keys().next().cloned();
                first.and_then(|first| cluster.end(&first));
            }
        }
    }

    /// Equal tasks that may go anywhere: the gang fits if and only if there is a way.
    #[test]
    fn a_gang_that_fits_is_placed(
        nodes in nodes(), history in history(), mut gang in gang(), talk in any::<bool>(), policy in 0_usize..8,
    ) {
        let mut cluster = Cluster::new(nodes);
        let mut placer = Placer::new(POLICIES[policy], 1);
        for (gang, _) in &history {
            start(&mut placer, &mut cluster, gang);
        }
        (gang.scope, gang.isolation, gang.id) = (Scope::Any, Isolation::Shared, "last".to_owned());
        gang.communication = if talk { Communication::Ring } else { Communication::None };
        let all: u32 = (0..cluster.nodes().len()).map(|index| most(&cluster, index, &gang)).sum();
        let placed = start(&mut placer, &mut cluster, &gang).is_some();
        prop_assert_eq!(placed, all >= gang.tasks.max, "{} fit", all);
    }

    /// Tasks of at most half a node: what is allocated is at least five eighths of what any order could
    /// have allocated, as no node is left with room for the largest task.
    #[test]
    fn packing_is_within_five_eighths_of_the_best(
        counts in prop::collection::vec(1_u32..5, 1..9), number in 1_usize..3, policy in 0_usize..8,
    ) {
        let node = |index: usize| Node {
            name: format!("n{index}"),
            total: Amount { cpu_milli: 64_000, memory_bytes: 1 << 40, hugepage_bytes: 0, sandboxes: 99 },
            gpus: (0..8).map(|index| gpu(index, Sharing::Whole, false)).collect(),
            classes: vec![Container],
            ..Node::default()
        };
        let mut cluster = Cluster::new((0..number).map(node).collect());
        let mut placer = Placer::new(POLICIES[policy], 3);
        let mut placed = 0;
        for (index, &count) in counts.iter().enumerate() {
            let gang = Gang {
                id: index.to_string(),
                task: TaskRequest { amount: Amount::default(), gpus: Some(GpuRequest::whole(count)) },
                ..Gang::default()
            };
            placed += start(&mut placer, &mut cluster, &gang).map_or(0, |_| count);
        }
        let best = best_packing(&counts, &mut vec![8; number]);
        prop_assert!(f64::from(placed) >= 0.625 * f64::from(best), "{} of {}", placed, best);
    }
}

/// Most GPUs that any choice of the tasks can have.
fn best_packing(counts: &[u32], free: &mut Vec<u32>) -> u32 {
    let Some((&count, rest)) = counts.split_first() else { return 0 };
    let mut best = best_packing(rest, free);
    for node in 0..free.len() {
        if free[node] >= count {
            free[node] -= count;
            best = best.max(count + best_packing(rest, free));
            free[node] += count;
        }
    }
    best
}

/// Most tasks of the gang that the node holds, by trying all ways to give its devices away.
fn most(cluster: &Cluster, index: usize, gang: &Gang) -> u32 {
    let (node, free) = (&cluster.nodes()[index], &cluster.free()[index]);
    let eligible = node.offer == Offer::Open
        && node.classes.contains(&gang.class)
        && node.taints.is_empty()
        && Span::of(gang, 0).hits(node).is_none()
        && gang.constraints.iter().all(|one| one.holds(&node.name, &node.labels))
        && free.admits(&gang.tenant, gang.isolation);
    if !eligible {
        return 0;
    }
    let amounts = free.amount.holds(&gang.taken());
    let Some(request) = &gang.task.gpus else { return amounts };
    let usable: Vec<(&Gpu, GpuFree)> = node
        .gpus
        .iter()
        .zip(&free.gpus)
        .filter(|(gpu, _)| {
            request.accepts(gpu) && free.switch_admits(gpu.switch, &gang.tenant, gang.isolation)
        })
        .map(|(gpu, free)| (gpu, *free))
        .collect();
    let devices: u32 = match &request.share {
        Share::Whole => {
            u32::try_from(usable.iter().filter(|(_, free)| free.is_whole()).count()).expect("it is there")
                / request.count
        }
        Share::Milli(milli) => usable.iter().map(|(_, free)| u32::from(free.milli / milli)).sum(),
        Share::Profile(name) => {
            let most = |(gpu, free): &(&Gpu, GpuFree)| {
                most_instances(gpu.profile(name).expect("it is there"), free.slots, free.compute)
            };
            usable.iter().map(most).sum()
        }
    };
    amounts.min(devices)
}

fn most_instances(profile: &Profile, slots: u8, compute: u8) -> u32 {
    let mut best = 0;
    for &start in &profile.starts {
        let mask = u8::try_from(((1_u16 << profile.slots) - 1) << start & 0xff).expect("it is there");
        if slots & mask == mask && mask.count_ones() == u32::from(profile.slots) && compute >= profile.compute
        {
            best = best.max(1 + most_instances(profile, slots & !mask, compute - profile.compute));
        }
    }
    best
}
