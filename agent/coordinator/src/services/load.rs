//! What is in flight at services, as nodes report it.
//!
//! In memory only: it comes back with the next reports. A node whose reports end is not counted.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lathe_api::service::{BackendLoad, ServiceLoad};

use super::autoscale::{self, Decision, Policy, Window};

/// See the module.
#[derive(Debug, Default)]
pub struct Loads(Mutex<HashMap<String, Load>>);

#[derive(Debug, Default)]
struct Load {
    /// By node: when it said what.
    nodes: BTreeMap<String, (u64, ServiceLoad)>,
    window: Window,
}

/// A service as the nodes see it now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// In flight, those that wait included.
    pub in_flight: u64,
    /// Those that wait.
    pub waiting: u64,
    /// Turned away since the agents started.
    pub turned_away: u64,
    /// By node.
    pub problems: Vec<String>,
    /// By sandbox: in flight from all nodes, and whether one of them would send it more.
    pub replicas: BTreeMap<String, (u64, bool)>,
    /// Whether any node has said anything.
    pub known: bool,
}

impl Loads {
    /// Takes what a node says of all services that it takes requests for. Of services that are none,
    /// nothing is kept.
    pub fn report(&self, node: &str, loads: &[ServiceLoad], now_ms: u64, is_service: impl Fn(&str) -> bool) {
        let mut all = self.lock();
        for load in all.values_mut() {
            load.nodes.remove(node);
        }
        for load in loads.iter().filter(|load| is_service(&load.service)) {
            let of = all.entry(load.service.clone()).or_default();
            of.nodes.insert(node.to_owned(), (now_ms, load.clone()));
        }
    }

    /// Forgets services that are none any more.
    pub fn retain(&self, is_service: impl Fn(&str) -> bool) {
        self.lock().retain(|service, _| is_service(service));
    }

    /// What is in flight at a service now. What nodes said longer ago than `expiry_ms` does not count.
    pub fn seen(&self, service: &str, now_ms: u64, expiry_ms: u64) -> Seen {
        self.lock().get(service).map(|load| load.seen(now_ms, expiry_ms)).unwrap_or_default()
    }

    /// Takes a sample and says how many replicas the service needs.
    pub fn decide(
        &self,
        service: &str,
        policy: &Policy,
        current: u32,
        now_ms: u64,
        expiry_ms: u64,
    ) -> Decision {
        let mut all = self.lock();
        let load = all.entry(service.to_owned()).or_default();
        let mut milli = None;
        for (_, said) in load.nodes.values().filter(|(at, _)| now_ms.saturating_sub(*at) <= expiry_ms) {
            // Whoever waits now counts in full: the average is of a time when it was not there yet.
            let waiting = u64::from(said.waiting) * 1000;
            milli = Some(milli.unwrap_or(0_u64).saturating_add(said.mean_in_flight_milli.max(waiting)));
        }
        if let Some(milli) = milli {
            load.window.push(now_ms, milli, policy.down_after_ms);
        }
        autoscale::decide(policy, &load.window, current, now_ms)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Load>> {
        // Whole whatever panicked while holding it: at worst one sample is missing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load {
    fn seen(&self, now_ms: u64, expiry_ms: u64) -> Seen {
        let mut seen = Seen::default();
        for (node, (at, said)) in &self.nodes {
            if now_ms.saturating_sub(*at) > expiry_ms {
                continue;
            }
            seen.known = true;
            seen.in_flight += u64::from(said.in_flight);
            seen.waiting += u64::from(said.waiting);
            seen.turned_away = seen.turned_away.saturating_add(said.turned_away);
            if let Some(problem) = &said.problem {
                seen.problems.push(format!("node {node}: {}", crate::observe::one_line(problem)));
            }
            for BackendLoad { sandbox, in_flight, accepts } in &said.replicas {
                let (sum, any) = seen.replicas.entry(sandbox.clone()).or_default();
                *sum += u64::from(*in_flight);
                *any |= accepts;
            }
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(service: &str, mean: u64, waiting: u32) -> ServiceLoad {
        let replicas = vec![BackendLoad { sandbox: "r-0-1".to_owned(), in_flight: 2, accepts: true }];
        let mean_in_flight_milli = mean;
        ServiceLoad {
            service: service.to_owned(),
            mean_in_flight_milli,
            in_flight: 3,
            waiting,
            replicas,
            ..ServiceLoad::default()
        }
    }

    #[test]
    fn nodes_are_added_up_and_those_that_are_silent_left_out() {
        let loads = Loads::default();
        loads.report("n1", &[load("web", 3_000, 1), load("other", 9_000, 0)], 1_000, |id| id == "web");
        loads.report("n2", &[load("web", 0, 4)], 5_000, |_| true);
        let seen = loads.seen("web", 5_000, 8_000);
        assert_eq!((seen.in_flight, seen.waiting, seen.replicas["r-0-1"]), (6, 5, (4, true)));
        assert!(!loads.seen("other", 5_000, 8_000).known, "it is no service");
        assert_eq!(loads.seen("web", 10_000, 8_000).in_flight, 3, "n1 was last heard 9 s ago");
        loads.report("n2", &[], 6_000, |_| true);
        assert_eq!(loads.seen("web", 6_000, 8_000).in_flight, 3, "n2 takes requests for it no more");
        loads.retain(|_| false);
        assert!(!loads.seen("web", 6_000, 8_000).known);
    }

    #[test]
    fn whoever_waits_counts_before_the_average_knows_him() {
        let loads = Loads::default();
        let policy = Policy { min: 0, max: 9, target_milli: 2_000, down_after_ms: 60_000 };
        loads.report("n1", &[load("web", 10, 4)], 1_000, |_| true);
        assert_eq!(loads.decide("web", &policy, 0, 1_000, 8_000).replicas, 2);
        assert_eq!(loads.decide("none", &policy, 3, 1_000, 8_000).replicas, 3, "nothing is known of it");
    }
}
