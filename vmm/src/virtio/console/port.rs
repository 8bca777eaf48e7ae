//! The console's only port: bytes from the transmit queue to a sink, from a file to the receive queue.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::Chain;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ChainQueue, QueueError};
use crate::virtio::worker::{Handler, Sources};

/// Index of the queue that brings input to the driver (§5.3.2).
pub const RECEIVE: u16 = 0;
/// Index of the queue that takes the driver's output.
pub const TRANSMIT: u16 = 1;

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const INPUT: u32 = 2;

/// What went through a console.
#[derive(Debug, Default)]
pub struct ConsoleCounters {
    /// Bytes the guest wrote.
    pub written: AtomicU64,
    /// Of these, bytes that the sink did not take.
    pub lost: AtomicU64,
    /// Bytes given to the guest.
    pub read: AtomicU64,
}

/// Both ends on the host.
pub struct Sinks {
    /// Takes output.
    pub output: Box<dyn Write + Send>,
    /// Gives input; gone once it has ended.
    pub input: Option<File>,
}

/// How input is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// There is none, or it has ended.
    None,
    /// Epoll tells.
    Watched,
    /// Not waited for while the driver has no room, as epoll would report it for ever.
    Held,
    /// A regular file, which epoll does not take: always readable.
    File,
}

/// The port, on its worker's thread.
pub struct Port {
    sinks: Arc<Mutex<Sinks>>,
    receive: ChainQueue,
    receive_kick: EventFd,
    transmit: ChainQueue,
    transmit_kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<ConsoleCounters>,
    chain: Chain,
    input: Input,
    broken: bool,
}

impl Port {
    /// A port with its queues and their kicks.
    pub fn new(
        sinks: Arc<Mutex<Sinks>>,
        (receive, receive_kick): (ChainQueue, EventFd),
        (transmit, transmit_kick): (ChainQueue, EventFd),
        interrupt: Arc<dyn Interrupt>,
        counters: Arc<ConsoleCounters>,
    ) -> Self {
        Self {
            sinks,
            receive,
            receive_kick,
            transmit,
            transmit_kick,
            interrupt,
            counters,
            chain: Chain::new(),
            input: Input::None,
            broken: false,
        }
    }

    fn sinks(&self) -> MutexGuard<'_, Sinks> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the transmit queue once around; kicks again if more came meanwhile.
    fn take_output(&mut self) -> Result<(), QueueError> {
        self.transmit.disable_kicks()?;
        for _ in 0..self.transmit.size() {
            if !self.transmit.pop(&mut self.chain)? {
                break;
            }
            self.write_out();
            self.transmit.push(self.chain.head(), 0)?;
        }
        self.transmit.notify()?;
        if self.transmit.enable_kicks()? {
            rekick(&self.transmit_kick);
        }
        Ok(())
    }

    fn write_out(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            // Reading from guest memory that was checked cannot fail.
            let count = self.chain.readable.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                break;
            }
            let mut sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = write_some(&mut *sinks.output, &buffer[..count]);
            drop(sinks);
            self.counters.written.fetch_add(count as u64, Ordering::Relaxed);
            self.counters.lost.fetch_add((count - kept) as u64, Ordering::Relaxed);
        }
        // A terminal's output may be buffered by lines; a prompt has none.
        let _ = self.sinks().output.flush();
    }

    /// Moves one buffer of input, if there is any and the driver has room.
    fn give_input(&mut self, sources: &Sources<'_>) -> Result<(), QueueError> {
        if matches!(self.input, Input::None) {
            return Ok(());
        }
        if !self.receive.pop(&mut self.chain)? {
            // Ask to hear of room, and leave the input alone until then.
            if self.receive.enable_kicks()? {
                rekick(&self.receive_kick);
            }
            self.hold(sources);
            return Ok(());
        }
        let sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        let read = match &sinks.input {
            Some(file) => self.chain.writable.readv_from(file.as_fd()),
            None => Ok(0),
        };
        drop(sinks);
        match read {
            Ok(0) => {
                self.receive.undo_pop();
                self.end_input(sources);
            }
            Ok(count) => {
                self.counters.read.fetch_add(count as u64, Ordering::Relaxed);
                self.receive.push(self.chain.head(), count as u32)?;
                self.receive.notify()?;
                if self.input == Input::File {
                    rekick(&self.receive_kick);
                }
            }
            Err(error) => {
                self.receive.undo_pop();
                if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                    self.end_input(sources);
                }
            }
        }
        Ok(())
    }

    /// The driver may have room again: waits for input. Reading at once could block.
    fn watch(&mut self, sources: &Sources<'_>) {
        if self.input == Input::Held {
            let added = self.sinks().input.as_ref().map(|file| sources.add(file, INPUT, EventSet::IN));
            match added {
                Some(Ok(())) => self.input = Input::Watched,
                _ => self.end_input(sources),
            }
        }
    }

    fn hold(&mut self, sources: &Sources<'_>) {
        if self.input == Input::Watched {
            if let Some(file) = &self.sinks().input {
                // It was added, so it can be removed.
                let _ = sources.remove(file);
            }
            self.input = Input::Held;
        }
    }

    fn end_input(&mut self, sources: &Sources<'_>) {
        let file = self.sinks().input.take();
        if let Some(file) = file.filter(|_| self.input == Input::Watched) {
            // It was added, so it can be removed.
            let _ = sources.remove(&file);
        }
        self.input = Input::None;
    }

    fn fail(&mut self, result: Result<(), QueueError>) {
        if result.is_err() {
            self.broken = true;
            self.interrupt.device_failed();
        }
    }
}

impl Handler for Port {
    fn start(&mut self, sources: &Sources<'_>) -> io::Result<()> {
        sources.add(&self.receive_kick, RECEIVE_KICK, EventSet::IN)?;
        sources.add(&self.transmit_kick, TRANSMIT_KICK, EventSet::IN)?;
        // Kicks from before the worker are looked at first.
        rekick(&self.transmit_kick);
        rekick(&self.receive_kick);
        let watched = match &self.sinks().input {
            None => Input::None,
            Some(file) => match sources.add(file, INPUT, EventSet::IN) {
                Ok(()) => Input::Watched,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => Input::File,
                Err(error) => return Err(error),
            },
        };
        self.input = watched;
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, sources: &Sources<'_>) {
        let kick = match token {
            RECEIVE_KICK => Some(&self.receive_kick),
            TRANSMIT_KICK => Some(&self.transmit_kick),
            _ => None,
        };
        if let Some(kick) = kick {
            // Non-blocking: empty after a pause that looked already.
            let _ = kick.read();
        }
        if self.broken {
            return self.end_input(sources);
        }
        let result = match (token, self.input) {
            (TRANSMIT_KICK, _) => self.take_output(),
            (INPUT, _) | (RECEIVE_KICK, Input::File) => self.give_input(sources),
            _ => {
                self.watch(sources);
                Ok(())
            }
        };
        self.fail(result);
    }

    fn resumed(&mut self, _sources: &Sources<'_>) {
        rekick(&self.transmit_kick);
        rekick(&self.receive_kick);
    }
}

/// Has the loop look at a queue again, after its other duties.
fn rekick(kick: &EventFd) {
    // Fails only when the counter is full, and then the loop is about to look.
    let _ = kick.write(1);
}

/// Writes what the sink takes now; returns how much that was.
fn write_some(output: &mut (dyn Write + Send), bytes: &[u8]) -> usize {
    let mut kept = 0;
    while kept < bytes.len() {
        match output.write(&bytes[kept..]) {
            Ok(0) => break,
            Ok(count) => kept += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    kept
}
