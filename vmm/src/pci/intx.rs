//! Which I/O APIC pin a legacy interrupt arrives at.
//!
//! The eight pins above the sixteen of ISA are for PCI. `_PRT` names them directly, without link devices, which
//! makes them level-triggered and active low to a guest (PCI Firmware 3.3; ACPI 6.5 §6.2.13). KVM's I/O APIC goes by
//! the level it is given and never looks at the polarity, so a VMM raises a pin's GSI by an irqfd with a resample
//! eventfd as for any level-triggered pin.

/// GSIs of PCI's legacy interrupts.
pub const INTX_GSIS: std::ops::Range<u32> = 16..24;

/// The GSI of a device directly on a root bus: `device` is its number there, `pin` 1 (INTA) to 4 (INTD) as in the
/// interrupt pin register. `None` for a function without one.
pub fn intx_gsi(device: u8, pin: u8) -> Option<u32> {
    let pins = INTX_GSIS.end - INTX_GSIS.start;
    let index = u32::from(pin).checked_sub(1).filter(|index| *index < 4)?;
    Some(INTX_GSIS.start + (u32::from(device) + index) % pins)
}

/// The pin on the bus above that a bridge turns `pin` of `device` below it into (PCI-to-PCI Bridge 1.2 §9.1).
pub fn swizzle(device: u8, pin: u8) -> u8 {
    match pin {
        1..=4 => (pin - 1 + device % 4) % 4 + 1,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_spread_over_the_gsis_and_turn_at_each_bridge() {
        assert_eq!([1, 2, 3, 4].map(|pin| intx_gsi(16, pin)), [Some(16), Some(17), Some(18), Some(19)]);
        assert_eq!(
            [16, 20, 23, 24].map(|device| intx_gsi(device, 1)),
            [Some(16), Some(20), Some(23), Some(16)]
        );
        assert_eq!((intx_gsi(16, 0), intx_gsi(16, 5), intx_gsi(255, 255)), (None, None, None));
        assert_eq!([0, 1, 2, 5].map(|device| swizzle(device, 1)), [1, 2, 3, 2]);
        assert_eq!((swizzle(1, 4), swizzle(3, 0)), (1, 0));
    }
}
