//! Takes requests for services on this node and hands them to replicas on all nodes.
//!
//! - [`service`]: one service: its replicas, who waits for one, who gets which. [`meter`]: how much is in
//!   flight.
//! - [`http`], [`tcp`]: what passes between clients and replicas.
//! - [`readiness`]: whether the replicas on this node accept connections.
//!
//! Which services and replicas there are the coordinator says, and what is in flight it hears with the
//! reports. While it is away all goes on with what it said last; a replica that cannot be connected to is
//! passed over. What passes here ends when the agent does.

pub mod http;
pub mod meter;
pub mod readiness;
pub mod service;
pub mod tcp;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lathe_api::sandbox::NodeDesired;
use lathe_api::service::{Exposure, NodeService, Protocol, ServiceLoad};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use service::Service;

/// How often ports that could not be had are tried again.
const RETRY: Duration = Duration::from_secs(2);
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;
/// File descriptors that the rest of the agent needs.
const OTHER_DESCRIPTORS: u64 = 512;
/// Fewest and most connections of all services at once.
const CONNECTIONS: std::ops::RangeInclusive<u64> = 128..=65_536;

/// See the module.
#[derive(Debug)]
pub struct Balancers {
    /// Where other nodes reach this one.
    own: Ipv4Addr,
    running: Mutex<BTreeMap<String, Running>>,
    /// Each takes two descriptors: beyond their limit nothing else in the agent would work.
    connections: Arc<Semaphore>,
}

#[derive(Debug)]
struct Running {
    service: Arc<Service>,
    /// Its port, or why it has none. What waits in the kernel when it goes is refused.
    listening: Result<Option<DropGuard>, String>,
}

impl Balancers {
    /// None, on a node that others reach at `own`.
    pub fn new(own: Ipv4Addr) -> Self {
        let connections = (descriptors().saturating_sub(OTHER_DESCRIPTORS) / 2)
            .clamp(*CONNECTIONS.start(), *CONNECTIONS.end());
        let connections = usize::try_from(connections).unwrap_or(usize::MAX);
        Self { own, running: Mutex::default(), connections: Arc::new(Semaphore::new(connections)) }
    }

    /// Makes the services those. Within a Tokio runtime.
    pub fn configure(&self, wanted: &[NodeService]) {
        let mut running = self.running();
        running.retain(|id, _| wanted.iter().any(|service| service.id == *id));
        for service in wanted {
            let one = running.entry(service.id.clone()).or_insert_with(|| Running {
                service: Service::new(service, self.own),
                listening: Err("not yet".to_owned()),
            });
            one.service.set_replicas(&service.replicas);
            if service.closing {
                one.listening = Ok(None);
            } else if !matches!(one.listening, Ok(Some(_))) {
                let before = one.listening.as_ref().err().cloned();
                one.listening = self.listen(service, &one.service).map(Some);
                if let Err(problem) = &one.listening
                    && before.as_ref() != Some(problem)
                {
                    tracing::error!(service = service.id, problem, "no requests are taken");
                }
            }
        }
    }

    /// What is in flight, for a report.
    pub fn loads(&self) -> Vec<ServiceLoad> {
        let running = self.running();
        running.values().map(|one| one.service.load(one.listening.as_ref().err().cloned())).collect()
    }

    /// How many wait for a replica: what deserves a report at once.
    pub fn waiting(&self) -> u32 {
        self.running().values().map(|one| one.service.waiting()).sum()
    }

    fn listen(&self, wanted: &NodeService, service: &Arc<Service>) -> Result<DropGuard, String> {
        let host = match wanted.expose {
            Exposure::Node => self.own,
            Exposure::Loopback => Ipv4Addr::LOCALHOST,
        };
        let address = SocketAddrV4::new(host, wanted.listen);
        let listener = bind(address).map_err(|error| format!("cannot listen on {address}: {error}"))?;
        tracing::info!(service = wanted.id, %address, "requests are taken");
        let stop = CancellationToken::new();
        let (token, service) = (stop.clone(), Arc::clone(service));
        let accept = accept(listener, service, wanted.protocol, Arc::clone(&self.connections));
        tokio::spawn(async move { token.run_until_cancelled(accept).await });
        Ok(stop.drop_guard())
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        // Whole whatever panicked while holding it: what is missing is made in the next pass.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many descriptors this process may have: what select(2) could take is the limit otherwise. Sandboxes
/// have limits of their own.
fn descriptors() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    let wanted = hard.min(2 * CONNECTIONS.end() + OTHER_DESCRIPTORS).max(soft);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_or(soft, |()| wanted)
}

fn bind(address: SocketAddrV4) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    // Connections of before the agent was restarted may not have timed out yet.
    socket.set_reuseaddr(true)?;
    socket.bind(address.into())?;
    socket.listen(BACKLOG)
}

async fn accept(
    listener: TcpListener,
    service: Arc<Service>,
    protocol: Protocol,
    connections: Arc<Semaphore>,
) {
    loop {
        // Before accepting: those that are too many wait in the kernel's queue, which is bounded.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, peer)) => {
                let service = Arc::clone(&service);
                tokio::spawn(async move {
                    let _permit = permit;
                    // Without it answers are late, not wrong.
                    let _ = client.set_nodelay(true);
                    match protocol {
                        Protocol::Http => http::serve(service, client, peer).await,
                        Protocol::Tcp => tcp::serve(service, client).await,
                    }
                });
            }
            Err(error) => {
                tracing::warn!(service = service.id(), %error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Keeps the services as the coordinator wants them, for ever.
pub async fn run(balancers: Arc<Balancers>, mut desired: watch::Receiver<Option<NodeDesired>>) {
    loop {
        let wanted = desired.borrow_and_update().as_ref().and_then(|desired| desired.services.clone());
        if let Some(wanted) = wanted {
            balancers.configure(&wanted);
        }
        if let Ok(Err(_)) = timeout(RETRY, desired.changed()).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
