//! The device: three queues, one worker, the [`Muxer`] in between.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::metrics::{VsockMetrics, count};
use super::muxer::{DEFAULT_WINDOW, Muxer};
use super::packet::{HEADER_SIZE, Header};
use super::unix::{UnixHost, VsockListener};
use crate::virtio::chain::{Chain, ChainLimits};
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::virtio::queue::{ChainQueue, QueueError, RING_FEATURES};
use crate::virtio::worker::{Handler, Sources, Worker, run_epoll};

/// Receive, transmit, event. Linux keeps a page in each receive buffer, so these cost it 1 MiB.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2 §5.10.3).
const F_STREAM: u64 = 0;

/// The most payload in one packet, either way. What Linux sends at most, and no less than a window.
const MAX_PAYLOAD: usize = 64 << 10;

/// Host programs accepted before the queues are looked at again.
const ACCEPT_BATCH: usize = 64;

/// More descriptors than any driver needs for a header and [`MAX_PAYLOAD`] in single pages.
const MAX_DESCRIPTORS: usize = 256;

/// A virtio socket device (virtio 1.2 §5.10) in user space, see the module.
pub struct Vsock {
    guest_cid: u32,
    window: u32,
    listener: VsockListener,
    metrics: Arc<VsockMetrics>,
    worker: Option<Worker>,
}

impl Vsock {
    /// A device for the guest with context ID `guest_cid`, 3 or more.
    pub fn new(guest_cid: u32, listener: VsockListener) -> Self {
        Self { guest_cid, window: DEFAULT_WINDOW, listener, metrics: Arc::default(), worker: None }
    }

    /// Sets what each connection may hold of what the guest sent, in bytes; 64 KiB by default.
    pub fn with_window(mut self, window: u32) -> Self {
        self.window = window;
        self
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        Arc::clone(&self.metrics)
    }

    fn engine(&self, activation: Activation) -> Result<Engine, ActivateError> {
        let mut queues = activation.queues;
        let mut take = |index: u16| -> Result<ActiveQueue, ActivateError> {
            let at = queues.iter().position(|queue| queue.index == index);
            at.map(|at| queues.swap_remove(at)).ok_or(ActivateError::MissingQueue(index))
        };
        let (rx, tx) = (take(RX_QUEUE)?, take(TX_QUEUE)?);
        let queue = |active: ActiveQueue, limits| {
            let memory = activation.memory.clone();
            let interrupt = Arc::clone(&activation.interrupt);
            let queue =
                ChainQueue::new(active.index, active.queue, memory, interrupt, activation.features, limits);
            (queue, active.kick)
        };
        // A packet to the host is readable, a buffer for one to the guest is writable.
        // The driver may offer larger buffers than are ever filled.
        let limits = |readable, writable| ChainLimits { descriptors: MAX_DESCRIPTORS, readable, writable };
        let (rx, rx_kick) = queue(rx, limits(0, u32::MAX as usize));
        let (tx, tx_kick) = queue(tx, limits(HEADER_SIZE + MAX_PAYLOAD, 0));
        let failed = |what| move |source| ActivateError::Host { what, source };
        let host = UnixHost::new(self.listener.path()).map_err(failed("vsock: no epoll set"))?;
        Ok(Engine {
            rx,
            tx,
            rx_kick,
            tx_kick,
            listener: self.listener.try_clone().map_err(failed("vsock: no descriptor for the listener"))?,
            accepting: true,
            more: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(failed("vsock: no eventfd"))?,
            timer: TimerFd::new().map_err(|error| failed("vsock: no timer")(error.into()))?,
            timer_set: None,
            muxer: Muxer::new(host, u64::from(self.guest_cid), self.window, Arc::clone(&self.metrics)),
            chain: Chain::new(),
            buffer: vec![0; MAX_PAYLOAD],
            interrupt: activation.interrupt,
            metrics: Arc::clone(&self.metrics),
            failed: false,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << F_STREAM | RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.guest_cid).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let len = data.len().min(config.len() - from);
        data.fill(0);
        data[..len].copy_from_slice(&config[from..from + len]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let engine = self.engine(activation)?;
        let worker = run_epoll("vsock", engine)
            .map_err(|source| ActivateError::Host { what: "vsock: no worker", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.metrics.connections.store(0, Ordering::Relaxed);
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }
}

/// What wakes the worker.
mod token {
    pub const RX_KICK: u32 = 0;
    pub const TX_KICK: u32 = 1;
    pub const LISTENER: u32 = 2;
    pub const STREAMS: u32 = 3;
    pub const TIMER: u32 = 4;
    pub const MORE: u32 = 5;
}

/// The worker's part.
struct Engine {
    rx: ChainQueue,
    tx: ChainQueue,
    rx_kick: EventFd,
    tx_kick: EventFd,
    listener: UnixListener,
    /// The listener has not said that nobody waits.
    accepting: bool,
    /// Signalled by the worker itself when it stops with work left.
    more: EventFd,
    timer: TimerFd,
    timer_set: Option<Instant>,
    muxer: Muxer<UnixHost>,
    chain: Chain,
    buffer: Vec<u8>,
    interrupt: Arc<dyn Interrupt>,
    metrics: Arc<VsockMetrics>,
    failed: bool,
}

impl Engine {
    /// Does a bounded amount of everything, and comes back soon if that was not all.
    fn work(&mut self, sources: &Sources<'_>) {
        if self.failed {
            return;
        }
        let now = Instant::now();
        self.accept(now);
        let result = self.serve_queues(now);
        self.set_timer(now);
        match result {
            Ok(more) => {
                if more || self.accepting {
                    let _ = self.more.write(1);
                }
            }
            Err(_) => self.fail(sources),
        }
    }

    /// Rings that the driver broke cannot be used until it resets the device.
    fn fail(&mut self, sources: &Sources<'_>) {
        self.failed = true;
        let _ = sources.remove(&self.rx_kick);
        let _ = sources.remove(&self.tx_kick);
        let _ = sources.remove(&self.listener);
        let _ = sources.remove(self.muxer.host_mut());
        let _ = sources.remove(&self.timer);
        let _ = sources.remove(&self.more);
        self.interrupt.device_failed();
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPT_BATCH {
            if !self.accepting {
                return;
            }
            // Out of descriptors is treated as nobody waiting: the next to connect tries again.
            match self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            }) {
                Ok(stream) => self.muxer.accept(stream, now),
                Err(_) => self.accepting = false,
            }
        }
    }

    /// True when it stopped for fairness and not for want of work.
    fn serve_queues(&mut self, now: Instant) -> Result<bool, QueueError> {
        let more_from_guest = self.take_packets(now)?;
        let was_stuck = !self.muxer.can_receive();
        let more_to_guest = self.give_packets(now)?;
        Ok(more_from_guest || more_to_guest || (was_stuck && self.muxer.can_receive()))
    }

    fn take_packets(&mut self, now: Instant) -> Result<bool, QueueError> {
        self.tx.disable_kicks()?;
        let mut more = true;
        for _ in 0..self.tx.size() {
            if !self.muxer.can_receive() {
                more = false;
                break;
            }
            if self.tx.pop(&mut self.chain)? {
                self.take_packet(now);
                self.tx.push(self.chain.head(), 0)?;
            } else if !self.tx.enable_kicks()? {
                more = false;
                break;
            }
        }
        self.tx.notify()?;
        Ok(more)
    }

    /// The packet in `self.chain`. Its header is copied before it is looked at.
    fn take_packet(&mut self, now: Instant) {
        let mut header = [0; HEADER_SIZE];
        if self.chain.readable.read_exact(&mut header).is_err() {
            return count(&self.metrics.packets_dropped, 1);
        }
        let header = Header::parse(&header);
        let len = header.len as usize;
        if len > self.chain.readable.remaining() || len > self.buffer.len() {
            return count(&self.metrics.packets_dropped, 1);
        }
        let payload = &mut self.buffer[..len];
        if self.chain.readable.read_exact(payload).is_err() {
            return count(&self.metrics.packets_dropped, 1);
        }
        self.muxer.receive(&header, payload, now);
    }

    fn give_packets(&mut self, now: Instant) -> Result<bool, QueueError> {
        let mut more = true;
        for _ in 0..self.rx.size() {
            if !self.muxer.has_packets() {
                more = false;
                break;
            }
            if !self.rx.pop(&mut self.chain)? {
                // No buffer: the kick that brings one wakes the worker.
                if self.rx.enable_kicks()? {
                    continue;
                }
                more = false;
                break;
            }
            let room = self.chain.writable.remaining().saturating_sub(HEADER_SIZE).min(self.buffer.len());
            if room == 0 {
                // It would hold no data, ever.
                count(&self.metrics.packets_dropped, 1);
                self.rx.push(self.chain.head(), 0)?;
                continue;
            }
            let Some(header) = self.muxer.next_packet(&mut self.buffer[..room], now) else {
                self.rx.undo_pop();
                more = false;
                break;
            };
            let payload = &self.buffer[..header.len as usize];
            let writable = &mut self.chain.writable;
            // Both fit: the room was measured above.
            let _ = writable.write_all(&header.to_bytes()).and_then(|()| writable.write_all(payload));
            let written = writable.written() as u32;
            self.rx.push(self.chain.head(), written)?;
        }
        self.rx.notify()?;
        Ok(more)
    }

    /// Arms the timer for the next deadline. Setting it also takes back an expiry that was not read,
    /// so it is never read.
    fn set_timer(&mut self, now: Instant) {
        let deadline = self.muxer.next_deadline();
        if deadline == self.timer_set {
            return;
        }
        self.timer_set = deadline;
        let _ = match deadline {
            // A duration of zero would disarm it.
            Some(deadline) => {
                self.timer.reset(deadline.saturating_duration_since(now).max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
    }
}

impl Handler for Engine {
    fn start(&mut self, sources: &Sources<'_>) -> io::Result<()> {
        sources.add(&self.rx_kick, token::RX_KICK, EventSet::IN)?;
        sources.add(&self.tx_kick, token::TX_KICK, EventSet::IN)?;
        sources.add(&self.listener, token::LISTENER, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        sources.add(self.muxer.host_mut(), token::STREAMS, EventSet::IN)?;
        sources.add(&self.timer, token::TIMER, EventSet::IN)?;
        sources.add(&self.more, token::MORE, EventSet::IN)?;
        // Programs may be waiting already.
        self.more.write(1)
    }

    fn handle(&mut self, token: u32, _events: EventSet, sources: &Sources<'_>) {
        match token {
            token::RX_KICK => drop(self.rx_kick.read()),
            token::TX_KICK => drop(self.tx_kick.read()),
            token::LISTENER => self.accepting = true,
            token::STREAMS => {
                let now = Instant::now();
                for event in self.muxer.host_mut().events().unwrap_or_default() {
                    self.muxer.stream_ready(event.id, event.readable, event.writable, event.hung_up, now);
                }
            }
            token::TIMER => {
                self.timer_set = None;
                let _ = self.timer.clear();
                self.muxer.expire(Instant::now());
            }
            token::MORE => drop(self.more.read()),
            _ => {}
        }
        self.work(sources);
    }

    fn resumed(&mut self, sources: &Sources<'_>) {
        self.work(sources);
    }
}
