//! What a service needs next, from how many replicas there should be and those that there are. Pure and
//! level-triggered: it keeps nothing, and asked again before its answer was carried out it gives the
//! same.

use lathe_api::job::TaskState;
use lathe_api::service::ServiceState;

use super::load::Seen;
use crate::records::{JobRecord, ReplicaRecord};

/// How long after nodes were told that a replica gets nothing new their word counts that nothing is in
/// flight there: longer than the time between two reports, so that each has spoken since.
const SETTLE_MS: u64 = 3_000;
/// Replicas that are made in one round: the next comes at once, and others have their turn.
const MOST_AT_ONCE: u32 = 64;

/// A replica as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its job.
    pub job: String,
    /// Order of creation.
    pub sequence: u64,
    /// Nothing, a place, or a port that accepts.
    pub phase: Phase,
    /// At it, from all nodes.
    pub in_flight: u64,
    /// A node would send it more.
    pub accepts: bool,
    /// Since when it gets nothing new.
    pub draining_since_ms: Option<u64>,
    /// It was told to end.
    pub ending: bool,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It waits for room, or to start again.
    Waiting,
    /// It is being started, or does not accept.
    Placed,
    /// It takes requests.
    Ready,
}

impl Replica {
    /// A replica's record, with what is in flight there.
    pub fn of(record: &JobRecord, seen: &Seen) -> Self {
        let task = record.job.tasks.first();
        let sandbox = task.and_then(|task| task.sandbox.as_ref());
        let (in_flight, accepts) =
            sandbox.and_then(|sandbox| seen.replicas.get(sandbox)).copied().unwrap_or_default();
        let none = ReplicaRecord::default();
        let phase = match task {
            Some(task) if task.state == TaskState::Running && task.ready => Phase::Ready,
            Some(task) if task.sandbox.is_some() => Phase::Placed,
            _ => Phase::Waiting,
        };
        Self {
            job: record.job.id.clone(),
            sequence: record.sequence,
            phase,
            in_flight,
            accepts,
            draining_since_ms: record.replica.as_ref().unwrap_or(&none).draining_since_ms,
            ending: record.cancelled,
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Replicas to make.
    pub create: u32,
    /// Those that get nothing new from now on.
    pub drain: Vec<String>,
    /// Those that were to end and are needed again.
    pub keep: Vec<String>,
    /// Those that get SIGTERM, and why.
    pub stop: Vec<(String, String)>,
    /// Nothing is left of it.
    pub finish: bool,
}

/// What to do for a service whose replicas may take `drain_ms` to end what they have.
pub fn steps(
    state: ServiceState,
    wanted: u32,
    drain_ms: u64,
    replicas: &[Replica],
    known: bool,
    now_ms: u64,
) -> Steps {
    let living = replicas.iter().filter(|replica| !replica.ending);
    if state != ServiceState::Active {
        let stop = living.map(|replica| (replica.job.clone(), "its service was cancelled".to_owned()));
        return Steps { stop: stop.collect(), finish: replicas.is_empty(), ..Steps::default() };
    }
    let (mut draining, mut serving): (Vec<&Replica>, Vec<&Replica>) =
        living.partition(|replica| replica.draining_since_ms.is_some());
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    let mut steps = Steps::default();
    if serving.len() < wanted {
        let missing = wanted - serving.len();
        // Those that come back have started already; most of all those that have the most to do.
        draining.sort_by_key(|replica| (replica.phase, replica.in_flight, replica.sequence));
        let back = draining.split_off(draining.len().saturating_sub(missing));
        steps.create = u32::try_from(missing - back.len()).unwrap_or(u32::MAX).min(MOST_AT_ONCE);
        steps.keep = back.into_iter().map(|replica| replica.job.clone()).collect();
    } else {
        // Those that serve nobody yet first, then those with the least to do; the youngest of equals.
        serving
            .sort_by_key(|replica| (replica.phase, replica.in_flight, std::cmp::Reverse(replica.sequence)));
        for replica in &serving[..serving.len() - wanted] {
            match replica.phase {
                Phase::Waiting => {
                    steps.stop.push((replica.job.clone(), "it is not needed any more".to_owned()))
                }
                _ => steps.drain.push(replica.job.clone()),
            }
        }
    }
    let ended =
        draining.into_iter().filter_map(|replica| Some((replica, end(replica, drain_ms, known, now_ms)?)));
    steps.stop.extend(ended.map(|(replica, why)| (replica.job.clone(), why)));
    steps
}

/// Why a replica that gets nothing new may end now.
fn end(replica: &Replica, drain_ms: u64, known: bool, now_ms: u64) -> Option<String> {
    let since_ms = now_ms.saturating_sub(replica.draining_since_ms?);
    if replica.phase == Phase::Waiting {
        return Some("it is not needed any more".to_owned());
    }
    if known && since_ms >= SETTLE_MS && replica.in_flight == 0 && !replica.accepts {
        return Some("it is not needed any more, and nothing is in flight there".to_owned());
    }
    let late =
        || format!("it is not needed any more, and {} in flight did not end in time", replica.in_flight);
    // Nodes that are told late would still send something at first.
    (since_ms >= drain_ms.max(SETTLE_MS)).then(late)
}

#[cfg(test)]
pub(crate) mod tests {
    use lathe_api::artefact::{Digest, Image};
    use proptest::prelude::*;

    use super::*;
    use crate::services::record::{job, job_record};

    /// A replica's record, not placed.
    pub fn replica(id: &str) -> JobRecord {
        let spec = r#"{"name":"web","class":"container","image":"i","service":{"port":80,"max":4}}"#;
        let spec = serde_json::from_str(spec).expect("a service");
        let image = Image { name: "i".to_owned(), digest: Digest::of(b"i"), size_bytes: 1 };
        let job = lathe_api::job::Job { id: id.to_owned(), ..job("red", spec, &image, 5) };
        JobRecord { replica: Some(ReplicaRecord::default()), ..job_record(job, image, Vec::new()) }
    }

    fn one(job: &str, sequence: u64, phase: Phase, in_flight: u64) -> Replica {
        let accepts = phase == Phase::Ready;
        Replica {
            job: job.to_owned(),
            sequence,
            phase,
            in_flight,
            accepts,
            draining_since_ms: None,
            ending: false,
        }
    }

    fn drains(replica: Replica, since_ms: u64) -> Replica {
        Replica { draining_since_ms: Some(since_ms), accepts: false, ..replica }
    }

    const NOW: u64 = 100_000;

    fn plan(wanted: u32, replicas: &[Replica]) -> Steps {
        steps(ServiceState::Active, wanted, 30_000, replicas, true, NOW)
    }

    #[test]
    fn who_has_the_least_to_do_goes_first_and_who_never_started_before_him() {
        let replicas = [
            one("a", 1, Phase::Ready, 3),
            one("b", 2, Phase::Ready, 1),
            one("c", 3, Phase::Placed, 0),
            one("d", 4, Phase::Waiting, 0),
        ];
        let steps = plan(1, &replicas);
        assert_eq!(steps.drain, ["c", "b"]);
        assert_eq!(steps.stop, [("d".to_owned(), "it is not needed any more".to_owned())]);
        assert_eq!(plan(4, &replicas), Steps::default());
    }

    #[test]
    fn a_replica_ends_when_nothing_is_in_flight_there_and_late_at_the_latest() {
        let stops = |replica: Replica, known| {
            let replicas = [replica, one("other", 9, Phase::Ready, 0)];
            let steps = steps(ServiceState::Active, 1, 30_000, &replicas, known, NOW);
            steps.stop.first().map(|(_, why)| why.clone())
        };
        let busy = |since| drains(one("a", 1, Phase::Ready, 2), since);
        let idle = |since| drains(one("a", 1, Phase::Ready, 0), since);
        assert_eq!(stops(busy(NOW - 29_000), true), None);
        assert!(stops(busy(NOW - 30_000), true).unwrap().contains("2 in flight did not end"));
        assert_eq!(stops(idle(NOW - 2_000), true), None, "a node may not have said anything since");
        assert!(stops(idle(NOW - 3_000), true).unwrap().contains("nothing is in flight"));
        assert_eq!(stops(idle(NOW - 3_000), false), None, "nobody has said so");
        let behind = Replica { accepts: true, ..idle(NOW - 3_000) };
        assert_eq!(stops(behind, true), None, "a node does not know yet");
        assert!(stops(drains(one("a", 1, Phase::Waiting, 0), NOW), true).is_some());
    }

    #[test]
    fn replicas_that_drain_come_back_before_new_ones_are_made() {
        let replicas = [
            drains(one("a", 1, Phase::Ready, 1), NOW - 1),
            drains(one("b", 2, Phase::Ready, 5), NOW - 1),
            one("c", 3, Phase::Ready, 0),
            Replica { ending: true, ..one("d", 4, Phase::Ready, 0) },
        ];
        assert_eq!((plan(2, &replicas).keep, plan(2, &replicas).create), (vec!["b".to_owned()], 0));
        let more = plan(5, &replicas);
        assert_eq!((more.keep.len(), more.create), (2, 2));
    }

    #[test]
    fn a_cancelled_service_stops_all_and_is_finished_when_none_is_left() {
        let cancelled = |replicas: &[Replica]| steps(ServiceState::Cancelling, 3, 0, replicas, true, NOW);
        let replicas =
            [one("a", 1, Phase::Ready, 1), Replica { ending: true, ..one("b", 2, Phase::Ready, 0) }];
        let steps = cancelled(&replicas);
        assert_eq!((steps.stop.len(), steps.create, steps.finish), (1, 0, false));
        assert!(cancelled(&[]).finish);
    }

    fn phases() -> impl Strategy<Value = Phase> {
        prop_oneof![Just(Phase::Waiting), Just(Phase::Placed), Just(Phase::Ready)]
    }

    prop_compose! {
        fn replicas()(all in prop::collection::vec(
            (phases(), 0_u64..9, any::<bool>(), prop::option::of(0_u64..NOW), prop::bool::weighted(0.2)), 0..12,
        )) -> Vec<Replica> {
            let made = all.into_iter().zip(0..).map(|((phase, in_flight, accepts, draining_since_ms, ending), n)| {
                let job = format!("r{n}");
                Replica { job, sequence: n, phase, in_flight, accepts, draining_since_ms, ending }
            });
            made.collect()
        }
    }

    proptest! {
        #[test]
        fn what_is_left_to_serve_is_what_is_wanted(wanted in 0_u32..20, replicas in replicas(), known in any::<bool>()) {
            let steps = steps(ServiceState::Active, wanted, 30_000, &replicas, known, NOW);
            let serving = replicas.iter().filter(|r| !r.ending && r.draining_since_ms.is_none()).count();
            let stopped = steps.stop.iter().filter(|(job, _)| {
                replicas.iter().any(|r| r.job == *job && r.draining_since_ms.is_none())
            });
            let left = serving + steps.keep.len() + steps.create as usize - steps.drain.len() - stopped.count();
            prop_assert_eq!(left, wanted as usize);
            // Nobody is told two things, and nobody who was told to end anything.
            let mut named: Vec<&String> = steps.drain.iter().chain(&steps.keep).collect();
            named.extend(steps.stop.iter().map(|(job, _)| job));
            let count = named.len();
            named.sort_unstable();
            named.dedup();
            prop_assert_eq!(named.len(), count);
            prop_assert!(replicas.iter().all(|r| !r.ending || !named.contains(&&r.job)));
        }
    }
}
