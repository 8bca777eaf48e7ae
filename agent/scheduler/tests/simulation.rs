//! The simulator against results that are known: by hand, from theory, and from conservation.

use std::sync::Arc;

use lathe_scheduler::model::{Gang, GpuRequest, Size, TaskRequest};
use lathe_scheduler::policy::{Backfill, Pool, Queue, Settings};
use lathe_scheduler::simulate::scenario::equal_nodes;
use lathe_scheduler::simulate::{Failures, Job, Options, Outcome, simulate};
use proptest::prelude::*;

/// A job `(arrival, duration, GPUs)` in seconds, of tasks of one GPU.
fn job(id: usize, (arrival_s, duration_s, gpus): (u64, u64, u32)) -> Job {
    let gang = Gang {
        id: format!("{id:06}"),
        tenant: format!("t{}", id % 3),
        tasks: Size::exactly(gpus),
        task: TaskRequest { gpus: Some(GpuRequest::whole(1)), ..TaskRequest::default() },
        submitted_ms: arrival_s * 1000,
        estimate_ms: Some(duration_s * 1000),
        ..Gang::default()
    };
    Job { gang: Arc::new(gang), duration_ms: duration_s * 1000 }
}

fn jobs(list: &[(u64, u64, u32)]) -> Vec<Job> {
    list.iter().enumerate().map(|(id, &of)| job(id, of)).collect()
}

fn options(queue: Queue, backfill: Backfill) -> Options {
    let pool = Pool { queue, backfill, ..Pool::default() };
    Options { policy: Settings { pools: vec![pool], ..Settings::default() }, ..Options::default() }
}

fn starts_s(outcome: &Outcome) -> Vec<u64> {
    outcome.jobs.iter().map(|job| job.started_ms.expect("it ran") / 1000).collect()
}

#[test]
fn three_jobs_by_hand() {
    // One GPU: runs 0-100, 100-150, 150-170.
    let list = jobs(&[(0, 100, 1), (10, 50, 1), (20, 20, 1)]);
    let outcome = simulate(equal_nodes(1, 1), list, options(Queue::FirstComeFirstServed, Backfill::None));
    assert_eq!(starts_s(&outcome), [0, 100, 150]);
    let figures = outcome.figures();
    assert_eq!((figures.jobs, figures.completed, figures.makespan_s), (3, 3, 170.0));
    assert_eq!(figures.waiting_s.mean, (0.0 + 90.0 + 130.0) / 3.0);
    assert_eq!(figures.completion_s.mean, (100.0 + 140.0 + 150.0) / 3.0);
    assert_eq!(figures.bounded_slowdown.max, 7.5);
    assert_eq!((figures.mean_percent_gpu_allocated, figures.percent_gpu_utilized), (100.0, 100.0));
    // Slowdowns 1, 2.8 and 7.5, each of another tenant.
    let jain = (1.0_f64 + 2.8 + 7.5).powi(2) / (3.0 * (1.0 + 2.8 * 2.8 + 7.5 * 7.5));
    assert!((figures.jain_fairness_jobs - jain).abs() < 1e-12);
    assert!((figures.jain_fairness_tenants - jain).abs() < 1e-12);
    assert_eq!(figures.samples.last().expect("samples").time_s, 170.0);
}

#[test]
fn gpus_that_nobody_has_are_counted() {
    // Two nodes of two GPUs: one job of one GPU for the whole time, one of two for half of it.
    let outcome = simulate(
        equal_nodes(2, 2),
        jobs(&[(0, 100, 1), (0, 50, 2)]),
        options(Queue::FirstComeFirstServed, Backfill::None),
    );
    assert_eq!(outcome.figures().mean_percent_gpu_allocated, 50.0);
    assert_eq!(outcome.figures().samples[0].percent_gpu_allocated, 75.0);
}

/// Poisson arrivals, constant service, one server: the mean time in the queue is
/// `rho * service / (2 * (1 - rho))` (Pollaczek and Khinchine).
#[test]
fn one_gpu_waits_as_queueing_theory_says() {
    let (service_s, load) = (1000_u32, 0.7);
    let mut random = fastrand::Rng::with_seed(1);
    let mut arrival = 0.0;
    let list: Vec<_> = (0..20_000)
        .map(|_| {
            arrival += -(1.0 - random.f64()).ln() * f64::from(service_s) / load;
            (arrival as u64, u64::from(service_s), 1)
        })
        .collect();
    let outcome =
        simulate(equal_nodes(1, 1), jobs(&list), options(Queue::FirstComeFirstServed, Backfill::None));
    let wanted = load * f64::from(service_s) / (2.0 * (1.0 - load));
    let waited = outcome.figures().waiting_s.mean;
    assert!((waited / wanted - 1.0).abs() < 0.05, "waited {waited} s, in theory {wanted} s");
}

#[test]
fn failures_lose_what_no_checkpoint_holds_and_all_jobs_are_done() {
    let list: Vec<_> = (0..40).map(|at| (at * 600, 7200, 1 + (at % 4) as u32)).collect();
    let failing = |checkpoint_ms| Options {
        failures: Some(Failures { mtbf_ms: 5 * 3_600_000, repair_ms: 600_000 }),
        checkpoint_ms,
        seed: 3,
        ..options(Queue::FirstComeFirstServed, Backfill::None)
    };
    let lost = |options| {
        let outcome = simulate(equal_nodes(4, 4), jobs(&list), options);
        assert!(outcome.failures > 0 && outcome.jobs.iter().all(|job| job.ended_ms.is_some()));
        conserved(&outcome, 0.0);
        outcome.lost_gpu_ms
    };
    let (none, often) = (lost(failing(None)), lost(failing(Some(60_000))));
    assert!(often < none / 4.0, "lost {often} with checkpoints, {none} without");
    assert_eq!(
        simulate(equal_nodes(4, 4), jobs(&list), failing(None)),
        simulate(equal_nodes(4, 4), jobs(&list), failing(None)),
        "the same seed gives the same run",
    );
}

/// Two of priority 1 hold both GPUs when one of priority 2 comes at 100 s: one is stopped, and goes on
/// later with what its checkpoint holds.
#[test]
fn who_is_stopped_goes_on_from_its_checkpoint() {
    let stopped = |grace_ms, checkpoint_ms| {
        let mut list = jobs(&[(0, 1000, 1), (0, 1000, 1), (100, 200, 1)]);
        for (job, priority) in list.iter_mut().zip([1, 1, 2]) {
            let gang = Arc::make_mut(&mut job.gang);
            (gang.priority, gang.preemptible, gang.grace_ms) = (priority, priority == 1, grace_ms);
        }
        let mut options = Options { checkpoint_ms, ..options(Queue::Priority, Backfill::None) };
        options.policy.pools[0].preemption = true;
        let outcome = simulate(equal_nodes(1, 2), list, options);
        let stopped_ms: f64 = if grace_ms > 0 { grace_ms as f64 * 1000.0 } else { 0.0 };
        conserved(&outcome, stopped_ms);
        let late = outcome.jobs.iter().filter_map(|job| job.ended_ms).max().expect("an end");
        (outcome.preemptions, outcome.jobs[2].started_ms, late, outcome.lost_gpu_ms)
    };
    // It starts when the checkpoint is written, and the other goes on when it ends.
    assert_eq!(stopped(30_000, None), (1, Some(130_000), 130_000 + 200_000 + 900_000, 0.0));
    assert_eq!(stopped(0, None), (1, Some(100_000), 300_000 + 1_000_000, 100_000.0));
    assert_eq!(stopped(0, Some(30_000)), (1, Some(100_000), 300_000 + 910_000, 10_000.0));
}

/// An elastic job has all four GPUs, gives up two when another comes, and gets them back.
#[test]
fn an_elastic_job_works_as_fast_as_it_is_large() {
    let mut list = jobs(&[(0, 1000, 4), (100, 200, 2)]);
    let gang = Arc::make_mut(&mut list[0].gang);
    gang.tasks.min = 2;
    let mut options = options(Queue::FirstComeFirstServed, Backfill::None);
    options.policy.pools[0].preemption = true;
    let outcome = simulate(equal_nodes(1, 4), list, options);
    assert_eq!((outcome.preemptions, outcome.resizes), (0, 2));
    assert_eq!(outcome.jobs[1].ended_ms, Some(300_000));
    // 100 s with four, 200 s with two, and the rest with four again.
    assert_eq!(outcome.jobs[0].ended_ms, Some(300_000 + 800_000));
    conserved(&outcome, 0.0);
}

/// The example that backfill is explained with (Feitelson and Weil, "Utilization and predictability in
/// scheduling the IBM SP2 with backfilling", IPPS'98): the first that waits gets a reservation; a short one goes
/// before it, and one that would delay it does not, but for GPUs that the reservation leaves over.
#[test]
fn easy_fills_what_the_first_that_waits_leaves() {
    let list = [(0, 100, 6), (1, 100, 8), (2, 50, 2), (3, 200, 2), (4, 90, 2)];
    let run = |backfill| {
        let outcome =
            simulate(equal_nodes(1, 8), jobs(&list), options(Queue::FirstComeFirstServed, backfill));
        starts_s(&outcome)
    };
    assert_eq!(run(Backfill::None), [0, 100, 200, 200, 200]);
    // The second gets all at 100. The third ends before, the fourth does not, the fifth has no time left.
    assert_eq!(run(Backfill::Easy), [0, 100, 2, 200, 200]);
    // Six of eight are the second's: the fourth may go on beside it.
    let list = [(0, 100, 6), (1, 100, 6), (2, 50, 2), (3, 200, 2), (4, 90, 2)];
    let outcome =
        simulate(equal_nodes(1, 8), jobs(&list), options(Queue::FirstComeFirstServed, Backfill::Easy));
    assert_eq!(starts_s(&outcome), [0, 100, 2, 52, 200]);
}

#[test]
fn what_never_fits_does_not_stop_time() {
    let outcome = simulate(
        equal_nodes(1, 2),
        jobs(&[(0, 10, 3), (5, 10, 1)]),
        Options {
            failures: Some(Failures { mtbf_ms: 1_000_000, repair_ms: 1000 }),
            ..options(Queue::FirstComeFirstServed, Backfill::None)
        },
    );
    assert_eq!(outcome.jobs[0].ended_ms, None);
    assert!(outcome.figures().completed <= 1);
}

#[test]
fn cycles_keep_their_distance() {
    let list: Vec<_> = (0..100).map(|at| (at, 1000, 1)).collect();
    let slow = Options { cycle_ms: 10_000, ..options(Queue::FirstComeFirstServed, Backfill::None) };
    let outcome = simulate(equal_nodes(16, 8), jobs(&list), slow);
    // Every 10 s from 0 to 100, and again while jobs end, from 1000 to 1110.
    assert!((20..=24).contains(&outcome.cycles), "{} cycles", outcome.cycles);
    assert_eq!(outcome.figures().waiting_s.max, 9.0);
}

/// GPU-time that gangs had is the work that was kept, the work that was lost, and what stopping took.
fn conserved(outcome: &Outcome, stopping_milli_ms: f64) {
    let work: f64 = outcome.jobs.iter().map(|job| job.gpu_milli as f64 * job.duration_ms as f64).sum();
    let had = outcome.allocated_milli_ms();
    let wanted = work + outcome.lost_gpu_ms * 1000.0 + stopping_milli_ms;
    assert!(
        (had / wanted - 1.0).abs() < 1e-9,
        "gangs had {had}, worked {work}, lost {}",
        outcome.lost_gpu_ms
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn nothing_is_lost_or_made(
        list in prop::collection::vec((0_u64..5000, 1_u64..2000, 1_u32..12), 1..60),
        queue in prop::sample::select(vec![
            Queue::FirstComeFirstServed,
            Queue::ShortestJobFirst,
            Queue::HighestResponseRatioNext,
            Queue::FairShare,
            Queue::Priority,
        ]),
        backfill in prop::sample::select(vec![Backfill::None, Backfill::Easy, Backfill::Conservative]),
    ) {
        let outcome = simulate(equal_nodes(3, 4), jobs(&list), options(queue, backfill));
        prop_assert!(outcome.jobs.iter().all(|job| job.ended_ms.is_some()), "all jobs fit and are done");
        conserved(&outcome, 0.0);
        for job in &outcome.jobs {
            // It was never stopped: it came, waited, and ran for as long as it runs.
            prop_assert_eq!(job.ended_ms, Some(job.arrived_ms + job.waited_ms + job.duration_ms));
            prop_assert_eq!(job.started_ms, Some(job.arrived_ms + job.waited_ms));
        }
        prop_assert!(outcome.steps.iter().all(|step| step.allocated_milli <= outcome.total_milli));
    }
}
