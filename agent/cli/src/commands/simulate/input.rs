//! Files and options, checked and made into a study.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use lathe_scheduler::model::Node;
use lathe_scheduler::placement;
use lathe_scheduler::policy::{Pool, Strategy};
use lathe_scheduler::simulate::arrivals::{self, TraceNode, TraceTask};
use lathe_scheduler::simulate::compare::{Choice, Study};
use lathe_scheduler::simulate::names::Named;
use lathe_scheduler::simulate::scenario::{self, Arrivals, Load};
use lathe_scheduler::simulate::trace::{self, Pod, Work};
use lathe_scheduler::simulate::{Failures, Options};

use super::report::{self, Report, ReportHead};
use super::{Demand, Procedure, SimulateArgs, Ties};

/// Largest file that is read, bytes: a mistaken path does not fill memory.
const FILE_BYTES: u64 = 1 << 30;

/// The word for all policies.
const ALL: &str = "all";

/// What is simulated, ready to run.
pub enum Input {
    /// Jobs that wait, run and end.
    Queue {
        /// What is the same for all.
        study: Box<Study>,
        /// What is compared.
        choices: Vec<Choice>,
        /// What the report begins with.
        head: ReportHead,
    },
    /// Pods that come and stay.
    Arrivals {
        /// The nodes.
        nodes: Vec<TraceNode>,
        /// The pods.
        pods: Vec<TraceTask>,
        /// What is compared.
        strategies: Vec<Strategy>,
        /// How equal nodes are told apart.
        ties: placement::Ties,
        /// Whether the mix of pods is known from the start.
        known_demand: bool,
        /// What the report begins with.
        head: ReportHead,
    },
}

impl Input {
    /// Simulates.
    pub fn run(&self) -> Report {
        match self {
            Self::Queue { study, choices, head } => report::queue(study, choices, head),
            Self::Arrivals { nodes, pods, strategies, ties, known_demand, head } => {
                let rows = strategies.iter().map(|&strategy| {
                    // Chance is all that random placement goes by.
                    let ties = if strategy == Strategy::Random { placement::Ties::Seeded } else { *ties };
                    let options = arrivals::Options { strategy, ties, seed: 0, known_demand: *known_demand };
                    report::arrivals(nodes, pods, options, head)
                });
                Report { head: head.clone(), results: rows.collect() }
            }
        }
    }
}

/// Reads the files and checks the options.
///
/// # Errors
/// The first that is wrong, one line.
pub fn read(args: &SimulateArgs) -> anyhow::Result<Input> {
    let work = trace::work(&args.jobs.display().to_string(), &bytes(&args.jobs)?)?;
    let nodes = match (&args.nodes, args.cluster) {
        (Some(file), _) => Some(trace::nodes(&file.display().to_string(), &bytes(file)?)?),
        (None, Some((count, gpus))) => Some(scenario::equal_nodes(count, gpus)),
        (None, None) => None,
    };
    let procedure = args.procedure.unwrap_or(match work {
        Work::Pods(_) => Procedure::Arrivals,
        Work::Jobs(_) => Procedure::Queue,
    });
    match (procedure, work) {
        (Procedure::Queue, Work::Pods(pods)) => {
            if pods.iter().all(|pod| pod.lifetime_ms.is_none()) {
                bail!(
                    "--procedure queue: no pod of {} has a creation_time and a deletion_time; use --procedure \
                     arrivals",
                    args.jobs.display()
                );
            }
            queue(args, nodes, Arrivals::Pods(pods))
        }
        (Procedure::Queue, Work::Jobs(jobs)) => queue(args, nodes, Arrivals::Jobs(jobs)),
        (Procedure::Arrivals, Work::Pods(pods)) => stay(args, nodes, pods),
        (Procedure::Arrivals, Work::Jobs(_)) => bail!(
            "--procedure arrivals: {} is a list of jobs; give a list of pods, or use --procedure queue",
            args.jobs.display()
        ),
    }
}

fn stay(args: &SimulateArgs, nodes: Option<Vec<Node>>, pods: Vec<Pod>) -> anyhow::Result<Input> {
    let Some(mut nodes) = nodes else { bail!("which nodes? Give --nodes FILE or --cluster NxG") };
    if args.load.is_some() {
        bail!("--load is for --procedure queue; pods arrive until their demand is 130 % of the GPUs");
    }
    // The published procedure is about GPUs: nodes without are no part of it.
    nodes.retain(|node| !node.gpus.is_empty());
    if nodes.is_empty() {
        bail!("no node has a GPU; arrivals are counted against GPUs");
    }
    if pods.iter().all(|pod| pod.gang.task.gpus.is_none()) {
        bail!("no pod of {} asks for a GPU; arrivals are counted against GPUs", args.jobs.display());
    }
    let strategies = several("--policy", &args.policy, "balanced")?;
    let head = ReportHead::new("arrivals", &nodes, pods.len(), seeds(args));
    Ok(Input::Arrivals {
        nodes: scenario::arrival_nodes(&nodes),
        pods: scenario::arrival_tasks(&pods),
        strategies,
        ties: if args.ties == Ties::Random { placement::Ties::Seeded } else { placement::Ties::ByName },
        known_demand: args.demand == Demand::Trace,
        head,
    })
}

fn queue(args: &SimulateArgs, nodes: Option<Vec<Node>>, mut arrivals: Arrivals) -> anyhow::Result<Input> {
    if args.ties == Ties::Random || args.demand == Demand::Learnt {
        bail!("--ties and --demand are for --procedure arrivals");
    }
    let given = nodes.is_some();
    let nodes = match (nodes, args.load) {
        (Some(nodes), _) => nodes,
        (None, Some(load)) => {
            let count = Load::of(&arrivals).nodes(load, scenario::NODE_GPUS);
            scenario::equal_nodes(count, scenario::NODE_GPUS)
        }
        (None, None) => bail!("which nodes? Give --nodes FILE, --cluster NxG, or --load to size a cluster"),
    };
    let gpus: usize = nodes.iter().map(|node| node.gpus.len()).sum();
    if gpus == 0 {
        bail!("no node has a GPU");
    }
    let mut study = Study {
        nodes,
        arrivals: Arrivals::default(),
        tenants: args.tenants,
        pool: Pool { preemption: args.preemption, starvation_ms: ms(args.starvation), ..Pool::default() },
        grace_ms: ms(args.grace),
        options: Options {
            cycle_ms: ms(args.cycle),
            checkpoint_ms: args.checkpoint.map(ms),
            failures: args.mtbf.map(|mtbf| Failures { mtbf_ms: ms(mtbf).max(1), repair_ms: ms(args.repair) }),
            ..Options::default()
        },
    };
    let load = Load::of(&arrivals).gpus / gpus as f64;
    // A cluster that was sized is a whole number of nodes; only one that had to be larger still, for
    // the largest job, is far from the load.
    if let Some(wanted) = args.load
        && (given || load < wanted / 2.0)
    {
        arrivals.stretch(load / wanted);
    }
    study.arrivals = arrivals;
    let misfits = study.leave_out_misfits();
    let placement = one::<Strategy>("--placement", &args.placement)?;
    let mut choices = Vec::new();
    for &queue in &several("--policy", &args.policy, "fcfs")? {
        for &backfill in &several("--backfill", &args.backfill, "easy")? {
            for &estimates in &several("--estimates", &args.estimates, "perfect")? {
                choices.push(Choice { queue, backfill, placement, estimates });
            }
        }
    }
    let jobs = study.jobs(choices[0].estimates, args.seed).len();
    if jobs == 0 {
        let why = misfits.first().map_or(String::new(), |(job, why)| format!("; {job}: {why}"));
        bail!("none of the jobs can run on these nodes{why}");
    }
    let mut head = ReportHead::new("queue", &study.nodes, jobs, seeds(args));
    head.load = Some(Load::of(&study.arrivals).gpus / gpus as f64);
    head.left_out = misfits.into_iter().map(|(job, reason)| report::LeftOut { job, reason }).collect();
    Ok(Input::Queue { study: Box::new(study), choices, head })
}

fn seeds(args: &SimulateArgs) -> Vec<u64> {
    (0..args.seeds).map(|more| args.seed.wrapping_add(more)).collect()
}

fn bytes(path: &Path) -> anyhow::Result<Vec<u8>> {
    let context = || format!("cannot read {}", path.display());
    let size = fs::metadata(path).with_context(context)?.len();
    if size > FILE_BYTES {
        bail!("{} is larger than 1 GiB; is it the trace?", path.display());
    }
    fs::read(path).with_context(context)
}

/// The values of these names, each once, in the order given.
fn several<T: Named>(option: &str, names: &[String], default: &str) -> anyhow::Result<Vec<T>> {
    if names.iter().any(|name| name == ALL) {
        return Ok(T::NAMES.iter().map(|(_, value)| *value).collect());
    }
    let mut values = Vec::new();
    for name in names {
        let value = one(option, name)?;
        if !values.contains(&value) {
            values.push(value);
        }
    }
    if values.is_empty() {
        values.push(one(option, default)?);
    }
    Ok(values)
}

fn one<T: Named>(option: &str, name: &str) -> anyhow::Result<T> {
    T::named(name).with_context(|| {
        let known: Vec<&str> = T::NAMES.iter().map(|(name, _)| *name).collect();
        format!("{option} {name:?}: no such {}; there are {}", T::WHAT, known.join(", "))
    })
}

/// `NODESxGPUS`.
pub fn cluster(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('x').and_then(|(nodes, gpus)| nodes.parse().ok().zip(gpus.parse().ok()));
    parts
        .filter(|(nodes, gpus)| (1..=1_000_000).contains(nodes) && (1..=64).contains(gpus))
        .ok_or_else(|| "write NODESxGPUS, such as 16x8: at most 1000000 nodes, of 1 to 64 GPUs".to_owned())
}

/// A load.
pub fn load(text: &str) -> Result<f64, String> {
    let load = text.parse::<f64>().ok();
    load.filter(|load| (0.001..=1000.0).contains(load))
        .ok_or_else(|| "write a number from 0.001 to 1000; 1 is as much as the GPUs can do".to_owned())
}

/// Seconds.
pub fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok();
    seconds
        .filter(|seconds| (0.0..=1e10).contains(seconds))
        .ok_or_else(|| "write seconds, from 0 to 10000000000".to_owned())
}

fn ms(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_scheduler::policy::Queue;

    #[test]
    fn clusters_loads_and_times_are_numbers_in_bounds() {
        assert_eq!(cluster("16x8"), Ok((16, 8)));
        for wrong in ["16", "x8", "0x8", "16x0", "16x65", "-1x8", "1e9x8"] {
            assert!(cluster(wrong).is_err(), "{wrong}");
        }
        assert!(load("0.9").is_ok() && load("0").is_err() && load("NaN").is_err());
        assert!(seconds("0").is_ok() && seconds("-1").is_err() && seconds("inf").is_err());
    }

    #[test]
    fn policies_are_named_once_and_unknown_ones_are_answered_with_the_known() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let queues: Vec<Queue> = several("--policy", &names(&["sjf", "fcfs", "sjf"]), "fcfs").unwrap();
        assert_eq!(queues, [Queue::ShortestJobFirst, Queue::FirstComeFirstServed]);
        assert_eq!(several::<Queue>("--policy", &names(&["all"]), "fcfs").unwrap().len(), 5);
        let error = several::<Queue>("--policy", &names(&["fgd"]), "fcfs").unwrap_err().to_string();
        assert_eq!(
            error,
            "--policy \"fgd\": no such queue policy; there are fcfs, sjf, hrrn, fair, priority"
        );
    }
}
