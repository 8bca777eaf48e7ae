//! The device: what it offers, and how its queues are shared out to workers or to the kernel.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use vmm_sys_util::eventfd::EventFd;

use super::control::{self, Controller, Relay, Steered, use_pairs};
use super::features::{self, Offer, USO_OFFLOADS, has};
use super::mac::{MacAddress, ParseMacError};
use super::metrics::NetMetrics;
use super::pair::Pair;
use super::receive::{self, Receiver};
use super::tap::{Tap, TapError, open_tap};
use super::transmit::{self, Transmitter};
use super::vhost::{self, VhostError, VhostPair, open_vhost};
use crate::config::{NetworkConfig, VhostMode};
use crate::virtio::chain::ChainLimits;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::virtio::queue::{ChainQueue, RING_FEATURES};
use crate::virtio::worker::{Worker, run_epoll};

/// Descriptors of a receive or a transmit queue.
const QUEUE_SIZE: u16 = 256;

/// Descriptors of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The most pairs; a tap would take 256.
pub const MAX_QUEUE_PAIRS: u8 = 8;

/// The least MTU that may be announced (§5.1.4.1).
const MIN_MTU: u16 = 68;

/// Features that concern vhost as much as the tap: what it lacks cannot be offered. The kernel leaves
/// all others to the tap.
const VHOST_FEATURES: u64 = RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The guest's address is none.
    #[error(transparent)]
    Mac(#[from] ParseMacError),
    /// Not a number of pairs.
    #[error("{0} queue pairs: there can be 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs(usize),
    /// Not an MTU.
    #[error("an MTU of {0}: it must be {MIN_MTU} or more")]
    Mtu(u16),
    /// The tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// vhost-net cannot be used.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The host refused something.
    #[error("network device {id:?}: {what}")]
    Host {
        /// The device.
        id: String,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// What a device is made of, opened by whoever has the privileges.
#[derive(Debug)]
pub struct NetParts {
    /// Names the device in errors and threads.
    pub id: String,
    /// The guest's address.
    pub mac: MacAddress,
    /// Announced to the guest, if it is to be.
    pub mtu: Option<u16>,
    /// One for each queue pair, from [`open_tap`].
    pub taps: Vec<File>,
    /// One for each queue pair, or none at all, from [`open_vhost`].
    pub vhost: Vec<File>,
    /// Whether the monitor may step in where vhost fails.
    pub mode: VhostMode,
}

impl NetParts {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// When it cannot be, or a value is out of range.
    pub fn open(config: &NetworkConfig) -> Result<Self, NetError> {
        let mac = config.mac.parse()?;
        if !(1..=MAX_QUEUE_PAIRS).contains(&config.queue_pairs) {
            return Err(NetError::QueuePairs(config.queue_pairs.into()));
        }
        if let Some(mtu) = config.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        Ok(Self {
            id: config.id.clone(),
            mac,
            mtu: config.mtu,
            taps: open_tap(&config.tap, config.queue_pairs)?,
            vhost: open_vhost(config.vhost, config.queue_pairs)?,
            mode: config.vhost,
        })
    }
}

/// A virtio network device (virtio 1.2 §5.1).
pub struct Net {
    name: String,
    config: [u8; 12],
    taps: Vec<Arc<Tap>>,
    vhost: Vec<File>,
    mode: VhostMode,
    features: u64,
    queue_sizes: Vec<u16>,
    metrics: Arc<NetMetrics>,
    active: Active,
}

/// What runs while the device is active. Fields drop in order: first those that touch the rings.
#[derive(Default)]
struct Active {
    vhost: Vec<VhostPair>,
    workers: Vec<Worker>,
}

/// The queues of a pair as the driver set them up.
struct QueuePair {
    rx: ActiveQueue,
    tx: ActiveQueue,
}

impl Net {
    /// A device over open descriptors.
    ///
    /// # Errors
    /// When their number does not fit, or the host does not do what a tap or vhost-net does.
    pub fn new(parts: NetParts) -> Result<Self, NetError> {
        let pairs = parts.taps.len();
        if !(1..=usize::from(MAX_QUEUE_PAIRS)).contains(&pairs)
            || !(parts.vhost.is_empty() || parts.vhost.len() == pairs)
        {
            return Err(NetError::QueuePairs(pairs));
        }
        let failed = |what| {
            let id = parts.id.clone();
            move |source| NetError::Host { id, what, source }
        };
        let taps: Vec<Arc<Tap>> = parts
            .taps
            .into_iter()
            .map(|file| Tap::new(file).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(failed("the tap has no virtio headers"))?;
        let uso = taps[0].set_offloads(USO_OFFLOADS).is_ok();
        taps[0].set_offloads(0).map_err(failed("the tap's offloads cannot be set"))?;
        let offer = Offer { mtu: parts.mtu.is_some(), multi_queue: pairs > 1, uso };
        let mut features = offer.features() | RING_FEATURES;
        if let Some(vhost) = parts.vhost.first() {
            let supported = vhost::features(vhost).map_err(failed("vhost-net does not tell its features"))?;
            features &= supported | !VHOST_FEATURES;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if offer.multi_queue {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Self {
            name: thread_name(&parts.id),
            config: config_space(parts.mac, pairs as u16, parts.mtu),
            taps,
            vhost: parts.vhost,
            mode: parts.mode,
            features,
            queue_sizes,
            metrics: Arc::default(),
            active: Active::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<NetMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The queues, shared out: one pair, or all with multiqueue; and the control queue, whose
    /// place depends on that (§5.1.2).
    fn share_out(
        &self,
        features: u64,
        queues: Vec<ActiveQueue>,
    ) -> Result<(Vec<QueuePair>, Option<ActiveQueue>), ActivateError> {
        let pairs = if has(features, VIRTIO_NET_F_MQ) { self.taps.len() as u16 } else { 1 };
        let mut slots: Vec<Option<ActiveQueue>> = (0..=2 * pairs).map(|_| None).collect();
        for queue in queues {
            let index = usize::from(queue.index);
            if let Some(slot) = slots.get_mut(index) {
                *slot = Some(queue);
            }
        }
        let control = slots.pop().flatten().filter(|_| has(features, VIRTIO_NET_F_CTRL_VQ));
        let mut found = Vec::new();
        let mut slots = slots.into_iter();
        for index in (0..2 * pairs).step_by(2) {
            match (slots.next().flatten(), slots.next().flatten()) {
                (Some(rx), Some(tx)) => found.push(QueuePair { rx, tx }),
                (None, _) if index == 0 => return Err(ActivateError::MissingQueue(0)),
                (Some(_), None) => return Err(ActivateError::MissingQueue(index + 1)),
                // A driver with fewer CPUs than pairs may leave the last ones alone.
                (None, _) => break,
            }
        }
        Ok((found, control))
    }

    fn start(
        &self,
        pairs: Vec<QueuePair>,
        control: Option<ActiveQueue>,
        shared: &Shared,
        with_vhost: bool,
    ) -> io::Result<Active> {
        let mut active = Active::default();
        let mut controller = Controller {
            queue: control.map(|queue| shared.queue(queue, control::LIMITS)),
            pairs: Vec::new(),
            relays: Vec::new(),
            interrupt: Arc::clone(&shared.activation.interrupt),
        };
        let mut workers = Vec::new();
        for (at, pair) in pairs.into_iter().enumerate() {
            let tap = Arc::clone(&self.taps[at]);
            let poke = if with_vhost {
                active.vhost.push(self.start_vhost(at, &pair, shared, &mut controller.relays)?);
                None
            } else {
                let poke = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
                workers.push(self.pair(&tap, pair, poke.try_clone()?, shared)?);
                Some(poke)
            };
            controller.pairs.push(Steered { tap, poke });
        }
        // The driver starts with one pair and asks for more (§5.1.6.5.5).
        if self.taps.len() > 1 {
            use_pairs(&controller.pairs, 1)?;
            for tap in &self.taps[controller.pairs.len()..] {
                tap.set_attached(false)?;
            }
        }
        for (at, pair) in workers.into_iter().enumerate() {
            active.workers.push(run_epoll(&format!("{}-{at}", self.name), pair)?);
        }
        if controller.is_needed() {
            active.workers.push(run_epoll(&format!("{}-c", self.name), controller)?);
        }
        Ok(active)
    }

    fn pair(&self, tap: &Arc<Tap>, pair: QueuePair, poke: EventFd, shared: &Shared) -> io::Result<Pair> {
        let mergeable = has(shared.activation.features, VIRTIO_NET_F_MRG_RXBUF);
        let (rx, rx_kick) = shared.queue(pair.rx, receive::LIMITS);
        let (tx, tx_kick) = shared.queue(pair.tx, transmit::LIMITS);
        Pair::new(
            Arc::clone(tap),
            (Receiver::new(rx, mergeable, self.metrics()), rx_kick),
            (Transmitter::new(tx, self.metrics()), tx_kick),
            poke,
            Arc::clone(&shared.activation.interrupt),
        )
    }

    fn start_vhost(
        &self,
        at: usize,
        pair: &QueuePair,
        shared: &Shared,
        relays: &mut Vec<Relay>,
    ) -> io::Result<VhostPair> {
        let mut call = |queue: u16| -> io::Result<EventFd> {
            if let Some(irqfd) = shared.activation.interrupt.queue_irqfd(queue) {
                return Ok(irqfd);
            }
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            relays.push(Relay { event: event.try_clone()?, queue });
            Ok(event)
        };
        let calls = [call(pair.rx.index)?, call(pair.tx.index)?];
        VhostPair::start(
            &self.vhost[at],
            &shared.activation.memory,
            shared.activation.features,
            &self.taps[at],
            [&pair.rx, &pair.tx],
            [&calls[0], &calls[1]],
        )
    }
}

/// What all queues of an activation have in common.
struct Shared {
    activation: Activation,
}

impl Shared {
    fn queue(&self, active: ActiveQueue, limits: ChainLimits) -> (ChainQueue, EventFd) {
        let Activation { memory, features, interrupt, .. } = &self.activation;
        let queue = ChainQueue::new(
            active.index,
            active.queue,
            memory.clone(),
            Arc::clone(interrupt),
            *features,
            limits,
        );
        (queue, active.kick)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.config.len());
        let len = data.len().min(self.config.len() - from);
        data.fill(0);
        data[..len].copy_from_slice(&self.config[from..from + len]);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let failed = |what| move |source| ActivateError::Host { what, source };
        let features = activation.features;
        let (pairs, control) = self.share_out(features, std::mem::take(&mut activation.queues))?;
        let shared = Shared { activation };
        for tap in &self.taps {
            // A detached queue has no device to set them for; they are the device's, not the queue's.
            tap.set_attached(true).map_err(failed("net: the tap's queue cannot be attached"))?;
        }
        self.taps[0]
            .set_offloads(features::offloads(features))
            .map_err(failed("net: the tap does not take the offloads that were negotiated"))?;
        if !self.vhost.is_empty() {
            let copy = |pair: &QueuePair| -> io::Result<QueuePair> {
                Ok(QueuePair { rx: copy_queue(&pair.rx)?, tx: copy_queue(&pair.tx)? })
            };
            let copies = pairs.iter().map(copy).collect::<io::Result<_>>();
            let control = control.as_ref().map(copy_queue).transpose();
            let started = copies
                .and_then(|pairs| Ok((pairs, control?)))
                .and_then(|(pairs, control)| self.start(pairs, control, &shared, true));
            match started {
                Ok(active) => {
                    self.active = active;
                    self.metrics.vhost.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                Err(_) if self.mode == VhostMode::Auto => {}
                Err(source) => return Err(failed("net: vhost-net does not take the queues")(source)),
            }
        }
        let active =
            self.start(pairs, control, &shared, false).map_err(failed("net: no worker can be started"))?;
        self.active = active;
        Ok(())
    }

    fn reset(&mut self) {
        self.active = Active::default();
        self.metrics.vhost.store(false, Ordering::Relaxed);
    }

    fn workers(&self) -> &[Worker] {
        &self.active.workers
    }

    fn pause(&mut self) {
        for pair in &self.active.vhost {
            // The kernel has no reason to refuse what it did when the ring was started.
            let _ = pair.pause();
        }
        self.workers().iter().for_each(Worker::pause);
    }

    fn resume(&mut self) {
        for pair in &self.active.vhost {
            let _ = pair.resume();
        }
        self.workers().iter().for_each(Worker::resume);
    }
}

/// A second handle on a queue that has not been used, for a second attempt.
fn copy_queue(active: &ActiveQueue) -> io::Result<ActiveQueue> {
    use virtio_queue::Queue;
    let queue = Queue::try_from(active.queue.state()).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(ActiveQueue { index: active.index, queue, kick: active.kick.try_clone()? })
}

/// `struct virtio_net_config` (§5.1.4) up to the MTU; what was not offered is not read.
fn config_space(mac: MacAddress, pairs: u16, mtu: Option<u16>) -> [u8; 12] {
    /// `VIRTIO_NET_S_LINK_UP`, for a driver that looks though the field was not offered.
    const LINK_UP: u16 = 1;
    let mut config = [0; 12];
    config[..6].copy_from_slice(&mac.octets());
    config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    config[8..10].copy_from_slice(&pairs.to_le_bytes());
    config[10..].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
    config
}

/// The host shows 15 bytes, of which two are the worker's; a NUL would be a panic.
fn thread_name(id: &str) -> String {
    let id: String = id.chars().filter(char::is_ascii_graphic).take(9).collect();
    format!("net-{id}")
}
