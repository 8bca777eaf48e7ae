//! The PCI Express capability of functions that the VMM makes itself (PCIe 6.0 §7.5.3).

use super::config::{CAP_EXPRESS, ConfigError, ConfigSpace};
use super::slot::Slot;

/// A PCI function's type in its Express capability (PCIe 6.0 table 7-18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpressType {
    /// An endpoint below a port.
    Endpoint = 0x0,
    /// A root port.
    RootPort = 0x4,
    /// A switch's port towards the root.
    UpstreamPort = 0x5,
    /// A switch's port away from the root.
    DownstreamPort = 0x6,
    /// An endpoint on the root complex itself.
    IntegratedEndpoint = 0x9,
}

/// Speed and width of a link, in the encodings of the link registers (PCIe 6.0 §7.5.3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// 1 is 2.5 GT/s, each further step the next generation, up to 6.
    speed: u8,
    /// Lanes, 1 to 32.
    width: u8,
}

impl Link {
    /// 2.5 GT/s, one lane: what every link can do.
    pub const SLOWEST: Self = Self { speed: 1, width: 1 };
    /// 32 GT/s, 16 lanes: what an empty slot promises.
    pub const FAST: Self = Self { speed: 5, width: 16 };

    /// Speed and width as a link register encodes them, or `None` if that is no link.
    pub fn new(speed: u8, width: u8) -> Option<Self> {
        let known = (1..=6).contains(&speed) && matches!(width, 1 | 2 | 4 | 8 | 12 | 16 | 32);
        known.then_some(Self { speed, width })
    }

    /// What a link capabilities or link status register says in its low bits.
    pub fn from_register(register: u32) -> Option<Self> {
        Self::new(register as u8 & 0xf, (register >> 4) as u8 & 0x3f)
    }

    /// The low bits of both registers.
    fn bits(self) -> u16 {
        u16::from(self.width) << 4 | u16::from(self.speed)
    }
}

impl Default for Link {
    fn default() -> Self {
        Self::SLOWEST
    }
}

/// What software reads of a port beside its slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortTraits {
    /// What the port's link can do.
    pub capable: Link,
    /// What it is trained to; what is below it decides.
    pub trained: Link,
    /// Bits 6 to 9 of device capabilities 2: routing and completion of atomic operations, which GPUs' drivers ask
    /// the ports above them for (PCIe 6.0 §7.5.3.15).
    pub atomics: u16,
}

impl PortTraits {
    /// An empty slot's.
    pub const EMPTY_SLOT: Self = Self { capable: Link::FAST, trained: Link::FAST, atomics: 0 };
    /// The bits that `atomics` may have.
    pub const ATOMICS: u16 = 0x03c0;
}

/// Offset of the slot control register in the capability; the status register follows.
pub const SLOT_CONTROL: u16 = 0x18;
/// Offset of the slot status register.
pub const SLOT_STATUS: u16 = 0x1a;
/// Offset of the link status register.
pub const LINK_STATUS: u16 = 0x12;
/// Offset of the link capabilities register.
pub const LINK_CAPABILITIES: u16 = 0x0c;
/// Offset of the device capabilities 2 register.
pub const DEVICE_CAPABILITIES_2: u16 = 0x24;
/// Data link layer active, in the link status register.
const LINK_ACTIVE: u16 = 1 << 13;

/// The registers of the capability, by their offsets in it.
struct Registers {
    bytes: [u8; Self::SIZE],
    writable: [u8; Self::SIZE],
}

impl Registers {
    const SIZE: usize = 0x3c;

    /// Version 2 of the capability, with what every function has.
    fn new(kind: ExpressType) -> Self {
        const DEVICE_CAPABILITIES: usize = 0x04;
        const DEVICE_CONTROL: usize = 0x08;
        let mut registers = Self { bytes: [0; Self::SIZE], writable: [0; Self::SIZE] };
        registers.put(0x02, &(2 | (kind as u16) << 4).to_le_bytes());
        // Role-based error reporting is required of every function (§7.5.3.3).
        registers.put(DEVICE_CAPABILITIES, &(1_u32 << 15).to_le_bytes());
        // Error reporting enables, relaxed ordering, no snoop: accepted, without effect.
        registers.allow(DEVICE_CONTROL, 0x081f);
        registers
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (target, byte) in self.bytes[offset..].iter_mut().zip(bytes) {
            *target |= byte;
        }
    }

    fn allow(&mut self, offset: usize, mask: u16) {
        self.writable[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }

    fn add_to(&self, config: &mut ConfigSpace) -> Result<u16, ConfigError> {
        config.add_capability(CAP_EXPRESS, &self.bytes[2..], &self.writable[2..])
    }
}

impl ConfigSpace {
    /// Adds the capability of an endpoint that has no link of its own to speak of.
    ///
    /// # Errors
    /// When the list is full.
    pub fn add_express(&mut self, kind: ExpressType) -> Result<u16, ConfigError> {
        let mut registers = Registers::new(kind);
        if kind != ExpressType::IntegratedEndpoint {
            // Software must find a trained link.
            let link = Link::SLOWEST.bits().to_le_bytes();
            registers.put(LINK_CAPABILITIES.into(), &link);
            registers.put(LINK_STATUS.into(), &link);
        }
        registers.add_to(self)
    }

    /// Adds the capability of a port. Without `slot` something is soldered to it, and the link is up.
    ///
    /// # Errors
    /// When the list is full.
    pub fn add_port_express(
        &mut self,
        kind: ExpressType,
        traits: &PortTraits,
        slot: Option<&Slot>,
    ) -> Result<u16, ConfigError> {
        const SLOT_IMPLEMENTED: u16 = 1 << 8;
        /// Data link layer link active reporting: required of ports with hot-plug (§7.5.3.6).
        const ACTIVE_REPORTING: u32 = 1 << 20;
        const LINK_CONTROL: usize = 0x10;
        const SLOT_CAPABILITIES: usize = 0x14;
        const ROOT_CONTROL: usize = 0x1c;
        const LINK_CAPABILITIES_2: usize = 0x2c;
        const LINK_CONTROL_2: usize = 0x30;
        let mut registers = Registers::new(kind);
        let reporting = if kind == ExpressType::UpstreamPort { 0 } else { ACTIVE_REPORTING };
        let link = u32::from(traits.capable.bits()) | reporting;
        registers.put(LINK_CAPABILITIES.into(), &link.to_le_bytes());
        registers.put(DEVICE_CAPABILITIES_2.into(), &(traits.atomics & PortTraits::ATOMICS).to_le_bytes());
        // Supported speeds: a bit each from bit 1 up (§7.5.3.18).
        let speeds = ((1_u32 << traits.capable.speed) - 1) << 1;
        registers.put(LINK_CAPABILITIES_2, &speeds.to_le_bytes());
        registers.put(LINK_CONTROL_2, &u16::from(traits.capable.speed).to_le_bytes());
        // Common clock, extended synch: accepted, without effect.
        registers.allow(LINK_CONTROL, 0x00c0);
        if kind == ExpressType::RootPort {
            // System errors and power management events: accepted, none ever comes.
            registers.allow(ROOT_CONTROL, 0x000f);
        }
        if let Some(slot) = slot {
            registers.put(0x02, &SLOT_IMPLEMENTED.to_le_bytes());
            registers.put(SLOT_CAPABILITIES, &slot.capabilities().to_le_bytes());
        }
        let up = slot.is_none_or(Slot::occupied);
        registers.put(LINK_STATUS.into(), &link_status(kind, traits, up).to_le_bytes());
        registers.add_to(self)
    }
}

/// The link status register of a port.
pub fn link_status(kind: ExpressType, traits: &PortTraits, up: bool) -> u16 {
    match (up, kind) {
        (false, _) => 0,
        // Only a port away from the root reports on its data link layer.
        (true, ExpressType::UpstreamPort) => traits.trained.bits(),
        (true, _) => traits.trained.bits() | LINK_ACTIVE,
    }
}
