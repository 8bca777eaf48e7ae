//! Whole initialisations and requests, by accesses to configuration space and BAR as a guest makes them.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::hypervisor::MsiVector;
use crate::virtio::rng::Rng;
use crate::virtio::test_machine::{
    ACKNOWLEDGE, BUFFERS, DRIVER, DRIVER_OK, FEATURES_OK, HIGH_WINDOW, MEMORY, NEEDS_RESET, TestMachine,
    TestQueue, VERSION_1, signalled, writable,
};

const READY: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

/// Asks for 100 random bytes and checks that some came.
fn random_bytes_come(machine: &TestMachine, queue: &mut TestQueue<'_>) {
    machine.memory.write_slice(&[0; 100], GuestAddress(BUFFERS)).unwrap();
    let head = queue.send(&[writable(BUFFERS, 100)]);
    assert_eq!(queue.wait(), (head, 100));
    let mut data = [0; 100];
    machine.memory.read_slice(&mut data, GuestAddress(BUFFERS)).unwrap();
    assert_ne!(data, [0; 100]);
}

#[test]
fn a_driver_finds_the_device() {
    let machine = TestMachine::new(Rng::new());
    assert_eq!(machine.config(0, 4), 0x1044_1af4);
    assert!(machine.config(8, 1) >= 1, "a modern device");
    assert_eq!(machine.bar(), HIGH_WINDOW.start, "programmed before the guest looks");
    assert_ne!(machine.window, 0);
    for kind in 1..=5 {
        machine.structure(kind);
    }
    machine.enable();
    assert_eq!(machine.common(0x12, 2), 1, "one queue");
    assert_eq!(machine.device_features() & VERSION_1, VERSION_1);
    assert!(machine.hypervisor.vectors.lock().unwrap().is_empty(), "vectors are taken on first use");
}

#[test]
fn requests_are_served_and_again_after_a_reset() {
    let machine = TestMachine::new(Rng::new());
    for _ in 0..3 {
        let mut queues = machine.start();
        for _ in 0..3 {
            random_bytes_come(&machine, &mut queues[0]);
        }
        machine.set_status(0);
        assert_eq!(machine.status(), 0);
        assert!(machine.hypervisor.ioevents().is_empty());
    }
}

#[test]
fn drivers_without_event_idx_are_notified_too() {
    let machine = TestMachine::new(Rng::new());
    let mut queues = machine.start_with(VERSION_1);
    random_bytes_come(&machine, &mut queues[0]);
    random_bytes_come(&machine, &mut queues[0]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let machine = TestMachine::new(Rng::new());
    machine.enable();
    let offered = machine.device_features();
    assert!(!machine.negotiate(offered | 1 << 20));
    machine.set_status(0);
    assert!(!machine.negotiate(offered & !VERSION_1), "legacy drivers are refused");
    machine.set_status(READY | DRIVER_OK);
    assert_eq!(machine.status() & DRIVER_OK, 0, "and cannot go on");
    machine.set_status(0);
    assert!(machine.negotiate(offered));
    machine.set_common(0xc, &[0; 4]);
    assert_eq!(machine.common(0xc, 4), offered >> 32, "what was agreed on stays");
}

#[test]
fn the_status_goes_forward_in_order_only() {
    let machine = TestMachine::new(Rng::new());
    machine.enable();
    for early in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER_OK | READY] {
        machine.set_status(early);
        assert_eq!(machine.status(), 0, "{early:#x} came first");
    }
    assert!(machine.negotiate(VERSION_1));
    machine.set_status(ACKNOWLEDGE);
    assert_eq!(machine.status(), READY, "bits are cleared by reset alone");
    machine.set_status(READY | NEEDS_RESET);
    assert_eq!(machine.status(), READY, "that bit is the device's");
    machine.set_status(READY | 0x80);
    assert_eq!(machine.status(), READY | 0x80);
    machine.set_status(READY | 0x80 | DRIVER_OK);
    assert_eq!(machine.status(), READY | 0x80, "a driver that gave up starts again from reset");
}

#[test]
fn a_queue_is_frozen_once_enabled_and_after_driver_ok() {
    let machine = TestMachine::new(Rng::new());
    machine.enable();
    machine.set_common(0x18, &[8, 0]);
    assert_eq!(machine.common(0x18, 2), 64, "not before FEATURES_OK");
    let _queues = machine.start();
    let before: Vec<u64> = (0x18..0x38).step_by(2).map(|offset| machine.common(offset, 2)).collect();
    for offset in [0x18, 0x1c, 0x20, 0x22, 0x28, 0x30] {
        machine.set_common(offset, &[4, 0]);
        machine.set_common(offset, &[0, 0, 1, 0]);
    }
    let after: Vec<u64> = (0x18..0x38).step_by(2).map(|offset| machine.common(offset, 2)).collect();
    assert_eq!(before, after);
    machine.set_common(0x16, &[9, 0]);
    assert_eq!(machine.common(0x18, 2), 0, "a queue that is not there has size 0");
}

#[test]
fn rings_outside_memory_stop_the_device_not_the_machine() {
    let end = MEMORY as u64;
    for rings in
        [[end - 16, 0, 0x1000], [0, end - 2, 0x1000], [0, 0x1000, end - 4], [u64::MAX - 15, 0, 0x1000]]
    {
        let machine = TestMachine::new(Rng::new());
        machine.enable();
        assert!(machine.negotiate(VERSION_1));
        machine.set_up_queue(0, 64, rings, 0xffff);
        machine.set_status(READY | DRIVER_OK);
        assert_eq!(machine.status() & NEEDS_RESET, NEEDS_RESET, "{rings:x?}");
        assert!(machine.device.lock().unwrap().activation_error().is_some());
        assert!(machine.hypervisor.ioevents().is_empty());
        let mut queues = machine.start();
        random_bytes_come(&machine, &mut queues[0]);
    }
}

#[test]
fn a_driver_that_breaks_its_ring_is_told_to_reset() {
    let machine = TestMachine::new(Rng::new());
    let queues = machine.start();
    machine.set_common(0x10, &[1, 0]);
    machine.program_vector(1, 0x99);
    // 1000 chains in a ring of 64.
    machine.memory.write_obj(1000u16, GuestAddress(0x1_0000 + 16 * 64 + 2)).unwrap();
    queues[0].notify();
    let vector = machine.hypervisor.vector(0x99).unwrap();
    assert!(signalled(vector.eventfd(), true), "a configuration interrupt");
    assert_eq!(machine.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(!machine.device.lock().unwrap().is_running());
    drop(queues);
    let mut queues = machine.start();
    random_bytes_come(&machine, &mut queues[0]);
}

#[test]
fn notifications_follow_the_bar() {
    let machine = TestMachine::new(Rng::new());
    let mut queues = machine.start();
    let old = machine.bar();
    assert_eq!(machine.hypervisor.ioevents(), [old + layout::NOTIFY]);
    let new = HIGH_WINDOW.start + (1 << 30);
    machine.set_config(4, &[0, 0]);
    assert!(machine.hypervisor.ioevents().is_empty(), "nothing answers without decoding");
    machine.set_config(0x10, &(new as u32).to_le_bytes());
    machine.set_config(0x14, &((new >> 32) as u32).to_le_bytes());
    machine.enable();
    assert_eq!(machine.bar(), new);
    assert_eq!(machine.hypervisor.ioevents(), [new + layout::NOTIFY]);
    random_bytes_come(&machine, &mut queues[0]);
    // Moved while it decodes, through an address outside the windows.
    machine.set_config(0x14, &[0; 4]);
    assert!(machine.hypervisor.ioevents().is_empty());
    machine.set_config(0x14, &((new >> 32) as u32).to_le_bytes());
    random_bytes_come(&machine, &mut queues[0]);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let machine = TestMachine::new(Rng::new());
    let access = |offset: u32, length: u32| {
        machine.set_config(machine.window + 4, &[0]);
        machine.set_config(machine.window + 8, &offset.to_le_bytes());
        machine.set_config(machine.window + 12, &length.to_le_bytes());
    };
    access(0x14, 1);
    machine.set_config(machine.window + 16, &[ACKNOWLEDGE]);
    assert_eq!(machine.config(machine.window + 16, 1), u32::from(ACKNOWLEDGE));
    access(0x12, 2);
    assert_eq!(machine.config(machine.window + 16, 2), 1);
    access(u32::MAX - 3, 4);
    machine.set_config(machine.window + 16, &[0; 4]);
    access(0, 3);
    machine.config(machine.window + 16, 4);
    machine.enable();
    assert_eq!(machine.status(), ACKNOWLEDGE);
}

#[test]
fn masked_vectors_wait() {
    let machine = TestMachine::new(Rng::new());
    let mut queues = machine.start();
    let vector = machine.hypervisor.vector(0x40).unwrap();
    machine.write(layout::MSIX_TABLE + 12, &[1, 0, 0, 0]);
    let head = queues[0].send(&[writable(BUFFERS, 8)]);
    while machine.read(layout::MSIX_PENDING, 8) & 1 == 0 {
        std::thread::yield_now();
    }
    assert!(!signalled(vector.eventfd(), false), "masked");
    machine.write(layout::MSIX_TABLE + 12, &[0; 4]);
    assert_eq!(queues[0].wait(), (head, 8));
    assert_eq!(machine.read(layout::MSIX_PENDING, 8), 0);
    // The function mask does the same for all. (Looking asks for the next interrupt.)
    assert_eq!(queues[0].driver.used(), None);
    machine.set_config(machine.msix + 2, &[0, 0xc0]);
    let head = queues[0].send(&[writable(BUFFERS, 8)]);
    while machine.read(layout::MSIX_PENDING, 8) & 1 == 0 {
        std::thread::yield_now();
    }
    machine.set_config(machine.msix + 2, &[0, 0x80]);
    assert_eq!(queues[0].wait(), (head, 8));
}

#[test]
fn a_vector_handed_out_is_detached_while_masked() {
    let machine = TestMachine::new(Rng::new());
    let _queues = machine.start();
    let interrupt = machine.device.lock().unwrap().interrupt();
    assert!(interrupt.queue_irqfd(5).is_none());
    let event = interrupt.queue_irqfd(0).unwrap();
    let vector = machine.hypervisor.vector(0x40).unwrap();
    machine.write(layout::MSIX_TABLE + 12, &[1, 0, 0, 0]);
    assert!(vector.route.lock().unwrap().is_none());
    event.write(1).unwrap();
    assert_eq!(machine.read(layout::MSIX_PENDING, 8), 1, "the kernel's signal shows as pending");
    machine.write(layout::MSIX_TABLE + 12, &[0; 4]);
    assert!(vector.route.lock().unwrap().is_some());
}

#[test]
fn without_msix_a_driver_polls_the_isr() {
    let machine = TestMachine::new(Rng::new());
    let mut queues = machine.start();
    machine.set_config(machine.msix + 2, &[0, 0]);
    queues[0].send(&[writable(BUFFERS, 8)]);
    while machine.read(layout::ISR, 1) != 1 {
        std::thread::yield_now();
    }
    assert_eq!(machine.read(layout::ISR, 1), 0, "reading clears it");
    assert!(queues[0].driver.used().is_some());
}

#[test]
fn vectors_that_are_not_in_the_table_are_refused() {
    let machine = TestMachine::new(Rng::new());
    machine.enable();
    machine.set_common(0x10, &[2, 0]);
    assert_eq!(machine.common(0x10, 2), 0xffff);
    machine.set_common(0x10, &[1, 0]);
    assert_eq!(machine.common(0x10, 2), 1);
}

#[derive(Clone, Debug)]
enum Access {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    Read(u64, usize),
    ReadConfig(u16, usize),
}

fn access() -> impl Strategy<Value = Access> {
    let data = || {
        (0usize..4, any::<u64>(), any::<bool>()).prop_map(|(size, value, small)| {
            let value = if small { value & 0xf } else { value };
            value.to_le_bytes()[..1 << size].to_vec()
        })
    };
    // Half of the accesses go where the registers are.
    let bar = || {
        prop_oneof![
            0..layout::BAR_SIZE - 8,
            (0..6u64, 0..0x40u64).prop_map(|(page, at)| page * layout::PAGE + at),
        ]
    };
    let config = || prop_oneof![0u16..248, Just(4u16), Just(0x10), Just(0x14)];
    prop_oneof![
        (config(), data()).prop_map(|(at, data)| Access::Config(at, data[..data.len().min(4)].to_vec())),
        (bar(), data()).prop_map(|(at, data)| Access::Bar(at, data)),
        (bar(), 0usize..4).prop_map(|(at, size)| Access::Read(at, 1 << size)),
        (config(), 0usize..3).prop_map(|(at, size)| Access::ReadConfig(at, 1 << size)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// No sequence of accesses makes the transport panic, or keeps the next driver from working.
    #[test]
    fn hostile_accesses_do_no_harm(accesses in proptest::collection::vec(access(), 0..200)) {
        let machine = TestMachine::new(Rng::new());
        machine.enable();
        for access in accesses {
            let device = machine.device.clone();
            match access {
                Access::Config(at, data) => machine.set_config(at, &data),
                Access::ReadConfig(at, size) => drop(machine.config(at, size)),
                Access::Bar(at, data) => {
                    crate::pci::PciDevice::write_bar(&mut *device.lock().unwrap(), 0, at, &data);
                }
                Access::Read(at, size) => {
                    crate::pci::PciDevice::read_bar(&mut *device.lock().unwrap(), 0, at, &mut [0; 8][..size]);
                }
            }
        }
        let bar = HIGH_WINDOW.start;
        machine.set_config(4, &[0, 0]);
        machine.set_config(0x10, &(bar as u32).to_le_bytes());
        machine.set_config(0x14, &((bar >> 32) as u32).to_le_bytes());
        machine.set_config(machine.msix + 2, &[0, 0]);
        let mut queues = machine.start();
        random_bytes_come(&machine, &mut queues[0]);
    }
}
