//! Which bits of a passed-through function's configuration space are whose.
//!
//! Each bit that the guest reads is either the device's or ours ("emulated"), and each bit it writes goes
//! to the device, to us, or nowhere. The kernel filters once more what reaches the device; the rules here
//! do not rely on it. What no rule names is read from the device and never written.

use std::ops::Range;

use super::function::HostFunction;
use crate::pci::capabilities::{self, Capability, u32_at};
use crate::pci::config::{
    Bar, CAPABILITIES, COMMAND, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, CONVENTIONAL_SIZE, ConfigError,
    ConfigSpace, FIRST_CAPABILITY, INTERRUPT_PIN, Identity, STATUS, STATUS_CAPABILITIES,
};

/// IDs of conventional capabilities (PCI Code and ID Assignment 1.16 §2).
mod id {
    pub const POWER_MANAGEMENT: u16 = 0x01;
    pub const VPD: u16 = 0x03;
    pub const MSI: u16 = 0x05;
    pub const VENDOR: u16 = 0x09;
    pub const SUBSYSTEM: u16 = 0x0d;
    pub const EXPRESS: u16 = 0x10;
    pub const MSIX: u16 = 0x11;
    pub const ADVANCED_FEATURES: u16 = 0x13;
}

/// IDs of extended capabilities (the same §3).
mod extended_id {
    pub const AER: u16 = 0x01;
    pub const SERIAL_NUMBER: u16 = 0x03;
    pub const VENDOR: u16 = 0x0b;
    pub const DESIGNATED_VENDOR: u16 = 0x23;
}

/// Where the MSI capability is, and its form (PCIe 6.0 §7.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiCapability {
    /// Its offset.
    pub offset: u16,
    /// The address has 64 bits.
    pub wide: bool,
    /// Vectors can be masked one by one.
    pub maskable: bool,
    /// How many vectors it asks for: a power of two, at most 32.
    pub vectors: u16,
}

impl MsiCapability {
    /// Offset of the message data.
    pub fn data(&self) -> u16 {
        self.offset + if self.wide { 12 } else { 8 }
    }

    /// Offset of the mask bits, where there are any.
    pub fn mask(&self) -> Option<u16> {
        self.maskable.then(|| self.data() + 4)
    }

    fn end(&self) -> u16 {
        // Mask and pending bits follow the data's dword.
        self.data() + if self.maskable { 12 } else { 2 }
    }
}

/// Where the MSI-X capability, its table and its pending bits are (PCIe 6.0 §7.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixCapability {
    /// Its offset.
    pub offset: u16,
    /// Entries of the table.
    pub vectors: u16,
    /// BAR and offset of the table.
    pub table: (u8, u64),
    /// BAR and offset of the pending bits.
    pub pending: (u8, u64),
}

impl MsixCapability {
    /// The table's bytes in its BAR.
    pub fn table_range(&self) -> Range<u64> {
        self.table.1..self.table.1 + u64::from(self.vectors) * 16
    }

    /// The pending bits' bytes in their BAR: a bit a vector, in units of 8 bytes.
    pub fn pending_range(&self) -> Range<u64> {
        self.pending.1..self.pending.1 + u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// What the guest can do by writing that the device's emulation has to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// MSI, if the function has it.
    pub msi: Option<MsiCapability>,
    /// MSI-X, if the function has it.
    pub msix: Option<MsixCapability>,
    /// Device control register of the Express capability: a function-level reset is asked for there.
    pub device_control: Option<u16>,
    /// Whether the function can be reset so.
    pub function_level_reset: bool,
    /// VPD's address register (PCI 3.0 appendix I).
    pub vpd_address: Option<u16>,
}

/// Configuration space as the guest sees it.
pub struct VirtualConfig {
    /// Holds the emulated bits, and the BARs.
    pub space: ConfigSpace,
    /// Bits that are read from `space`; the others from the device.
    emulated: Vec<u8>,
    /// Bits whose writes go to the device.
    forwarded: Vec<u8>,
    /// What was found.
    pub found: Found,
}

/// Initiate function-level reset (PCIe 6.0 §7.5.3.4); reads as zero.
const DEVICE_CONTROL_RESET: u16 = 1 << 15;
const DEVICE_CAPABILITIES_RESET: u32 = 1 << 28;
/// VPD: a write of data, not a read.
const VPD_WRITE: u16 = 1 << 15;

impl VirtualConfig {
    /// The view onto `function`, whose configuration space has `size` bytes; `bars` are its memory BARs.
    ///
    /// # Errors
    /// When a BAR is not possible.
    pub fn new(function: &dyn HostFunction, size: u16, bars: &[Bar]) -> Result<Self, ConfigError> {
        let size = if usize::from(size) > CONVENTIONAL_SIZE { 4096 } else { CONVENTIONAL_SIZE };
        let mut host = vec![0xff; size];
        for (index, chunk) in host.chunks_exact_mut(4).enumerate() {
            function.read_config((index * 4) as u16, chunk);
        }
        let mut config = Self {
            space: ConfigSpace::endpoint(&identity(&host), size),
            emulated: vec![0; size],
            forwarded: vec![0; size],
            found: Found::default(),
        };
        config.header(&host, bars)?;
        config.conventional(&host);
        config.extended(&host);
        Ok(config)
    }

    /// Bytes `offset..` are ours: `value` at first, and the guest changes the bits of `writable`.
    fn emulate(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        self.space.define(offset, value, writable);
        if let Some(mask) = self.emulated.get_mut(offset..offset + value.len()) {
            mask.fill(0xff);
        }
    }

    /// The guest writes the bits of `mask` at `offset` through to the device.
    fn forward(&mut self, offset: usize, mask: &[u8]) {
        if let Some(target) = self.forwarded.get_mut(offset..offset + mask.len()) {
            target.copy_from_slice(mask);
        }
    }

    /// Type 0 header (PCIe 6.0 §7.5.1).
    fn header(&mut self, host: &[u8], bars: &[Bar]) -> Result<(), ConfigError> {
        // Vendor and device ID: a virtual function reads as ones here, the kernel fills them in.
        // Command: memory decoding is where BARs answer in the guest, and moves memory slots. On the host
        // it stays on: a slot whose device does not decode would fault the VMM. I/O space does not exist.
        self.emulated[..6].fill(0xff);
        // Bus mastering and the pin's disable are the device's; the kernel follows the latter.
        self.forward(COMMAND, &(COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        // Status: the device's errors. Writing ones clears them.
        self.forward(STATUS, &0xf900_u16.to_le_bytes());
        // Class to subsystem: constant. Cache line size, latency timer and BIST have no effect on PCIe;
        // a self-test could leave the device in no known state. The header type's high bit (multi-function)
        // is the guest's topology's.
        self.emulated[8..FIRST_CAPABILITY].fill(0xff);
        self.space.define(INTERRUPT_PIN, &[host[INTERRUPT_PIN]], &[0]);
        // The list's start is the device's unless rewritten below.
        self.space.define(CAPABILITIES, &[host[CAPABILITIES] & !3], &[0]);
        self.emulated[CAPABILITIES] = 0xff;
        // The card bus pointer, and latencies that nobody reads: as the device has them.
        self.space.define(0x28, &host[0x28..0x2c], &[0; 4]);
        self.space.define(0x3e, &host[0x3e..0x40], &[0; 2]);
        for bar in bars {
            self.space.add_bar(*bar)?;
        }
        Ok(())
    }

    fn conventional(&mut self, host: &[u8]) {
        let list = capabilities::conventional(host);
        let shown: Vec<Capability> = list.iter().copied().filter(|c| self.capability(host, *c)).collect();
        // Hidden: what is unknown might act on the host, and what could be moved (enhanced allocation,
        // HyperTransport, AGP, bridges' own) means nothing to a guest.
        for hidden in list.iter().filter(|c| !shown.contains(c)) {
            self.hide(host, &list, *hidden);
        }
        let links = shown.iter().skip(1).map(|c| c.offset as u8).chain([0]);
        for (capability, next) in shown.iter().zip(links) {
            self.emulate(usize::from(capability.offset), &[capability.id as u8, next], &[0, 0]);
        }
        self.space.define(CAPABILITIES, &[shown.first().map_or(0, |c| c.offset as u8)], &[0]);
        self.show_list(!shown.is_empty());
    }

    /// The status register's bit for the capability list is ours, the others are the device's.
    fn show_list(&mut self, there: bool) {
        let bit = STATUS_CAPABILITIES as u8;
        self.space.define(STATUS, &[if there { bit } else { 0 }], &[0]);
        self.emulated[STATUS] |= bit;
    }

    /// The bytes from a capability to the next one, or to the end, read as zeros.
    fn hide(&mut self, host: &[u8], list: &[Capability], hidden: Capability) {
        let start = usize::from(hidden.offset);
        let region_end = if start < CONVENTIONAL_SIZE { CONVENTIONAL_SIZE } else { host.len() };
        let next = list.iter().map(|c| usize::from(c.offset)).filter(|offset| *offset > start).min();
        let end = next.unwrap_or(region_end).min(region_end);
        let zeros = vec![0; end - start];
        self.emulate(start, &zeros, &zeros);
    }

    /// Applies the rules for one capability; returns whether the guest sees it.
    fn capability(&mut self, host: &[u8], capability: Capability) -> bool {
        let at = usize::from(capability.offset);
        // What the rules name would lie in extended space, where other rules hold.
        if at + least_length(host, capability) > CONVENTIONAL_SIZE {
            return false;
        }
        match capability.id {
            id::POWER_MANAGEMENT => self.power_management(host, at),
            id::VPD => self.vpd(capability.offset),
            id::MSI => self.msi(host, at),
            id::MSIX => self.msix(host, at),
            id::EXPRESS => self.express(host, at),
            // Vendors' own, which their drivers read; writes could reach anything.
            id::VENDOR | id::SUBSYSTEM => {}
            // Only a reset can be asked for; the kernel carries it out.
            id::ADVANCED_FEATURES => self.forward(at + 4, &[1]),
            _ => return false,
        }
        true
    }

    /// Power state is kept but not passed on: in D3 the device would not decode, and slots would fault.
    /// `No_Soft_Reset` is set, as nothing is lost on the way back (PCIe 6.0 §7.5.2.2). No PME.
    fn power_management(&mut self, host: &[u8], at: usize) {
        let capabilities = (u32_at(host, at) >> 16) as u16 & 0x07ff;
        self.emulate(at + 2, &capabilities.to_le_bytes(), &[0; 2]);
        self.emulate(at + 4, &[1 << 3, 0, 0, 0], &[3, 0, 0, 0]);
    }

    /// Read only: the data outlives the tenant. The address register is written with its write flag off.
    fn vpd(&mut self, offset: u16) {
        self.found.vpd_address = Some(offset + 2);
        self.forward(usize::from(offset + 2), &(!VPD_WRITE).to_le_bytes());
    }

    /// Ours as a whole: the kernel programs the device with messages of the host's own.
    fn msi(&mut self, host: &[u8], at: usize) {
        let control = (u32_at(host, at) >> 16) as u16;
        // Reserved encodings above 32 vectors.
        let vectors = 1_u16 << (control >> 1 & 7).min(5);
        let msi = MsiCapability {
            offset: at as u16,
            wide: control & 1 << 7 != 0,
            maskable: control & 1 << 8 != 0,
            vectors,
        };
        let length = usize::from(msi.end()) - at;
        let (mut value, mut writable) = (vec![0; length - 2], vec![0xff; length - 2]);
        // Enabled vectors and extended message data start off.
        value[..2].copy_from_slice(&(control & 0x018e).to_le_bytes());
        writable[..2].copy_from_slice(&0x0071_u16.to_le_bytes());
        writable[2] = 0xfc;
        if msi.maskable {
            let pending = length - 2 - 4;
            writable[pending..].fill(0);
        }
        self.emulate(at + 2, &value, &writable);
        self.found.msi = Some(msi);
    }

    /// Control is ours for the same reason; where table and pending bits are is the device's to say.
    fn msix(&mut self, host: &[u8], at: usize) {
        const ENABLE_AND_MASK: u16 = 0xc000;
        let vectors = (u32_at(host, at) >> 16) as u16 & 0x07ff;
        self.emulate(at + 2, &vectors.to_le_bytes(), &ENABLE_AND_MASK.to_le_bytes());
        let place = |offset| {
            let register = u32_at(host, offset);
            ((register & 7) as u8, u64::from(register & !7))
        };
        self.found.msix = Some(MsixCapability {
            offset: at as u16,
            vectors: vectors + 1,
            table: place(at + 4),
            pending: place(at + 8),
        });
    }

    /// PCI Express (PCIe 6.0 §7.5.3).
    fn express(&mut self, host: &[u8], at: usize) {
        const ENDPOINT: u16 = 0;
        const TYPE: u16 = 0x00f0;
        // Below a port of the guest there are endpoints only; the device may be a legacy endpoint, or
        // integrated into the host's root complex.
        let flags = (u32_at(host, at) >> 16) as u16 & !TYPE | ENDPOINT << 4;
        self.emulate(at + 2, &flags.to_le_bytes(), &[0; 2]);
        let capabilities = u32_at(host, at + 4);
        self.found.function_level_reset = capabilities & DEVICE_CAPABILITIES_RESET != 0;
        self.found.device_control = Some(at as u16 + 8);
        // Device control: payload and read request sizes, and orderings; the kernel keeps the sizes within
        // what the host's path allows. Error reporting is the host's. The reset bit is acted on by the
        // device's emulation, so that interrupts and BARs are reset along with it.
        self.forward(at + 8, &0x78f0_u16.to_le_bytes());
        // Device status: writing ones clears.
        self.forward(at + 0x0a, &0x000f_u16.to_le_bytes());
        // Link control stays unwritten: the link is the host's. Retraining or disabling it would be the
        // neighbours' loss.
        if flags & 0xf >= 2 && at + 0x2c <= CONVENTIONAL_SIZE {
            // Device control 2: completion timeout, ID-based ordering, 10-bit tags stay as they are; only
            // the timeout's value is the guest driver's to choose.
            self.forward(at + 0x28, &0x001f_u16.to_le_bytes());
        }
    }

    /// Shown: error registers (the kernel lets none of the host's be changed), serial number, vendors' own.
    /// Hidden: what is the host's to decide (SR-IOV, ARI, ACS, resizable BARs, ATS, PRI, PASID, power
    /// budgets, the link's), and all that is unknown.
    fn extended(&mut self, host: &[u8]) {
        let list = capabilities::extended(host);
        let shows = |c: &&Capability| {
            matches!(
                c.id,
                extended_id::AER
                    | extended_id::SERIAL_NUMBER
                    | extended_id::VENDOR
                    | extended_id::DESIGNATED_VENDOR
            )
        };
        let shown: Vec<Capability> = list.iter().filter(shows).copied().collect();
        for hidden in list.iter().filter(|c| !shown.contains(c)) {
            self.hide(host, &list, *hidden);
        }
        let header = |id: u16, version: u8, next: u16| {
            u32::from(id) | u32::from(version) << 16 | u32::from(next) << 20
        };
        let links = shown.iter().skip(1).map(|c| c.offset).chain([0]);
        for (capability, next) in shown.iter().zip(links) {
            let header = header(capability.id, capability.version, next).to_le_bytes();
            self.emulate(usize::from(capability.offset), &header, &[0; 4]);
        }
        // The list starts at 0x100 whatever is there: a null capability leads to the first one shown.
        match shown.first() {
            Some(first) if first.offset != 0x100 => {
                self.emulate(0x100, &header(0, 0, first.offset).to_le_bytes(), &[0; 4]);
            }
            _ => {}
        }
    }

    /// Puts a vendor's capability of `body` (after ID and link) where no other is, at the list's start.
    /// Returns its offset; `None` where there is no room.
    pub fn insert_vendor_capability(&mut self, host: &dyn HostFunction, body: &[u8]) -> Option<u16> {
        let mut bytes = vec![0; CONVENTIONAL_SIZE];
        for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
            self.read(host, (index * 4) as u16, chunk);
        }
        let list = capabilities::conventional(&bytes);
        let mut used: Vec<Range<usize>> = list.iter().map(|c| extent(&bytes, *c)).collect();
        used.sort_by_key(|range| range.start);
        let length = (2 + body.len()).next_multiple_of(4);
        let free = (FIRST_CAPABILITY..=CONVENTIONAL_SIZE - length).step_by(4).find(|at| {
            let range = *at..at + length;
            let apart = used.iter().all(|other| other.end <= range.start || range.end <= other.start);
            // Registers that no list leads to may still be some: vendors hide theirs there.
            apart && bytes[range].iter().all(|byte| *byte == 0)
        })?;
        let mut value = vec![id::VENDOR as u8, self.space.u16(CAPABILITIES) as u8];
        value.extend(body);
        value.resize(length, 0);
        self.emulate(free, &value, &vec![0; length]);
        self.space.define(CAPABILITIES, &[free as u8], &[0]);
        self.show_list(true);
        Some(free as u16)
    }

    /// The guest reads.
    pub fn read(&self, host: &dyn HostFunction, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        let Some(masks) = self.emulated.get(start..start + data.len()) else { return };
        if masks.iter().any(|mask| *mask != 0xff) {
            host.read_config(offset, data);
        }
        let mut ours = vec![0; data.len()];
        self.space.read(offset, &mut ours);
        for ((byte, ours), mask) in data.iter_mut().zip(ours).zip(masks) {
            *byte = *byte & !mask | ours & mask;
        }
    }

    /// The guest writes. Returns whether it asked for a function-level reset.
    pub fn write(&mut self, host: &dyn HostFunction, offset: u16, data: &[u8]) -> bool {
        let start = usize::from(offset);
        let Some(masks) = self.forwarded.get(start..start + data.len()) else { return false };
        self.space.write(offset, data);
        if masks.iter().any(|mask| *mask != 0) {
            forward(host, offset, data, masks);
        }
        let asked = |register: u16| {
            // The reset bit is the top one of the register's second byte.
            let byte = usize::from(register) + 1;
            let written = byte.checked_sub(start).and_then(|index| data.get(index));
            written.is_some_and(|byte| byte & (DEVICE_CONTROL_RESET >> 8) as u8 != 0)
        };
        self.found.function_level_reset && self.found.device_control.is_some_and(asked)
    }

    /// Back to the state after a reset: BARs and command, and both kinds of messages, off.
    pub fn reset(&mut self) {
        self.space.write(COMMAND as u16, &[0, 0]);
        let bars = self.space.bars().to_vec();
        for bar in bars {
            self.space.set_bar_address(&bar, 0);
        }
        if let Some(msi) = self.found.msi {
            let zeros = vec![0; usize::from(msi.end() - msi.offset - 2)];
            self.space.write(msi.offset + 2, &zeros);
        }
        if let Some(msix) = self.found.msix {
            self.space.write(msix.offset + 2, &[0, 0]);
        }
    }
}

/// Writes the bits of `masks` through. The others are the device's own and are written as they are read, but
/// for those that a one would clear, which are all in registers that are forwarded in whole bytes or not
/// at all.
fn forward(host: &dyn HostFunction, offset: u16, data: &[u8], masks: &[u8]) {
    let whole = masks.iter().all(|mask| *mask == 0xff);
    let mut value = vec![0; data.len()];
    if !whole {
        host.read_config(offset, &mut value);
    }
    let aligned = offset.is_multiple_of(data.len() as u16) && matches!(data.len(), 1 | 2 | 4);
    let clears = |index: usize| matches!(usize::from(offset) + index, 6 | 7);
    for (index, ((byte, new), mask)) in value.iter_mut().zip(data).zip(masks).enumerate() {
        let kept = if clears(index) { 0 } else { *byte & !mask };
        *byte = kept | new & mask;
    }
    if aligned && masks.iter().all(|mask| *mask != 0) {
        host.write_config(offset, &value);
        return;
    }
    // Byte by byte where the neighbours are not to be touched.
    for (index, byte) in value.iter().enumerate().filter(|(index, _)| masks[*index] != 0) {
        host.write_config(offset + index as u16, &[*byte]);
    }
}

fn identity(host: &[u8]) -> Identity {
    let u16_at = |offset: usize| u32_at(host, offset) as u16;
    Identity {
        vendor: u16_at(0),
        device: u16_at(2),
        revision: host[8],
        class: u32_at(host, 8) >> 8,
        subsystem_vendor: u16_at(0x2c),
        subsystem: u16_at(0x2e),
    }
}

/// The bytes that a conventional capability has at the least; a dword where its length is unknown.
fn least_length(bytes: &[u8], capability: Capability) -> usize {
    let control = u32_at(bytes, usize::from(capability.offset)) >> 16;
    match capability.id {
        id::POWER_MANAGEMENT | id::VPD | id::SUBSYSTEM => 8,
        id::MSI => {
            10 + if control & 1 << 7 != 0 { 4 } else { 0 } + if control & 1 << 8 != 0 { 10 } else { 0 }
        }
        id::MSIX => 12,
        id::EXPRESS => 0x14,
        id::ADVANCED_FEATURES => 6,
        _ => 4,
    }
}

/// The bytes that a conventional capability takes up, in whole dwords.
fn extent(bytes: &[u8], capability: Capability) -> Range<usize> {
    let at = usize::from(capability.offset);
    let third = usize::from(bytes.get(at + 2).copied().unwrap_or(0));
    let length = match capability.id {
        id::EXPRESS if third & 0xf >= 2 => 0x3c,
        id::VENDOR => third.max(3),
        _ => least_length(bytes, capability),
    };
    at..at + length.next_multiple_of(4)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
