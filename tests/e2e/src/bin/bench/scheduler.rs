//! The planner on one core: placements a second, and how long a cycle takes, over nodes and gangs that
//! wait; then what [`traces`] replays.
//!
//! Each case begins with a full cluster and a queue. Before each cycle some gangs end and as many come,
//! so that cycles are what a running coordinator sees: a few changes to a large state. Times are CPU
//! time of this thread: what else runs on the machine is not counted.

use std::sync::Arc;

use anyhow::{Context, bail};
use lathe_scheduler::model::{Amount, Cluster, Gang, GpuRequest, Running, Size, TaskRequest};
use lathe_scheduler::placement::Placer;
use lathe_scheduler::planner::Planner;
use lathe_scheduler::policy::{Backfill, Pool, Queue, Settings, Strategy};
use lathe_scheduler::simulate::scenario::equal_nodes;
use nix::time::{ClockId, clock_gettime};

use crate::record::Record;
use crate::traces;

/// Nodes of each case.
const NODES: [u32; 3] = [1_000, 5_000, 10_000];
/// Gangs that wait in each case.
const QUEUED: [usize; 3] = [1_000, 10_000, 100_000];
/// GPUs of a node.
const NODE_GPUS: u32 = 8;
/// Gangs that end, and come, before each cycle: at a cycle a second this is a busy cluster.
const CHANGES: usize = 100;
/// What cannot be more than there is room for is no measure of the planner: here so many end at once,
/// with so many that wait.
const BURST: usize = 1_000;
const BURST_QUEUED: usize = 10_000;
/// Cycles that are measured.
const CYCLES: usize = 60;
/// CPU time that a case may take before it has fewer cycles, seconds.
const CASE_S: f64 = 12.0;
/// Placements that are measured at a time, and how often.
const PLACEMENTS: usize = 10_000;
const ROUNDS: usize = 5;

/// What can be asked for alone.
const PARTS: [&str; 4] = ["rate", "philly", "estimates", "openb"];

/// These parts of it; all if none is named.
pub fn run(parts: &[String]) -> anyhow::Result<Vec<Record>> {
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(&part.as_str())) {
        bail!("scheduler has no part {unknown:?}; there are {}", PARTS.join(", "));
    }
    let mut records = Vec::new();
    if parts.is_empty() || parts.iter().any(|part| part == "rate") {
        records.extend(rates()?);
    }
    records.extend(traces::run(parts)?);
    Ok(records)
}

/// Placements and cycles.
fn rates() -> anyhow::Result<Vec<Record>> {
    let mut records = Vec::new();
    for nodes in NODES {
        eprintln!("bench: placing on {nodes} nodes");
        records.push(placements(nodes)?);
    }
    for nodes in NODES {
        let cases = QUEUED.map(|queued| (queued, CHANGES));
        for (queued, changes) in cases.into_iter().chain([(BURST_QUEUED, BURST)]) {
            eprintln!("bench: cycles over {nodes} nodes with {queued} gangs that wait, {changes} end");
            records.extend(cycles(nodes, queued, changes)?);
        }
    }
    Ok(records)
}

/// Prints the rates, then the tables of the traces.
pub fn print(records: &[Record]) {
    let own: Vec<Record> =
        records.iter().filter(|record| !record.metric.contains(traces::MARK)).cloned().collect();
    println!("{:<44}{:<38}{:>14}{:>14}{:>14}", "METRIC", "CASE", "VALUE", "SMALLEST", "LARGEST");
    for Record { metric, subject, value, unit, range, .. } in &own {
        let metric = format!("{metric} ({unit})");
        println!("{metric:<44}{subject:<38}{value:>14.2}{:>14.2}{:>14.2}", range[0], range[1]);
    }
    traces::print(records);
}

/// Tasks placed one after the other by the default strategy, on nodes that are 70 to 90 % full: what
/// ran longest ends when they are fuller.
fn placements(nodes: u32) -> anyhow::Result<Record> {
    let mut cluster = Cluster::new(equal_nodes(nodes, NODE_GPUS));
    let mut placer = Placer::new(Strategy::Balanced, 1);
    let mut source = Source::new(1);
    let mut running = std::collections::VecDeque::new();
    let all = nodes * NODE_GPUS;
    let mut used = 0;
    let mut rates = Vec::new();
    for round in 0..=ROUNDS {
        let mut placed = 0;
        let mut seconds = 0.0;
        while placed < PLACEMENTS {
            if used * 10 >= all * 9 {
                while used * 10 >= all * 7 {
                    let (gang, places): (Gang, Vec<_>) = running.pop_front().context("something runs")?;
                    used -= gang.tasks.max * gang.task.gpu_count();
                    places.iter().for_each(|place| cluster.give(&gang, place));
                }
            }
            let batch: Vec<Gang> = (0..100).map(|_| source.gang(1)).collect();
            let before = cpu_seconds()?;
            let places: Vec<_> = batch
                .iter()
                .map(|gang| placer.place(&mut cluster, gang, gang.tasks.max, &|_| true))
                .collect();
            seconds += cpu_seconds()? - before;
            for (gang, places) in batch.into_iter().zip(places) {
                let Ok(places) = places else { continue };
                placed += places.len();
                used += gang.tasks.max * gang.task.gpu_count();
                running.push_back((gang, places));
            }
        }
        // The first round fills the caches, as a coordinator's are.
        if round > 0 {
            rates.push(placed as f64 / seconds);
        }
    }
    Ok(Record::of("placements of the default strategy", &format!("{nodes} nodes"), "per_s", rates))
}

/// Cycles of the planner with the default policies, and gangs of 1 to 32 GPUs, of which so many end before
/// each.
fn cycles(nodes: u32, queued: usize, changes: usize) -> anyhow::Result<Vec<Record>> {
    let mut cluster = Cluster::new(equal_nodes(nodes, NODE_GPUS));
    let pool = Pool {
        queue: Queue::FirstComeFirstServed,
        backfill: Backfill::Easy,
        placement: Strategy::Balanced,
        ..Pool::default()
    };
    let mut planner = Planner::new(Settings { pools: vec![pool], ..Settings::default() }, 1);
    let mut source = Source::new(2);
    fill(&mut cluster, &mut source);
    let mut pending: Vec<Arc<Gang>> = (0..queued).map(|_| Arc::new(source.gang(4))).collect();
    // The first cycle sees everything for the first time: it is the start of a coordinator.
    let before = cpu_seconds()?;
    step(&mut planner, &mut cluster, &mut pending, &mut source);
    let first = cpu_seconds()? - before;
    let (mut times, mut starts, mut total) = (Vec::new(), 0, 0.0);
    while times.len() < CYCLES && (times.len() < 10 || total < CASE_S) {
        source.end_some(&mut cluster, changes);
        for _ in 0..queued.saturating_sub(pending.len()) {
            pending.push(Arc::new(source.gang(4)));
        }
        let before = cpu_seconds()?;
        let plan = planner.cycle(&mut cluster, &pending, source.now_ms);
        let seconds = cpu_seconds()? - before;
        total += seconds;
        starts += plan.starts.iter().map(|start| start.tasks.len()).sum::<usize>();
        times.push(seconds * 1000.0);
        source.settle(&mut pending, &plan);
    }
    times.sort_by(f64::total_cmp);
    let case = format!("{nodes} nodes, {queued} queued, {changes} end");
    let one = |metric: &str, unit, value| Record::of(metric, &case, unit, vec![value]);
    let percentile = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    Ok(vec![
        one("cycle, 50th percentile", "ms", percentile(0.5)),
        one("cycle, 99th percentile", "ms", percentile(0.99)),
        one("first cycle", "ms", first * 1000.0),
        one("gangs decided", "per_s", (queued * times.len()) as f64 / total),
        one("tasks started", "per_s", starts as f64 / total),
    ])
}

fn step(planner: &mut Planner, cluster: &mut Cluster, pending: &mut Vec<Arc<Gang>>, source: &mut Source) {
    let plan = planner.cycle(cluster, pending, source.now_ms);
    source.settle(pending, &plan);
}

/// Fills the nodes with gangs that end at different times.
fn fill(cluster: &mut Cluster, source: &mut Source) {
    let mut placer = Placer::new(Strategy::BestFit, 1);
    loop {
        let gang = Arc::new(source.gang(4));
        let Ok(tasks) = placer.place(cluster, &gang, gang.tasks.max, &|_| true) else { return };
        let expected_end_ms = Some(source.now_ms + source.random.u64(1..86_400_000));
        let running = Running { gang, tasks, started_ms: source.now_ms, expected_end_ms, stopping: false };
        source.running.push(running.gang.id.clone());
        if cluster.started(running).is_err() {
            return;
        }
    }
}

/// Gangs that come and end.
struct Source {
    random: fastrand::Rng,
    made: u64,
    now_ms: u64,
    running: Vec<String>,
}

impl Source {
    fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), made: 0, now_ms: 1_000_000, running: Vec::new() }
    }

    /// Sizes as clusters for learning have them: most of one GPU, some of a node, few of several.
    fn gang(&mut self, most_tasks: u32) -> Gang {
        self.made += 1;
        let gpus = match self.random.u32(0..100) {
            0..60 => 1,
            60..75 => 2,
            75..88 => 4,
            _ => 8,
        };
        let tasks = if gpus == 8 { self.random.u32(1..=most_tasks) } else { 1 };
        let amount = Amount {
            cpu_milli: 8_000 * u64::from(gpus),
            memory_bytes: u64::from(gpus) << 36,
            hugepage_bytes: 0,
            sandboxes: 1,
        };
        Gang {
            id: format!("job-{:08}", self.made),
            tenant: format!("tenant-{}", self.made % 50),
            kind: format!("kind-{}", self.made % 200),
            tasks: Size::exactly(tasks),
            task: TaskRequest { amount, gpus: Some(GpuRequest::whole(gpus)) },
            submitted_ms: self.now_ms,
            estimate_ms: Some(self.random.u64(60_000..86_400_000)),
            ..Gang::default()
        }
    }

    /// A second passes, in which some gangs end.
    fn end_some(&mut self, cluster: &mut Cluster, changes: usize) {
        self.now_ms += 1000;
        for _ in 0..changes.min(self.running.len()) {
            let at = self.random.usize(0..self.running.len());
            cluster.end(&self.running.swap_remove(at));
        }
    }

    /// What was started waits no more.
    fn settle(&mut self, pending: &mut Vec<Arc<Gang>>, plan: &lathe_scheduler::Plan) {
        let started: std::collections::HashSet<&str> =
            plan.starts.iter().map(|start| start.gang.id.as_str()).collect();
        pending.retain(|gang| !started.contains(gang.id.as_str()));
        self.running.extend(started.into_iter().map(str::to_owned));
        // The order of a set is another each time.
        self.running.sort_unstable();
    }
}

/// CPU time of this thread.
fn cpu_seconds() -> anyhow::Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("cannot read the CPU's clock")?;
    Ok(std::time::Duration::from(time).as_secs_f64())
}
