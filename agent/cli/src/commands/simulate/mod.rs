//! `lathe simulate`: the scheduler in virtual time, over traces; it needs no cluster.
//!
//! [`input`] makes files and options into a study, [`report`] what is printed, [`plot`] what is drawn.
//! Nothing is written before everything was read and simulated.

mod input;
mod plot;
mod report;

use std::path::PathBuf;

use clap::Args;

use crate::exit::Exit;
use crate::output::{self, Format};

/// Replay a trace of a real cluster with different policies, and compare them.
///
/// Two procedures. `arrivals` (the one for lists of pods): pods come in random order, stay for ever, and what
/// does not fit is skipped; shows how much of the GPUs each placement policy can give away. `queue` (the
/// one for jobs with arrival and duration): jobs wait, run and end; shows waiting and completion times of
/// each queue policy.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// Nodes: CSV with sn,cpu_milli,memory_mib,gpu,model.
    #[arg(long, value_name = "FILE", conflicts_with = "cluster")]
    nodes: Option<PathBuf>,
    /// Instead of a list: NODESxGPUS equal nodes, such as 16x8.
    #[arg(long, value_name = "NxG", value_parser = input::cluster)]
    cluster: Option<(u32, u32)>,
    /// Work: CSV with name,cpu_milli,memory_mib,num_gpu,gpu_milli (pods) or job,arrival_s,duration_s,gpus
    /// (jobs).
    #[arg(long, value_name = "FILE")]
    jobs: PathBuf,
    /// What is simulated; arrivals for pods, queue for jobs, unless said.
    #[arg(long, value_enum)]
    procedure: Option<Procedure>,
    /// Policies, separated by commas or given again; or all.
    ///
    /// For arrivals: random, dot-product, gpu-clustering, gpu-packing, best-fit, fgd, balanced, spread. For
    /// queue: fcfs, sjf, hrrn, fair, priority. What a pool has unless said: balanced, fcfs.
    #[arg(long, value_delimiter = ',')]
    policy: Vec<String>,
    /// queue: none, easy or conservative; several are compared.
    #[arg(long, value_delimiter = ',', default_value = "easy")]
    backfill: Vec<String>,
    /// queue: where jobs go; one of the policies for arrivals.
    #[arg(long, default_value = "balanced")]
    placement: String,
    /// queue: what the planner knows of how long jobs run: perfect, user or history; several are compared.
    #[arg(long, value_delimiter = ',', default_value = "perfect")]
    estimates: Vec<String>,
    /// queue: the load: work that comes by what the GPUs can do.
    ///
    /// With --nodes or --cluster, arrivals are moved closer together or apart; without, the cluster is
    /// sized: nodes of 8 GPUs, whole ones, enough for the largest job.
    #[arg(long, value_parser = input::load)]
    load: Option<f64>,
    /// queue: tenants that jobs are dealt to by chance, where the list names none.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    tenants: u32,
    /// Decides what is left to chance.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// So many runs, with --seed and the numbers after it; figures are means.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// arrivals: how nodes of the same score are told apart; random places by chance anyhow.
    #[arg(long, value_enum, default_value_t)]
    ties: Ties,
    /// arrivals: where the mix of pods that fragmentation is measured against comes from.
    #[arg(long, value_enum, default_value_t)]
    demand: Demand,
    /// queue: at least so many seconds between two planning cycles.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = input::seconds)]
    cycle: f64,
    /// queue: jobs may be stopped for others, and are put back into the queue.
    #[arg(long)]
    preemption: bool,
    /// queue: seconds that a job gets to write a checkpoint before it is stopped; without, it loses its
    /// work.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = input::seconds)]
    grace: f64,
    /// queue: jobs write a checkpoint after so many seconds of their run, again and again.
    #[arg(long, value_name = "SECONDS", value_parser = input::seconds)]
    checkpoint: Option<f64>,
    /// queue: a job that waited so many seconds goes next, whatever the policy says.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = input::seconds)]
    starvation: f64,
    /// queue: nodes fail, each after so many seconds on average.
    #[arg(long, value_name = "SECONDS", value_parser = input::seconds)]
    mtbf: Option<f64>,
    /// queue: seconds until a node that failed is back.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600.0, value_parser = input::seconds)]
    repair: f64,
    /// Draw the figures into this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Procedure {
    /// Pods come and stay.
    Arrivals,
    /// Jobs wait, run and end.
    Queue,
}

/// How equal nodes are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Ties {
    /// The smallest name, as in the published results.
    #[default]
    Name,
    /// By chance, with the seed.
    Random,
}

/// Where the mix of pods comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Demand {
    /// The whole list, known from the start, as in the published results.
    #[default]
    Trace,
    /// What came so far, as in a cluster.
    Learnt,
}

/// Simulates, prints, draws.
///
/// # Errors
/// When a file or an option cannot be used; nothing is printed or written then.
pub fn run(args: &SimulateArgs, format: Format) -> anyhow::Result<Exit> {
    let plot = args.plot.as_deref().map(plot::Target::new).transpose()?;
    let report = input::read(args)?.run();
    if let Some(plot) = plot {
        plot.write(&report)?;
    }
    match format {
        Format::Json => output::json(&report)?,
        Format::Table => report.print(),
    }
    Ok(Exit::Success)
}
