//! Discrete events: gangs come, run, are stopped and end; nodes fail; the planner is asked when
//! something changed. Time is a number that jumps from event to event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use super::metrics::Step;
use super::outcome::{JobTimes, Outcome};
use crate::model::{Cluster, Gang, Node, Offer, Running};
use crate::placement::{Demand, fragmented_milli};
use crate::plan::{Plan, Resize};
use crate::planner::Planner;
use crate::policy;

/// Cycles without time passing between them, after which the next waits a second: a policy that stops
/// and starts the same gangs at one moment must not stop time.
const CYCLES_AT_ONCE: u32 = 100;

/// Runs of one job, after which it is given up: without checkpoints, on nodes that fail often enough,
/// a long one never ends.
const RUNS: u32 = 10_000;

/// Measurements of fragmentation while jobs arrive.
const MEASUREMENTS: u64 = 400;

/// One job of a simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What it asks for; `submitted_ms` is when it comes, and `estimate_ms` is what the planner is told.
    pub gang: Arc<Gang>,
    /// How long it runs at its full size, milliseconds, at least 1. The planner is not told.
    pub duration_ms: u64,
}

/// How to simulate.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Pools and tenants.
    pub policy: policy::Settings,
    /// What is left to chance.
    pub seed: u64,
    /// At least so long between two planning cycles, milliseconds.
    pub cycle_ms: u64,
    /// Work is kept up to the last multiple of this when a node fails, or when a gang without grace is
    /// stopped, milliseconds of its run; nothing is kept without.
    pub checkpoint_ms: Option<u64>,
    /// Nodes fail, if they do.
    pub failures: Option<Failures>,
}

/// How nodes fail: at exponentially distributed times, each on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    /// Mean time between the failures of one node, milliseconds.
    pub mtbf_ms: u64,
    /// Until it is back, milliseconds.
    pub repair_ms: u64,
}

/// Simulates until nothing can happen any more.
pub fn simulate(nodes: Vec<Node>, jobs: Vec<Job>, options: Options) -> Outcome {
    let mut simulation = Simulation::new(nodes, jobs, options);
    simulation.run();
    simulation.outcome()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Repairs and ends before arrivals: what comes at the same moment finds the room.
    Repaired(u32),
    /// A job's run; outdated if it has begun another since.
    Ended(usize, u32),
    /// A job's checkpoint is written.
    Stopped(usize, u32),
    Failed(u32),
    Arrived(usize),
    /// The planner may be asked again.
    Cycle,
}

/// A job on its way.
struct State {
    job: Job,
    /// Milliseconds of tasks that are left.
    left: u64,
    /// What the planner was told of how long all of it runs.
    estimate_ms: Option<u64>,
    /// Thousandths of GPUs of a task, once it was placed.
    task_milli: u64,
    /// Thousandths of GPUs that it has now.
    has_milli: u64,
    /// Counts changes of its run, to tell outdated events.
    run: u32,
    stage: Stage,
    waiting_since_ms: u64,
    waited_ms: u64,
    started_ms: Option<u64>,
    ended_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Coming,
    Waiting,
    Running {
        tasks: u32,
        since_ms: u64,
    },
    /// Told to stop; works no more.
    Stopping,
    Done,
}

struct Simulation {
    options: Options,
    planner: Planner,
    cluster: Cluster,
    states: Vec<State>,
    by_id: HashMap<String, usize>,
    /// Indices of jobs that wait, in the order of arrival, and their gangs.
    waiting: Vec<usize>,
    pending: Vec<Arc<Gang>>,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    random: fastrand::Rng,
    now_ms: u64,
    next_cycle_ms: u64,
    planned_ms: Option<u64>,
    cycles_at_once: u32,
    /// Jobs that are not done, and those of them that have not come.
    open: usize,
    coming: usize,
    /// Nodes that failed and are not back.
    down: usize,
    result: Outcome,
    steps: Vec<Step>,
    allocated_milli: u64,
    /// What fragmentation is measured against, what it was, and when it is measured again: it is a look
    /// at all nodes.
    demand: Demand,
    fragmented_milli: f64,
    measure_ms: u64,
    measure_every_ms: u64,
}

impl Simulation {
    fn new(nodes: Vec<Node>, mut jobs: Vec<Job>, options: Options) -> Self {
        jobs.sort_by_key(|job| job.gang.submitted_ms);
        let mut events: BinaryHeap<_> = jobs
            .iter()
            .enumerate()
            .map(|(at, job)| Reverse((job.gang.submitted_ms, Event::Arrived(at))))
            .collect();
        let mut random = fastrand::Rng::with_seed(options.seed);
        let first = jobs.first().map_or(0, |job| job.gang.submitted_ms);
        let last = jobs.last().map_or(0, |job| job.gang.submitted_ms);
        let demand = Demand::of(jobs.iter().map(|job| (&job.gang.task, f64::from(job.gang.tasks.max))));
        if let Some(failures) = options.failures {
            for node in 0..u32::try_from(nodes.len()).unwrap_or(u32::MAX) {
                events
                    .push(Reverse((first + exponential(&mut random, failures.mtbf_ms), Event::Failed(node))));
            }
        }
        let total_milli = nodes.iter().map(|node| 1000 * node.gpus.len() as u64).sum();
        Self {
            planner: Planner::new(options.policy.clone(), options.seed),
            by_id: jobs.iter().enumerate().map(|(at, job)| (job.gang.id.clone(), at)).collect(),
            result: Outcome::new(first, total_milli),
            open: jobs.len(),
            coming: jobs.len(),
            down: 0,
            states: jobs.into_iter().map(State::new).collect(),
            cluster: Cluster::new(nodes),
            options,
            waiting: Vec::new(),
            pending: Vec::new(),
            events,
            random,
            now_ms: first,
            next_cycle_ms: 0,
            planned_ms: None,
            cycles_at_once: 0,
            steps: Vec::new(),
            allocated_milli: 0,
            fragmented_milli: 0.0,
            measure_ms: first,
            measure_every_ms: (last - first) / MEASUREMENTS,
            demand,
        }
    }

    fn run(&mut self) {
        while let Some(Reverse((time, event))) = self.events.pop() {
            self.advance(time);
            let mut changed = self.happens(event);
            while let Some(Reverse((next, _))) = self.events.peek()
                && *next == self.now_ms
                && let Some(Reverse((_, event))) = self.events.pop()
            {
                changed |= self.happens(event);
            }
            if changed && self.open > 0 {
                self.plan();
            }
            self.record();
            if self.open == 0 || self.stuck() {
                break;
            }
        }
    }

    /// Nothing runs, nothing comes, nothing is broken: only nodes would fail, for ever.
    fn stuck(&self) -> bool {
        let idle = self.cluster.running().is_empty() && self.coming == 0 && self.down == 0;
        idle && self.planned_ms == Some(self.now_ms)
    }

    fn advance(&mut self, time_ms: u64) {
        if time_ms > self.now_ms {
            self.now_ms = time_ms;
            self.cycles_at_once = 0;
        }
    }

    /// Applies an event, and tells whether it is one to plan for.
    fn happens(&mut self, event: Event) -> bool {
        match event {
            Event::Cycle => true,
            Event::Arrived(job) => {
                self.coming -= 1;
                self.queue(job);
                true
            }
            Event::Ended(job, run) if self.states[job].run == run => {
                self.complete(job);
                true
            }
            Event::Stopped(job, run) if self.states[job].run == run => {
                self.release(job);
                self.queue(job);
                true
            }
            Event::Ended(..) | Event::Stopped(..) => false,
            Event::Failed(node) => {
                self.fail(node);
                true
            }
            Event::Repaired(node) => {
                let mut repaired = self.cluster.nodes()[node as usize].clone();
                repaired.offer = Offer::Open;
                self.cluster.update(node, repaired);
                self.down -= 1;
                if let Some(failures) = self.options.failures {
                    let next = self.now_ms + exponential(&mut self.random, failures.mtbf_ms);
                    self.events.push(Reverse((next, Event::Failed(node))));
                }
                true
            }
        }
    }

    fn queue(&mut self, job: usize) {
        let state = &mut self.states[job];
        if state.run > RUNS {
            state.stage = Stage::Done;
            self.open -= 1;
            return;
        }
        state.stage = Stage::Waiting;
        state.waiting_since_ms = self.now_ms;
        let at = self.waiting.partition_point(|&other| other < job);
        self.waiting.insert(at, job);
        self.pending.insert(at, Arc::clone(&state.job.gang));
    }

    fn complete(&mut self, job: usize) {
        self.release(job);
        let state = &mut self.states[job];
        state.stage = Stage::Done;
        state.ended_ms = Some(self.now_ms);
        self.open -= 1;
        // What was said of it was about all of it, not about what was left when it last waited.
        let gang = Gang { estimate_ms: state.estimate_ms, ..(*state.job.gang).clone() };
        self.planner.ended(&gang, state.job.duration_ms);
    }

    /// Gives back what a job has, whatever it did with it.
    fn release(&mut self, job: usize) {
        self.worked(job);
        let state = &mut self.states[job];
        state.run += 1;
        self.cluster.end(&state.job.gang.id);
        self.has(job, 0);
    }

    /// Counts the work since a job was last looked at.
    fn worked(&mut self, job: usize) {
        let state = &mut self.states[job];
        if let Stage::Running { tasks, ref mut since_ms } = state.stage {
            state.left = state.left.saturating_sub((self.now_ms - *since_ms).saturating_mul(tasks.into()));
            *since_ms = self.now_ms;
        }
    }

    /// Takes back work that no checkpoint holds.
    fn lose(&mut self, job: usize) {
        let state = &mut self.states[job];
        let all = state.all_work();
        let done = all - state.left;
        let full = u64::from(state.job.gang.tasks.max.max(1));
        let kept =
            self.options.checkpoint_ms.map_or(0, |every| done - done % every.saturating_mul(full).max(1));
        self.result.lost_gpu_ms += (done - kept) as f64 * state.task_milli as f64 / 1000.0;
        state.left = all - kept;
        state.estimate_again();
    }

    fn fail(&mut self, node: u32) {
        let Some(failures) = self.options.failures else { return };
        self.result.failures += 1;
        let hit: Vec<usize> = self
            .cluster
            .running()
            .values()
            .filter(|running| running.tasks.iter().any(|task| task.node == node))
            .filter_map(|running| self.by_id.get(&running.gang.id).copied())
            .collect();
        for job in hit {
            let working = matches!(self.states[job].stage, Stage::Running { .. });
            self.release(job);
            // One that was told to stop lost what it had to lose then.
            if working {
                self.lose(job);
            }
            self.queue(job);
        }
        let mut failed = self.cluster.nodes()[node as usize].clone();
        failed.offer = Offer::Suspected { reason: "it failed".to_owned() };
        self.cluster.update(node, failed);
        self.down += 1;
        self.events.push(Reverse((self.now_ms + failures.repair_ms, Event::Repaired(node))));
    }

    fn plan(&mut self) {
        if self.now_ms < self.next_cycle_ms {
            self.events.push(Reverse((self.next_cycle_ms, Event::Cycle)));
            return;
        }
        self.cycles_at_once += 1;
        let rest = if self.cycles_at_once >= CYCLES_AT_ONCE { 1000 } else { 0 };
        self.next_cycle_ms = self.now_ms + self.options.cycle_ms.max(rest);
        self.planned_ms = Some(self.now_ms);
        let plan = self.planner.cycle(&mut self.cluster, &self.pending, self.now_ms);
        self.result.cycles += 1;
        self.apply(plan);
    }

    fn apply(&mut self, plan: Plan) {
        for start in &plan.starts {
            let Some(&job) = self.by_id.get(&start.gang.id) else { continue };
            let state = &mut self.states[job];
            state.waited_ms += self.now_ms - state.waiting_since_ms;
            state.started_ms.get_or_insert(self.now_ms);
            let milli = self.cluster.running().get(&start.gang.id).map_or(0, gpu_milli);
            let tasks = u32::try_from(start.tasks.len()).unwrap_or(u32::MAX);
            state.task_milli = milli / u64::from(tasks.max(1));
            self.has(job, milli);
            self.go_on(job, tasks);
        }
        let states = &self.states;
        self.waiting.retain(|&job| states[job].stage == Stage::Waiting);
        self.pending = self.waiting.iter().map(|&job| Arc::clone(&states[job].job.gang)).collect();
        for resize in &plan.resizes {
            self.resize(resize);
        }
        for preemption in &plan.preemptions {
            if let Some(&job) = self.by_id.get(&preemption.gang) {
                self.preempt(job);
            }
        }
    }

    /// A job works on so many tasks from now on.
    fn go_on(&mut self, job: usize, tasks: u32) {
        let state = &mut self.states[job];
        state.run += 1;
        state.stage = Stage::Running { tasks, since_ms: self.now_ms };
        let end = self.now_ms.saturating_add(state.left.div_ceil(tasks.max(1).into()));
        self.events.push(Reverse((end, Event::Ended(job, state.run))));
    }

    fn preempt(&mut self, job: usize) {
        if !matches!(self.states[job].stage, Stage::Running { .. }) {
            return;
        }
        self.result.preemptions += 1;
        self.worked(job);
        let grace_ms = self.states[job].job.gang.grace_ms;
        if grace_ms == 0 {
            self.lose(job);
        } else {
            self.states[job].estimate_again();
        }
        let state = &mut self.states[job];
        state.stage = Stage::Stopping;
        state.run += 1;
        let gone_ms = self.now_ms + grace_ms;
        if let Some(running) = self.cluster.running_mut(&state.job.gang.id) {
            running.stopping = true;
            running.expected_end_ms = Some(gone_ms);
        }
        self.events.push(Reverse((gone_ms, Event::Stopped(job, state.run))));
    }

    /// A gang is as large as it is planned to be from now on; its work goes on. What comes to it the
    /// planner has added; what goes, it leaves to us, who do not wait for its tasks to stop.
    fn resize(&mut self, resize: &Resize) {
        let Some(&job) = self.by_id.get(&resize.gang) else { return };
        let Stage::Running { tasks: before, .. } = self.states[job].stage else { return };
        self.worked(job);
        self.result.resizes += 1;
        let Some(mut running) = self.cluster.end(&resize.gang) else { return };
        let mut ranks = 0..;
        running.tasks.retain(|_| ranks.next().is_some_and(|rank| !resize.remove.contains(&rank)));
        let tasks = u32::try_from(running.tasks.len()).unwrap_or(u32::MAX);
        running.expected_end_ms = running.expected_end_ms.map(|end| {
            let left = end.saturating_sub(self.now_ms).saturating_mul(before.into());
            self.now_ms.saturating_add(left / u64::from(tasks.max(1)))
        });
        self.has(job, gpu_milli(&running));
        if self.cluster.start(running).is_ok() {
            self.go_on(job, tasks);
        }
        if !resize.remove.is_empty() {
            self.events.push(Reverse((self.now_ms, Event::Cycle)));
        }
    }

    /// A job has so many thousandths of GPUs from now on.
    fn has(&mut self, job: usize, milli: u64) {
        self.allocated_milli += milli;
        self.allocated_milli -= std::mem::replace(&mut self.states[job].has_milli, milli);
    }

    fn record(&mut self) {
        if self.now_ms >= self.measure_ms {
            self.fragmented_milli = fragmented_milli(&self.cluster, &self.demand);
            self.measure_ms = self.now_ms + self.measure_every_ms;
        }
        let step = Step {
            from_ms: self.now_ms,
            allocated_milli: self.allocated_milli,
            fragmented_milli: self.fragmented_milli,
            waiting: self.waiting.len(),
        };
        match self.steps.last_mut() {
            Some(last) if last.from_ms == step.from_ms => *last = step,
            _ => self.steps.push(step),
        }
    }

    fn outcome(mut self) -> Outcome {
        let times = self.states.iter().map(|state| JobTimes {
            id: state.job.gang.id.clone(),
            tenant: state.job.gang.tenant.clone(),
            gpu_milli: u64::from(state.job.gang.tasks.max) * state.task_milli,
            arrived_ms: state.job.gang.submitted_ms,
            duration_ms: state.job.duration_ms,
            waited_ms: state.waited_ms,
            started_ms: state.started_ms,
            ended_ms: state.ended_ms,
        });
        self.result.jobs = times.collect();
        self.result.steps = self.steps;
        self.result
    }
}

impl State {
    fn new(job: Job) -> Self {
        let mut state = Self {
            left: 0,
            estimate_ms: job.gang.estimate_ms,
            task_milli: 0,
            has_milli: 0,
            run: 0,
            stage: Stage::Coming,
            waiting_since_ms: job.gang.submitted_ms,
            waited_ms: 0,
            started_ms: None,
            ended_ms: None,
            job,
        };
        state.left = state.all_work();
        state
    }

    fn all_work(&self) -> u64 {
        self.job.duration_ms.max(1).saturating_mul(self.job.gang.tasks.max.max(1).into())
    }

    /// What is told of how long it runs shrinks by what it has done.
    fn estimate_again(&mut self) {
        let Some(estimate_ms) = self.estimate_ms else { return };
        let left = estimate_ms as f64 * self.left as f64 / self.all_work() as f64;
        Arc::make_mut(&mut self.job.gang).estimate_ms = Some((left.round() as u64).max(1));
    }
}

/// Thousandths of GPUs that a gang has.
fn gpu_milli(running: &Running) -> u64 {
    running.tasks.iter().flat_map(|task| &task.gpus).map(|gpu| u64::from(gpu.part.milli)).sum()
}

fn exponential(random: &mut fastrand::Rng, mean_ms: u64) -> u64 {
    (-(1.0 - random.f64()).ln() * mean_ms as f64).round().max(1.0) as u64
}
