//! A passed-through function as the guest's root complex sees it.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::config::VirtualConfig;
use super::dma::Dma;
use super::function::{FunctionParts, HostFunction, PAGE, ROM_REGION, Region};
use super::interrupts::{InterruptCounters, Interrupts};
use super::mapping::Mapping;
use crate::hypervisor::PassthroughHypervisor;
use crate::pci::config::{Bar, COMMAND, COMMAND_MEMORY, ConfigError, ConfigSpace, INTERRUPT_PIN, ROM_BAR};
use crate::pci::{PciDevice, gpudirect};
use crate::ranges::without;

/// A function of the host in a guest.
pub struct VfioPci {
    function: Arc<dyn HostFunction>,
    hypervisor: Arc<dyn PassthroughHypervisor>,
    config: VirtualConfig,
    interrupts: Interrupts,
    regions: Vec<Region>,
    bars: Vec<MappedBar>,
    /// Present once guest memory is mapped; BARs placed from then on are reached by peers as well.
    dma: Option<Arc<Dma>>,
    /// It was said that a reset failed: a guest asks as often as it likes, and is not to fill the host's log.
    reset_failed: bool,
}

/// A BAR with the parts of it that the guest reaches without an exit.
struct MappedBar {
    index: u8,
    address: Option<u64>,
    areas: Vec<Area>,
}

/// A mapped part.
struct Area {
    /// In the BAR.
    offset: u64,
    mapping: Mapping,
    /// The memory slot, while the BAR answers.
    slot: Option<u32>,
    /// The guest address at which peers reach it.
    peer: Option<u64>,
}

impl VfioPci {
    /// The function with `parts`.
    ///
    /// # Errors
    /// When its BARs are not possible.
    pub fn new(
        function: Arc<dyn HostFunction>,
        parts: FunctionParts,
        hypervisor: Arc<dyn PassthroughHypervisor>,
    ) -> Result<Self, ConfigError> {
        let bars = memory_bars(&*function, &parts.regions);
        let config = VirtualConfig::new(&*function, parts.config_size, &bars)?;
        let found = config.found;
        let interrupts = Interrupts::new(
            Arc::clone(&function),
            Arc::clone(&hypervisor),
            parts.interrupts,
            found.msi,
            found.msix,
        );
        let device = Self {
            function,
            hypervisor,
            config,
            interrupts,
            regions: parts.regions,
            bars: bars
                .iter()
                .map(|bar| MappedBar { index: bar.index, address: None, areas: vec![] })
                .collect(),
            dma: None,
            reset_failed: false,
        };
        device.turn_on_decoding();
        Ok(device)
    }

    /// Wires its interrupt pin, if it has one, to line `gsi`.
    pub fn wire_pin(&mut self, gsi: u32) {
        self.interrupts.wire_pin(gsi);
    }

    /// The interrupt pin as its configuration space has it: 1 to 4 for INTA to INTD, 0 for none.
    pub fn pin(&self) -> u8 {
        let mut pin = [0];
        self.config.read(&*self.function, INTERRUPT_PIN as u16, &mut pin);
        pin[0]
    }

    /// Maps the parts of its BARs that the kernel offers, but for the pages with MSI-X table and pending bits.
    /// `region_offset` tells where a region begins in `file`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn map_bars(&mut self, file: BorrowedFd<'_>, region_offset: impl Fn(u8) -> u64) -> io::Result<()> {
        for bar in &mut self.bars {
            let Some(region) = self.regions.iter().find(|region| region.index == bar.index) else { continue };
            let trapped = trapped_pages(&self.interrupts, bar.index);
            for range in region.mappable.iter().flat_map(|range| without(range.clone(), &trapped)) {
                let offset = region_offset(bar.index) + range.start;
                let mapping = Mapping::new(file, offset, range.end - range.start)?;
                bar.areas.push(Area { offset: range.start, mapping, slot: None, peer: None });
            }
        }
        Ok(())
    }

    /// Lets peers reach its BARs, wherever they answer from now on; `None`: no longer.
    pub fn set_dma(&mut self, dma: Option<Arc<Dma>>) {
        for bar in &mut self.bars {
            bar.unmap_for_peers(self.dma.as_deref());
        }
        self.dma = dma;
        for bar in &mut self.bars {
            bar.map_for_peers(self.dma.as_deref());
        }
    }

    /// What its interrupts did.
    pub fn interrupt_counters(&self) -> Arc<InterruptCounters> {
        self.interrupts.counters()
    }

    /// Shows NVIDIA's driver which GPUs reach each other's memory. Returns whether there was room.
    pub fn show_clique(&mut self, clique: u8) -> bool {
        // The list's ID and link are written along with the place.
        let [_, _, body @ ..] = gpudirect::capability(clique);
        self.config.insert_vendor_capability(&*self.function, &body).is_some()
    }

    /// No interrupts, no DMA, nothing that the guest reaches: before the function is reset or given up.
    pub fn quiesce(&mut self) {
        self.interrupts.stop();
        self.function.write_config(COMMAND as u16, &COMMAND_MEMORY.to_le_bytes());
        for bar in &mut self.bars {
            bar.leave(&*self.hypervisor, self.dma.as_deref());
            bar.address = None;
        }
    }

    /// A reset asked for by the guest, of the function or of its bus. If it fails, as it does where the function
    /// alone cannot be reset, its configuration is as after a reset and the rest as it was.
    fn reset(&mut self) {
        self.interrupts.stop();
        if let Err(error) = self.function.reset()
            && !self.reset_failed
        {
            self.reset_failed = self.tell_of_failed_reset(&error);
        }
        self.config.reset();
        self.turn_on_decoding();
        self.interrupts.start();
    }

    /// Whether there was anything to tell: of a function that answers no more, whoever watches it tells that it is
    /// lost, and that it cannot be reset is no news.
    fn tell_of_failed_reset(&self, error: &io::Error) -> bool {
        if !self.function.answers() {
            return false;
        }
        let mut ids = [0; 4];
        self.function.read_config(0, &mut ids);
        let [vendor, device] = [[ids[0], ids[1]], [ids[2], ids[3]]].map(u16::from_le_bytes);
        crate::notice(format_args!(
            "the guest asked device {vendor:04x}:{device:04x} for a reset, which failed: {error}; said once"
        ));
        true
    }

    /// On the host the function answers at all times; see the rules of the command register.
    fn turn_on_decoding(&self) {
        self.function.write_config(COMMAND as u16, &COMMAND_MEMORY.to_le_bytes());
    }

    /// The part of the MSI-X structures that an access means.
    fn msix_target(&self, bar: u8, offset: u64) -> Option<MsixTarget> {
        let (capability, _) = self.interrupts.msix()?;
        let (table, pending) = (capability.table_range(), capability.pending_range());
        if bar == capability.table.0 && table.contains(&offset) {
            Some(MsixTarget::Table(offset - table.start))
        } else if bar == capability.pending.0 && pending.contains(&offset) {
            Some(MsixTarget::Pending(offset - pending.start))
        } else {
            None
        }
    }
}

enum MsixTarget {
    Table(u64),
    Pending(u64),
}

impl PciDevice for VfioPci {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config.space
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(&*self.function, offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        let reset = self.config.write(&*self.function, offset, data);
        self.interrupts.config_written(&self.config.space);
        if reset {
            self.reset();
        }
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        match (self.msix_target(bar, offset), self.interrupts.msix()) {
            (Some(MsixTarget::Table(at)), Some((_, table))) => table.read_table(at, data),
            (Some(MsixTarget::Pending(at)), Some((_, table))) => table.read_pending(at, data),
            _ => self.function.read_region(bar, offset, data),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match (self.msix_target(bar, offset), self.interrupts.msix()) {
            (Some(MsixTarget::Table(at)), Some((_, table))) => {
                table.write_table(at, data);
                self.interrupts.table_written(&self.config.space);
            }
            // Pending bits are read only (PCIe 6.0 §7.7.2).
            (Some(MsixTarget::Pending(_)), _) => {}
            _ if bar == ROM_REGION => {}
            _ => self.function.write_region(bar, offset, data),
        }
    }

    fn bus_reset(&mut self) {
        self.reset();
    }

    fn leave(&mut self) {
        self.quiesce();
    }

    fn bar_moved(&mut self, bar: u8, address: Option<u64>) {
        let Some(bar) = self.bars.iter_mut().find(|mapped| mapped.index == bar) else { return };
        bar.leave(&*self.hypervisor, self.dma.as_deref());
        bar.address = address;
        bar.enter(&*self.hypervisor, self.dma.as_deref());
    }
}

impl MappedBar {
    /// The guest reaches its mapped parts at the BAR's address.
    fn enter(&mut self, hypervisor: &dyn PassthroughHypervisor, dma: Option<&Dma>) {
        let Some(base) = self.address else { return };
        for area in &mut self.areas {
            let guest = base + area.offset;
            if !guest.is_multiple_of(PAGE) {
                continue;
            }
            let (host, size) = (area.mapping.address(), area.mapping.len());
            // SAFETY: the mapping lives until `leave` or until this area is dropped, which removes the slot first.
            let slot = unsafe { hypervisor.add_memory_slot(guest, host, size) };
            // Without a slot each access is an exit: slow, but right.
            area.slot = slot.ok();
        }
        self.map_for_peers(dma);
    }

    /// Other devices reach its mapped parts at the BAR's address.
    fn map_for_peers(&mut self, dma: Option<&Dma>) {
        let (Some(base), Some(dma)) = (self.address, dma) else { return };
        for area in &mut self.areas {
            let guest = base + area.offset;
            if area.peer.is_some() || !guest.is_multiple_of(PAGE) {
                continue;
            }
            // SAFETY: the mapping lives until `unmap_for_peers` or until this area is dropped, which undoes it first.
            let reached = unsafe { dma.map_bar(guest, area.mapping.address(), area.mapping.len()) };
            area.peer = reached.then_some(guest);
        }
    }

    fn unmap_for_peers(&mut self, dma: Option<&Dma>) {
        for area in &mut self.areas {
            if let (Some(guest), Some(dma)) = (area.peer.take(), dma) {
                dma.unmap_bar(guest, area.mapping.len());
            }
        }
    }

    /// Undoes [`enter`](Self::enter).
    fn leave(&mut self, hypervisor: &dyn PassthroughHypervisor, dma: Option<&Dma>) {
        self.unmap_for_peers(dma);
        for area in &mut self.areas {
            if let Some(slot) = area.slot.take() {
                // It was added; the kernel has no other reason to refuse.
                let _ = hypervisor.remove_memory_slot(slot);
            }
        }
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        self.quiesce();
    }
}

/// The memory BARs with regions behind them, and the expansion ROM's. I/O BARs do not exist in the guest: its bus has
/// no I/O window, and every driver of a PCIe device does without.
fn memory_bars(function: &dyn HostFunction, regions: &[Region]) -> Vec<Bar> {
    const BARS: u16 = 0x10;
    const IO: u32 = 1;
    let mut bars = Vec::new();
    let mut index = 0;
    while index < ROM_REGION {
        let mut bytes = [0; 4];
        function.read_config(BARS + u16::from(index) * 4, &mut bytes);
        let register = u32::from_le_bytes(bytes);
        let wide = register & 0b111 == 0b100;
        let region = regions.iter().find(|region| region.index == index);
        let possible = region.filter(|region| region.size.is_power_of_two() && region.size >= 16);
        if let (Some(region), 0) = (possible, register & IO) {
            bars.push(Bar { index, size: region.size, wide, prefetchable: register & 8 != 0 });
        }
        index += 1 + u8::from(wide);
    }
    // Cards without a ROM have no region; a ROM's BAR has at least 2 KiB (PCIe 6.0 §7.5.1.2.4).
    let rom = regions.iter().find(|region| region.index == ROM_REGION);
    if let Some(rom) = rom.filter(|rom| rom.size.is_power_of_two() && (2048..=1 << 24).contains(&rom.size)) {
        bars.push(Bar { index: ROM_BAR, size: rom.size, wide: false, prefetchable: false });
    }
    bars
}

/// The pages of a BAR that hold MSI-X structures, of which the guest must not reach the real ones.
fn trapped_pages(interrupts: &Interrupts, bar: u8) -> Vec<Range<u64>> {
    let Some((capability, _)) = interrupts.msix() else { return Vec::new() };
    let places =
        [(capability.table.0, capability.table_range()), (capability.pending.0, capability.pending_range())];
    let pages = |range: Range<u64>| range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE);
    places.into_iter().filter(|(index, _)| *index == bar).map(|(_, range)| pages(range)).collect()
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
