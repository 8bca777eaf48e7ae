use super::super::fake::{FakeFunction, FakeIommu, FakeReset};
use super::*;
use crate::bus::lock;

const DISPLAY: u32 = 0x03_00_00;
const DISK: u32 = 0x01_08_02;

fn device(class: u32) -> HostDevice {
    HostDevice {
        address: "0000:01:00.0".parse().unwrap(),
        path: "/sys/bus/pci/devices/0000:01:00.0".into(),
        group: 7,
        class,
        ids: (0x10de, 0x2330),
    }
}

/// The function's reset before the start of a machine that has its group alone.
fn at_start(class: u32, function: &FakeFunction) -> Result<ResetMethod, String> {
    let done = reset((&device(class), "passthrough[0].address"), function, &FakeIommu, &[7], &[]);
    done.map(|report| report.method).map_err(|error| error.to_string())
}

fn function(resets: [FakeReset; 2]) -> std::sync::Arc<FakeFunction> {
    let function = FakeFunction::endpoint();
    *lock(&function.resets) = resets;
    function
}

fn counts(function: &FakeFunction) -> (usize, usize) {
    let log = lock(&function.log);
    (log.resets, log.bus_resets)
}

#[test]
fn gpus_are_reset_by_their_bus_where_that_is_ours_and_others_alone() {
    use ResetMethod::{Bus, Function};
    assert_eq!(choose(0x03_02_00, true, true), [Bus, Function]);
    assert_eq!(choose(0x12_00_00, true, false), [Function]);
    assert_eq!(choose(DISK, true, true), [Function, Bus]);
    assert_eq!(choose(0x00_ff_00, false, true), [Bus]);
    assert_eq!(choose(DISPLAY, false, false), []);
}

#[test]
fn another_way_is_tried_where_one_fails() {
    use FakeReset::{Fails, Works};
    let disk = function([Fails, Works]);
    assert_eq!(at_start(DISK, &disk), Ok(ResetMethod::Bus));
    assert_eq!(counts(&disk), (1, 1));
    let display = function([Works, Fails]);
    assert_eq!(at_start(DISPLAY, &display), Ok(ResetMethod::Function));
    assert_eq!(counts(&display), (1, 1));
}

#[test]
fn one_whose_resets_fail_is_refused_with_all_that_was_tried() {
    use FakeReset::{Fails, Missing};
    assert_eq!(
        at_start(DISK, &function([Fails, Fails])).unwrap_err(),
        "passthrough[0].address: 0000:01:00.0: cannot be reset: function reset failed: Inappropriate ioctl for \
         device (os error 25), bus reset failed: Inappropriate ioctl for device (os error 25); what its last user \
         left in it is unknown; bind every function on its bus to vfio-pci, or restart the host"
    );
    let message = at_start(DISPLAY, &function([Missing, Fails])).unwrap_err();
    assert!(message.contains("cannot be reset: bus reset failed"), "{message}");
}

#[test]
fn one_that_does_not_come_back_from_its_reset_is_refused_whatever_the_kernel_says() {
    use FakeReset::{Kills, Missing};
    assert_eq!(
        at_start(DISK, &function([Kills, Missing])).unwrap_err(),
        "passthrough[0].address: 0000:01:00.0: cannot be reset: function reset left it without an answer; it does \
         not answer; turn its slot off and on, or restart the host"
    );
}

#[test]
fn one_without_a_reset_is_refused_and_nothing_is_tried() {
    let without = function([FakeReset::Missing; 2]);
    let message = at_start(DISPLAY, &without).unwrap_err();
    assert!(
        message
            .starts_with("passthrough[0].address: 0000:01:00.0: cannot be reset: it has no reset of its own"),
        "{message}"
    );
    assert_eq!(counts(&without), (0, 0));
}

#[test]
fn a_bus_with_functions_of_others_or_of_a_running_guest_is_left_alone() {
    let on_bus = |group, devfn| Affected { group, domain: 0, bus: 1, devfn };
    let beside = |other| {
        let function = FakeFunction::beside(vec![0; 64], vec![on_bus(7, 0), other]);
        *lock(&function.resets) = [FakeReset::Missing, FakeReset::Works];
        function
    };
    let theirs = beside(on_bus(8, 8));
    assert!(at_start(DISPLAY, &theirs).unwrap_err().contains("its bus has functions that are not part of"));
    let ours = beside(on_bus(7, 8));
    assert_eq!(at_start(DISPLAY, &ours), Ok(ResetMethod::Bus));
    let running = ["0000:01:01.0".parse().unwrap()];
    let plugged = reset((&device(DISPLAY), "address"), &ours, &FakeIommu, &[7], &running);
    assert!(
        plugged.unwrap_err().to_string().starts_with("address: 0000:01:00.0: cannot be reset: it has no")
    );
    assert_eq!((counts(&theirs), counts(&ours)), ((0, 0), (0, 1)));
}

/// With iommufd the kernel says itself whether all are ours.
#[test]
fn the_kernels_word_counts_where_it_speaks_of_devices() {
    let mut function =
        FakeFunction::beside(vec![0; 64], vec![Affected { group: 1, domain: 0, bus: 1, devfn: 0 }]);
    *lock(&function.resets) = [FakeReset::Missing, FakeReset::Works];
    function.on_its_bus.0 = BY_DEVICE;
    assert!(at_start(DISPLAY, &function).is_err());
    function.on_its_bus.0 = BY_DEVICE | OWNED;
    assert_eq!(at_start(DISPLAY, &function), Ok(ResetMethod::Bus));
}

#[test]
fn a_reset_that_fails_after_use_says_so_in_one_line() {
    let function = function([FakeReset::Fails; 2]);
    let error = reset((&device(DISPLAY), "after use"), &*function, &FakeIommu, &[7], &[]).unwrap_err();
    let line = error.to_string();
    assert!(line.starts_with("after use: 0000:01:00.0: cannot be reset: bus reset failed: "), "{line}");
    assert!(!line.contains('\n'));
}
