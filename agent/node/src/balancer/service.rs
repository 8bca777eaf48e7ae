//! One service on this node: its replicas, who waits for one, and who gets which.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_api::service::{Backend, BackendLoad, NodeService, ServiceLoad};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::meter::Meter;

/// Most that is in flight of a service at once, those that wait included: without a bound one client
/// would take all of the host's memory and descriptors.
pub const MAX_IN_FLIGHT: u32 = 8192;
/// How long connecting to a replica may take: they are at most a few hops away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a replica that could not be connected to is left alone.
const SHUN: Duration = Duration::from_secs(1);
/// How often those that wait look again although nothing rang: a replica is not shunned any more.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Why a request was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TurnedAway {
    /// Too much is in flight.
    #[error("{MAX_IN_FLIGHT} are in flight at this node already")]
    Full,
    /// Too much waits.
    #[error("too many wait for a replica at this node already")]
    Queue,
    /// None came.
    #[error("no replica took it in time")]
    Late,
}

/// See the module.
#[derive(Debug)]
pub struct Service {
    id: String,
    max_waiting: u32,
    max_wait: Duration,
    /// Where connections to replicas on other nodes come from.
    source: Ipv4Addr,
    meter: Meter,
    turned_away: AtomicU64,
    state: Mutex<State>,
    /// Rung when a replica may have become free to choose.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    replicas: Vec<Replica>,
    waiting: u32,
    /// Where the search for the next replica begins: equals take turns.
    next: usize,
}

#[derive(Debug)]
struct Replica {
    sandbox: String,
    address: SocketAddrV4,
    accepts: bool,
    in_flight: u32,
    shunned_until: Option<Instant>,
    /// Cancelled when the replica is there no more.
    gone: CancellationToken,
}

impl Service {
    /// A service without replicas.
    pub fn new(wanted: &NodeService, source: Ipv4Addr) -> Arc<Self> {
        Arc::new(Self {
            id: wanted.id.clone(),
            max_waiting: wanted.max_waiting,
            max_wait: Duration::from_secs(wanted.max_wait_seconds),
            source,
            meter: Meter::new(Instant::now()),
            turned_away: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Makes the replicas these. What is in flight at one that is not among them is cut off: it is gone.
    pub fn set_replicas(&self, wanted: &[Backend]) {
        let mut state = self.state();
        let mut before = std::mem::take(&mut state.replicas);
        for Backend { sandbox, address, port, accepts } in wanted {
            let Ok(address) = address.parse().map(|address| SocketAddrV4::new(address, *port)) else {
                tracing::warn!(service = self.id, sandbox, address, "a replica's address is none");
                continue;
            };
            let known = before.iter().position(|one| one.sandbox == *sandbox && one.address == address);
            let mut replica = known.map(|at| before.swap_remove(at)).unwrap_or_else(|| Replica {
                sandbox: sandbox.clone(),
                address,
                accepts: false,
                in_flight: 0,
                shunned_until: None,
                gone: CancellationToken::new(),
            });
            replica.accepts = *accepts;
            state.replicas.push(replica);
        }
        before.iter().for_each(|replica| replica.gone.cancel());
        drop(state);
        self.changed.notify_waiters();
    }

    /// Counts a request from now on.
    ///
    /// # Errors
    /// When too many are there.
    pub fn admit(self: &Arc<Self>) -> Result<Admission, TurnedAway> {
        if self.in_flight() >= MAX_IN_FLIGHT {
            return Err(self.turn_away(TurnedAway::Full));
        }
        self.meter.add(Instant::now());
        Ok(Admission { service: Arc::clone(self) })
    }

    fn turn_away(&self, why: TurnedAway) -> TurnedAway {
        // Only read to be shown: no other memory depends on it.
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        why
    }

    /// The replica that takes something new and has the least in flight from here.
    fn pick(self: &Arc<Self>) -> Option<Lease> {
        let now = Instant::now();
        let mut state = self.state();
        let count = state.replicas.len();
        let order = (0..count).map(|step| (state.next + step) % count);
        let free = order.filter(|at| {
            let replica = &state.replicas[*at];
            replica.accepts && replica.shunned_until.is_none_or(|until| until <= now)
        });
        let at = free.min_by_key(|at| state.replicas[*at].in_flight)?;
        state.next = (at + 1) % count;
        let replica = &mut state.replicas[at];
        replica.in_flight += 1;
        let (sandbox, address) = (replica.sandbox.clone(), replica.address);
        Some(Lease { service: Arc::clone(self), sandbox, address, gone: replica.gone.clone() })
    }

    /// What is in flight here, for a report: averages are since the last one.
    pub fn load(&self, problem: Option<String>) -> ServiceLoad {
        let mean_in_flight_milli = self.meter.take_mean_milli(Instant::now());
        let state = self.state();
        let of = |replica: &Replica| BackendLoad {
            sandbox: replica.sandbox.clone(),
            in_flight: replica.in_flight,
            accepts: replica.accepts,
        };
        ServiceLoad {
            service: self.id.clone(),
            mean_in_flight_milli,
            in_flight: self.in_flight(),
            waiting: state.waiting,
            turned_away: self.turned_away.load(Ordering::Relaxed),
            problem,
            replicas: state.replicas.iter().map(of).collect(),
        }
    }

    /// How many wait for a replica.
    pub fn waiting(&self) -> u32 {
        self.state().waiting
    }

    /// How much is in flight, those that wait included.
    pub fn in_flight(&self) -> u32 {
        self.meter.count()
    }

    /// Its ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole whatever panicked while holding it: counts are changed in single steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is counted until this is dropped.
#[derive(Debug)]
pub struct Admission {
    service: Arc<Service>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.service.meter.remove(Instant::now());
    }
}

/// One that waits for a replica, until this is dropped.
struct Waiting<'a>(&'a Service);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state().waiting -= 1;
    }
}

impl Admission {
    /// A connection to the replica that has the least to do; waits for one if there is none.
    ///
    /// # Errors
    /// When too many wait already, or none comes in time.
    pub async fn connect(&self) -> Result<(TcpStream, Lease), TurnedAway> {
        let service = &self.service;
        let deadline = Instant::now() + service.max_wait;
        loop {
            let lease = self.lease(deadline).await?;
            match timeout(CONNECT_TIMEOUT, open(service.source, lease.address)).await {
                Ok(Ok(stream)) => return Ok((stream, lease)),
                failed => {
                    let error = failed.map_or_else(
                        |_| "it did not answer".to_owned(),
                        |done| match done {
                            Ok(_) => String::new(),
                            Err(error) => error.to_string(),
                        },
                    );
                    tracing::debug!(
                        service = service.id,
                        sandbox = lease.sandbox,
                        error,
                        "a replica is shunned"
                    );
                    lease.shun();
                }
            }
        }
    }

    async fn lease(&self, deadline: Instant) -> Result<Lease, TurnedAway> {
        let service = &self.service;
        if let Some(lease) = service.pick() {
            return Ok(lease);
        }
        {
            let mut state = service.state();
            if state.waiting >= service.max_waiting {
                return Err(service.turn_away(TurnedAway::Queue));
            }
            state.waiting += 1;
        }
        let _waiting = Waiting(service);
        loop {
            // Before the look, so that what comes after it rings.
            let rung = service.changed.notified();
            if let Some(lease) = service.pick() {
                return Ok(lease);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(service.turn_away(TurnedAway::Late));
            }
            let _ = timeout(left.min(LOOK_AGAIN), rung).await;
        }
    }
}

/// A place at a replica, until this is dropped.
#[derive(Debug)]
pub struct Lease {
    service: Arc<Service>,
    sandbox: String,
    address: SocketAddrV4,
    gone: CancellationToken,
}

impl Lease {
    /// The replica's.
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Resolves when the replica is there no more.
    pub fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Gives the place up; nobody is sent there for a moment.
    fn shun(self) {
        let mut state = self.service.state();
        if let Some(replica) = state.replicas.iter_mut().find(|one| one.sandbox == self.sandbox) {
            replica.shunned_until = Some(Instant::now() + SHUN);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.service.state();
        // One that came again under the same name has none of the former's.
        let same = |one: &&mut Replica| one.sandbox == self.sandbox && one.address == self.address;
        if let Some(replica) = state.replicas.iter_mut().find(same) {
            replica.in_flight = replica.in_flight.saturating_sub(1);
        }
    }
}

/// Connects from the address that nodes know this one by, where the way leads through others: their
/// filters let nobody else through.
async fn open(source: Ipv4Addr, address: SocketAddrV4) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // As many connections to each replica as there are ports, and not in all.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    // The address may be that of a router before this host: then the kernel's choice has to do.
    let _ = socket.bind(SocketAddrV4::new(source, 0).into());
    let stream = socket.connect(address.into()).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
