//! What was simulated, for people and programs.

use lathe_scheduler::model::Node;
use lathe_scheduler::placement::Ties;
use lathe_scheduler::simulate::Figures;
use lathe_scheduler::simulate::arrivals::{self, TraceNode, TraceTask};
use lathe_scheduler::simulate::compare::{self, ArrivalFigures, Choice, Study};
use lathe_scheduler::simulate::names::Named;
use serde::Serialize;

use crate::output;

/// What `--json` prints; agent/scheduler/docs/simulator.md says what each field is.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was simulated.
    #[serde(flatten)]
    pub head: ReportHead,
    /// What came out, in the order of the options.
    pub results: Vec<Row>,
}

/// What is the same for all results.
#[derive(Clone, Debug, Serialize)]
pub struct ReportHead {
    /// `arrivals` or `queue`.
    pub procedure: &'static str,
    /// Nodes.
    pub nodes: usize,
    /// Their GPUs.
    pub gpus: usize,
    /// Jobs or pods.
    pub jobs: usize,
    /// GPU-time that comes, by what the GPUs can do while it comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// The seeds of the runs.
    pub seeds: Vec<u64>,
    /// Jobs that no policy could ever run on these nodes.
    pub left_out: Vec<LeftOut>,
}

/// A job that was left out.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Its name.
    pub job: String,
    /// Why.
    pub reason: String,
}

/// One way to schedule, and what came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Row {
    /// Pods that come and stay.
    Arrivals {
        /// Where they go.
        policy: &'static str,
        /// How equal nodes are told apart.
        ties: &'static str,
        /// Where the mix of pods comes from.
        demand: &'static str,
        /// What came of it.
        #[serde(flatten)]
        figures: Box<ArrivalFigures>,
    },
    /// Jobs that wait, run and end.
    Queue {
        /// Which goes next.
        policy: &'static str,
        /// What may go before one that waits.
        backfill: &'static str,
        /// Where they go.
        placement: &'static str,
        /// What was known of how long they run.
        estimates: &'static str,
        /// What came of it.
        #[serde(flatten)]
        figures: Box<Figures>,
    },
}

impl ReportHead {
    /// Nothing left out, no load.
    pub fn new(procedure: &'static str, nodes: &[Node], jobs: usize, seeds: Vec<u64>) -> Self {
        let gpus = nodes.iter().map(|node| node.gpus.len()).sum();
        Self { procedure, nodes: nodes.len(), gpus, jobs, load: None, seeds, left_out: Vec::new() }
    }
}

/// Runs each choice.
pub fn queue(study: &Study, choices: &[Choice], head: &ReportHead) -> Report {
    let row = |choice: &Choice| Row::Queue {
        policy: choice.queue.name(),
        backfill: choice.backfill.name(),
        placement: choice.placement.name(),
        estimates: choice.estimates.name(),
        figures: Box::new(study.run(choice, &head.seeds)),
    };
    Report { head: head.clone(), results: choices.iter().map(row).collect() }
}

/// Runs one placement.
pub fn arrivals(
    nodes: &[TraceNode],
    tasks: &[TraceTask],
    options: arrivals::Options,
    head: &ReportHead,
) -> Row {
    Row::Arrivals {
        policy: options.strategy.name(),
        ties: if options.ties == Ties::ByName { "name" } else { "random" },
        demand: if options.known_demand { "trace" } else { "learnt" },
        figures: Box::new(compare::arrivals(nodes, tasks, options, &head.seeds)),
    }
}

impl Report {
    /// A table, and what was left out.
    pub fn print(&self) {
        let ReportHead { procedure, nodes, gpus, jobs, seeds, .. } = &self.head;
        let load = self.head.load.map_or(String::new(), |load| format!(", load {load:.2}"));
        let plural = if seeds.len() == 1 { "" } else { "s" };
        println!(
            "{procedure}: {jobs} jobs on {nodes} nodes with {gpus} GPUs{load}, {} seed{plural}\n",
            seeds.len()
        );
        println!("{}", self.table());
        if let Some(LeftOut { job, reason }) = self.head.left_out.first() {
            println!(
                "\n{} jobs were left out, which fit on no empty cluster; {job}: {reason}",
                self.head.left_out.len()
            );
        }
    }

    fn table(&self) -> comfy_table::Table {
        let headings: &[&str] = match self.results.first() {
            Some(Row::Arrivals { .. }) => &[
                "POLICY",
                "TIES",
                "ALLOCATED AT 90",
                "AT 100",
                "MIN",
                "MAX",
                "IN THE END",
                "FRAGMENTED AT 100",
                "PLACED",
            ],
            _ => &[
                "POLICY",
                "BACKFILL",
                "ESTIMATES",
                "WAIT MEAN",
                "P95",
                "COMPLETION MEAN",
                "P95",
                "SLOWDOWN",
                "P95",
                "MAKESPAN",
                "JAIN",
                "ALLOCATED",
                "FRAGMENTED",
                "PREEMPTED",
            ],
        };
        let mut table = output::table(headings);
        for row in &self.results {
            table.add_row(row.cells());
        }
        table
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        match self {
            Self::Arrivals { policy, ties, figures, .. } => {
                let at = |list: &[f64], percent: usize| {
                    list.get(percent).map_or_else(|| "-".to_owned(), |value| format!("{value:.2} %"))
                };
                let ArrivalFigures {
                    percent_gpu_allocated: curve, percent_gpu_allocated_at_100: full, ..
                } = &**figures;
                vec![
                    (*policy).to_owned(),
                    (*ties).to_owned(),
                    at(curve, 90),
                    format!("{:.2} %", full.mean),
                    format!("{:.2} %", full.min),
                    format!("{:.2} %", full.max),
                    at(curve, curve.len().saturating_sub(1)),
                    at(&figures.percent_gpu_fragmented, 100),
                    format!("{:.0} of {:.0}", figures.placed, figures.arrived),
                ]
            }
            Self::Queue { policy, backfill, estimates, figures, .. } => vec![
                (*policy).to_owned(),
                (*backfill).to_owned(),
                (*estimates).to_owned(),
                time(figures.waiting_s.mean),
                time(figures.waiting_s.p95),
                time(figures.completion_s.mean),
                time(figures.completion_s.p95),
                format!("{:.2}", figures.bounded_slowdown.mean),
                format!("{:.2}", figures.bounded_slowdown.p95),
                time(figures.makespan_s),
                format!("{:.3}", figures.jain_fairness_tenants),
                format!("{:.1} %", figures.mean_percent_gpu_allocated),
                format!("{:.1} %", figures.mean_percent_gpu_fragmented),
                format!("{:.0}", figures.preemptions),
            ],
        }
    }
}

fn time(seconds: f64) -> String {
    output::duration((seconds * 1000.0).round() as u64)
}
