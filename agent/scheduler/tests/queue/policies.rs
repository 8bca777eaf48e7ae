//! What each policy does with a few gangs that a reader can follow.

use lathe_scheduler::model::{Amount, Cluster, Constraint, Gang, Operator};
use lathe_scheduler::plan::Reason;
use lathe_scheduler::policy::{Backfill, Pool, Queue, Quota, Settings, Share, Tenant, Weight};

use crate::world::{Job, World, gang, nodes, pool, settings};

const MIN: u64 = 60_000;

fn order(world: &World) -> Vec<&str> {
    world.starts.iter().map(|(_, id, _)| id.as_str()).collect()
}

fn four_of_one_gpu(queue: Queue, backfill: Backfill) -> World {
    let job = |id: &str, at, runs, priority| Job::exact(Gang { priority, ..gang(id, 1, 8) }, at, runs);
    let jobs = vec![
        job("first", 0, 10 * MIN, 0),
        job("long", MIN, 30 * MIN, 0),
        job("short", 2 * MIN, MIN, 0),
        job("dear", 3 * MIN, 20 * MIN, 9),
    ];
    let mut world = World::new(settings(queue, backfill), nodes(1, 8), jobs);
    world.run(u64::MAX);
    assert!(world.idle());
    world
}

#[test]
fn queues_are_in_the_order_of_their_policies() {
    let of = |queue| order(&four_of_one_gpu(queue, Backfill::Easy)).join(" ");
    assert_eq!(of(Queue::FirstComeFirstServed), "first long short dear");
    assert_eq!(of(Queue::ShortestJobFirst), "first short dear long");
    assert_eq!(of(Queue::HighestResponseRatioNext), "first short dear long");
    assert_eq!(of(Queue::Priority), "first dear long short");
}

fn one_large_and_small_ones(backfill: Backfill) -> World {
    let jobs = vec![
        Job::exact(gang("runs", 1, 6), 0, 10 * MIN),
        Job::exact(gang("large", 1, 8), MIN, 10 * MIN),
        Job::exact(gang("fits", 1, 2), 2 * MIN, 8 * MIN),
        Job::exact(gang("delays", 1, 2), MIN, 10 * MIN),
    ];
    World::new(settings(Queue::FirstComeFirstServed, backfill), nodes(1, 8), jobs)
}

#[test]
fn backfill_uses_what_the_head_cannot_use_yet_and_no_more() {
    let mut world = one_large_and_small_ones(Backfill::Easy);
    world.run(MIN);
    assert_eq!(world.why("delays").reason.to_string(), "behind job large, for which the room is held");
    world.run(2 * MIN);
    assert!(world.started.contains_key("fits"), "it is gone when the large one starts");
    let large = world.why("large");
    assert_eq!((large.expected_ms, large.after.as_deref()), (Some(10 * MIN), Some("runs")));
    world.run(u64::MAX);
    assert_eq!(world.started["large"], 10 * MIN);
    assert!(world.starts[1].2.contains("goes before job large without delaying it"), "{}", world.starts[1].2);

    let mut world = one_large_and_small_ones(Backfill::None);
    world.run(u64::MAX);
    assert_eq!(order(&world), ["runs", "large", "delays", "fits"]);
}

#[test]
fn backfill_goes_beside_the_heads_places_for_as_long_as_it_likes() {
    let jobs = vec![
        Job::exact(gang("runs", 1, 8), 0, 10 * MIN),
        Job::exact(gang("half", 1, 4), 0, 10 * MIN),
        Job::exact(gang("large", 1, 8), MIN, 10 * MIN),
        Job::exact(gang("endless", 1, 4), 2 * MIN, 10_000 * MIN),
    ];
    let mut world = World::new(settings(Queue::FirstComeFirstServed, Backfill::Easy), nodes(2, 8), jobs);
    world.run(u64::MAX);
    assert_eq!((world.started["endless"], world.started["large"]), (2 * MIN, 10 * MIN));
}

#[test]
fn conservative_backfill_delays_no_gang_that_waits() {
    let jobs = {
        vec![
            Job::exact(gang("runs", 1, 6), 0, 10 * MIN),
            Job::exact(gang("first", 1, 8), MIN, 10 * MIN),
            Job::exact(gang("second", 1, 5), MIN, 10 * MIN),
            Job::exact(gang("third", 1, 4), MIN, 20 * MIN),
            Job::exact(gang("small", 1, 2), 2 * MIN, 8 * MIN),
            Job::exact(gang("tempting", 1, 3), 10 * MIN + 1, 30 * MIN),
        ]
    };
    let start = |backfill| {
        let mut world =
            World::new(settings(Queue::FirstComeFirstServed, backfill), nodes(1, 8), jobs.clone());
        world.run(u64::MAX);
        world.started
    };
    let (easy, conservative) = (start(Backfill::Easy), start(Backfill::Conservative));
    assert_eq!((easy["first"], conservative["first"]), (10 * MIN, 10 * MIN));
    assert_eq!((easy["second"], conservative["second"]), (20 * MIN, 20 * MIN));
    assert_eq!(conservative["third"], 30 * MIN);
    assert_eq!(conservative["small"], 2 * MIN);
}

#[test]
fn an_impossible_gang_holds_nobody_back() {
    let jobs = vec![
        Job::exact(gang("impossible", 1, 9), 0, MIN),
        Job::exact(gang("enormous", 9, 1), 0, MIN),
        Job::exact(gang("fine", 1, 1), 0, MIN),
    ];
    for backfill in [Backfill::None, Backfill::Easy, Backfill::Conservative] {
        let mut world =
            World::new(settings(Queue::FirstComeFirstServed, backfill), nodes(1, 8), jobs.clone());
        world.run(0);
        assert_eq!(order(&world), ["fine"]);
        assert_eq!(world.why("impossible").expected_ms, None);
    }
}

#[test]
fn a_reason_stays_the_same_for_a_minute_unless_a_node_changes() {
    let jobs = vec![
        Job::exact(gang("runs", 1, 2), 0, 60 * MIN),
        Job::exact(gang("waits", 1, 4), 0, 10 * MIN),
        Job::exact(gang("beside", 1, 1), MIN / 2, 10 * MIN),
    ];
    let mut world = World::new(settings(Queue::FirstComeFirstServed, Backfill::Easy), nodes(1, 4), jobs);
    let free = |world: &World| world.why("waits").reason.to_string();
    let says = |count: u32| format!("needs 4 GPUs, the largest number free on one node is {count}");
    world.run(0);
    assert_eq!(free(&world), says(2));
    world.run(MIN / 2);
    assert!(world.started.contains_key("beside"));
    assert_eq!(free(&world), says(2), "how much is free changes all the time");
    world.advance(MIN);
    assert_eq!(free(&world), says(1), "not for ever");
    world.advance(11 * MIN);
    assert_eq!((world.ended.contains_key("beside"), free(&world)), (true, says(2)));
    // Whoever repaired a node wants to read what came of it.
    let jobs = vec![Job::exact(gang("waits", 1, 2), 0, MIN)];
    let mut world = World::new(settings(Queue::FirstComeFirstServed, Backfill::Easy), nodes(1, 0), jobs);
    let says = |most: u32| format!("needs 2 GPUs, the most that a ready node can give is {most}");
    world.run(0);
    assert_eq!(world.why("waits").reason.to_string(), says(0));
    world.cluster = Cluster::new(nodes(1, 1));
    world.advance(1_000);
    assert_eq!(world.why("waits").reason.to_string(), says(1));
}

fn shares(gpus: u64) -> Share {
    Share { gpu_milli: 1000 * gpus, ..Share::UNLIMITED }
}

#[test]
fn limits_hold_and_say_whose_they_are() {
    let quota = |gpus| Quota { guaranteed: None, limit: Some(shares(gpus)) };
    let tenants = vec![
        Tenant {
            name: "a".to_owned(),
            parent: Some("group".to_owned()),
            quota: quota(4),
            ..Tenant::default()
        },
        Tenant { name: "group".to_owned(), quota: quota(6), ..Tenant::default() },
        Tenant { name: "b".to_owned(), parent: Some("group".to_owned()), ..Tenant::default() },
    ];
    let parent = Pool { name: "all".to_owned(), quota: quota(7), ..Pool::default() };
    let sub = Pool { parent: Some("all".to_owned()), ..pool(Queue::FirstComeFirstServed, Backfill::Easy) };
    let of = |id: &str, tenant: &str, gpus| Gang { tenant: tenant.to_owned(), ..gang(id, 1, gpus) };
    let jobs = [of("a1", "a", 4), of("a2", "a", 1), of("b1", "b", 1), of("b2", "b", 2), of("c", "c", 3)]
        .map(|gang| Job::exact(gang, 0, MIN));
    let settings = Settings { pools: vec![parent, sub], tenants };
    let mut world = World::new(settings, nodes(2, 8), jobs.into());
    world.run(0);
    assert_eq!(order(&world), ["a1", "b1"]);
    let why = |id| world.why(id).reason.to_string();
    assert_eq!(why("a2"), "tenant a's limit of 4 GPUs in pool main is used up: 4 in use");
    assert_eq!(
        why("b2"),
        "tenant group's limit of 6 GPUs in pool main leaves too little: 5 in use, 2 needed"
    );
    assert_eq!(why("c"), "the limit of 7 GPUs in pool all leaves too little: 5 in use, 3 needed");
}

#[test]
fn a_limit_of_nothing_is_a_limit() {
    let limit = Some(Share { gpu_milli: 0, amount: Amount { cpu_milli: 500, ..Share::UNLIMITED.amount } });
    let tenant =
        Tenant { name: "a".to_owned(), quota: Quota { guaranteed: None, limit }, ..Tenant::default() };
    let mut settings = settings(Queue::FirstComeFirstServed, Backfill::Easy);
    settings.tenants.push(tenant);
    let jobs = [gang("gpu", 1, 1), gang("cpu", 1, 0)].map(|gang| Job::exact(gang, 0, MIN));
    let mut world = World::new(settings, nodes(1, 8), jobs.into());
    world.run(0);
    let why = |id| world.why(id).reason.to_string();
    assert_eq!(
        why("gpu"),
        "tenant a's limit of 0 GPUs in pool main is less than the 1 GPU it needs: raise the limit, or ask for less"
    );
    assert_eq!(
        why("cpu"),
        "tenant a's limit of 0.5 CPUs in pool main is less than the 1 CPU it needs: raise the limit, or ask for less"
    );
}

#[test]
fn fair_shares_follow_the_weights_and_remember_what_was_had() {
    let tenant =
        |name: &str, weight| Tenant { name: name.to_owned(), weight: Weight(weight), ..Tenant::default() };
    let mut settings = settings(Queue::FairShare, Backfill::Easy);
    settings.tenants = vec![tenant("a", 1.0), tenant("b", 3.0)];
    let job = |tenant: &str, index: u64, at| {
        let gang = Gang { tenant: tenant.to_owned(), ..gang(&format!("{tenant}{index}"), 1, 1) };
        Job::exact(gang, at, (20 + index % 7) * MIN)
    };
    // Both could fill the cluster for a day.
    let jobs = (0..1000).flat_map(|index| [job("a", index, 0), job("b", index, 0)]).collect();
    let mut world = World::new(settings, nodes(2, 8), jobs);
    world.run(12 * 60 * MIN);
    let had = |tenant: &str| world.starts.iter().filter(|(_, id, _)| id.starts_with(tenant)).count() as f64;
    let ratio = had("b") / had("a");
    assert!((2.7..3.3).contains(&ratio), "{ratio}");
}

#[test]
fn behind_more_shapes_than_a_cycle_tries_each_is_tried_in_turn() {
    // On so many nodes 128 shapes that find no room may be tried in a cycle.
    let elsewhere = |index: u64| {
        let operator = Operator::In(vec![format!("site-{index}")]);
        let constraints = vec![Constraint { label: "site".to_owned(), operator }];
        Gang { constraints, ..gang(&format!("elsewhere-{index:03}"), 1, 1) }
    };
    let mut jobs: Vec<Job> = (0..300).map(|index| Job::exact(elsewhere(index), index, MIN)).collect();
    jobs.push(Job::exact(gang("fits", 1, 1), 300, MIN));
    let queue = settings(Queue::FirstComeFirstServed, Backfill::Easy);
    let mut world = World::new(queue, nodes(5_000, 1), jobs);
    let cycles = (0..10).find(|cycle| {
        world.advance(1_000 * (cycle + 1));
        world.started.contains_key("fits")
    });
    // Half of the tries go to the first each time: it takes (300 - 64) / 64 cycles, and they are told why.
    assert_eq!(cycles, Some(3));
    assert!(world.waiting.iter().all(|waiting| matches!(waiting.reason, Reason::Shortage(_))));
    assert_eq!(world.waiting.len(), 300);
}
