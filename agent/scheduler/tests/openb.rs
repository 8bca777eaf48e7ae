//! The simulator reproduces what was published on the openb traces, and the default policy is ahead of
//! it. Skipped, with a message, where the shared data are not there.

#[path = "common/openb.rs"]
mod openb;

use lathe_scheduler::placement::Ties;
use lathe_scheduler::policy::Strategy;
use lathe_scheduler::simulate::arrivals::{Options, arrivals};

const VARIATIONS: [&str; 5] = ["default", "cpu100", "gpushare40", "gpuspec10", "multigpu20"];

/// Published means are over ten seeds; three leave the mean within a tenth of a point.
const SEEDS: u64 = 3;

fn mean(variation: &str, strategy: Strategy, ties: Ties, known_demand: bool) -> f64 {
    let (nodes, tasks) = (openb::nodes(), openb::tasks(variation));
    let run =
        |seed| arrivals(&nodes, &tasks, Options { strategy, ties, seed, known_demand }).at_full_demand();
    (42..42 + SEEDS).map(run).sum::<f64>() / SEEDS as f64
}

fn absent() -> bool {
    let absent = openb::folder().is_none();
    if absent {
        eprintln!("skipped: no shared data; set LATHE_SHARED_DATA to the folder that has openb/");
    }
    absent
}

#[test]
fn published_means_are_reproduced() {
    if absent() {
        return;
    }
    let policies = [
        ("Random", Strategy::Random, Ties::Seeded, 0.7),
        ("BestFit", Strategy::BestFit, Ties::ByName, 0.7),
        ("FGD", Strategy::FragmentationGradientDescent, Ties::ByName, 0.5),
    ];
    for variation in VARIATIONS {
        for (name, strategy, ties, within) in policies {
            let (ours, published) =
                (mean(variation, strategy, ties, true), openb::published(variation, name));
            assert!(
                (ours - published).abs() <= within,
                "{variation}, {name}: {ours:.2}, published {published}"
            );
        }
    }
}

#[test]
fn the_default_is_ahead_of_the_published_gradient_descent() {
    if absent() {
        return;
    }
    for variation in VARIATIONS {
        for (ties, known_demand) in [(Ties::ByName, true), (Ties::Seeded, true), (Ties::Seeded, false)] {
            let (ours, published) =
                (mean(variation, Strategy::Balanced, ties, known_demand), openb::published(variation, "FGD"));
            assert!(ours > published, "{variation}, {ties:?}: {ours:.2}, FGD {published}");
        }
    }
}

#[test]
fn the_default_leaves_fewer_than_one_gpu_in_twentysix_unallocated() {
    if absent() {
        return;
    }
    for ties in [Ties::ByName, Ties::Seeded] {
        let ours = mean("default", Strategy::Balanced, ties, true);
        assert!(ours >= 96.2, "{ties:?}: {ours:.2}");
    }
}
