use super::*;
use crate::bus::lock;
use crate::vfio::fake::FakeFunction;
use proptest::prelude::*;

fn bars() -> Vec<Bar> {
    vec![
        Bar { index: 0, size: 1 << 16, wide: true, prefetchable: true },
        Bar { index: 2, size: 64, wide: false, prefetchable: false },
    ]
}

fn config(function: &FakeFunction) -> VirtualConfig {
    VirtualConfig::new(function, 4096, &bars()).unwrap()
}

fn read(config: &VirtualConfig, function: &FakeFunction, offset: u16) -> u32 {
    let mut data = [0xff; 4];
    config.read(function, offset, &mut data);
    u32::from_le_bytes(data)
}

fn view(config: &VirtualConfig, function: &FakeFunction) -> Vec<u8> {
    (0..1024).flat_map(|index| read(config, function, index * 4).to_le_bytes()).collect()
}

#[test]
fn the_guest_sees_what_its_driver_needs_and_nothing_that_is_the_hosts() {
    let function = FakeFunction::endpoint();
    let config = config(&function);
    let bytes = view(&config, &function);
    assert_eq!(read(&config, &function, 0), 0x2330_10de);
    assert_eq!(read(&config, &function, 8), 0x0302_00a1);
    let ids = |list: Vec<Capability>| list.iter().map(|c| c.id).collect::<Vec<_>>();
    assert_eq!(ids(capabilities::conventional(&bytes)), [1, 5, 0x10, 0x11, 3]);
    // A null capability stands where SR-IOV was; its registers read as zeros.
    assert_eq!(ids(capabilities::extended(&bytes)), [0, 1, 3]);
    assert!(bytes[0x104..0x140].iter().all(|byte| *byte == 0));
    // No soft reset, power state D0, no PME.
    assert_eq!(read(&config, &function, 0x44), 8);
}

#[test]
fn decoding_and_power_stay_the_hosts_and_bus_mastering_does_not() {
    let function = FakeFunction::endpoint();
    let mut config = config(&function);
    config.write(&*function, 4, &[0x06, 0x04]);
    assert_eq!(read(&config, &function, 4) & 0xffff, 0x0406);
    assert_eq!(lock(&function.log).config, [(4, vec![0x04, 0x04])], "the memory bit does not get through");
    lock(&function.log).config.clear();
    config.write(&*function, 0x44, &[3, 0]);
    assert_eq!(read(&config, &function, 0x44), 0x0b, "the guest believes in D3");
    assert!(lock(&function.log).config.is_empty());
    // A self-test, the link's control, the vital product data's write flag.
    config.write(&*function, 0x0c, &[0, 0, 0, 0x40]);
    config.write(&*function, 0x80, &[0x10, 0]);
    assert!(lock(&function.log).config.is_empty());
    config.write(&*function, 0xc2, &[0x04, 0x80]);
    assert_eq!(lock(&function.log).config, [(0xc2, vec![0x04, 0x00])]);
}

#[test]
fn errors_in_the_status_register_are_cleared_only_where_ones_are_written() {
    let function = FakeFunction::endpoint();
    lock(&function.config)[7] = 0xf9;
    let mut config = config(&function);
    config.write(&*function, 4, &[0x04, 0, 0, 0x20]);
    let log = lock(&function.log);
    assert!(log.config.contains(&(7, vec![0x20])), "{:?}", log.config);
    assert!(!log.config.iter().any(|(offset, _)| *offset == 6));
}

#[test]
fn a_function_level_reset_is_asked_for_by_its_bit_alone() {
    let function = FakeFunction::endpoint();
    let mut config = config(&function);
    assert!(!config.write(&*function, 0x78, &[0x10, 0x28]));
    assert!(config.write(&*function, 0x78, &[0x10, 0xa8]));
    assert!(config.write(&*function, 0x79, &[0x80]));
    assert!(!lock(&function.log).config.iter().any(|(_, bytes)| bytes.last().unwrap() & 0x80 != 0));
    lock(&function.config)[0x77] = 0;
    let mut without = VirtualConfig::new(&*function, 4096, &bars()).unwrap();
    assert!(!without.write(&*function, 0x78, &[0x10, 0xa8]), "a function that has none");
}

#[test]
fn a_reset_turns_messages_and_decoding_off() {
    let function = FakeFunction::endpoint();
    let mut config = config(&function);
    config.write(&*function, 4, &[6, 0]);
    config.write(&*function, 0x52, &[1, 0]);
    config.write(&*function, 0xb2, &[0, 0x80]);
    config.reset();
    assert_eq!(read(&config, &function, 4) & 0xffff, 0);
    assert_eq!(read(&config, &function, 0x50) >> 16 & 1, 0);
    assert_eq!(read(&config, &function, 0xb0) >> 31, 0);
}

#[test]
fn a_clique_goes_where_nothing_is() {
    let function = FakeFunction::endpoint();
    let mut config = config(&function);
    let before = capabilities::conventional(&view(&config, &function));
    let at = config.insert_vendor_capability(&*function, &[8, b'P', b'2', b'P', 5 << 3, 0]).unwrap();
    let bytes = view(&config, &function);
    let list = capabilities::conventional(&bytes);
    assert_eq!(list[0].offset, at);
    assert_eq!(list[1..], before[..]);
    assert_eq!(bytes[usize::from(at)..][..8], [9, 0x40, 8, b'P', b'2', b'P', 0x28, 0]);
    let full = FakeFunction::endpoint();
    lock(&full.config)[0x40..0x100].iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = 0xee);
    lock(&full.config)[0xc1] = 0;
    let mut config = VirtualConfig::new(&*full, 4096, &bars()).unwrap();
    assert_eq!(config.insert_vendor_capability(&*full, &[8, b'P', b'2', b'P', 0, 0]), None);
}

#[test]
fn a_capability_that_runs_into_extended_space_is_hidden() {
    // Power management, VPD, MSI, Express, MSI-X and advanced features.
    for id in [1, 3, 5, 0x10, 0x11, 0x13] {
        let function = FakeFunction::endpoint();
        {
            let mut bytes = lock(&function.config);
            bytes[CAPABILITIES] = 0xfc;
            bytes[0xfc..0x104].copy_from_slice(&[id, 0, 0, 0, 0, 0, 0, 0]);
        }
        let mut config = config(&function);
        let bytes = view(&config, &function);
        assert_eq!(capabilities::conventional(&bytes), [], "{id:#x}");
        assert_eq!(capabilities::extended(&bytes), [], "{id:#x}");
        config.write(&*function, 0xfc, &[0xff; 4]);
        config.write(&*function, 0x100, &[0xff; 4]);
        assert!(lock(&function.log).config.is_empty(), "{id:#x}");
    }
}

proptest! {
    #[test]
    fn nothing_reaches_a_hostile_device_that_no_rule_forwards(
        mut bytes in proptest::collection::vec(any::<u8>(), 4096),
        writes in proptest::collection::vec((0_u16..4096, proptest::collection::vec(any::<u8>(), 1..=4)), 0..64),
    ) {
        bytes[0x0e] = 0;
        let function = FakeFunction::new(bytes);
        let mut config = VirtualConfig::new(&*function, 4096, &bars()).unwrap();
        for (offset, data) in writes {
            config.write(&*function, offset, &data);
            config.read(&*function, offset, &mut [0; 4]);
        }
        for (offset, data) in &lock(&function.log).config {
            let masks = &config.forwarded[usize::from(*offset)..][..data.len()];
            prop_assert!(masks.iter().all(|mask| *mask != 0), "{offset:#x} was written");
        }
        // Header registers beyond the command and status stay unwritten whatever capabilities claim.
        prop_assert!(lock(&function.log).config.iter().all(|(offset, _)| *offset >= 0x40 || *offset < 8));
        config.reset();
    }

    #[test]
    fn whatever_a_device_says_lists_shown_to_the_guest_end(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
        let function = FakeFunction::new(bytes);
        let config = VirtualConfig::new(&*function, 4096, &[]).unwrap();
        let bytes = view(&config, &function);
        for capability in capabilities::extended(&bytes) {
            prop_assert!(matches!(capability.id, 0 | 1 | 3 | 0x0b | 0x23), "{capability:?}");
        }
    }
}
