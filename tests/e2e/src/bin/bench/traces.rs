//! Traces of real clusters, replayed: every queue policy on Philly's jobs, what estimates are worth
//! there, and every placement on openb's pods beside what was published.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use lathe_e2e::artefacts;
use lathe_scheduler::placement::Ties;
use lathe_scheduler::policy::{Backfill, Pool, Queue, Strategy};
use lathe_scheduler::simulate::Options;
use lathe_scheduler::simulate::arrivals;
use lathe_scheduler::simulate::compare::{self, Choice, Study};
use lathe_scheduler::simulate::names::Named;
use lathe_scheduler::simulate::scenario::{self, Arrivals, Estimates, Load};
use lathe_scheduler::simulate::trace::{self, Work};

use crate::record::Record;

/// What tells these records' metrics from the planner's own.
pub const MARK: &str = "/";

/// Loads that clusters are sized for.
const LOADS: [f64; 3] = [0.7, 0.9, 1.1];
/// Tenants that jobs are dealt to, and the seed.
const TENANTS: u32 = 8;
const SEED: u64 = 1;

/// Seeds of the comparison of estimates, of which one says little: which of two long jobs goes first
/// decides for all behind them.
const ESTIMATE_SEEDS: [u64; 6] = [1, 2, 3, 4, 5, 6];

/// Width of a figure in a table.
const WIDTH: usize = 16;

/// Seeds of the published results.
const ARRIVAL_SEEDS: u64 = 10;

/// Placements, how ties are broken, and the name of the published results that they compare with.
const PLACEMENTS: [(Strategy, Ties, &str); 8] = [
    (Strategy::Random, Ties::Seeded, "01-Random"),
    (Strategy::DotProduct, Ties::ByName, "02-DotProd"),
    (Strategy::GpuClustering, Ties::ByName, "03-GpuClustering"),
    (Strategy::GpuPacking, Ties::ByName, "04-GpuPacking"),
    (Strategy::BestFit, Ties::ByName, "05-BestFit"),
    (Strategy::FragmentationGradientDescent, Ties::ByName, "06-FGD"),
    (Strategy::Balanced, Ties::ByName, "06-FGD"),
    (Strategy::Balanced, Ties::Seeded, "06-FGD"),
];

/// The traces of these folders that are there; all if none is named.
pub fn run(parts: &[String]) -> anyhow::Result<Vec<Record>> {
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| part == name);
    let Some(folder) = folder() else {
        eprintln!(
            "bench: no traces: set LATHE_SHARED_DATA to the folder with openb/ and philly/ to replay them"
        );
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    if wanted("philly") || wanted("estimates") {
        for (name, study) in studies(&folder.join("philly"))? {
            if wanted("philly") {
                records.extend(policies(&name, &study));
            }
            if wanted("estimates") {
                records.extend(estimates(&name, &study));
            }
        }
    }
    if wanted("openb") {
        records.extend(openb(&folder.join("openb"))?);
    }
    Ok(records)
}

fn folder() -> Option<PathBuf> {
    let beside = || ["shared/data", "../shared/data"].map(|path| artefacts::repository().join(path)).to_vec();
    let folders = std::env::var_os("LATHE_SHARED_DATA").map_or_else(beside, |named| vec![named.into()]);
    folders.into_iter().find(|path| path.join("philly").is_dir())
}

/// CSV files of a folder whose names begin so, in the order of their names.
fn lists(folder: &Path, prefix: &str) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("cannot read {}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let csv = path.extension().is_some_and(|extension| extension == "csv");
        if csv && stem(&path).starts_with(prefix) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The jobs of each list of a folder on clusters of each load, and what to call them.
fn studies(folder: &Path) -> anyhow::Result<Vec<(String, Study)>> {
    let mut studies = Vec::new();
    for path in lists(folder, "")? {
        studies.extend(loads(&path)?);
    }
    Ok(studies)
}

/// The jobs of one list.
fn loads(path: &Path) -> anyhow::Result<Vec<(String, Study)>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Work::Jobs(jobs) = trace::work(&path.display().to_string(), &bytes)? else { return Ok(Vec::new()) };
    let study = |load: f64| {
        let mut arrivals = Arrivals::Jobs(jobs.clone());
        let sized = Load::of(&arrivals);
        let nodes = scenario::equal_nodes(sized.nodes(load, scenario::NODE_GPUS), scenario::NODE_GPUS);
        // Where the largest job needs more than the load does, arrivals move closer together instead.
        let real = sized.gpus / (nodes.len() * scenario::NODE_GPUS as usize) as f64;
        if real < load / 2.0 {
            arrivals.stretch(real / load);
        }
        let mut study = Study {
            nodes,
            arrivals,
            tenants: TENANTS,
            pool: Pool::default(),
            grace_ms: 0,
            options: Options::default(),
        };
        study.leave_out_misfits();
        (format!("{} {load}", stem(path)), study)
    };
    Ok(LOADS.map(study).into())
}

fn choice(queue: Queue, backfill: Backfill, estimates: Estimates) -> Choice {
    Choice { queue, backfill, placement: Strategy::Balanced, estimates }
}

/// Every policy, with and without backfill, with perfect knowledge.
fn policies(name: &str, study: &Study) -> Vec<Record> {
    let each = |&(_, queue): &(&str, Queue)| {
        Backfill::NAMES.iter().map(move |&(_, backfill)| choice(queue, backfill, Estimates::Perfect))
    };
    let choices: Vec<Choice> = Queue::NAMES.iter().flat_map(each).collect();
    on_all_cores(name, &choices, |choice| row(study, choice, name)).into_iter().flatten().collect()
}

/// The policy that lives by estimates, with each kind of them: how far it is behind perfect knowledge.
fn estimates(name: &str, study: &Study) -> Vec<Record> {
    let kinds = [Estimates::Perfect, Estimates::User, Estimates::History];
    let name = format!("{name}, {} seeds", ESTIMATE_SEEDS.len());
    // Jobs that come together are one user's, which dealing them out would hide.
    let study = Study { tenants: 0, ..study.clone() };
    let mut records = Vec::new();
    for backfill in [Backfill::Easy, Backfill::None] {
        let choices = kinds.map(|kind| choice(Queue::ShortestJobFirst, backfill, kind));
        let runs = on_all_cores(&name, &choices, |choice| {
            let hours = |seed| study.run_once(choice, seed).figures().completion_s.mean / 3600.0;
            let hours: Vec<f64> = ESTIMATE_SEEDS.into_iter().map(hours).collect();
            vec![Record::mean_of(&format!("{name}{MARK}complete mean"), &subject(choice), "h", hours)]
        });
        let runs: Vec<Record> = runs.into_iter().flatten().collect();
        let perfect = runs.first().map_or(f64::NAN, |record| record.value);
        let behind = |record: &Record| {
            let percent = (record.value / perfect - 1.0) * 100.0;
            let metric = format!("{name}{MARK}behind perfect");
            Record::mean_of(&metric, &record.subject, "percent", vec![percent])
        };
        let behind: Vec<Record> = runs.iter().map(behind).collect();
        records.extend(runs.into_iter().chain(behind));
    }
    records
}

/// Every placement on every list of pods by the published procedure, beside what was published.
fn openb(folder: &Path) -> anyhow::Result<Vec<Record>> {
    let Some(path) = lists(folder, "openb_node_list_gpu")?.pop() else { return Ok(Vec::new()) };
    let nodes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let nodes = scenario::arrival_nodes(&trace::nodes(&path.display().to_string(), &nodes)?);
    let published = fs::read_to_string(folder.join("expected_gpu_allocated.csv")).unwrap_or_default();
    let seeds: Vec<u64> = (42..42 + ARRIVAL_SEEDS).collect();
    let mut records = Vec::new();
    for path in lists(folder, "openb_pod_list")? {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let Work::Pods(pods) = trace::work(&path.display().to_string(), &bytes)? else { continue };
        let tasks = scenario::arrival_tasks(&pods);
        let runs = on_all_cores(&stem(&path), &PLACEMENTS, |&(strategy, ties, name)| {
            let options = arrivals::Options { strategy, ties, seed: 0, known_demand: true };
            let figures = compare::arrivals(&nodes, &tasks, options, &seeds).percent_gpu_allocated_at_100;
            let known = published
                .lines()
                .map(|line| line.split(',').collect::<Vec<_>>())
                .find(|line| line[0] == stem(&path) && line.get(1) == Some(&name))
                .and_then(|line| line.get(4)?.parse::<f64>().ok());
            let ties = if ties == Ties::ByName { "ties by name" } else { "random ties" };
            let subject = format!("{}, {ties}", strategy.name());
            let record = |metric: &str, value| {
                Record::of(&format!("{}{MARK}{metric}", stem(&path)), &subject, "percent", vec![value])
            };
            let own = [("mean", figures.mean), ("min", figures.min), ("max", figures.max)];
            let own = own.map(|(metric, value)| record(metric, value));
            own.into_iter().chain(known.map(|value| record("published mean", value))).collect::<Vec<_>>()
        });
        records.extend(runs.into_iter().flatten());
    }
    Ok(records)
}

/// Results in the order of the inputs; each core takes the next that nobody took. Each is printed as it
/// is there: all of them take minutes.
fn on_all_cores<T: Sync>(
    trace: &str,
    inputs: &[T],
    run: impl Fn(&T) -> Vec<Record> + Sync,
) -> Vec<Vec<Record>> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Vec<Record>)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(input) = inputs.get(at) else { return };
                    let result = run(input);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    let subject = result.first().map_or("", |record| &record.subject);
                    let figures: Vec<String> = result.iter().map(figure).collect();
                    let count = format!("{} of {}", results.len() + 1, inputs.len());
                    eprintln!("bench: {trace}, {count}: {subject}: {}", figures.join(", "));
                    results.push((at, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

/// A figure in words.
fn figure(record: &Record) -> String {
    let metric = record.metric.split_once(MARK).map_or(&*record.metric, |(_, metric)| metric);
    format!("{metric} {:.2} {}", record.value, record.unit)
}

fn subject(choice: &Choice) -> String {
    [choice.queue.name(), choice.backfill.name(), choice.estimates.name()].join(" ")
}

fn row(study: &Study, choice: &Choice, trace: &str) -> Vec<Record> {
    let figures = study.run(choice, &[SEED]);
    let subject = subject(choice);
    let hours = |seconds: f64| seconds / 3600.0;
    [
        ("wait mean", "h", hours(figures.waiting_s.mean)),
        ("wait p95", "h", hours(figures.waiting_s.p95)),
        ("complete mean", "h", hours(figures.completion_s.mean)),
        ("complete p95", "h", hours(figures.completion_s.p95)),
        ("slowdown mean", "ratio", figures.bounded_slowdown.mean),
        ("slowdown p95", "ratio", figures.bounded_slowdown.p95),
        ("makespan", "h", hours(figures.makespan_s)),
        ("jain", "ratio", figures.jain_fairness_tenants),
    ]
    .map(|(metric, unit, value)| Record::of(&format!("{trace}{MARK}{metric}"), &subject, unit, vec![value]))
    .into()
}

/// A table a trace, a row a policy.
pub fn print(records: &[Record]) {
    let mut tables: Vec<(&str, Vec<&str>, Vec<&str>)> = Vec::new();
    for record in records {
        let Some((trace, metric)) = record.metric.split_once(MARK) else { continue };
        let at = tables.iter().position(|(name, ..)| *name == trace).unwrap_or_else(|| {
            tables.push((trace, Vec::new(), Vec::new()));
            tables.len() - 1
        });
        let (_, metrics, subjects) = &mut tables[at];
        for (list, name) in [(metrics, metric), (subjects, record.subject.as_str())] {
            if !list.contains(&name) {
                list.push(name);
            }
        }
    }
    for (trace, metrics, subjects) in tables {
        print!("\n{trace:<28}");
        metrics.iter().for_each(|metric| print!("{metric:>WIDTH$}"));
        println!();
        for subject in subjects {
            print!("{subject:<32}");
            for metric in &metrics {
                let named = format!("{trace}{MARK}{metric}");
                let found = records.iter().find(|one| one.subject == subject && one.metric == named);
                let cell = found.map_or_else(|| "-".to_owned(), |record| format!("{:.2}", record.value));
                print!("{cell:>WIDTH$}");
            }
            println!();
        }
    }
}
