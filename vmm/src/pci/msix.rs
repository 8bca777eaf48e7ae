//! A function's MSI-X vectors: table, pending bits, masks (PCIe 6.0 §6.1.4.2, §7.7.2).
//!
//! A vector costs a GSI and an irqfd, so it is taken from the hypervisor when the guest first
//! unmasks its entry, not when the machine is built. Masks are kept here: a masked vector that
//! only the VMM triggers is remembered as pending without a system call. The irqfd itself is
//! detached on masking only where the kernel may signal it too (vhost, VFIO).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::config::{CAP_MSIX, ConfigError, ConfigSpace};
use crate::hypervisor::{Hypervisor, MsiMessage, MsiVector};

/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The largest table the capability can describe.
pub const MAX_VECTORS: u16 = 2048;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Offset of the message control register in the capability.
const MESSAGE_CONTROL: u16 = 2;

#[derive(Default)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    vector: Option<Arc<dyn MsiVector>>,
    /// The message the irqfd is attached with.
    routed: Option<MsiMessage>,
    /// Someone else holds the eventfd, so signals also come past [`Msix::trigger`].
    exported: bool,
    pending: bool,
}

struct State {
    control: u16,
    entries: Vec<Entry>,
}

/// The vectors of one function. Thread-safe.
pub struct Msix {
    hypervisor: Arc<dyn Hypervisor>,
    state: Mutex<State>,
    failures: AtomicU64,
}

impl Msix {
    /// `vectors` entries, 1 to [`MAX_VECTORS`], all masked as after a reset.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, vectors: u16) -> Self {
        let count = vectors.clamp(1, MAX_VECTORS);
        let entries = (0..count).map(|_| Entry { masked: true, ..Entry::default() }).collect();
        Self {
            hypervisor,
            state: Mutex::new(State { control: count - 1, entries }),
            failures: AtomicU64::new(0),
        }
    }

    /// Adds the capability: table and pending bits in `bar`, at these offsets.
    /// Returns the capability's offset.
    ///
    /// # Errors
    /// When the capability list is full.
    pub fn add_capability(
        &self,
        config: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<u16, ConfigError> {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&self.lock().control.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        config.add_capability(CAP_MSIX, &body, &writable)
    }

    /// Follows the message control register after the guest wrote configuration space.
    /// `capability` is what [`add_capability`](Self::add_capability) returned.
    pub fn config_written(&self, config: &ConfigSpace, capability: u16) {
        let control = config.u16(usize::from(capability + MESSAGE_CONTROL));
        let mut state = self.lock();
        if state.control == control {
            return;
        }
        let was_enabled = state.control & CONTROL_ENABLE != 0;
        state.control = control;
        for index in 0..state.entries.len() {
            if was_enabled && control & CONTROL_ENABLE == 0 {
                state.entries[index].pending = false;
            }
            self.update(&mut state, index);
        }
    }

    /// Back to the state after power-on, once the message control register is: all entries masked, none pending.
    pub fn reset(&self, config: &ConfigSpace, capability: u16) {
        self.config_written(config, capability);
        let mut state = self.lock();
        for index in 0..state.entries.len() {
            let entry = &mut state.entries[index];
            entry.message = MsiMessage::default();
            entry.masked = true;
            entry.pending = false;
            self.update(&mut state, index);
        }
    }

    /// How many vectors there are.
    pub fn len(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// Never: a function has one vector at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether MSI-X is on at all.
    pub fn is_enabled(&self) -> bool {
        self.lock().control & CONTROL_ENABLE != 0
    }

    /// Whether `vector` exists and nothing masks it.
    pub fn is_unmasked(&self, vector: u16) -> bool {
        self.lock().unmasked(usize::from(vector))
    }

    /// Interrupts lost because the host refused a vector or a route.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The guest reads the table, in aligned units of 4 or 8 bytes; else zeros.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let state = self.lock();
        for (position, chunk) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            let Some(entry) = state.entries.get((position / ENTRY_SIZE) as usize) else { return };
            let value = match position % ENTRY_SIZE {
                0 => entry.message.address as u32,
                4 => (entry.message.address >> 32) as u32,
                8 => entry.message.data,
                _ => u32::from(entry.masked),
            };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// The guest writes the table, in aligned units of 4 or 8 bytes; else nothing happens
    /// (PCIe 6.0 §7.7.2: other sizes are undefined).
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let mut state = self.lock();
        for (position, chunk) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let index = (position / ENTRY_SIZE) as usize;
            let Some(entry) = state.entries.get_mut(index) else { return };
            let mut bytes = [0; 4];
            bytes.copy_from_slice(chunk);
            let value = u32::from_le_bytes(bytes);
            match position % ENTRY_SIZE {
                // The two low bits are reserved: a message is a dword write.
                0 => entry.message.address = entry.message.address & !0xffff_ffff | u64::from(value & !3),
                4 => {
                    entry.message.address = entry.message.address & 0xffff_ffff | u64::from(value) << 32;
                }
                8 => entry.message.data = value,
                _ => {
                    entry.masked = value & 1 != 0;
                    self.update(&mut state, index);
                }
            }
        }
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (position, byte) in (offset..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| {
                let index = position.saturating_mul(8).saturating_add(bit) as usize;
                let pending = state.entries.get(index).is_some_and(|entry| {
                    entry.pending || (entry.exported && entry.routed.is_none() && signalled(entry))
                });
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Raises `vector`, or marks it pending while it is masked. Returns false if that is no way to
    /// reach the driver: there is no such vector, or MSI-X is off.
    pub fn trigger(&self, vector: u16) -> bool {
        let mut state = self.lock();
        let unmasked = state.unmasked(usize::from(vector));
        let enabled = state.control & CONTROL_ENABLE != 0;
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else { return false };
        if unmasked {
            self.signal(entry);
        } else {
            entry.pending |= enabled;
        }
        enabled
    }

    /// The eventfd that raises `vector`; `None` for a vector that does not exist or when the host has none left.
    pub fn irqfd(&self, vector: u16) -> Option<EventFd> {
        let mut state = self.lock();
        let index = usize::from(vector);
        let entry = state.entries.get_mut(index)?;
        if entry.vector.is_none() {
            entry.vector = self.count(self.hypervisor.msi_vector());
        }
        let event = self.count(entry.vector.as_ref()?.eventfd().try_clone())?;
        entry.exported = true;
        self.update(&mut state, index);
        Some(event)
    }

    /// Brings the irqfd of an entry in line with its masks and message.
    fn update(&self, state: &mut State, index: usize) {
        let unmasked = state.unmasked(index);
        let entry = &mut state.entries[index];
        if !unmasked {
            if let (true, true, Some(vector)) = (entry.exported, entry.routed.is_some(), &entry.vector) {
                self.count(vector.mask());
                entry.routed = None;
            }
            return;
        }
        if entry.vector.is_none() {
            entry.vector = self.count(self.hypervisor.msi_vector());
        }
        let Some(vector) = &entry.vector else { return };
        if entry.routed != Some(entry.message) {
            entry.routed = self.count(vector.route(entry.message)).map(|()| entry.message);
        }
        if entry.pending {
            self.signal(entry);
        }
    }

    fn signal(&self, entry: &mut Entry) {
        entry.pending = false;
        match &entry.vector {
            // Non-blocking: fails only when 2^64 - 2 signals are pending already.
            Some(vector) => self.count(vector.eventfd().write(1)).unwrap_or_default(),
            None => self.lost(),
        }
    }

    fn count<T>(&self, result: io::Result<T>) -> Option<T> {
        result.inspect_err(|_| self.lost()).ok()
    }

    fn lost(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn unmasked(&self, index: usize) -> bool {
        let enabled = self.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        enabled && self.entries.get(index).is_some_and(|entry| !entry.masked)
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

/// Whether the eventfd was written to and nobody took it yet.
fn signalled(entry: &Entry) -> bool {
    let Some(vector) = &entry.vector else { return false };
    let mut poll = libc::pollfd { fd: vector.eventfd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one initialised pollfd that lives through the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1
}
