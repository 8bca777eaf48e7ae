//! Traces of real clusters, replayed: every queue policy on Philly's jobs, every placement on openb's
//! pods beside what was published.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use lathe_e2e::artefacts;
use lathe_scheduler::policy::{Backfill, Pool, Queue, Strategy};
use lathe_scheduler::simulate::Options;
use lathe_scheduler::simulate::compare::{Choice, Study};
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

/// All traces that are there.
pub fn run() -> anyhow::Result<Vec<Record>> {
    let Some(folder) = folder() else {
        eprintln!("bench: no traces: set LATHE_TRACES to the folder with openb/ and philly/ to replay them");
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    for path in lists(&folder.join("philly"), "")? {
        records.extend(philly(&path)?);
    }
    Ok(records)
}

fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("LATHE_TRACES").map(PathBuf::from);
    let beside = ["shared/data", "../shared/data"].map(|path| artefacts::repository().join(path));
    named.into_iter().chain(beside).find(|path| path.join("philly").is_dir())
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

/// Every policy, with and without backfill, on clusters of each load.
fn philly(path: &Path) -> anyhow::Result<Vec<Record>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Work::Jobs(jobs) = trace::work(&path.display().to_string(), &bytes)? else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    for load in LOADS {
        eprintln!("bench: {} at a load of {load}", stem(path));
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
        for (queue, estimates) in choices() {
            for &(_, backfill) in Backfill::NAMES {
                let choice = Choice { queue, backfill, placement: Strategy::Balanced, estimates };
                records.extend(row(&study, &choice, &format!("{} {load}", stem(path))));
            }
        }
    }
    Ok(records)
}

/// Every policy with perfect knowledge, and the one that lives by estimates with the others, too.
fn choices() -> Vec<(Queue, Estimates)> {
    let perfect = Queue::NAMES.iter().map(|(_, queue)| (*queue, Estimates::Perfect));
    let others = [Estimates::User, Estimates::History].map(|known| (Queue::ShortestJobFirst, known));
    perfect.chain(others).collect()
}

fn row(study: &Study, choice: &Choice, trace: &str) -> Vec<Record> {
    let figures = study.run(choice, &[SEED]);
    let subject = [choice.queue.name(), choice.backfill.name(), choice.estimates.name()].join(" ");
    let hours = |seconds: f64| seconds / 3600.0;
    [
        ("wait mean", "h", hours(figures.waiting_s.mean)),
        ("wait p95", "h", hours(figures.waiting_s.p95)),
        ("completion mean", "h", hours(figures.completion_s.mean)),
        ("completion p95", "h", hours(figures.completion_s.p95)),
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
        print!("\n{trace:<32}");
        metrics.iter().for_each(|metric| print!("{metric:>18}"));
        println!();
        for subject in subjects {
            print!("{subject:<32}");
            for metric in &metrics {
                let named = format!("{trace}{MARK}{metric}");
                let found = records.iter().find(|one| one.subject == subject && one.metric == named);
                let cell = found.map_or_else(|| "-".to_owned(), |record| format!("{:.2}", record.value));
                print!("{cell:>18}");
            }
            println!();
        }
    }
}
