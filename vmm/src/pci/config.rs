//! Configuration space as registers with bits that the guest may change (PCIe 6.0 §7.5).
//!
//! Each byte has a mask of writable bits; a write changes those and no others. BAR sizing falls out
//! of it: the address bits below a BAR's size are not writable, so they read as zero after all
//! ones were written (PCIe 6.0 §7.5.1.2.1).

/// Configuration space without extended capabilities.
pub const CONVENTIONAL_SIZE: usize = 256;
/// Configuration space with them.
pub const EXPRESS_SIZE: usize = 4096;

const VENDOR: usize = 0x00;
/// The command register.
pub(crate) const COMMAND: usize = 0x04;
/// The status register.
pub(crate) const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CACHE_LINE_SIZE: usize = 0x0c;
const HEADER_TYPE: usize = 0x0e;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
/// The start of the capability list.
pub(crate) const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The interrupt pin: 1 to 4 for INTA to INTD, 0 for none.
pub(crate) const INTERRUPT_PIN: usize = 0x3d;
/// The expansion ROM's BAR, in type 0 and type 1 headers.
const ROM_BARS: [usize; 2] = [0x30, 0x38];
/// First byte free for capabilities, in both header types.
pub(crate) const FIRST_CAPABILITY: usize = 0x40;

/// Command register: the function answers to its memory BARs (PCIe 6.0 §7.5.1.1.3).
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may send memory requests, MSI-X messages included.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_SERR: u16 = 1 << 8;
/// Command register: the function does not raise its interrupt pin.
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a capability list.
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Vendor-specific capability (PCI 3.0 appendix H).
pub const CAP_VENDOR: u8 = 0x09;
/// PCI Express capability (PCIe 6.0 §7.5.3).
pub const CAP_EXPRESS: u8 = 0x10;
/// MSI-X capability (PCIe 6.0 §7.7.2).
pub const CAP_MSIX: u8 = 0x11;

/// Index that stands for the expansion ROM, which has a register of its own (PCIe 6.0 §7.5.1.2.4).
pub const ROM_BAR: u8 = 6;
/// Expansion ROM BAR: the ROM answers, if memory decoding is on as well.
const ROM_ENABLE: u32 = 1;
/// Address bits of an expansion ROM BAR: those from bit 11 up.
const ROM_SIZE_MIN: u64 = 1 << 11;
/// Memory BARs have 28 address bits at most (PCIe 6.0 §7.5.1.2.1).
const BAR_SIZE_MIN: u64 = 16;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and interface as one 24-bit number.
    pub class: u32,
    /// Subsystem vendor ID (type 0 headers).
    pub subsystem_vendor: u16,
    /// Subsystem ID (type 0 headers).
    pub subsystem: u16,
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Index of its first register, or [`ROM_BAR`].
    pub index: u8,
    /// Size in bytes, a power of two, at least 16 (2 KiB for a ROM).
    pub size: u64,
    /// Takes two registers and may lie above 4 GiB.
    pub wide: bool,
    /// May lie in a bridge's prefetchable window. PCIe devices set it on 64-bit BARs even where
    /// reads have side effects, as nothing on the way prefetches (PCIe 6.0 §7.5.1.2.1, note).
    pub prefetchable: bool,
}

/// A layout that is wrong in the VMM itself, never through the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The capability list is full.
    #[error("no room for a capability of {0} bytes")]
    NoRoom(usize),
    /// A size, an index, or a register used twice.
    #[error("BAR {index} of {size:#x} bytes is not possible")]
    BadBar {
        /// First register.
        index: u8,
        /// Size in bytes.
        size: u64,
    },
}

/// One function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that the guest may change, byte by byte.
    writable: Vec<u8>,
    bars: Vec<Bar>,
    /// Registers a header has for BARs.
    bar_registers: u8,
    /// Where the next capability's offset goes, and where the next capability goes.
    link: usize,
    free: usize,
    /// The same for extended capabilities: the last one, and where the next goes.
    extended_last: Option<usize>,
    extended_free: usize,
}

impl ConfigSpace {
    /// A type 0 header (an endpoint) in `size` bytes ([`CONVENTIONAL_SIZE`] or [`EXPRESS_SIZE`]).
    pub fn endpoint(identity: &Identity, size: usize) -> Self {
        let mut config = Self::header(identity, size, 0, 6);
        config.set_u16(SUBSYSTEM, identity.subsystem_vendor);
        config.set_u16(SUBSYSTEM + 2, identity.subsystem);
        config
    }

    /// A type 1 header (a bridge): the guest sets the bus numbers and both memory windows,
    /// of which the prefetchable one is 64 bits wide (PCIe 6.0 §7.5.1.3).
    pub fn bridge(identity: &Identity) -> Self {
        const BUS_NUMBERS: usize = 0x18;
        const MEMORY_WINDOW: usize = 0x20;
        const PREFETCHABLE_WINDOW: usize = 0x24;
        const PREFETCHABLE_UPPER: usize = 0x28;
        const BRIDGE_CONTROL: usize = 0x3e;
        let mut config = Self::header(identity, EXPRESS_SIZE, 1, 2);
        config.writable[BUS_NUMBERS..BUS_NUMBERS + 3].fill(0xff);
        for window in [MEMORY_WINDOW, MEMORY_WINDOW + 2, PREFETCHABLE_WINDOW, PREFETCHABLE_WINDOW + 2] {
            config.allow_u16(window, 0xfff0);
        }
        config.bytes[PREFETCHABLE_WINDOW] = 1;
        config.bytes[PREFETCHABLE_WINDOW + 2] = 1;
        config.writable[PREFETCHABLE_UPPER..PREFETCHABLE_UPPER + 8].fill(0xff);
        // Parity response, SERR, secondary bus reset.
        config.allow_u16(BRIDGE_CONTROL, 0x0043);
        config
    }

    fn header(identity: &Identity, size: usize, header_type: u8, bar_registers: u8) -> Self {
        let mut config = Self {
            bytes: vec![0; size],
            writable: vec![0; size],
            bars: Vec::new(),
            bar_registers,
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
            extended_last: None,
            extended_free: CONVENTIONAL_SIZE,
        };
        config.set_u16(VENDOR, identity.vendor);
        config.set_u16(VENDOR + 2, identity.device);
        config.bytes[REVISION] = identity.revision;
        config.bytes[REVISION + 1..REVISION + 4].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        config.bytes[HEADER_TYPE] = header_type;
        config.allow_u16(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE);
        config.writable[CACHE_LINE_SIZE] = 0xff;
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Adds a memory BAR, or the expansion ROM's, at address 0.
    ///
    /// # Errors
    /// When it is not possible in this header.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigError> {
        let bad = ConfigError::BadBar { index: bar.index, size: bar.size };
        let width = 1 + u8::from(bar.wide);
        let end = bar.index.checked_add(width).ok_or(bad)?;
        let taken = |other: &Bar| bar.index <= other.index + u8::from(other.wide) && other.index < end;
        let rom = bar.index == ROM_BAR;
        let sizes = match (rom, bar.wide) {
            (true, _) => ROM_SIZE_MIN..=1 << 31,
            (false, true) => BAR_SIZE_MIN..=1 << 62,
            (false, false) => BAR_SIZE_MIN..=1 << 31,
        };
        let place = if rom { !bar.wide && !bar.prefetchable } else { end <= self.bar_registers };
        if !place || !bar.size.is_power_of_two() || !sizes.contains(&bar.size) || self.bars.iter().any(taken)
        {
            return Err(bad);
        }
        let register = self.bar_register(bar.index);
        let mask = !(bar.size - 1) | u64::from(rom);
        let len = usize::from(width) * 4;
        self.writable[register..register + len].copy_from_slice(&mask.to_le_bytes()[..len]);
        self.bytes[register] = u8::from(bar.prefetchable) << 3 | if bar.wide { 0b100 } else { 0 };
        self.bars.push(bar);
        Ok(())
    }

    fn bar_register(&self, index: u8) -> usize {
        match index {
            ROM_BAR => ROM_BARS[usize::from(self.bytes[HEADER_TYPE] & 1)],
            _ => BARS + usize::from(index) * 4,
        }
    }

    /// The BARs, in the order in which they were added.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Adds a capability of `body` after its two-byte header; `writable` masks the first bytes of
    /// the body. Returns the capability's offset.
    ///
    /// # Errors
    /// When the list is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, ConfigError> {
        let offset = self.free;
        let len = 2 + body.len();
        let end = offset + len.next_multiple_of(4);
        if end > CONVENTIONAL_SIZE || writable.len() > body.len() {
            return Err(ConfigError::NoRoom(len));
        }
        self.bytes[offset] = id;
        self.bytes[offset + 2..offset + len].copy_from_slice(body);
        self.writable[offset + 2..][..writable.len()].copy_from_slice(writable);
        self.bytes[self.link] = offset as u8;
        self.link = offset + 1;
        self.free = end;
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set_u16(STATUS, status);
        Ok(offset as u16)
    }

    /// Adds an extended capability of `body` after its four-byte header (PCIe 6.0 §7.6.3); `writable`
    /// masks the first bytes of the body. Returns the capability's offset.
    ///
    /// # Errors
    /// When the space is full, or has no extended part.
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let offset = self.extended_free;
        let len = 4 + body.len();
        let end = offset + len.next_multiple_of(4);
        if end > self.bytes.len() || writable.len() > body.len() {
            return Err(ConfigError::NoRoom(len));
        }
        if let Some(previous) = self.extended_last {
            let next = self.u16(previous + 2) | (offset as u16) << 4;
            self.set_u16(previous + 2, next);
        }
        self.set_u16(offset, id);
        self.set_u16(offset + 2, u16::from(version));
        self.bytes[offset + 4..offset + len].copy_from_slice(body);
        self.writable[offset + 4..][..writable.len()].copy_from_slice(writable);
        self.extended_last = Some(offset);
        self.extended_free = end;
        Ok(offset as u16)
    }

    /// Reads as the guest does. Bytes past the end stay as they are.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (value, byte) in data.iter_mut().zip(self.bytes.get(usize::from(offset)..).unwrap_or(&[])) {
            *value = *byte;
        }
    }

    /// Writes as the guest does: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, value) in (usize::from(offset)..self.bytes.len()).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | value & mask;
        }
    }

    /// The two bytes at `offset`, for capabilities that watch their registers; zero past the end.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        if let Some(source) = self.bytes.get(offset..offset + 2) {
            bytes.copy_from_slice(source);
        }
        u16::from_le_bytes(bytes)
    }

    /// The four bytes at `offset`; zero past the end.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Overwrites bytes, whatever their masks, as the device itself does. Past the end: ignored.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        if let Some(target) = self.bytes.get_mut(offset..offset + data.len()) {
            target.copy_from_slice(data);
        }
    }

    /// Overwrites bytes and says which of their bits the guest may change, for spaces that follow those of
    /// a device. Past the end: ignored.
    pub fn define(&mut self, offset: usize, data: &[u8], writable: &[u8]) {
        self.set(offset, data);
        if let Some(target) = self.writable.get_mut(offset..offset + writable.len()) {
            target.copy_from_slice(writable);
        }
    }

    /// Programs a BAR's address, as firmware would. A ROM stays off.
    pub fn set_bar_address(&mut self, bar: &Bar, address: u64) {
        let register = self.bar_register(bar.index) as u16;
        let bytes = (address & !(bar.size - 1)).to_le_bytes();
        self.write(register, if bar.wide { &bytes } else { &bytes[..4] });
    }

    /// Where a BAR's registers point, whether or not it answers.
    pub fn bar_address(&self, bar: &Bar) -> u64 {
        let register = self.bar_register(bar.index);
        let flags = if bar.index == ROM_BAR { ROM_SIZE_MIN - 1 } else { 0xf };
        let low = u64::from(self.u32(register)) & !flags;
        if bar.wide { low | u64::from(self.u32(register + 4)) << 32 } else { low }
    }

    /// Where a BAR answers: nowhere while memory decoding is off, or for a ROM its own enable bit.
    pub fn decoded_address(&self, bar: &Bar) -> Option<u64> {
        let memory = self.u16(COMMAND) & COMMAND_MEMORY != 0;
        let enabled = bar.index != ROM_BAR || self.u32(self.bar_register(ROM_BAR)) & ROM_ENABLE != 0;
        (memory && enabled).then(|| self.bar_address(bar))
    }

    /// Lets the guest change more bits of a register that is there already.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        if let Some(target) = self.writable.get_mut(offset..offset + mask.len()) {
            for (byte, bits) in target.iter_mut().zip(mask) {
                *byte |= bits;
            }
        }
    }

    /// Clears every bit that the guest may change, as a reset does.
    pub fn clear_writable(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !mask;
        }
    }

    fn set_u16(&mut self, offset: usize, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }

    fn allow_u16(&mut self, offset: usize, mask: u16) {
        self.writable[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::express::ExpressType;
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };

    fn read32(config: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_driver_finds_identity_and_capabilities() {
        let mut config = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
        let first = config.add_capability(CAP_VENDOR, &[16, 1, 2, 3], &[]).unwrap();
        let second = config.add_express(ExpressType::IntegratedEndpoint).unwrap();
        assert_eq!(read32(&config, 0), 0x1042_1af4);
        assert_eq!(read32(&config, 8), 0x0180_0001);
        assert_eq!(read32(&config, 4) >> 16 & 0x10, 0x10, "the status register announces the list");
        assert_eq!(read32(&config, 0x34) & 0xff, u32::from(first));
        assert_eq!(read32(&config, first) & 0xffff, u32::from(second) << 8 | 9);
        assert_eq!(read32(&config, second) & 0xffff, 0x10, "the list ends");
        assert_eq!(read32(&config, second) >> 20 & 0xf, 9);
        assert_eq!(read32(&config, 256), u32::MAX, "there is no extended space");
    }

    #[test]
    fn bars_do_not_overlap_registers() {
        let mut config = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
        let bar = |index, size, wide| Bar { index, size, wide, prefetchable: false };
        config.add_bar(bar(2, 4096, true)).unwrap();
        for bad in [bar(1, 4096, true), bar(3, 4096, false), bar(5, 4096, true), bar(6, 1024, false)] {
            assert!(config.add_bar(bad).is_err(), "{bad:?}");
        }
        for size in [0, 8, 5000, 1 << 32] {
            assert!(config.add_bar(bar(0, size, false)).is_err(), "{size:#x}");
        }
        config.add_bar(bar(0, 1 << 31, false)).unwrap();
        let mut bridge = ConfigSpace::bridge(&IDENTITY);
        assert!(bridge.add_bar(bar(2, 4096, false)).is_err());
    }

    #[test]
    fn a_rom_answers_when_both_its_enable_bits_are_set() {
        let mut config = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
        let rom = Bar { index: ROM_BAR, size: 1 << 17, wide: false, prefetchable: false };
        config.add_bar(rom).unwrap();
        assert!(config.add_bar(rom).is_err(), "there is one");
        config.write(0x30, &[0xff; 4]);
        assert_eq!(read32(&config, 0x30), 0xfffe_0001, "sizing");
        config.set_bar_address(&rom, 0xc012_0000);
        assert_eq!((config.bar_address(&rom), config.decoded_address(&rom)), (0xc012_0000, None));
        config.write(0x04, &[COMMAND_MEMORY as u8, 0]);
        assert_eq!(config.decoded_address(&rom), None, "firmware leaves it off");
        config.write(0x30, &[1]);
        assert_eq!(config.decoded_address(&rom), Some(0xc012_0000));
    }

    #[test]
    fn extended_capabilities_are_a_list_from_0x100() {
        let mut config = ConfigSpace::endpoint(&IDENTITY, EXPRESS_SIZE);
        let first = config.add_extended_capability(0xd, 1, &[1, 2, 3, 4], &[0xff]).unwrap();
        let second = config.add_extended_capability(3, 2, &[0; 8], &[]).unwrap();
        assert_eq!((first, second), (0x100, 0x108));
        assert_eq!(read32(&config, 0x100), 0x1081_000d);
        assert_eq!(read32(&config, 0x108), 0x0002_0003);
        config.write(0x104, &[0xff; 4]);
        assert_eq!(read32(&config, 0x104), 0x0403_02ff);
        let mut small = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
        assert!(small.add_extended_capability(0xd, 1, &[0; 4], &[]).is_err());
    }

    #[test]
    fn a_bridge_keeps_what_enumeration_writes() {
        let mut config = ConfigSpace::bridge(&IDENTITY);
        config.write(0x18, &[0, 1, 1, 0xff]);
        config.write(0x24, &[0xff; 4]);
        assert_eq!(read32(&config, 0x18), 0x0001_0100, "the latency timer is hard-wired");
        assert_eq!(read32(&config, 0x24), 0xfff1_fff1, "64-bit prefetchable window");
        assert_eq!(read32(&config, 0x0c) >> 16 & 0x7f, 1);
    }

    proptest! {
        #[test]
        fn sizing_tells_the_size(shift in 4u32..=40, prefetchable: bool, wide: bool, address: u64) {
            let size = 1 << if wide { shift } else { shift.min(31) };
            let mut config = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
            let bar = Bar { index: 0, size, wide, prefetchable };
            config.add_bar(bar).unwrap();
            config.write(0x10, &[0xff; 4]);
            config.write(0x14, &[0xff; 4]);
            let high = if wide { u64::from(read32(&config, 0x14)) << 32 } else { u64::MAX << 32 };
            let sized = high | u64::from(read32(&config, 0x10) & !0xf);
            prop_assert_eq!((!sized).wrapping_add(1), size);
            prop_assert_eq!(read32(&config, 0x10) & 0xf, u32::from(prefetchable) << 3 | u32::from(wide) << 2);
            config.set_bar_address(&bar, address);
            let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
            prop_assert_eq!(config.bar_address(&bar), address & !(size - 1) & mask);
            prop_assert_eq!(config.decoded_address(&bar), None);
            config.write(4, &[2, 0]);
            prop_assert_eq!(config.decoded_address(&bar), Some(config.bar_address(&bar)));
        }

        #[test]
        fn random_writes_change_writable_bits_only(
            writes in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 1..=8)), 0..64)
        ) {
            let mut config = ConfigSpace::endpoint(&IDENTITY, CONVENTIONAL_SIZE);
            config.add_bar(Bar { index: 0, size: 1 << 15, wide: true, prefetchable: true }).unwrap();
            let cap = config.add_capability(CAP_MSIX, &[0; 10], &[0, 0xc0]).unwrap();
            let before = config.clone();
            for (offset, data) in writes {
                config.write(offset, &data);
            }
            for index in 0..CONVENTIONAL_SIZE {
                let mask = !before.writable[index];
                prop_assert_eq!(config.bytes[index] & mask, before.bytes[index] & mask);
            }
            prop_assert_eq!(config.bytes[usize::from(cap) + 2], 0);
        }
    }
}
