//! A hot-plug slot: the slot registers of a port, and what their events mean (PCIe 6.0 §6.7, §7.5.3.9 to 11).
//!
//! The slot has an attention button, a power indicator and surprise removal, and neither a power
//! controller nor command completion. That makes Linux's pciehp as quick as it can be:
//! - A device that appears is enabled at once, because the link's state changes. (The 5 seconds in which
//!   pressing a button can be taken back pass only when the button was pressed.)
//! - A device that shall go is asked for by the button; pciehp waits its 5 seconds, lets the driver finish, and
//!   turns the power indicator off, which is what releases the slot here. A power controller would add
//!   a second to each removal, in which pciehp ignores what is plugged in. A guest that does not want to
//!   wait writes 0 to `/sys/bus/pci/slots/N/power`, with the same result.
//! - No command takes time, so no interrupt needs to say that one is done.
//!
//! A guest may also turn a slot off without being asked: the device stays, and can be turned on again.

/// Slot capabilities (§7.5.3.9).
const ATTENTION_BUTTON: u32 = 1 << 0;
const POWER_INDICATOR: u32 = 1 << 4;
const SURPRISE: u32 = 1 << 5;
const HOT_PLUG: u32 = 1 << 6;
const NO_COMMAND_COMPLETED: u32 = 1 << 18;
const NUMBER_SHIFT: u32 = 19;
/// The physical slot number has 13 bits.
pub const SLOT_NUMBER_MAX: u16 = (1 << 13) - 1;

/// Events, at the same bits in the status register and, as enables, in the control register (§7.5.3.10).
const BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
/// In the status register.
const LINK_CHANGED: u16 = 1 << 8;
/// In the control register.
const LINK_CHANGED_ENABLE: u16 = 1 << 12;
const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED;
const PRESENT: u16 = 1 << 6;

const INTERRUPT_ENABLE: u16 = 1 << 5;
const INDICATOR: u16 = 0b11 << 8;
const INDICATOR_ON: u16 = 0b01 << 8;
const INDICATOR_BLINK: u16 = 0b10 << 8;
const INDICATOR_OFF: u16 = 0b11 << 8;
/// What the guest may change: no bit of anything that the slot does not have.
const WRITABLE: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | INTERRUPT_ENABLE | INDICATOR | LINK_CHANGED_ENABLE;

/// How far a removal that the host asked for has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removal {
    /// Nobody asked.
    None,
    /// Asked for while the guest was about to turn the slot on, when it would ignore the button.
    Due,
    /// The button was pressed.
    Asked,
}

/// The slot registers of one port.
#[derive(Clone, Debug)]
pub struct Slot {
    number: u16,
    control: u16,
    events: u16,
    occupied: bool,
    removal: Removal,
}

impl Slot {
    /// Slot `number` as software numbers it, at most [`SLOT_NUMBER_MAX`]. What is in it when the machine starts is on.
    pub fn new(number: u16, occupied: bool) -> Self {
        let control = if occupied { INDICATOR_ON } else { INDICATOR_OFF };
        Self { number: number & SLOT_NUMBER_MAX, control, events: 0, occupied, removal: Removal::None }
    }

    /// The physical slot number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Whether there is something in it.
    pub fn occupied(&self) -> bool {
        self.occupied
    }

    /// The slot capabilities register.
    pub fn capabilities(&self) -> u32 {
        let has = ATTENTION_BUTTON | POWER_INDICATOR | SURPRISE | HOT_PLUG | NO_COMMAND_COMPLETED;
        has | u32::from(self.number) << NUMBER_SHIFT
    }

    /// The slot control register.
    pub fn control(&self) -> u16 {
        self.control
    }

    /// The slot status register.
    pub fn status(&self) -> u16 {
        self.events | if self.occupied { PRESENT } else { 0 }
    }

    /// The guest writes the control register, those bits of it that are in `mask`.
    pub fn write_control(&mut self, value: u16, mask: u16) {
        let mask = mask & WRITABLE;
        let before = self.control & INDICATOR;
        self.control = self.control & !mask | value & mask;
        if self.control & INDICATOR == 0 {
            // A reserved value, which pciehp never writes.
            self.control |= before;
        }
        if self.removal == Removal::Due && self.control & INDICATOR != INDICATOR_BLINK {
            self.press();
        }
    }

    /// The guest clears the events in `bits` of the status register.
    pub fn clear_events(&mut self, bits: u16) {
        self.events &= !(bits & EVENTS);
    }

    /// Whether an event asks for an interrupt: raised when this becomes true (§6.7.3.4).
    pub fn interrupt(&self) -> bool {
        let link = if self.control & LINK_CHANGED_ENABLE == 0 { 0 } else { LINK_CHANGED };
        let enabled = self.control & (BUTTON_PRESSED | PRESENCE_CHANGED) | link;
        self.control & INTERRUPT_ENABLE != 0 && self.events & enabled != 0
    }

    /// A device is put in.
    pub fn insert(&mut self) {
        self.change(true);
    }

    /// What is in it is pulled out.
    pub fn remove(&mut self) {
        self.change(false);
        self.events &= !BUTTON_PRESSED;
    }

    fn change(&mut self, occupied: bool) {
        if self.occupied != occupied {
            self.occupied = occupied;
            self.events |= PRESENCE_CHANGED | LINK_CHANGED;
        }
        self.removal = Removal::None;
    }

    /// Asks the guest to let go of what is in the slot. Asking again is harmless: a second press, which would
    /// take the first one back, comes only when the guest has neither seen the first nor acted on it.
    pub fn request_removal(&mut self) {
        match (self.control & INDICATOR, self.removal) {
            _ if !self.occupied => {}
            (INDICATOR_BLINK, Removal::None) => self.removal = Removal::Due,
            (INDICATOR_BLINK, _) => {}
            _ => self.press(),
        }
    }

    fn press(&mut self) {
        self.removal = Removal::Asked;
        if self.control & INDICATOR == INDICATOR_ON {
            self.events |= BUTTON_PRESSED;
        }
    }

    /// Whether the guest has let go of what the host asked for: it may be taken out now.
    pub fn released(&self) -> bool {
        self.occupied && self.removal == Removal::Asked && self.control & INDICATOR == INDICATOR_OFF
    }

    /// A reset of the port: enables are off, events forgotten; what is in the slot stays, and so does what the host
    /// asked for.
    pub fn reset(&mut self) {
        let removal = if self.removal == Removal::None { Removal::None } else { Removal::Due };
        *self = Self { removal, ..Self::new(self.number, self.occupied) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What pciehp does with the registers of a slot that has no power controller.
    struct Pciehp {
        slot: Slot,
        on: bool,
        blinking_off: bool,
    }

    impl Pciehp {
        fn new(slot: Slot) -> Self {
            let on = slot.occupied();
            let mut driver = Self { slot, on, blinking_off: false };
            let enables = BUTTON_PRESSED | INTERRUPT_ENABLE | LINK_CHANGED_ENABLE;
            driver.slot.write_control(enables, enables);
            driver
        }

        fn indicate(&mut self, state: u16) {
            self.slot.write_control(state, INDICATOR);
        }

        /// Handles interrupts until there is none.
        fn service(&mut self) {
            while self.slot.interrupt() {
                let events = self.slot.status() & EVENTS;
                self.slot.clear_events(events);
                if events & BUTTON_PRESSED != 0 && self.on {
                    self.blinking_off = !self.blinking_off;
                    self.indicate(if self.blinking_off { INDICATOR_BLINK } else { INDICATOR_ON });
                }
                if events & (PRESENCE_CHANGED | LINK_CHANGED) != 0 {
                    if self.on {
                        self.turn_off();
                    }
                    if self.slot.occupied() {
                        self.indicate(INDICATOR_BLINK);
                        self.indicate(INDICATOR_ON);
                        self.on = true;
                    }
                }
            }
        }

        fn turn_off(&mut self) {
            self.on = false;
            self.blinking_off = false;
            self.indicate(INDICATOR_OFF);
        }

        fn five_seconds_later(&mut self) {
            if self.blinking_off {
                self.turn_off();
            }
        }
    }

    #[test]
    fn a_device_comes_is_asked_for_and_goes() {
        let mut guest = Pciehp::new(Slot::new(3, false));
        assert_eq!(guest.slot.capabilities(), 0x0004_0071 | 3 << 19);
        for _ in 0..10 {
            guest.slot.insert();
            guest.service();
            assert!(guest.on && !guest.slot.released());
            guest.slot.request_removal();
            guest.service();
            assert!(guest.blinking_off && !guest.slot.released());
            guest.slot.request_removal();
            guest.service();
            assert!(guest.blinking_off, "asking again took the request back");
            guest.five_seconds_later();
            assert!(guest.slot.released());
            guest.slot.remove();
            guest.service();
            assert!(!guest.on && !guest.slot.released());
        }
    }

    #[test]
    fn a_guest_that_turns_a_slot_off_unasked_keeps_the_device() {
        let mut guest = Pciehp::new(Slot::new(1, true));
        guest.turn_off();
        assert!(!guest.slot.released());
        guest.slot.request_removal();
        assert!(guest.slot.released(), "and lets go at once when it is asked for");
    }

    #[test]
    fn a_request_waits_until_the_guest_heeds_the_button() {
        let mut slot = Slot::new(1, true);
        slot.write_control(INDICATOR_BLINK, INDICATOR);
        slot.request_removal();
        assert_eq!(slot.status() & BUTTON_PRESSED, 0);
        slot.write_control(INDICATOR_ON, INDICATOR);
        assert_eq!(slot.status() & BUTTON_PRESSED, BUTTON_PRESSED);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Control(u16, u16),
        Clear(u16),
        Insert,
        Remove,
        Request,
        Reset,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            any::<(u16, u16)>().prop_map(|(value, mask)| Step::Control(value, mask)),
            any::<u16>().prop_map(Step::Clear),
            Just(Step::Insert),
            Just(Step::Remove),
            Just(Step::Request),
            Just(Step::Reset),
        ];
        proptest::collection::vec(step, 0..64)
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_a_slot_is_released_only_when_asked_for(occupied: bool, steps in steps()) {
            let mut slot = Slot::new(7, occupied);
            let (mut present, mut asked) = (occupied, false);
            for step in steps {
                let before = slot.clone();
                match step {
                    Step::Control(value, mask) => slot.write_control(value, mask),
                    Step::Clear(bits) => slot.clear_events(bits),
                    Step::Insert => { slot.insert(); (present, asked) = (true, false) }
                    Step::Remove => { slot.remove(); (present, asked) = (false, false) }
                    Step::Request => { slot.request_removal(); asked |= present }
                    Step::Reset => slot.reset(),
                }
                prop_assert_eq!(slot.occupied(), present);
                prop_assert_eq!(slot.status() & PRESENT != 0, present);
                prop_assert!(!slot.released() || asked && present);
                prop_assert_eq!(slot.control() & !WRITABLE, 0);
                prop_assert!(slot.control() & INDICATOR != 0);
                if before.occupied() != present {
                    prop_assert_eq!(slot.status() & (PRESENCE_CHANGED | LINK_CHANGED), PRESENCE_CHANGED | LINK_CHANGED);
                }
            }
            // Whatever happened before: a guest that then behaves gets the device, and lets go of it.
            let mut guest = Pciehp::new(slot);
            guest.slot.remove();
            guest.service();
            guest.turn_off();
            guest.slot.insert();
            guest.service();
            prop_assert!(guest.on);
            guest.slot.request_removal();
            guest.service();
            guest.five_seconds_later();
            prop_assert!(guest.slot.released());
        }
    }
}
