//! Any rank but 0: finds rank 0, then answers what it asks.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::frame::{self, FrameError};
use super::{GangError, Message, Place, printable, watch_connection};

/// Pause between attempts. Short, because the ranks of a gang start within seconds of each other.
const RETRY: Duration = Duration::from_millis(100);

/// Longest wait for one attempt to connect: packets to a machine that is not up yet are lost, and
/// the kernel alone would wait for minutes.
const ATTEMPT: Duration = Duration::from_secs(3);

/// One rank's end of the gang.
pub struct Member {
    stream: TcpStream,
    address: String,
    message_limit: usize,
}

/// How one attempt to join failed.
enum Failure {
    /// Rank 0 may not be up yet: try again.
    Passing(String),
    Final(GangError),
}

impl Member {
    /// Connects to rank 0, trying until the time for it has passed.
    pub fn join(place: &Place) -> Result<Self, GangError> {
        let started = Instant::now();
        let address = format!("{}:{}", place.address, place.port);
        loop {
            let left = place.connect_timeout.saturating_sub(started.elapsed());
            let reason = match attempt(place, &address, left) {
                Ok(stream) => return Ok(Self { stream, address, message_limit: place.message_limit }),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason)) => reason,
            };
            if started.elapsed() + RETRY >= place.connect_timeout {
                let seconds = place.connect_timeout.as_secs();
                return Err(GangError::Unreachable { address, seconds, reason });
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Sends a message to rank 0.
    pub fn send(&mut self, message: &Message) -> Result<(), GangError> {
        match frame::send(&mut self.stream, message) {
            Ok(()) => Ok(()),
            // Rank 0 may have said why before it went.
            Err(error) => match self.receive() {
                Err(aborted @ GangError::Aborted { .. }) => Err(aborted),
                _ => Err(self.lost(&error)),
            },
        }
    }

    /// Waits for what rank 0 says next.
    pub fn receive(&mut self) -> Result<Message, GangError> {
        match frame::receive(&mut self.stream, self.message_limit, None) {
            Ok(Message::Abort { exit, reason }) => Err(GangError::Aborted {
                exit,
                reason: format!("rank 0 ended the job: {}", printable(&reason)),
            }),
            Ok(message) => Ok(message),
            Err(error @ (FrameError::Closed | FrameError::Io(_) | FrameError::Late)) => {
                Err(self.lost(&error))
            }
            Err(error) => Err(self.protocol_error(error.to_string())),
        }
    }

    /// Tells rank 0 that this rank gives up.
    pub fn abort(&mut self, exit: u8, reason: &str) {
        let message = Message::Abort { exit, reason: printable(reason) };
        // Rank 0 notices the closed connection when this does not arrive.
        let _ = frame::send(&mut self.stream, &message);
    }

    /// The error for a message that was not due.
    pub fn unexpected(&self, message: &Message) -> GangError {
        self.protocol_error(format!("{} out of turn", message.kind()))
    }

    fn protocol_error(&self, what: String) -> GangError {
        GangError::Protocol { rank: 0, address: self.address.clone(), what }
    }

    fn lost(&self, error: &FrameError) -> GangError {
        GangError::Lost { rank: 0, address: self.address.clone(), reason: error.to_string() }
    }
}

fn attempt(place: &Place, address: &str, left: Duration) -> Result<TcpStream, Failure> {
    let passing = |reason: String| Failure::Passing(reason);
    // Names are looked up each time: the record may appear while we wait.
    let targets = (place.address.as_str(), place.port).to_socket_addrs();
    let targets = targets.map_err(|e| passing(format!("no address for {:?}: {e}", place.address)))?;
    let mut reason = format!("no address for {:?}", place.address);
    for target in targets {
        let patience = left.min(ATTEMPT).max(RETRY);
        match TcpStream::connect_timeout(&target, patience) {
            Ok(stream) => return greet(place, address, stream, left),
            Err(e) => reason = e.to_string(),
        }
    }
    Err(passing(reason))
}

fn greet(place: &Place, address: &str, mut stream: TcpStream, left: Duration) -> Result<TcpStream, Failure> {
    watch_connection(&stream, place.peer_timeout)
        .map_err(|e| Failure::Final(GangError::Setup(format!("cannot set up a connection: {e}"))))?;
    let hello = Message::Hello { rank: place.rank, world: place.world, problem: place.problem.clone() };
    let answer = frame::send(&mut stream, &hello)
        .and_then(|()| frame::receive(&mut stream, frame::HELLO_LIMIT, Some(left.max(RETRY))));
    match answer {
        Ok(Message::Welcome) => Ok(stream),
        Ok(Message::Refused(reason)) => Err(Failure::Final(GangError::Refused {
            address: address.to_owned(),
            reason: printable(&reason),
        })),
        Ok(other) => Err(Failure::Final(GangError::Protocol {
            rank: 0,
            address: address.to_owned(),
            what: format!("{} instead of a welcome", other.kind()),
        })),
        // Something else may still hold the port, or rank 0 may be restarting.
        Err(error) => Err(Failure::Passing(format!("instead of a welcome: {error}"))),
    }
}
