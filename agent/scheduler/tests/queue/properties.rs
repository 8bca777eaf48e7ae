//! What holds for all gangs and clusters. That nothing is over-committed, no gang is split and none is
//! forgotten is checked by [`World`] in every cycle.

use std::collections::BTreeMap;

use lathe_scheduler::model::{Gang, Size};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Quota, Settings, Share, Tenant, Weight};
use proptest::prelude::*;

use crate::world::{Job, World, gang, nodes, pool};

const MIN: u64 = 60_000;
const QUEUES: [Queue; 5] = [
    Queue::FirstComeFirstServed,
    Queue::ShortestJobFirst,
    Queue::HighestResponseRatioNext,
    Queue::FairShare,
    Queue::Priority,
];
const BACKFILLS: [Backfill; 3] = [Backfill::None, Backfill::Easy, Backfill::Conservative];

/// A job in a nutshell: tasks, GPUs each, arrival, minutes, tenant, priority, how wrong the estimate is.
type Sketch = (u32, u32, u64, u64, usize, i32, u64);

fn sketches(most: usize) -> impl Strategy<Value = Vec<Sketch>> {
    let one = (1..4_u32, 0..5_u32, 0..60_u64, 1..40_u64, 0..3_usize, 0..3, 1..5_u64);
    prop::collection::vec(one, 1..most)
}

/// With right estimates, or with wrong or no ones.
fn jobs(sketches: &[Sketch], right: bool) -> Vec<Job> {
    let job = |(index, &(tasks, gpus, at, runs, tenant, priority, wrong)): (usize, &Sketch)| {
        let base = Gang {
            tenant: ["a", "b", "c"][tenant].to_owned(),
            priority,
            submitted_ms: at * MIN,
            preemptible: wrong % 2 == 0,
            grace_ms: 1000 * (wrong % 3),
            kind: format!("k{gpus}"),
            ..gang(&format!("j{index:02}"), tasks, gpus)
        };
        let runs_ms = runs * MIN;
        if right {
            return Job::exact(base, at * MIN, runs_ms);
        }
        let estimate_ms = (wrong > 1).then_some(runs_ms * wrong / 3);
        Job { gang: Gang { estimate_ms, ..base }, runs_ms }
    };
    sketches.iter().enumerate().map(job).collect()
}

fn limited(settings: &mut Settings, gpus: u64) {
    let limit = Some(Share { gpu_milli: 1000 * gpus, ..Share::UNLIMITED });
    settings.tenants = ["a", "b", "c"]
        .map(|name| Tenant {
            name: name.to_owned(),
            quota: Quota { guaranteed: None, limit },
            ..Tenant::default()
        })
        .into();
}

fn one_pool(queue: Queue, backfill: Backfill) -> Settings {
    Settings { pools: vec![pool(queue, backfill)], tenants: Vec::new() }
}

fn starts(settings: Settings, count: usize, jobs: Vec<Job>) -> BTreeMap<String, u64> {
    let mut world = World::new(settings, nodes(count, 8), jobs);
    world.run(u64::MAX);
    world.started
}

/// Gangs of tasks of one GPU, with right estimates: any GPU will do.
fn of_single_gpus(sketches: &[Sketch]) -> Vec<Job> {
    let job = |(index, &(tasks, gpus, at, runs, ..)): (usize, &Sketch)| {
        let all = (tasks * gpus).clamp(1, 8);
        Job::exact(gang(&format!("j{index:02}"), all, 1), at * MIN, runs * MIN)
    };
    sketches.iter().enumerate().map(job).collect()
}

/// The case that no bound excludes: with three GPUs, the last goes before the third, which waits for
/// two of them; with four the third starts at once, and the last has nobody to go before. (Graham,
/// "Bounds on multiprocessing timing anomalies", 1969, has others.)
#[test]
fn a_node_more_may_delay_what_went_before_others() {
    let jobs: Vec<Job> = [("one", 1, 2), ("two", 1, 2), ("wide", 2, 2), ("long", 1, 5)]
        .map(|(id, tasks, minutes)| Job::exact(gang(id, tasks, 1), 0, minutes * MIN))
        .into();
    for backfill in [Backfill::Easy, Backfill::Conservative] {
        let of = |count| {
            let settings = one_pool(Queue::FirstComeFirstServed, backfill);
            let mut world = World::new(settings, nodes(count, 1), jobs.clone());
            world.run(u64::MAX);
            (world.started["wide"] / MIN, world.started["long"] / MIN, world.now / MIN)
        };
        assert_eq!((of(3), of(4)), ((2, 0, 5), (0, 2, 7)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everything_that_fits_runs_in_the_end_and_limits_hold(
        sketches in sketches(40), queue in 0..5_usize, backfill in 0..3_usize, preemption: bool,
        elastic: bool,
    ) {
        let mut settings = one_pool(QUEUES[queue], BACKFILLS[backfill]);
        settings.pools[0].preemption = preemption;
        limited(&mut settings, 12);
        let mut jobs = jobs(&sketches, false);
        if elastic {
            for job in &mut jobs {
                job.gang.tasks = Size { min: 1, max: job.gang.tasks.max };
            }
        }
        let mut world = World::new(settings, nodes(3, 8), jobs);
        let mut cycles = 0;
        while let Some(at) = world.next() {
            world.advance(at);
            // What is told to shrink has: the room is used in the next cycle.
            world.cycle();
            cycles += 1;
            prop_assert!(cycles < 10_000, "gangs stop each other for ever");
            for tenant in ["a", "b", "c"] {
                let running = world.cluster.running().values().filter(|one| one.gang.tenant == tenant);
                let gpus: u32 =
                    running.map(|one| one.gang.task.gpu_count() * one.tasks.len() as u32).sum();
                prop_assert!(gpus <= 12, "tenant {tenant} has {gpus} GPUs");
            }
        }
        for waiting in &world.waiting {
            let gang = world.pending.iter().find(|gang| gang.id == waiting.gang).expect("it waits");
            prop_assert!(gang.tasks.min * gang.task.gpu_count() > 12, "{}: {}", gang.id, waiting.reason);
        }
        prop_assert!(world.cluster.running().is_empty());
    }

    #[test]
    fn the_same_input_gives_the_same_plans(sketches in sketches(30), queue in 0..5_usize, backfill in 0..3_usize) {
        let plans = || {
            let mut settings = one_pool(QUEUES[queue], BACKFILLS[backfill]);
            settings.pools[0].preemption = true;
            let mut world = World::new(settings, nodes(2, 8), jobs(&sketches, false));
            let mut plans = Vec::new();
            while let Some(at) = world.next() {
                plans.push(world.advance(at));
            }
            plans
        };
        prop_assert_eq!(plans(), plans());
    }

    /// EASY: the gang that is first when it begins to wait starts no later than if nothing went before
    /// it. (Later ones may: Mu'alem and Feitelson, TPDS'01.) The plan without backfill is the same up
    /// to the first gang that waits.
    #[test]
    fn easy_backfill_never_delays_the_first_that_waits(sketches in sketches(30)) {
        let jobs = jobs(&sketches, true);
        let fcfs = |backfill| one_pool(Queue::FirstComeFirstServed, backfill);
        let without = starts(fcfs(Backfill::None), 2, jobs.clone());
        let with = starts(fcfs(Backfill::Easy), 2, jobs.clone());
        let head = jobs
            .iter()
            .filter(|job| without[&job.gang.id] > job.gang.submitted_ms)
            .min_by_key(|job| (job.gang.submitted_ms, job.gang.id.clone()));
        if let Some(head) = head {
            prop_assert!(with[&head.gang.id] <= without[&head.gang.id]);
        }
    }

    /// Conservative: with right estimates, and where any GPU will do, nobody starts later than if
    /// nothing went before anybody. (Where a task needs several GPUs of one node, who goes before may
    /// leave them on different nodes: there a promise holds, as below, but it may be a later one.)
    #[test]
    fn conservative_backfill_delays_nobody(sketches in sketches(30), count in 1..4_usize) {
        let jobs = of_single_gpus(&sketches);
        let fcfs = |backfill| one_pool(Queue::FirstComeFirstServed, backfill);
        let without = starts(fcfs(Backfill::None), count, jobs.clone());
        let with = starts(fcfs(Backfill::Conservative), count, jobs);
        for (gang, at) in &without {
            prop_assert!(with[gang] <= *at, "{gang} started at {}, without backfill at {at}", with[gang]);
        }
    }

    /// In order, a node more delays nobody. (With backfill it may:
    /// [`a_node_more_may_delay_what_went_before_others`].)
    #[test]
    fn a_node_more_delays_nobody_in_order(sketches in sketches(30), count in 1..3_usize) {
        let of = |count| starts(
            one_pool(Queue::FirstComeFirstServed, Backfill::None), count, of_single_gpus(&sketches),
        );
        let (few, more) = (of(count), of(count + 1));
        for (gang, at) in &few {
            prop_assert!(more[gang] <= *at, "{gang} started at {}, with a node less at {at}", more[gang]);
        }
    }

    /// Once promised, a start is not put off, when gangs run as long as they should.
    #[test]
    fn promises_are_kept(sketches in sketches(30), queue in 0..5_usize, easy: bool) {
        let backfill = if easy { Backfill::Easy } else { Backfill::Conservative };
        // With EASY, only the first in the order has a promise, and that order must not change.
        let queue = if easy { Queue::FirstComeFirstServed } else { QUEUES[queue] };
        let mut world = World::new(one_pool(queue, backfill), nodes(2, 8), jobs(&sketches, true));
        let mut promised: BTreeMap<String, u64> = BTreeMap::new();
        while let Some(at) = world.next() {
            world.advance(at);
            for waiting in &world.waiting {
                if let Some(expected) = waiting.expected_ms {
                    let before = promised.insert(waiting.gang.clone(), expected);
                    prop_assert!(
                        before.is_none_or(|before| expected <= before),
                        "{} was to start at {before:?}, now at {expected}", waiting.gang
                    );
                } else {
                    prop_assert!(!promised.contains_key(&waiting.gang), "{} lost its place", waiting.gang);
                }
            }
        }
        for (gang, at) in promised {
            prop_assert!(world.started[&gang] <= at, "{gang} was to start at {at}");
        }
    }

    /// The bound that the planner states: `starvation + (n + 1) D` with n starved gangs before it.
    #[test]
    fn nobody_waits_beyond_the_bound(
        sketches in sketches(60), queue in 0..5_usize, backfill in 0..3_usize, tasks in 4..17_u32,
    ) {
        let mut settings = one_pool(QUEUES[queue], BACKFILLS[backfill]);
        let starvation_ms = 30 * MIN;
        settings.pools[0].starvation_ms = starvation_ms;
        // Estimates are wrong, and a large gang is last in most orders.
        let mut jobs = jobs(&sketches, false);
        let large = Gang { priority: -1, ..gang("large", tasks, 1) };
        jobs.push(Job { gang: Gang { submitted_ms: 10 * MIN, ..large }, runs_ms: 40 * MIN });
        let longest = 40 * MIN;
        let mut world = World::new(settings, nodes(2, 8), jobs.clone());
        world.run(u64::MAX);
        let waited_since = |job: &Job| (job.gang.submitted_ms, job.gang.id.clone());
        for job in &jobs {
            let starved_at = job.gang.submitted_ms + starvation_ms;
            let before = jobs.iter().filter(|other| {
                waited_since(other) < waited_since(job) && world.started[&other.gang.id] > starved_at
            });
            let bound = starved_at + (before.count() as u64 + 1) * longest;
            let start = world.started[&job.gang.id];
            prop_assert!(start <= bound, "{} started at {start}, beyond {bound}", job.gang.id);
        }
    }

    /// The same bound where pools share nodes, each with its own order and backfill: the starved of all
    /// pools are in one line.
    #[test]
    fn nobody_waits_beyond_the_bound_in_any_pool(
        sketches in sketches(60), queues in prop::array::uniform2(0..5_usize),
        backfills in prop::array::uniform2(0..3_usize), tasks in 4..17_u32,
    ) {
        let starvation_ms = 30 * MIN;
        let part = |name: &str, at: usize| Pool {
            name: name.to_owned(),
            parent: Some("all".to_owned()),
            starvation_ms,
            ..pool(QUEUES[queues[at]], BACKFILLS[backfills[at]])
        };
        let all = Pool { name: "all".to_owned(), ..Pool::default() };
        let settings = Settings { pools: vec![all, part("x", 0), part("y", 1)], tenants: Vec::new() };
        let mut jobs = jobs(&sketches, false);
        for job in &mut jobs {
            job.gang.pool = if job.gang.tenant == "a" { "x" } else { "y" }.to_owned();
        }
        let large = Gang { priority: -1, pool: "x".to_owned(), ..gang("large", tasks, 1) };
        jobs.push(Job { gang: Gang { submitted_ms: 10 * MIN, ..large }, runs_ms: 40 * MIN });
        let longest = 40 * MIN;
        let mut world = World::new(settings, nodes(2, 8), jobs.clone());
        world.run(u64::MAX);
        let waited_since = |job: &Job| (job.gang.submitted_ms, job.gang.id.clone());
        for job in &jobs {
            let starved_at = job.gang.submitted_ms + starvation_ms;
            let before = jobs.iter().filter(|other| {
                waited_since(other) < waited_since(job) && world.started[&other.gang.id] > starved_at
            });
            let bound = starved_at + (before.count() as u64 + 1) * longest;
            let start = world.started[&job.gang.id];
            prop_assert!(start <= bound, "{} started at {start}, beyond {bound}", job.gang.id);
        }
    }

    /// A cycle on a cluster with one node more starts as much work, but for one gang: a larger gang
    /// of before may find room for the first time and take that of smaller ones behind it, which is
    /// at most what it has itself beyond the new node.
    #[test]
    fn a_node_more_makes_no_plan_much_worse(sketches in sketches(30), queue in 0..5_usize) {
        let started = |count| {
            let jobs: Vec<Job> = jobs(&sketches, true)
                .into_iter()
                .map(|job| Job { gang: Gang { submitted_ms: 0, ..job.gang }, ..job })
                .collect();
            let mut world = World::new(one_pool(QUEUES[queue], Backfill::Easy), nodes(count, 8), jobs);
            let plan = world.advance(0);
            let gpus = |tasks: usize, each: u32| tasks as u64 * u64::from(each);
            plan.starts.iter().map(|start| gpus(start.tasks.len(), start.gang.task.gpu_count())).sum::<u64>()
        };
        let largest = sketches.iter().map(|(tasks, gpus, ..)| u64::from(tasks * gpus)).max().unwrap_or(0);
        prop_assert!(started(3) + largest >= started(2));
    }

    /// Over six hours with more work than room, tenants have GPU time by their weights, to one
    /// GPU of the eight.
    #[test]
    fn shares_are_fair_within_a_bound(weights in prop::array::uniform3(1..5_u32), lengths in prop::array::uniform3(5..40_u64)) {
        let settings = Settings {
            pools: vec![Pool { ..pool(Queue::FairShare, Backfill::Easy) }],
            tenants: (0..3)
                .map(|at| Tenant {
                    name: ["a", "b", "c"][at].to_owned(),
                    weight: Weight(f64::from(weights[at])),
                    ..Tenant::default()
                })
                .collect(),
        };
        let jobs: Vec<Job> = (0..3)
            .flat_map(|at| (0..8 * 60 * 8 / lengths[at]).map(move |index| (at, index)))
            .map(|(at, index)| {
                let tenant = ["a", "b", "c"][at];
                let one = Gang { tenant: tenant.to_owned(), ..gang(&format!("{tenant}{index}"), 1, 1) };
                Job::exact(one, 0, lengths[at] * MIN)
            })
            .collect();
        let mut world = World::new(settings, nodes(1, 8), jobs);
        // What was had in the last hours evens out what eight GPUs cannot be divided into.
        world.planner = lathe_scheduler::Planner::new(world.planner.settings().clone(), 7).half_life_ms(60 * MIN);
        world.run(6 * 60 * MIN);
        let total: u32 = weights.iter().sum();
        for at in 0..3 {
            let tenant = ["a", "b", "c"][at];
            let had = world.starts.iter().filter(|(_, id, _)| id.starts_with(tenant)).count() as u64 * lengths[at];
            let share = had as f64 / (6.0 * 60.0 * 8.0);
            let due = f64::from(weights[at]) / f64::from(total);
            prop_assert!((share - due).abs() < 0.125, "{tenant} of {weights:?} had {share:.3}, due {due:.3}");
        }
    }
}
