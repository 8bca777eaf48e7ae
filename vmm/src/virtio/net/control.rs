//! The control queue (virtio 1.2 §5.1.6.5), of which one command is offered: how many pairs are in use.

use std::io::{self, Read, Write};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::tap::Tap;
use crate::virtio::chain::{Chain, ChainLimits};
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ChainQueue, QueueError};
use crate::virtio::worker::{Handler, Sources};

/// A command is a few bytes, its acknowledgement is one.
pub const LIMITS: ChainLimits = ChainLimits { descriptors: 16, readable: 4096, writable: 4096 };

const KICK: u32 = 0;
const FIRST_RELAY: u32 = 1;

/// One pair, as far as the control queue goes.
pub struct Steered {
    /// Where its frames come from.
    pub tap: Arc<Tap>,
    /// Has its worker look again; none when the kernel moves the frames.
    pub poke: Option<EventFd>,
}

/// Attaches the first `count` pairs to the tap, and detaches the others.
///
/// # Errors
/// What the kernel said.
pub fn use_pairs(pairs: &[Steered], count: usize) -> io::Result<()> {
    for (pair, index) in pairs.iter().zip(0..) {
        let attached = index < count;
        pair.tap.set_attached(attached)?;
        if let Some(poke) = pair.poke.as_ref().filter(|_| attached) {
            let _ = poke.write(1);
        }
    }
    Ok(())
}

/// An interrupt that the kernel signals by an eventfd which is no irqfd, because the guest
/// had not given the queue a vector when vhost was set up.
pub struct Relay {
    /// Signalled by vhost.
    pub event: EventFd,
    /// The queue that the interrupt is for.
    pub queue: u16,
}

/// A thread for what the pairs' own threads do not do: the control queue, and relayed interrupts.
pub struct Controller {
    /// The queue and its kick, if the driver uses it.
    pub queue: Option<(ChainQueue, EventFd)>,
    /// All pairs that the driver enabled.
    pub pairs: Vec<Steered>,
    /// Interrupts to pass on.
    pub relays: Vec<Relay>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

impl Controller {
    /// Whether it is worth a thread.
    pub fn is_needed(&self) -> bool {
        self.queue.is_some() || !self.relays.is_empty()
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        let Some((queue, _)) = self.queue.as_mut() else { return Ok(()) };
        let mut chain = Chain::new();
        // Commands are rare: a driver waits for the answer to one before it sends the next.
        for _ in 0..queue.size() {
            if !queue.pop(&mut chain)? {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            let answer = if execute(&mut chain, &self.pairs) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let _ = chain.writable.write_all(&[answer as u8]);
            queue.push(chain.head(), chain.writable.written() as u32)?;
        }
        queue.notify()
    }
}

/// False for a command that is unknown, malformed or impossible.
fn execute(chain: &mut Chain, pairs: &[Steered]) -> bool {
    let mut command = [0; 4];
    if chain.readable.read_exact(&mut command).is_err() {
        return false;
    }
    let [class, number, low, high] = command;
    let count = usize::from(u16::from_le_bytes([low, high]));
    u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(number) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
        && (1..=pairs.len()).contains(&count)
        && use_pairs(pairs, count).is_ok()
}

impl Handler for Controller {
    fn start(&mut self, sources: &Sources<'_>) -> io::Result<()> {
        if let Some((_, kick)) = &self.queue {
            sources.add(kick, KICK, EventSet::IN)?;
        }
        for (relay, token) in self.relays.iter().zip(FIRST_RELAY..) {
            sources.add(&relay.event, token, EventSet::IN)?;
        }
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, sources: &Sources<'_>) {
        if let Some(relay) = token.checked_sub(FIRST_RELAY).and_then(|at| self.relays.get(at as usize)) {
            let _ = relay.event.read();
            return self.interrupt.notify_queue(relay.queue);
        }
        if let Some((_, kick)) = &self.queue {
            let _ = kick.read();
        }
        if self.serve().is_err() {
            if let Some((_, kick)) = self.queue.take() {
                let _ = sources.remove(&kick);
            }
            self.interrupt.device_failed();
        }
    }

    fn resumed(&mut self, sources: &Sources<'_>) {
        self.handle(KICK, EventSet::IN, sources);
    }
}
