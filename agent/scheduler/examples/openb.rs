//! Prints percent of GPUs allocated at 100 % arrived demand for the shared openb lists, beside what was
//! published: `openb [SEEDS] [VARIATION ...]`.

#[path = "../tests/common/openb.rs"]
mod openb;

use lathe_scheduler::placement::Ties;
use lathe_scheduler::policy::Strategy;
use lathe_scheduler::simulate::arrivals::{Options, arrivals};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seeds: u64 = arguments.next().and_then(|seeds| seeds.parse().ok()).unwrap_or(10);
    let mut variations: Vec<String> = arguments.collect();
    if variations.is_empty() {
        variations = ["default", "cpu100", "gpushare40", "gpuspec10", "multigpu20"].map(str::to_owned).into();
    }
    let fgd = Strategy::FragmentationGradientDescent;
    let runs = [
        ("Random", Some("Random"), Strategy::Random, Ties::Seeded, true),
        ("DotProd", Some("DotProd"), Strategy::DotProduct, Ties::ByName, true),
        ("GpuClustering", Some("GpuClustering"), Strategy::GpuClustering, Ties::ByName, true),
        ("GpuPacking", Some("GpuPacking"), Strategy::GpuPacking, Ties::ByName, true),
        ("BestFit", Some("BestFit"), Strategy::BestFit, Ties::ByName, true),
        ("FGD", Some("FGD"), fgd, Ties::ByName, true),
        ("FGD, random ties", None, fgd, Ties::Seeded, true),
        ("Balanced, ties by name", None, Strategy::Balanced, Ties::ByName, true),
        ("Balanced, random ties", None, Strategy::Balanced, Ties::Seeded, true),
        ("Balanced, learning", None, Strategy::Balanced, Ties::Seeded, false),
    ];
    let nodes = openb::nodes();
    for variation in &variations {
        let tasks = openb::tasks(variation);
        for (name, published, strategy, ties, known_demand) in runs {
            let started = std::time::Instant::now();
            let seeds = 42..42 + seeds;
            let runs = seeds.clone().map(|seed| {
                arrivals(&nodes, &tasks, Options { strategy, ties, seed, known_demand }).at_full_demand()
            });
            let figures: Vec<f64> = runs.collect();
            let mean = figures.iter().sum::<f64>() / figures.len() as f64;
            let (least, most) = (
                figures.iter().copied().fold(f64::INFINITY, f64::min),
                figures.iter().copied().fold(0.0, f64::max),
            );
            let published = published.map_or_else(
                || "     ".to_owned(),
                |policy| format!("{:.2}", openb::published(variation, policy)),
            );
            let seconds = started.elapsed().as_secs_f64() / figures.len() as f64;
            println!(
                "{variation:12} {name:24} mean {mean:.2} ({least:.2} to {most:.2}) published {published}  {seconds:.2} s a run"
            );
        }
    }
}
