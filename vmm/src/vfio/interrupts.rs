//! A passed-through function's interrupts on their way to the guest: pin, MSI, MSI-X.
//!
//! The kernel lets one kind be on at a time. The pin is on whenever neither message kind is, as it is on
//! the bus. A message's eventfd is both the function's interrupt and an irqfd of the guest's irqchip, so
//! an interrupt passes without the VMM running; with posted interrupts the kernel bypasses even that.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::config::{MsiCapability, MsixCapability};
use super::function::{HostFunction, InterruptCounts, InterruptKind};
use crate::hypervisor::{LevelInterrupt, MsiMessage, MsiVector, PassthroughHypervisor};
use crate::pci::config::ConfigSpace;
use crate::pci::msix::Msix;

/// MSI control: on.
const MSI_ENABLE: u16 = 1;

/// What a function's interrupts did, beyond being delivered.
#[derive(Debug, Default)]
pub struct InterruptCounters {
    /// Times a kind of interrupt was turned on.
    pub enabled: AtomicU64,
    /// Vectors connected.
    pub connected: AtomicU64,
    /// What the host refused: interrupts that the guest waits for in vain.
    pub failures: AtomicU64,
}

impl InterruptCounters {
    fn note(&self, result: &io::Result<()>) {
        if result.is_err() {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The interrupts of one function.
pub struct Interrupts {
    function: Arc<dyn HostFunction>,
    hypervisor: Arc<dyn PassthroughHypervisor>,
    counts: InterruptCounts,
    /// The kind that is on at the function.
    on: Option<InterruptKind>,
    pin: Option<Pin>,
    msi: Option<Msi>,
    msix: Option<MsixState>,
    counters: Arc<InterruptCounters>,
}

struct Pin {
    gsi: u32,
    line: Option<Arc<dyn LevelInterrupt>>,
}

struct Msi {
    capability: MsiCapability,
    vectors: Vec<Arc<dyn MsiVector>>,
    /// Messages and masks as last routed.
    routed: Vec<Option<MsiMessage>>,
}

struct MsixState {
    capability: MsixCapability,
    table: Arc<Msix>,
    /// The eventfd of each entry that is connected at the function.
    connected: Vec<Option<EventFd>>,
    /// Entries that the kernel has vectors for.
    allocated: usize,
}

impl Interrupts {
    /// For a function with these capabilities. Its pin is wired later.
    pub fn new(
        function: Arc<dyn HostFunction>,
        hypervisor: Arc<dyn PassthroughHypervisor>,
        counts: InterruptCounts,
        msi: Option<MsiCapability>,
        msix: Option<MsixCapability>,
    ) -> Self {
        let table = |capability: MsixCapability| {
            // What the kernel knows of the table and what the device says of it may differ: the smaller counts.
            let vectors = capability.vectors.min(counts.msix);
            (vectors > 0).then(|| MsixState {
                capability,
                table: Arc::new(Msix::new(Arc::clone(&hypervisor) as _, vectors)),
                connected: (0..vectors).map(|_| None).collect(),
                allocated: 0,
            })
        };
        let msix = msix.and_then(table);
        Self {
            pin: None,
            msi: msi.filter(|_| counts.msi > 0).map(|capability| Msi {
                capability,
                vectors: Vec::new(),
                routed: Vec::new(),
            }),
            msix,
            function,
            hypervisor,
            counts,
            on: None,
            counters: Arc::default(),
        }
    }

    /// Wires the pin to line `gsi` and turns it on, as the guest has asked for nothing else yet.
    pub fn wire_pin(&mut self, gsi: u32) {
        if self.counts.intx {
            self.turn_off();
            self.pin = Some(Pin { gsi, line: None });
            self.start();
        }
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<InterruptCounters> {
        Arc::clone(&self.counters)
    }

    /// The table, for accesses to the BAR that it lies in.
    pub fn msix(&self) -> Option<(&MsixCapability, &Arc<Msix>)> {
        self.msix.as_ref().map(|state| (&state.capability, &state.table))
    }

    /// Brings the function in line with what the guest wrote to `config`.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        if let Some(state) = &self.msix {
            state.table.config_written(config, state.capability.offset);
        }
        self.update(config);
    }

    /// The guest wrote the MSI-X table.
    pub fn table_written(&mut self, config: &ConfigSpace) {
        if self.on == Some(InterruptKind::Msix) {
            self.update(config);
        }
    }

    fn update(&mut self, config: &ConfigSpace) {
        let msix = self.msix.as_ref().is_some_and(|state| state.table.is_enabled());
        let msi = self
            .msi
            .as_ref()
            .is_some_and(|msi| config.u16(usize::from(msi.capability.offset + 2)) & MSI_ENABLE != 0);
        // Both on at once is undefined (PCIe 6.0 §6.1.4): the table wins.
        let wanted = match (msix, msi) {
            (true, _) => Some(InterruptKind::Msix),
            (false, true) => Some(InterruptKind::Msi),
            (false, false) => self.pin.as_ref().map(|_| InterruptKind::Intx),
        };
        if self.on != wanted {
            self.turn_off();
        }
        match wanted {
            Some(InterruptKind::Msix) => self.update_msix(),
            Some(InterruptKind::Msi) => self.update_msi(config),
            Some(InterruptKind::Intx) if self.on.is_none() => self.turn_on_pin(),
            _ => {}
        }
    }

    /// Turns on what is to be on when the guest has written nothing yet: the pin.
    pub fn start(&mut self) {
        if self.pin.is_some() && self.on.is_none() {
            self.turn_on_pin();
        }
    }

    /// Nothing arrives any more; messages and masks are forgotten.
    pub fn stop(&mut self) {
        self.turn_off();
    }

    fn turn_off(&mut self) {
        if let Some(kind) = self.on.take() {
            let result = self.function.disconnect(kind);
            self.counters.note(&result);
        }
        if let Some(pin) = &mut self.pin {
            pin.line = None;
        }
        if let Some(msi) = &mut self.msi {
            msi.vectors.clear();
            msi.routed.clear();
        }
        if let Some(state) = &mut self.msix {
            state.connected.iter_mut().for_each(|event| *event = None);
            state.allocated = 0;
        }
    }

    fn turned_on(&mut self, kind: InterruptKind) {
        self.on = Some(kind);
        self.counters.enabled.fetch_add(1, Ordering::Relaxed);
    }

    fn turn_on_pin(&mut self) {
        let Some(pin) = &mut self.pin else { return };
        let result = (|| {
            let line = self.hypervisor.level_interrupt(pin.gsi)?;
            // First the way back: the pin is masked by its first interrupt.
            self.function.connect(InterruptKind::Intx, 0, &[Some(line.trigger())])?;
            self.function.unmask_by(line.resample())?;
            pin.line = Some(line);
            Ok(())
        })();
        self.counters.note(&result);
        // Also after a failure of the second step: the kind is on.
        self.turned_on(InterruptKind::Intx);
    }

    fn update_msi(&mut self, config: &ConfigSpace) {
        let Some(msi) = &mut self.msi else { return };
        let capability = msi.capability;
        let control = config.u16(usize::from(capability.offset + 2));
        let limit = capability.vectors.min(self.counts.msi);
        let count = (1_u16 << (control >> 4 & 7).min(5)).min(limit);
        let turn_on = self.on.is_none();
        if turn_on {
            let vectors: io::Result<Vec<_>> = (0..count).map(|_| self.hypervisor.msi_vector()).collect();
            match vectors {
                Ok(vectors) => {
                    msi.routed = vec![None; vectors.len()];
                    msi.vectors = vectors;
                }
                Err(error) => return self.counters.note(&Err(error)),
            }
        }
        let masks = capability.mask().map_or(0, |offset| config.u32(usize::from(offset)));
        let at = usize::from(capability.offset);
        let high = if capability.wide { u64::from(config.u32(at + 8)) << 32 } else { 0 };
        let address = high | u64::from(config.u32(at + 4));
        let data = u32::from(config.u16(usize::from(capability.data())));
        for (index, (vector, routed)) in msi.vectors.iter().zip(&mut msi.routed).enumerate() {
            let masked = masks & 1 << index != 0;
            // The function replaces the low bits of the data by the vector's number (PCIe 6.0 §6.1.4.1).
            let low = u32::from(count) - 1;
            let message = (!masked).then_some(MsiMessage { address, data: data & !low | index as u32 & low });
            if *routed == message {
                continue;
            }
            let result = message.map_or_else(|| vector.mask(), |message| vector.route(message));
            self.counters.note(&result);
            *routed = message;
        }
        if turn_on {
            let events: Vec<_> = msi.vectors.iter().map(|vector| Some(vector.eventfd())).collect();
            let result = self.function.connect(InterruptKind::Msi, 0, &events);
            self.counters.note(&result);
            self.counters.connected.fetch_add(events.len() as u64, Ordering::Relaxed);
            self.turned_on(InterruptKind::Msi);
        }
    }

    /// Connects the entries that the guest has unmasked and that are not connected yet. Masking is the
    /// table's affair: a masked entry's irqfd is detached, and its signals wait in the eventfd.
    fn update_msix(&mut self) {
        let turn_on = self.on.is_none();
        let Some(state) = &mut self.msix else { return };
        let unmasked = |index: &usize| state.table.is_unmasked(*index as u16);
        let fresh: Vec<usize> = (0..state.connected.len())
            .filter(|index| state.connected[*index].is_none())
            .filter(unmasked)
            .collect();
        if fresh.is_empty() && !turn_on {
            return;
        }
        for index in &fresh {
            state.connected[*index] = state.table.irqfd(*index as u16);
        }
        let highest = fresh.last().map_or(1, |last| last + 1);
        let result = if turn_on || (highest > state.allocated && !self.counts.msix_grows) {
            if !turn_on {
                let result = self.function.disconnect(InterruptKind::Msix);
                self.counters.note(&result);
            }
            // At least one, so that the function is in MSI-X mode as the guest has been told.
            state.allocated = highest.max(state.allocated);
            let events: Vec<_> = state.connected[..state.allocated].iter().map(Option::as_ref).collect();
            self.function.connect(InterruptKind::Msix, 0, &events)
        } else {
            state.allocated = highest.max(state.allocated);
            fresh.iter().try_for_each(|index| {
                let event = state.connected[*index].as_ref();
                self.function.connect(InterruptKind::Msix, *index as u16, &[event])
            })
        };
        self.counters.note(&result);
        self.counters.connected.fetch_add(fresh.len() as u64, Ordering::Relaxed);
        if turn_on {
            self.turned_on(InterruptKind::Msix);
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.turn_off();
    }
}
