#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]

use super::super::fake::{FakeFunction, FakeHypervisor, FakeReset};
use super::super::function::InterruptKind::{Intx, Msi, Msix};
use super::*;
use crate::bus::lock;
use crate::hypervisor::MsiMessage;

struct Guest {
    function: Arc<FakeFunction>,
    hypervisor: Arc<FakeHypervisor>,
    device: VfioPci,
}

fn guest_with(parts: FunctionParts) -> Guest {
    let (function, hypervisor) = (FakeFunction::endpoint(), Arc::new(FakeHypervisor::default()));
    let device = VfioPci::new(Arc::clone(&function) as _, parts, Arc::clone(&hypervisor) as _).unwrap();
    Guest { function, hypervisor, device }
}

fn guest() -> Guest {
    guest_with(FakeFunction::parts())
}

impl Guest {
    fn table(&mut self, entry: u64, address: u32, data: u32, mask: u32) {
        for (offset, value) in [(0, address), (4, 0), (8, data), (12, mask)] {
            self.device.write_bar(0, 0x2000 + entry * 16 + offset, &value.to_le_bytes());
        }
    }

    fn connected(&self) -> Vec<(super::super::function::InterruptKind, u16, Vec<bool>)> {
        std::mem::take(&mut lock(&self.function.log).connected)
    }
}

#[test]
fn memory_bars_and_the_rom_are_shown_and_io_is_not() {
    let mut guest = guest();
    let bars: Vec<_> =
        guest.device.config().bars().iter().map(|bar| (bar.index, bar.size, bar.wide)).collect();
    assert_eq!(bars, [(0, 1 << 16, true), (2, 64, false), (6, 1 << 16, false)]);
    assert_eq!(guest.device.pin(), 1);
    assert_eq!(lock(&guest.function.log).config, [(4, vec![2, 0])], "it decodes from the start, without DMA");
}

#[test]
fn accesses_reach_the_region_but_never_the_real_msix_table() {
    let mut guest = guest();
    let mut data = [0; 4];
    guest.device.read_bar(2, 8, &mut data);
    assert_eq!(data, [10; 4]);
    guest.device.write_bar(0, 0x1ffc, &[1, 2, 3, 4]);
    guest.table(1, 0xfee0_0000, 0x41, 0);
    guest.device.write_bar(0, 0x3000, &[0xff; 4]);
    guest.device.write_bar(6, 0, &[1]);
    assert_eq!(lock(&guest.function.log).regions, [(0, 0x1ffc, vec![1, 2, 3, 4])]);
    guest.device.read_bar(0, 0x2018, &mut data);
    assert_eq!(data, 0x41_u32.to_le_bytes(), "the guest reads its own message back");
}

#[test]
fn msix_vectors_are_connected_when_they_are_first_unmasked() {
    let mut guest = guest();
    guest.device.wire_pin(16);
    assert_eq!(guest.connected(), [(Intx, 0, vec![true])]);
    // As Linux does: on with all masked, then entries one by one.
    guest.device.write_config(0xb2, &[0x07, 0xc0]);
    assert_eq!(lock(&guest.function.log).disconnected, [Intx]);
    assert_eq!(guest.connected(), [(Msix, 0, vec![false])]);
    guest.table(0, 0xfee0_0000, 0x30, 0);
    guest.table(3, 0xfee0_1000, 0x31, 0);
    assert!(guest.connected().is_empty(), "the function's mask still holds");
    guest.device.write_config(0xb2, &[0x07, 0x80]);
    assert_eq!(guest.connected(), [(Msix, 0, vec![true]), (Msix, 3, vec![true])]);
    guest.table(5, 0xfee0_1000, 0x32, 0);
    assert_eq!(guest.connected(), [(Msix, 5, vec![true])]);
    let routes: Vec<_> = lock(&guest.hypervisor.routes).iter().flatten().map(|m| m.data).collect();
    assert_eq!(routes, [0x30, 0x31, 0x32]);
    guest.table(3, 0xfee0_1000, 0x31, 1);
    assert_eq!(lock(&guest.hypervisor.routes)[1], None, "masking detaches the irqfd");
    guest.device.write_config(0xb2, &[0x07, 0]);
    assert_eq!(lock(&guest.function.log).disconnected, [Intx, Msix]);
    assert_eq!(guest.connected(), [(Intx, 0, vec![true])], "the pin is back");
}

#[test]
fn kernels_that_cannot_add_vectors_get_them_all_anew() {
    let mut parts = FakeFunction::parts();
    parts.interrupts.msix_grows = false;
    let mut guest = guest_with(parts);
    guest.device.write_config(0xb2, &[0x07, 0x80]);
    guest.table(1, 0xfee0_0000, 0x30, 0);
    guest.table(0, 0xfee0_0000, 0x31, 0);
    let connected = guest.connected();
    assert_eq!(connected[0], (Msix, 0, vec![false]));
    assert_eq!(connected[1], (Msix, 0, vec![false, true]));
    assert_eq!(connected[2], (Msix, 0, vec![true]), "within what is allocated");
    assert_eq!(lock(&guest.function.log).disconnected, [Msix]);
}

#[test]
fn several_msi_vectors_get_messages_of_their_own_and_masks() {
    let mut guest = guest();
    guest.device.write_config(0x54, &0xfee0_3000_u32.to_le_bytes());
    guest.device.write_config(0x5c, &0x4c_u16.to_le_bytes());
    guest.device.write_config(0x60, &[0b0100, 0, 0, 0]);
    guest.device.write_config(0x52, &[0x21, 0]);
    assert_eq!(guest.connected(), [(Msi, 0, vec![true; 4])]);
    let message = |data| Some(MsiMessage { address: 0xfee0_3000, data });
    let expected = [message(0x4c), message(0x4d), None, message(0x4f)];
    assert_eq!(*lock(&guest.hypervisor.routes), expected);
    guest.device.write_config(0x60, &[0, 0, 0, 0]);
    assert_eq!(lock(&guest.hypervisor.routes)[2], message(0x4e));
    // Asked for more than it said it has: it gets what there is.
    guest.device.write_config(0x52, &[0, 0]);
    guest.device.write_config(0x52, &[0x51, 0]);
    assert_eq!(guest.connected(), [(Msi, 0, vec![true; 4])]);
}

#[test]
fn a_reset_by_the_guest_leaves_nothing_on() {
    let mut guest = guest();
    guest.device.wire_pin(16);
    guest.device.write_config(4, &[6, 0]);
    guest.device.write_config(0xb2, &[0x07, 0x80]);
    guest.device.write_config(0x78, &[0, 0x80]);
    assert_eq!(lock(&guest.function.log).resets, 1);
    assert_eq!(lock(&guest.function.log).disconnected, [Intx, Msix]);
    let bar = guest.device.config().bars()[0];
    assert_eq!(guest.device.config().decoded_address(&bar), None);
    guest.device.bus_reset();
    assert_eq!(lock(&guest.function.log).resets, 2);
    let last = lock(&guest.function.log).config.last().cloned();
    assert_eq!(last, Some((4, vec![2, 0])), "it decodes on the host, and masters the bus no more");
}

/// At its own request, as when it reboots: the machine goes on, and what is the VMM's is as after a reset.
#[test]
fn a_reset_by_the_guest_that_fails_leaves_nothing_on_either() {
    let mut guest = guest();
    lock(&guest.function.resets)[0] = FakeReset::Fails;
    guest.device.wire_pin(16);
    for round in 1..=3 {
        guest.device.write_config(4, &[6, 0]);
        guest.device.write_config(0xb2, &[0x07, 0x80]);
        guest.connected();
        guest.device.write_config(0x78, &[0, 0x80]);
        assert_eq!(lock(&guest.function.log).resets, round);
        let bar = guest.device.config().bars()[0];
        assert_eq!(guest.device.config().decoded_address(&bar), None);
        let last = lock(&guest.function.log).config.last().cloned();
        assert_eq!(last, Some((4, vec![2, 0])), "it masters the bus no more");
        assert_eq!(guest.connected(), [(Intx, 0, vec![true])], "no messages, but the pin");
        assert!(guest.device.reset_failed, "said, and not again");
    }
}

/// A guest that finds a device gone uses for something else what the device was to write to.
#[test]
fn one_that_is_taken_off_the_bus_does_no_dma_any_more() {
    let mut guest = guest();
    let _file = mapped(&mut guest);
    guest.device.wire_pin(16);
    guest.device.write_config(4, &[6, 0]);
    guest.device.write_config(0xb2, &[0x07, 0x80]);
    guest.device.bar_moved(0, Some(0x1_0000_0000));
    assert_eq!(lock(&guest.hypervisor.slots).len(), 2);
    guest.device.leave();
    assert_eq!(lock(&guest.function.log).disconnected, [Intx, Msix]);
    assert_eq!(lock(&guest.function.log).config.last().cloned(), Some((4, vec![2, 0])));
    assert!(lock(&guest.hypervisor.slots).is_empty(), "nor does the guest reach it");
}

#[test]
fn pages_with_msix_structures_are_not_mapped() {
    let guest = guest();
    assert_eq!(trapped_pages(&guest.device.interrupts, 0), [0x2000..0x3000, 0x3000..0x4000]);
    assert_eq!(trapped_pages(&guest.device.interrupts, 2), []);
}

/// BAR 0 is mapped from the file.
fn mapped(guest: &mut Guest) -> std::fs::File {
    use std::os::fd::AsFd;
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    guest.device.map_bars(file.as_fd(), |_| 0).unwrap();
    file
}

#[test]
fn mapped_parts_follow_the_bar() {
    let mut guest = guest();
    let _file = mapped(&mut guest);
    let slots = |guest: &Guest| lock(&guest.hypervisor.slots).values().copied().collect::<Vec<_>>();
    guest.device.bar_moved(0, Some(0x1_0000_0000));
    assert_eq!(slots(&guest), [(0x1_0000_0000, 0x2000), (0x1_0000_4000, 0xc000)]);
    guest.device.bar_moved(0, None);
    assert_eq!(slots(&guest), []);
    guest.device.bar_moved(0, Some(0x2_0000_0000));
    let hypervisor = Arc::clone(&guest.hypervisor);
    drop(guest);
    assert!(lock(&hypervisor.slots).is_empty(), "nothing is left mapped");
}
