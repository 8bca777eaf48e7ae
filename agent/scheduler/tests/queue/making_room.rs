//! Preemption, reclaimed quota, elastic gangs and drained nodes.

use lathe_scheduler::model::{Gang, Offer, Scope, Size};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Quota, Settings, Share, Tenant};

use crate::world::{Job, World, gang, nodes, pool, settings};

const MIN: u64 = 60_000;

fn preempting(queue: Queue) -> Settings {
    Settings { pools: vec![Pool { preemption: true, ..pool(queue, Backfill::Easy) }], tenants: Vec::new() }
}

fn stoppable(id: &str, tasks: u32, gpus: u32, priority: i32) -> Gang {
    Gang { priority, preemptible: true, grace_ms: 30_000, ..gang(id, tasks, gpus) }
}

fn stopped(world: &World) -> Vec<&str> {
    world.preempted.iter().map(|(_, id, _)| id.as_str()).collect()
}

#[test]
fn a_topology_is_freed_that_fits_and_no_more() {
    // Eight small gangs on each of two nodes by first fit; the urgent one needs all of one node.
    let mut jobs: Vec<Job> = (0..16)
        .map(|index| Job::exact(stoppable(&format!("s{index:02}"), 1, 1, 0), index, 600 * MIN))
        .collect();
    // One on the first node must not be stopped, so that the second is the one.
    jobs[3].gang.preemptible = false;
    let urgent = Gang { scope: Scope::Node, ..stoppable("urgent", 8, 1, 5) };
    jobs.push(Job::exact(urgent, 10 * MIN, 20 * MIN));
    let mut world = World::new(preempting(Queue::Priority), nodes(2, 8), jobs);
    world.run(10 * MIN);
    assert_eq!(stopped(&world).len(), 8);
    let on = |id: &str| world.cluster.running()[id].tasks[0].node;
    assert!(stopped(&world).iter().all(|id| on(id) != on("s03")), "{:?}", stopped(&world));
    let why = world.why("urgent").reason.to_string();
    let named = stopped(&world)[..3].join(", ");
    assert_eq!(why, format!("gets the room of jobs {named}, told to make it"));
    assert_eq!(world.why("urgent").expected_ms, Some(10 * MIN + 30_000));
    // A gang that comes meanwhile does not get it.
    world.cycle();
    assert_eq!(stopped(&world).len(), 8, "nobody is told twice, and nobody else");
    world.run(11 * MIN);
    assert_eq!(world.started["urgent"], 10 * MIN + 30_000);
    world.run(u64::MAX);
    assert!(world.idle());
}

#[test]
fn equals_and_better_ones_are_never_stopped() {
    for (priority, preemptible) in [(5, true), (6, true), (0, false)] {
        let running = Gang { preemptible, ..stoppable("runs", 1, 8, priority) };
        let jobs = vec![Job::exact(running, 0, 60 * MIN), Job::exact(stoppable("waits", 1, 8, 5), MIN, MIN)];
        let mut world = World::new(preempting(Queue::Priority), nodes(1, 8), jobs);
        world.run(u64::MAX);
        assert_eq!((stopped(&world), world.started["waits"]), (Vec::new(), 60 * MIN));
    }
}

#[test]
fn the_least_work_is_lost() {
    // Of equal priority: one with a checkpoint, one that began just now, one that ran for an hour.
    let without = |id: &str| Gang { grace_ms: 0, ..stoppable(id, 1, 8, 0) };
    let jobs = vec![
        Job::exact(without("old"), 0, 600 * MIN),
        Job::exact(stoppable("saves", 1, 8, 0), 0, 600 * MIN),
        Job::exact(without("young"), 59 * MIN, 600 * MIN),
        Job::exact(stoppable("urgent", 1, 8, 1), 60 * MIN, MIN),
        Job::exact(Gang { priority: 2, ..gang("more", 1, 8) }, 60 * MIN + 1, MIN),
    ];
    let mut world = World::new(preempting(Queue::Priority), nodes(3, 8), jobs);
    world.run(61 * MIN);
    assert_eq!(stopped(&world), ["saves", "young"]);
}

#[test]
fn the_room_of_stopping_gangs_is_the_gangs_they_stop_for() {
    let jobs = vec![
        Job::exact(stoppable("low", 1, 8, 0), 0, 600 * MIN),
        Job::exact(stoppable("high", 1, 8, 5), MIN, 10 * MIN),
        Job::exact(gang("thief", 1, 1), MIN + 1, 1_000),
    ];
    let mut world = World::new(preempting(Queue::FirstComeFirstServed), nodes(1, 8), jobs);
    world.run(u64::MAX);
    assert_eq!(world.started["high"], MIN + 30_000);
    assert!(world.started["thief"] > 11 * MIN, "one that came first stops for none that came later");
    assert_eq!(stopped(&world), ["low"]);
}

fn guaranteed(gpus: u64) -> Quota {
    Quota { guaranteed: Some(Share { gpu_milli: 1000 * gpus, ..Share::default() }), limit: None }
}

#[test]
fn a_pool_has_its_guarantee_back_from_those_that_borrowed_it() {
    let part = |name: &str, gpus| Pool {
        name: name.to_owned(),
        parent: Some("all".to_owned()),
        quota: guaranteed(gpus),
        preemption: true,
        ..pool(Queue::FirstComeFirstServed, Backfill::Easy)
    };
    let settings = Settings {
        pools: vec![Pool { name: "all".to_owned(), ..Pool::default() }, part("x", 8), part("y", 8)],
        tenants: Vec::new(),
    };
    let of = |id: String, pool: &str, gpus, priority| Gang {
        pool: pool.to_owned(),
        priority,
        ..stoppable(&id, 1, gpus, 0)
    };
    let mut jobs: Vec<Job> =
        (0..4).map(|index| Job::exact(of(format!("x{index}"), "x", 4, 100), index, 600 * MIN)).collect();
    jobs.push(Job::exact(of("y0".to_owned(), "y", 4, 0), 10 * MIN, 600 * MIN));
    jobs.push(Job::exact(of("y1".to_owned(), "y", 8, 0), 20 * MIN, 600 * MIN));
    let mut world = World::new(settings, nodes(2, 8), jobs);
    world.run(30 * MIN);
    // The first of y is its own; with the second it would borrow itself.
    assert_eq!(stopped(&world).len(), 1);
    assert_eq!(world.started["y0"], 10 * MIN + 30_000);
    let used = |pool: &str| {
        world
            .cluster
            .running()
            .values()
            .filter(|one| one.gang.pool == pool)
            .map(|one| one.gang.task.gpu_count())
            .sum::<u32>()
    };
    assert_eq!((used("x"), used("y")), (12, 4));
}

#[test]
fn a_tenant_has_its_guarantee_back_whatever_the_priorities() {
    let tenant =
        |name: &str, gpus| Tenant { name: name.to_owned(), quota: guaranteed(gpus), ..Tenant::default() };
    let mut settings = preempting(Queue::FairShare);
    settings.tenants = vec![tenant("a", 4), tenant("b", 4)];
    let of = |id: String, tenant: &str, priority| Gang {
        tenant: tenant.to_owned(),
        ..stoppable(&id, 1, 1, priority)
    };
    let mut jobs: Vec<Job> =
        (0..8).map(|index| Job::exact(of(format!("a{index}"), "a", 100), 0, 600 * MIN)).collect();
    jobs.extend((0..8).map(|index| Job::exact(of(format!("b{index}"), "b", 0), 10 * MIN, 600 * MIN)));
    let mut world = World::new(settings, nodes(1, 8), jobs);
    world.run(20 * MIN);
    let has = |tenant: &str| world.cluster.running().values().filter(|one| one.gang.tenant == tenant).count();
    assert_eq!((has("a"), has("b")), (4, 4), "each has what is guaranteed, and no more");
}

fn elastic(id: &str, min: u32, max: u32) -> Gang {
    Gang { tasks: Size { min, max }, ..gang(id, min, 1) }
}

#[test]
fn elastic_gangs_take_what_is_there_shrink_for_others_and_grow_again() {
    let jobs = vec![
        Job::exact(gang("first", 1, 3), 0, 10 * MIN),
        Job::exact(elastic("elastic", 2, 8), MIN, 600 * MIN),
        Job::exact(gang("second", 1, 4), 20 * MIN, 10 * MIN),
    ];
    let mut world = World::new(settings(Queue::FirstComeFirstServed, Backfill::Easy), nodes(1, 8), jobs);
    let size = |world: &World| world.cluster.running()["elastic"].tasks.len();
    world.run(MIN);
    assert_eq!(size(&world), 5, "what is free");
    world.run(10 * MIN);
    assert_eq!(size(&world), 8, "the first one's room, too");
    world.run(20 * MIN);
    assert_eq!(size(&world), 2, "its least, for the second");
    assert_eq!(world.why("second").reason.to_string(), "gets the room of job elastic, told to make it");
    world.cycle();
    assert_eq!(world.started["second"], 20 * MIN);
    world.cycle();
    assert_eq!(size(&world), 4, "what the second left");
    world.run(30 * MIN);
    assert_eq!(size(&world), 8);
    assert!(stopped(&world).is_empty());
}

#[test]
fn elastic_gangs_stay_within_their_scope_and_limits() {
    let limit = Some(Share { gpu_milli: 6000, ..Share::UNLIMITED });
    let mut settings = settings(Queue::FirstComeFirstServed, Backfill::Easy);
    settings.tenants.push(Tenant {
        name: "a".to_owned(),
        quota: Quota { guaranteed: None, limit },
        ..Tenant::default()
    });
    let other = |id: &str| Gang { tenant: "b".to_owned(), ..gang(id, 1, 4) };
    let jobs = vec![
        Job::exact(other("b0"), 0, 10 * MIN),
        Job::exact(Gang { task: gang("", 1, 8).task, ..other("b1") }, 0, 600 * MIN),
        Job::exact(Gang { scope: Scope::Node, ..elastic("elastic", 2, 8) }, 0, 600 * MIN),
    ];
    let mut world = World::new(settings, nodes(2, 8), jobs);
    world.run(0);
    assert_eq!(world.cluster.running()["elastic"].tasks.len(), 4);
    world.run(10 * MIN);
    let tasks = &world.cluster.running()["elastic"].tasks;
    assert_eq!(tasks.len(), 6, "the tenant's limit");
    assert!(tasks.iter().all(|place| place.node == tasks[0].node));
}

#[test]
fn a_drained_node_is_emptied_of_what_may_move_and_fits_elsewhere() {
    let jobs = vec![
        Job::exact(stoppable("moves", 1, 4, 0), 0, 600 * MIN),
        Job::exact(gang("stays", 1, 1), 0, 60 * MIN),
        Job::exact(stoppable("large", 1, 3, 0), 0, 600 * MIN),
        Job::exact(gang("elsewhere", 1, 3), 0, 600 * MIN),
    ];
    let mut world = World::new(settings(Queue::FirstComeFirstServed, Backfill::Easy), nodes(2, 8), jobs);
    world.run(0);
    let on = |world: &World, id: &str| world.cluster.running().get(id).map(|running| running.tasks[0].node);
    let (left, other) = (on(&world, "moves").expect("it runs"), on(&world, "elsewhere").expect("it runs"));
    let four = ["moves", "stays", "large", "elsewhere"];
    assert_eq!(four.map(|id| on(&world, id)), [left, left, left, 1 - left].map(Some));
    let mut drained = world.cluster.nodes()[left as usize].clone();
    drained.offer = Offer::Draining { reason: "new fans".to_owned() };
    world.cluster.update(left, drained);
    let plan = world.advance(MIN);
    // Five GPUs are free elsewhere: the first fits there, and then the other does not.
    let moved: Vec<_> =
        plan.preemptions.iter().map(|one| (one.gang.as_str(), one.for_gang.clone())).collect();
    assert_eq!(moved.len(), 1);
    assert_eq!(plan.preemptions[0].for_gang, None);
    assert_eq!(
        plan.preemptions[0].why,
        format!("node n{left} is being emptied; there is room on node n{other}")
    );
    world.pending.push(std::sync::Arc::new(Gang { submitted_ms: MIN, ..gang("thief", 1, 5) }));
    world.cycle();
    assert!(!world.started.contains_key("thief"), "the room is the moving gang's");
    world.run(2 * MIN);
    assert_eq!(on(&world, moved[0].0), Some(other));
    world.run(59 * MIN);
    assert_eq!(on(&world, "stays"), Some(left));
    assert_eq!(stopped(&world).len(), 1);
}
