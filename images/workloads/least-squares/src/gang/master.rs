//! Rank 0: lets the others in, gathers what they send in rank order, and tells all what is next.
//!
//! One thread accepts; each connection has a thread that checks the greeting and then forwards
//! messages. All meet in one channel, so a lost peer is known at once, whoever is waited for.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::frame::{self, FrameError};
use super::{GangError, Message, Place, address_of, plain_address, printable, watch_connection};

/// Strangers that may greet at the same time; further ones are turned away.
const STRANGERS: u32 = 64;

/// Time a stranger has for its greeting.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// Time from the start within which a rank 0 that has failed still lets others in to tell them.
const STRAGGLERS: Duration = Duration::from_secs(10);

/// Rank 0's end of the gang.
pub struct Master {
    place: Place,
    started: Instant,
    events: Receiver<Event>,
    peers: BTreeMap<u32, Peer>,
    /// The last stranger that was turned away, to explain why a rank is missing.
    rejected: Arc<Mutex<Option<String>>>,
}

struct Peer {
    stream: TcpStream,
    address: String,
    /// Messages that arrived before they were asked for; ranks move in step, so at most one.
    waiting: Vec<Message>,
}

enum Event {
    Joined { rank: u32, stream: TcpStream },
    Said { rank: u32, message: Message },
    Lost { rank: u32, error: FrameError },
}

/// What the accepting and greeting threads share.
struct Door {
    place: Place,
    events: Sender<Event>,
    strangers: AtomicU32,
    /// Ranks that are in.
    joined: Mutex<Vec<u32>>,
    rejected: Arc<Mutex<Option<String>>>,
}

impl Master {
    /// Listens and lets ranks in from now on, in the background.
    pub fn listen(place: Place) -> Result<Self, GangError> {
        let listener = bind(&place)?;
        let (sender, events) = channel();
        let rejected = Arc::new(Mutex::new(None));
        let door = Arc::new(Door {
            place: place.clone(),
            events: sender,
            strangers: AtomicU32::new(0),
            joined: Mutex::new(vec![0]),
            rejected: Arc::clone(&rejected),
        });
        std::thread::spawn(move || door.open(&listener));
        Ok(Self { place, started: Instant::now(), events, peers: BTreeMap::new(), rejected })
    }

    /// Waits until every rank is in.
    pub fn wait_for_all(&mut self) -> Result<(), GangError> {
        while self.peers.len() + 1 < self.place.world as usize {
            let left = self.place.connect_timeout.saturating_sub(self.started.elapsed());
            match self.events.recv_timeout(left) {
                Ok(event) => self.take(event)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(self.missing()),
            }
        }
        Ok(())
    }

    /// Takes note of what arrived meanwhile, without waiting: a lost peer ends the computation
    /// at the next block of rows rather than at its end.
    pub fn check(&mut self) -> Result<(), GangError> {
        loop {
            match self.events.try_recv() {
                Ok(event) => self.take(event)?,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    /// One message from each rank, in rank order: what is computed from them must not depend on
    /// who was first.
    pub fn gather(&mut self) -> Result<Vec<(u32, Message)>, GangError> {
        self.wait_for_all()?;
        while self.peers.values().any(|p| p.waiting.is_empty()) {
            match self.events.recv() {
                Ok(event) => self.take(event)?,
                Err(_) => return Err(GangError::Setup("all connections ended".to_owned())),
            }
        }
        Ok(self.peers.iter_mut().map(|(rank, peer)| (*rank, peer.waiting.remove(0))).collect())
    }

    /// Sends each rank what `message` makes for it.
    pub fn tell(&mut self, message: impl Fn(u32) -> Message) -> Result<(), GangError> {
        for (rank, peer) in &mut self.peers {
            frame::send(&mut peer.stream, &message(*rank)).map_err(|error| GangError::Lost {
                rank: *rank,
                address: peer.address.clone(),
                reason: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// Tells whoever still listens that the job has failed, and why.
    pub fn abort(&mut self, exit: u8, reason: &str) {
        self.await_stragglers();
        for peer in self.peers.values_mut() {
            let message = Message::Abort { exit, reason: printable(reason) };
            // The gang is failing: a peer that cannot be told finds the connection closed.
            let _ = frame::send(&mut peer.stream, &message);
        }
    }

    /// Addresses of the other ranks.
    pub fn addresses(&self) -> impl Iterator<Item = (u32, &str)> {
        self.peers.iter().map(|(rank, peer)| (*rank, peer.address.as_str()))
    }

    /// An error that says `rank` broke the protocol.
    pub fn protocol_error(&self, rank: u32, what: &str) -> GangError {
        let address = self.peers.get(&rank).map_or_else(String::new, |p| p.address.clone());
        GangError::Protocol { rank, address, what: what.to_owned() }
    }

    /// The error for a message that was not due.
    pub fn unexpected(&self, rank: u32, message: &Message) -> GangError {
        self.protocol_error(rank, &format!("{} out of turn", message.kind()))
    }

    fn take(&mut self, event: Event) -> Result<(), GangError> {
        match event {
            Event::Joined { rank, stream } => {
                let address = address_of(&stream);
                self.peers.insert(rank, Peer { stream, address, waiting: Vec::new() });
                Ok(())
            }
            Event::Said { rank, message: Message::Abort { exit, reason } } => {
                Err(GangError::Aborted { exit, reason: format!("rank {rank}: {}", printable(&reason)) })
            }
            Event::Said { rank, message } => match self.peers.get_mut(&rank) {
                Some(peer) if peer.waiting.is_empty() => {
                    peer.waiting.push(message);
                    Ok(())
                }
                _ => Err(self.unexpected(rank, &message)),
            },
            Event::Lost { rank, error } => {
                let address = self.peers.get(&rank).map_or_else(String::new, |p| p.address.clone());
                Err(match error {
                    FrameError::Closed | FrameError::Io(_) | FrameError::Late => {
                        GangError::Lost { rank, address, reason: error.to_string() }
                    }
                    other => GangError::Protocol { rank, address, what: other.to_string() },
                })
            }
        }
    }

    /// Ranks that are still on their way would otherwise look for rank 0 until their time is up.
    fn await_stragglers(&mut self) {
        let until = self.started + self.place.connect_timeout.min(STRAGGLERS);
        while self.peers.len() + 1 < self.place.world as usize {
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                // The job has failed already: a further failure adds nothing.
                Ok(event) => drop(self.take(event)),
                Err(_) => return,
            }
        }
    }

    fn missing(&self) -> GangError {
        let missing: Vec<String> = (1..self.place.world)
            .filter(|rank| !self.peers.contains_key(rank))
            .map(|rank| rank.to_string())
            .collect();
        let rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        GangError::Missing {
            missing: missing.join(", "),
            seconds: self.place.connect_timeout.as_secs(),
            rejected: rejected.as_ref().map_or_else(String::new, |r| format!("; turned away {r}")),
        }
    }
}

/// Listens on the master address alone where it is one of this machine, and on all addresses
/// where it is a name or an address that something in between translates.
fn bind(place: &Place) -> Result<TcpListener, GangError> {
    let mut candidates = Vec::new();
    if let Ok(address) = place.address.parse::<IpAddr>() {
        candidates.push(address);
    }
    candidates.extend([IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)]);
    let mut failure = None;
    for address in candidates {
        match TcpListener::bind(SocketAddr::new(address, place.port)) {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                failure = Some(e);
                break;
            }
            Err(e) => failure = Some(e),
        }
    }
    Err(GangError::Listen {
        address: format!("{}:{}", place.address, place.port),
        source: failure.unwrap_or_else(|| std::io::ErrorKind::AddrNotAvailable.into()),
    })
}

impl Door {
    /// Accepts until all ranks are in; the port closes with the first connection after that.
    fn open(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.joined().len() == self.place.world as usize {
                return;
            }
            let Ok((stream, address)) = accepted else {
                // Out of descriptors, most likely: do not spin until some are free.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            if self.strangers.fetch_add(1, Ordering::Relaxed) >= STRANGERS {
                self.strangers.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let door = Arc::clone(&self);
            std::thread::spawn(move || door.serve(stream, &plain_address(address)));
        }
    }

    fn joined(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Greets one connection and, once it is a peer, forwards what it says.
    fn serve(&self, mut stream: TcpStream, address: &str) {
        let greeted = self.greet(&mut stream);
        self.strangers.fetch_sub(1, Ordering::Relaxed);
        let (rank, writer) = match greeted {
            Ok(peer) => peer,
            Err(reason) => {
                let _ = frame::send(&mut stream, &Message::Refused(reason.clone()));
                let note = format!("{address}: {reason}");
                *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = Some(printable(&note));
                return;
            }
        };
        // A closed channel means that rank 0 is through with the gang.
        if self.events.send(Event::Joined { rank, stream: writer }).is_err() {
            return;
        }
        loop {
            let event = match frame::receive(&mut stream, self.place.message_limit, None) {
                Ok(message) => Event::Said { rank, message },
                Err(error) => Event::Lost { rank, error },
            };
            let lost = matches!(event, Event::Lost { .. });
            if self.events.send(event).is_err() || lost {
                return;
            }
        }
    }

    fn greet(&self, stream: &mut TcpStream) -> Result<(u32, TcpStream), String> {
        watch_connection(stream, self.place.peer_timeout).map_err(|e| e.to_string())?;
        let hello = frame::receive(stream, frame::HELLO_LIMIT, Some(HELLO_PATIENCE))
            .map_err(|e| format!("no greeting but {e}"))?;
        let Message::Hello { rank, world, problem } = hello else {
            return Err(format!("{} instead of a greeting", hello.kind()));
        };
        let ours = self.place.world;
        if world != ours || rank == 0 || rank >= ours {
            return Err(format!("rank {rank} of {world} is not one of ranks 1 to {} of {ours}", ours - 1));
        }
        if problem != self.place.problem {
            return Err(format!(
                "rank {rank} has another problem: {}; rank 0 has {}",
                printable(&problem),
                self.place.problem
            ));
        }
        let writer = stream.try_clone().map_err(|e| e.to_string())?;
        let mut joined = self.joined();
        if joined.contains(&rank) {
            return Err(format!("rank {rank} is already in; was it started twice?"));
        }
        frame::send(stream, &Message::Welcome).map_err(|e| e.to_string())?;
        joined.push(rank);
        Ok((rank, writer))
    }
}
