//! Whether replicas on this node accept connections: what starts is not ready because its process runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lathe_api::job::TaskState;
use lathe_api::node::SandboxStatus;
use lathe_api::sandbox::NodeDesired;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::metrics::Snapshot;

/// How often replicas that are not ready are tried.
const STARTING: Duration = Duration::from_millis(250);
/// How often those that are ready are tried.
const READY: Duration = Duration::from_secs(5);
/// How often in a row one that was ready must fail: a full queue for a moment is no end.
const FAILURES: u32 = 3;
/// How long one try may take: the replica is on this host.
const PATIENCE: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug, Default)]
pub struct Readiness(Mutex<BTreeMap<String, Known>>);

#[derive(Clone, Copy, Debug)]
struct Known {
    ready: bool,
    failures: u32,
    tried: Instant,
}

impl Readiness {
    /// Says of each sandbox whether it is ready.
    pub fn tell(&self, sandboxes: &mut [SandboxStatus]) {
        let known = self.known();
        for status in sandboxes {
            let ready = known.get(&status.id).is_some_and(|known| known.ready);
            status.ready = ready && status.state == TaskState::Running;
        }
    }

    /// Those of `ports` that are to be tried now.
    fn due(&self, ports: &BTreeMap<String, SocketAddrV4>, now: Instant) -> Vec<(String, SocketAddrV4)> {
        let mut known = self.known();
        known.retain(|sandbox, _| ports.contains_key(sandbox));
        let due = ports.iter().filter(|(sandbox, _)| match known.get(*sandbox) {
            Some(Known { ready: true, failures: 0, tried }) => now.saturating_duration_since(*tried) >= READY,
            _ => true,
        });
        due.map(|(sandbox, address)| (sandbox.clone(), *address)).collect()
    }

    fn learn(&self, sandbox: String, accepts: bool, now: Instant) {
        let mut known = self.known();
        let one = known.entry(sandbox).or_insert(Known { ready: false, failures: 0, tried: now });
        one.tried = now;
        one.failures = if accepts { 0 } else { one.failures.saturating_add(1) };
        one.ready = accepts || (one.ready && one.failures < FAILURES);
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        // Whole whatever panicked while holding it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tries the ports of replicas that run here, for ever.
pub async fn run(
    readiness: Arc<Readiness>,
    desired: watch::Receiver<Option<NodeDesired>>,
    snapshot: watch::Receiver<Snapshot>,
) {
    loop {
        let ports = ports(desired.borrow().as_ref(), &snapshot.borrow().sandboxes);
        let tries = readiness.due(&ports, Instant::now()).into_iter().map(async |(sandbox, address)| {
            let accepts = matches!(timeout(PATIENCE, TcpStream::connect(address)).await, Ok(Ok(_)));
            readiness.learn(sandbox, accepts, Instant::now());
        });
        join_all(tries).await;
        sleep(STARTING).await;
    }
}

/// The ports of those that run and are to.
fn ports(desired: Option<&NodeDesired>, observed: &[SandboxStatus]) -> BTreeMap<String, SocketAddrV4> {
    let running = observed.iter().filter(|status| status.state == TaskState::Running);
    let running: BTreeSet<&str> = running.map(|status| status.id.as_str()).collect();
    let specs = desired.into_iter().flat_map(|desired| &desired.sandboxes);
    let ports = specs.filter(|spec| running.contains(spec.id.as_str())).filter_map(|spec| {
        let address = SocketAddrV4::new(spec.address.parse().ok()?, spec.port?);
        Some((spec.id.clone(), address))
    });
    ports.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_ready_may_miss_a_try_and_not_three() {
        let readiness = Readiness::default();
        let address: SocketAddrV4 = "127.0.0.1:1".parse().unwrap();
        let ports = BTreeMap::from([("a-0-1".to_owned(), address)]);
        let now = Instant::now();
        let is_ready = || readiness.known().get("a-0-1").is_some_and(|known| known.ready);
        let learn = |accepts| readiness.learn("a-0-1".to_owned(), accepts, now);
        learn(false);
        assert!(!is_ready() && readiness.due(&ports, now).len() == 1);
        learn(true);
        assert!(is_ready() && readiness.due(&ports, now).is_empty());
        assert_eq!(readiness.due(&ports, now + READY).len(), 1);
        learn(false);
        learn(false);
        assert!(is_ready() && readiness.due(&ports, now).len() == 1, "it is tried at once again");
        learn(false);
        assert!(!is_ready());
        assert!(readiness.due(&BTreeMap::new(), now).is_empty());
        assert!(readiness.known().is_empty(), "what is gone is forgotten");
    }
}
