//! A cluster in virtual time: gangs come, the planner plans, gangs end. Checked in every cycle: what
//! runs fits on nodes that are empty otherwise, gangs are whole, and each that waits has a reason.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_api::job::IsolationClass;
use lathe_scheduler::Planner;
use lathe_scheduler::model::{Amount, Cluster, Gang, Gpu, GpuRequest, Node, Sharing, Size, TaskRequest};
use lathe_scheduler::plan::{Plan, Reason, Waiting};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Settings, Strategy};

/// A node with GPUs, four below a switch.
pub fn node(name: &str, gpus: u8) -> Node {
    let gpu = |index: u8| Gpu {
        id: format!("0000:{index:02x}:00.0"),
        model: "H100".to_owned(),
        memory_bytes: 80 << 30,
        numa: None,
        switch: Some(index / 4),
        link: Some(0),
        partition: None,
        sharing: Sharing::Whole,
    };
    Node {
        name: name.to_owned(),
        total: Amount {
            cpu_milli: 16_000 * u64::from(gpus.max(1)),
            memory_bytes: u64::from(gpus.max(1)) << 37,
            hugepage_bytes: 0,
            sandboxes: 250,
        },
        gpus: (0..gpus).map(gpu).collect(),
        classes: vec![IsolationClass::Container],
        ..Node::default()
    }
}

/// So many nodes of so many GPUs.
pub fn nodes(count: usize, gpus: u8) -> Vec<Node> {
    (0..count).map(|index| node(&format!("n{index}"), gpus)).collect()
}

/// Tasks of whole GPUs, in pool `main`.
pub fn gang(id: &str, tasks: u32, gpus: u32) -> Gang {
    Gang {
        id: id.to_owned(),
        tenant: "a".to_owned(),
        pool: "main".to_owned(),
        tasks: Size::exactly(tasks),
        task: TaskRequest {
            amount: Amount { cpu_milli: 1000, memory_bytes: 1 << 30, hugepage_bytes: 0, sandboxes: 1 },
            gpus: (gpus > 0).then(|| GpuRequest::whole(gpus)),
        },
        ..Gang::default()
    }
}

pub fn pool(queue: Queue, backfill: Backfill) -> Pool {
    Pool { name: "main".to_owned(), queue, backfill, placement: Strategy::BestFit, ..Pool::default() }
}

pub fn settings(queue: Queue, backfill: Backfill) -> Settings {
    Settings { pools: vec![pool(queue, backfill)], tenants: Vec::new() }
}

/// A gang that will come, and how long it really runs.
#[derive(Clone, Debug)]
pub struct Job {
    pub gang: Gang,
    pub runs_ms: u64,
}

impl Job {
    /// With an estimate that is right.
    pub fn exact(gang: Gang, at_ms: u64, runs_ms: u64) -> Self {
        Self { gang: Gang { submitted_ms: at_ms, estimate_ms: Some(runs_ms), ..gang }, runs_ms }
    }
}

pub struct World {
    pub planner: Planner,
    pub cluster: Cluster,
    pub now: u64,
    pub pending: Vec<Arc<Gang>>,
    pub started: BTreeMap<String, u64>,
    pub ended: BTreeMap<String, u64>,
    pub starts: Vec<(u64, String, String)>,
    pub preempted: Vec<(u64, String, Option<String>)>,
    pub waiting: Vec<Waiting>,
    /// What each gang still has to run when it starts.
    left: BTreeMap<String, u64>,
    /// Ends and stops to come: time, gang, and whether it ends by itself.
    events: BTreeMap<(u64, String), bool>,
    coming: Vec<Job>,
}

impl World {
    pub fn new(settings: Settings, nodes: Vec<Node>, mut jobs: Vec<Job>) -> Self {
        // The next is the last.
        jobs.sort_by_key(|job| job.gang.submitted_ms);
        jobs.reverse();
        Self {
            planner: Planner::new(settings, 7),
            cluster: Cluster::new(nodes),
            now: 0,
            pending: Vec::new(),
            started: BTreeMap::new(),
            ended: BTreeMap::new(),
            starts: Vec::new(),
            preempted: Vec::new(),
            waiting: Vec::new(),
            left: jobs.iter().map(|job| (job.gang.id.clone(), job.runs_ms)).collect(),
            events: BTreeMap::new(),
            coming: jobs,
        }
    }

    /// Until nothing more happens, or that time.
    pub fn run(&mut self, until_ms: u64) {
        while let Some(at) = self.next().filter(|at| *at <= until_ms) {
            self.advance(at);
        }
    }

    pub fn next(&self) -> Option<u64> {
        let arrival = self.coming.last().map(|job| job.gang.submitted_ms);
        let event = self.events.keys().next().map(|(at, _)| *at);
        arrival.into_iter().chain(event).min()
    }

    /// All that happens up to that time, and a cycle then.
    pub fn advance(&mut self, at: u64) -> Plan {
        self.now = at;
        while let Some(((_, id), by_itself)) =
            self.events.first_key_value().filter(|((end, _), _)| *end <= at).map(|(k, v)| (k.clone(), *v))
        {
            self.events.pop_first();
            let running = self.cluster.end(&id).expect("it ran");
            let ran = at - running.started_ms;
            if by_itself {
                self.planner.ended(&running.gang, ran);
                self.ended.insert(id, at);
            } else {
                // A gang that has a grace writes a checkpoint.
                if running.gang.grace_ms > 0 {
                    *self.left.get_mut(&id).expect("it came") -= ran;
                }
                self.started.remove(&id);
                self.pending.push(running.gang);
            }
        }
        while self.coming.last().is_some_and(|job| job.gang.submitted_ms <= at) {
            self.pending.push(Arc::new(self.coming.pop().expect("there is one").gang));
        }
        self.cycle()
    }

    pub fn cycle(&mut self) -> Plan {
        let plan = self.planner.cycle(&mut self.cluster, &self.pending, self.now);
        self.check(&plan);
        for start in &plan.starts {
            let id = start.gang.id.clone();
            self.started.insert(id.clone(), self.now);
            self.starts.push((self.now, id.clone(), start.why.clone()));
            self.events.insert((self.now + self.left[&id].max(1), id.clone()), true);
            self.pending.retain(|gang| gang.id != id);
        }
        for preemption in &plan.preemptions {
            let running = self.cluster.running_mut(&preemption.gang).expect("it runs");
            assert!(!running.stopping, "it was told already");
            running.stopping = true;
            let grace = running.gang.grace_ms.max(1);
            self.events.retain(|(_, id), _| *id != preemption.gang);
            self.events.insert((self.now + grace, preemption.gang.clone()), false);
            self.preempted.push((self.now, preemption.gang.clone(), preemption.for_gang.clone()));
        }
        for resize in &plan.resizes {
            let running = self.cluster.running_mut(&resize.gang).expect("it runs");
            let gang = Arc::clone(&running.gang);
            let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut running.tasks)
                .into_iter()
                .zip(0..)
                .partition(|(_, rank)| !resize.remove.contains(rank));
            running.tasks = kept.into_iter().map(|(place, _)| place).collect();
            gone.iter().for_each(|(place, _)| self.cluster.give(&gang, place));
        }
        self.waiting.clone_from(&plan.waiting);
        plan
    }

    /// Whether anything still waits or runs.
    pub fn idle(&self) -> bool {
        self.pending.is_empty() && self.cluster.running().is_empty() && self.coming.is_empty()
    }

    pub fn why(&self, gang: &str) -> &Waiting {
        self.waiting.iter().find(|waiting| waiting.gang == gang).expect("it waits")
    }

    fn check(&self, plan: &Plan) {
        let mut empty = Cluster::new(self.cluster.nodes().to_vec());
        for running in self.cluster.running().values() {
            let tasks = running.tasks.len() as u32;
            let size = running.gang.tasks;
            assert!((size.min..=size.max).contains(&tasks), "{} has {tasks} tasks", running.gang.id);
            empty.start(running.clone()).expect("what runs fits");
        }
        for (is, should) in self.cluster.free().iter().zip(empty.free()) {
            assert_eq!((&is.amount, &is.gpus), (&should.amount, &should.gpus));
        }
        let mut seen: Vec<&str> = plan.starts.iter().map(|start| start.gang.id.as_str()).collect();
        seen.extend(plan.waiting.iter().map(|waiting| waiting.gang.as_str()));
        seen.sort_unstable();
        let mut pending: Vec<&str> = self.pending.iter().map(|gang| gang.id.as_str()).collect();
        pending.sort_unstable();
        assert_eq!(seen, pending, "each gang starts or waits, once");
        for waiting in &plan.waiting {
            assert!(waiting.expected_ms.is_none_or(|expected| expected >= self.now));
            assert!(!matches!(&waiting.reason, Reason::Behind { gang } if gang.is_empty()));
        }
    }
}
