//! A pair of queues on its own thread, when the monitor moves the frames itself.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::receive::{self, Receiver};
use super::tap::Tap;
use super::transmit::{self, Transmitter};
use crate::virtio::device::Interrupt;
use crate::virtio::queue::QueueError;
use crate::virtio::worker::{Handler, Sources};

/// What wakes the worker.
mod token {
    pub const RX_KICK: u32 = 0;
    pub const TX_KICK: u32 = 1;
    pub const TAP: u32 = 2;
    pub const TIMER: u32 = 3;
    pub const POKE: u32 = 4;
}

/// The worker's part.
pub struct Pair {
    tap: Arc<Tap>,
    receiver: Receiver,
    transmitter: Transmitter,
    rx_kick: EventFd,
    tx_kick: EventFd,
    /// Makes the worker look at everything: signalled by itself when it stops with work left, and
    /// when the queue is attached to its tap.
    poke: EventFd,
    timer: TimerFd,
    interrupt: Arc<dyn Interrupt>,
    /// Receiving may get on.
    receive: bool,
    /// Transmitting may get on.
    transmit: bool,
    /// What the tap is polled for now. One-shot: the kernel forgets it with the event, so that a tap
    /// which is not wanted wakes nobody.
    polled: EventSet,
    failed: bool,
}

impl Pair {
    /// A worker's part for one pair; `poke` is kept by whoever attaches queues.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn new(
        tap: Arc<Tap>,
        (receiver, rx_kick): (Receiver, EventFd),
        (transmitter, tx_kick): (Transmitter, EventFd),
        poke: EventFd,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            tap,
            receiver,
            transmitter,
            rx_kick,
            tx_kick,
            poke,
            timer,
            interrupt,
            receive: true,
            transmit: true,
            polled: EventSet::empty(),
            failed: false,
        })
    }

    fn work(&mut self, sources: &Sources<'_>) {
        if !self.failed && self.try_work(sources).is_err() {
            self.fail(sources);
        }
    }

    fn try_work(&mut self, sources: &Sources<'_>) -> Result<(), QueueError> {
        let mut wanted = self.polled;
        let mut again = false;
        if self.receive {
            wanted.remove(EventSet::IN);
            match self.receiver.run(self.tap.as_fd(), Instant::now())? {
                receive::Wait::None => again = true,
                receive::Wait::Frames => wanted |= EventSet::IN,
                receive::Wait::BuffersUntil(deadline) => self.set_timer(deadline),
                receive::Wait::Buffers | receive::Wait::Detached => {}
            }
            self.receive = again;
        }
        if self.transmit {
            wanted.remove(EventSet::OUT);
            self.transmit = false;
            match self.transmitter.run(self.tap.as_fd())? {
                transmit::Wait::None => {
                    self.transmit = true;
                    again = true;
                }
                transmit::Wait::Frames => {}
                transmit::Wait::Tap => wanted |= EventSet::OUT,
            }
        }
        if wanted != self.polled && sources.modify(&*self.tap, token::TAP, one_shot(wanted)).is_ok() {
            self.polled = wanted;
        }
        if again {
            let _ = self.poke.write(1);
        }
        Ok(())
    }

    fn set_timer(&mut self, deadline: Instant) {
        // A duration of zero would disarm it.
        let time = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let _ = self.timer.reset(time, None);
    }

    /// Rings that the driver broke cannot be used until it resets the device.
    fn fail(&mut self, sources: &Sources<'_>) {
        self.failed = true;
        let _ = sources.remove(&self.rx_kick);
        let _ = sources.remove(&self.tx_kick);
        let _ = sources.remove(&*self.tap);
        let _ = sources.remove(&self.timer);
        let _ = sources.remove(&self.poke);
        self.interrupt.device_failed();
    }
}

fn one_shot(events: EventSet) -> EventSet {
    events | EventSet::ONE_SHOT
}

impl Handler for Pair {
    fn start(&mut self, sources: &Sources<'_>) -> io::Result<()> {
        sources.add(&self.rx_kick, token::RX_KICK, EventSet::IN)?;
        sources.add(&self.tx_kick, token::TX_KICK, EventSet::IN)?;
        // Errors are reported unasked, so it starts with nothing to report.
        sources.add(&*self.tap, token::TAP, one_shot(EventSet::empty()))?;
        sources.add(&self.timer, token::TIMER, EventSet::IN)?;
        sources.add(&self.poke, token::POKE, EventSet::IN)?;
        self.poke.write(1)
    }

    fn handle(&mut self, token: u32, events: EventSet, sources: &Sources<'_>) {
        match token {
            token::RX_KICK => {
                let _ = self.rx_kick.read();
                self.receive = true;
            }
            token::TX_KICK => {
                let _ = self.tx_kick.read();
                self.transmit = true;
            }
            token::TAP => {
                self.polled = EventSet::empty();
                let error = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
                self.receive |= error || events.contains(EventSet::IN);
                self.transmit |= error || events.contains(EventSet::OUT);
            }
            token::TIMER => {
                let _ = self.timer.clear();
                self.receive = true;
            }
            token::POKE => {
                let _ = self.poke.read();
                self.receive = true;
                self.transmit = true;
            }
            _ => {}
        }
        self.work(sources);
    }

    fn resumed(&mut self, sources: &Sources<'_>) {
        self.receiver.resumed(Instant::now());
        self.receive = true;
        self.transmit = true;
        self.work(sources);
    }
}
