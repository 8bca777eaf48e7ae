//! Prints how many placements a second one core makes: `rate [NODES] [SHAPES] [STRATEGY]`.

use lathe_scheduler::model::*;
use lathe_scheduler::placement::{PlaceRequest, Placer};
use lathe_scheduler::policy::Strategy;

fn main() {
    let number = |at: usize, other: u32| {
        std::env::args().nth(at).and_then(|number| number.parse().ok()).unwrap_or(other)
    };
    let (nodes, shapes) = (number(1, 5_000), number(2, 64));
    let strategy = match std::env::args().nth(3).as_deref() {
        Some("fgd") => Strategy::FragmentationGradientDescent,
        Some("bestfit") => Strategy::BestFit,
        Some("random") => Strategy::Random,
        _ => Strategy::Balanced,
    };
    let gpu = |index: u8, model: &str| Gpu {
        id: String::new(),
        model: model.to_owned(),
        memory_bytes: 80 << 30,
        numa: Some(index / 4),
        switch: Some(index / 2),
        link: Some(0),
        partition: None,
        sharing: Sharing::Whole,
    };
    let node = |index: u32| {
        let amount = |part: u64| Amount {
            cpu_milli: 128_000 / part,
            memory_bytes: (1 << 40) / part,
            hugepage_bytes: 0,
            sandboxes: 250,
        };
        let model = ["H100", "A100", "L40S"][index as usize % 3];
        Node {
            name: format!("node-{index:05}"),
            total: amount(1),
            numa: vec![NumaNode { total: Amount { sandboxes: 0, ..amount(2) } }; 2],
            gpus: (0..8).map(|index| gpu(index, model)).collect(),
            classes: vec![Gang::default().class],
            leaf: Some(format!("leaf-{}", index / 32)),
            rack: Some(format!("rack-{}", index / 128)),
            ..Node::default()
        }
    };
    let mut cluster = Cluster::new((0..nodes).map(node).collect());
    let gang = |index: u32| {
        let count = [1, 1, 1, 2, 1, 4, 1, 0, 1, 8][index as usize % 10];
        Gang {
            id: format!("g{index}"),
            tenant: format!("t{}", index % 17),
            task: TaskRequest {
                amount: Amount {
                    cpu_milli: 1_000 + u64::from(index % shapes) * 170,
                    memory_bytes: u64::from(1 + index % shapes) << 28,
                    hugepage_bytes: 0,
                    sandboxes: 1,
                },
                gpus: (count > 0).then(|| GpuRequest::whole(count)),
            },
            ..Gang::default()
        }
    };
    let mut placer = Placer::new(strategy, 1);
    let (mut placed, mut index) = (Vec::new(), 0_u32);
    let mut measure = |name: &str, many: u32, cluster: &mut Cluster, churn: bool| {
        let started = std::time::Instant::now();
        let mut count = 0;
        for _ in 0..many {
            // A multiplier that mixes the shapes.
            let gang = gang(index.wrapping_mul(2_654_435_761) % shapes + index % 17 * shapes);
            index += 1;
            let request =
                PlaceRequest { gang: &gang, tasks: 1, admits: &|_| true, admits_key: Some(0), span: None };
            if let Some(places) = placer.try_place(cluster, &request) {
                count += 1;
                placed.push((gang, places));
            }
            if churn && placed.len() > 1 {
                let at = index.wrapping_mul(2_246_822_519) as usize % placed.len();
                let (gang, places) = placed.swap_remove(at);
                places.iter().for_each(|place| cluster.give(&gang, place));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        println!("{name}: {count} of {many} placed, {:.0} attempts a second", f64::from(many) / seconds);
    };
    measure("filling", nodes * 3, &mut cluster, false);
    measure("one comes, one goes", 40_000, &mut cluster, true);
}
