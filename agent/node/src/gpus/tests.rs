//! The life of devices on a model of the kernel: every way it can go wrong, and a crash at every step.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};

use lathe_api::HostPciAddress;
use lathe_api::gpu::{GpuHealth, GpuState};
use tempfile::TempDir;

use super::fake::Fake;
use super::{GpuError, Gpus, Owner, Policy};
use crate::pci::VFIO_PCI;

const GPU: u32 = 0x030200;
const AUDIO: u32 = 0x040300;
const BRIDGE: u32 = 0x060400;

const CONVENTIONAL: &str = "0000:00:02.0";
const ROOT_PORT: &str = "0000:00:03.0";

struct Bench {
    fake: Fake,
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { fake: Fake::default(), dir: tempfile::tempdir().unwrap() }
    }

    /// A device with two functions below a bridge to conventional PCI with slots, and one alone below a root port.
    fn with_gpus() -> (Self, HostPciAddress, HostPciAddress) {
        let bench = Self::new();
        bench.fake.add(CONVENTIONAL, BRIDGE, 1, Some("shpchp"));
        bench.fake.add(ROOT_PORT, BRIDGE, 2, Some("pcieport"));
        let gpu = bench.fake.add("0000:01:00.0", GPU, 1, Some("nvidia"));
        bench.fake.add("0000:01:00.1", AUDIO, 1, Some("snd_hda_intel"));
        let other = bench.fake.add("0000:02:00.0", GPU, 2, None);
        (bench, gpu, other)
    }

    fn gpus_in(&self, boot: &str) -> Gpus {
        Gpus::on(Box::new(self.fake.clone()), self.dir.path().join("gpus"), boot.into(), Policy::All)
    }

    fn gpus(&self) -> Gpus {
        self.gpus_in("boot")
    }

    /// One that dies at its `at`th crash point.
    fn dying(&self, at: u32) -> Gpus {
        let passed = AtomicU32::new(0);
        self.gpus().crashing(Box::new(move || {
            if passed.fetch_add(1, Ordering::Relaxed) + 1 == at {
                resume_unwind(Box::new("the crash"));
            }
        }))
    }

    /// The drivers of all functions of the first device.
    fn drivers(&self, gpu: HostPciAddress) -> Vec<Option<String>> {
        let model = self.fake.model();
        let unit = model.functions.iter().filter(|(a, _)| (a.bus(), a.device()) == (gpu.bus(), gpu.device()));
        unit.map(|(_, function)| function.driver.clone()).collect()
    }

    fn is_lent(&self, gpu: HostPciAddress) -> bool {
        let lent = self.drivers(gpu).iter().all(|driver| driver.as_deref() == Some(VFIO_PCI));
        lent && self.bridges_are(gpu, (None, Some("none")))
    }

    /// Whether the bridges of its group that have to give up their driver have this driver and `driver_override`; one
    /// that need not keeps its own in any case.
    fn bridges_are(&self, gpu: HostPciAddress, wanted: (Option<&str>, Option<&str>)) -> bool {
        let model = self.fake.model();
        let group = model.functions[&gpu].group;
        let mut bridges = model.functions.values().filter(|f| f.group == group && f.class == BRIDGE);
        bridges.all(|f| {
            let harmless = f.native.as_deref() == Some("pcieport");
            let wanted = if harmless { (Some("pcieport"), None) } else { wanted };
            (f.driver.as_deref(), f.over.as_deref()) == wanted
        })
    }

    fn is_the_host_s(&self, gpu: HostPciAddress) -> bool {
        let model = self.fake.model();
        let unit = model.functions.iter().filter(|(a, _)| (a.bus(), a.device()) == (gpu.bus(), gpu.device()));
        let as_before = |f: &super::fake::Function| {
            f.driver == f.native && f.over.is_none() && f.enabled == 0 && f.reset_method == "flr bus"
        };
        let unit_is = unit.map(|(_, function)| function).all(as_before);
        drop(model);
        unit_is && self.bridges_are(gpu, (Some("shpchp"), None))
    }

    fn assert_nothing_forbidden_happened(&self) {
        assert_eq!(self.fake.model().violations, [] as [String; 0]);
    }
}

fn sandbox(id: &str) -> Owner {
    Owner::Sandbox(id.into())
}

fn take(gpus: &Gpus, address: HostPciAddress, owner: &Owner) -> Result<Vec<HostPciAddress>, GpuError> {
    gpus.reserve_one(address, owner)?;
    gpus.take(address, owner)
}

#[test]
fn a_device_is_lent_with_all_its_functions_and_comes_back_clean() {
    for native in [Some("nvidia"), None] {
        let (bench, gpu, _) = Bench::with_gpus();
        bench
            .fake
            .change(gpu, |f| (f.native, f.driver) = (native.map(str::to_owned), native.map(str::to_owned)));
        let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
        let functions = take(&gpus, gpu, &owner).unwrap();
        assert_eq!(functions, [gpu, "0000:01:00.1".parse().unwrap()]);
        assert!(bench.is_lent(gpu));
        let view = gpus.view(gpu);
        assert_eq!((view.state, view.owner), (GpuState::InUse, Some(owner.clone())));
        assert_eq!(view.host_driver.as_deref(), native);
        bench.fake.tenant(gpu);
        gpus.release(gpu, &owner).unwrap();
        assert!(bench.is_the_host_s(gpu), "{:?}", bench.drivers(gpu));
        let view = gpus.view(gpu);
        assert_eq!((view.state, view.owner, view.reason), (GpuState::Free, None, None));
        assert!(view.last.unwrap().ends_with("memory proven zero: 16 MiB"));
        bench.assert_nothing_forbidden_happened();
    }
}

#[test]
fn a_bridge_that_does_not_come_back_to_its_driver_is_told() {
    let (bench, gpu, _) = Bench::with_gpus();
    let (gpus, owner, bridge) = (bench.gpus(), sandbox("a-0-1"), CONVENTIONAL.parse().unwrap());
    take(&gpus, gpu, &owner).unwrap();
    bench.fake.change(bridge, |f| f.broken = vec!["shpchp"]);
    gpus.release(gpu, &owner).unwrap();
    let reason = gpus.view(gpu).reason.unwrap();
    assert!(reason.contains("0000:00:02.0: cannot bind it to shpchp"), "{reason}");
    bench.fake.change(bridge, |f| f.broken.clear());
    gpus.release_quarantine(gpu).unwrap();
    assert!(bench.is_the_host_s(gpu));
}

#[test]
fn vfio_pci_may_be_the_host_s_own_choice() {
    let (bench, _, gpu) = Bench::with_gpus();
    bench.fake.change(gpu, |f| (f.native, f.driver) = (Some(VFIO_PCI.into()), Some(VFIO_PCI.into())));
    bench.fake.change(gpu, |f| f.open = true);
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    let error = take(&gpus, gpu, &owner).unwrap_err().to_string();
    assert!(error.contains("another program has it open"), "{error}");
    bench.fake.change(gpu, |f| f.open = false);
    take(&gpus, gpu, &owner).unwrap();
    gpus.release(gpu, &owner).unwrap();
    assert!(bench.is_the_host_s(gpu));
    bench.assert_nothing_forbidden_happened();
}

/// Runs `act` with a crash at every point until it comes through, each time on a new bench.
fn crash_everywhere(
    act: impl Fn(&Bench, HostPciAddress, &Gpus),
    after: impl Fn(&Bench, HostPciAddress),
) -> u32 {
    for at in 1.. {
        let (bench, gpu, _) = Bench::with_gpus();
        let gpus = bench.dying(at);
        let died = catch_unwind(AssertUnwindSafe(|| act(&bench, gpu, &gpus))).is_err();
        drop(gpus);
        after(&bench, gpu);
        bench.assert_nothing_forbidden_happened();
        if !died {
            return at;
        }
    }
    unreachable!()
}

/// A device is either fully the host's or fully lent, and what is said of it is true.
fn assert_whole(bench: &Bench, gpu: HostPciAddress) {
    let view = bench.gpus().view(gpu);
    match view.state {
        GpuState::Free => assert!(bench.is_the_host_s(gpu), "{:?}", bench.drivers(gpu)),
        GpuState::InUse => assert!(bench.is_lent(gpu), "{:?}", bench.drivers(gpu)),
        state => panic!("{state:?} {:?} after recovery", view.reason),
    }
}

#[test]
fn a_crash_while_a_device_is_taken_leaves_it_whole() {
    let owner = sandbox("a-0-1");
    let points = crash_everywhere(
        |_, gpu, gpus| drop(take(gpus, gpu, &owner).unwrap()),
        |bench, gpu| {
            // Whether its sandbox goes on or not.
            bench.gpus().recover(|id| id == "a-0-1").unwrap();
            assert_whole(bench, gpu);
            bench.gpus().recover(|_| false).unwrap();
            assert_eq!(bench.gpus().view(gpu).state, GpuState::Free);
            assert!(bench.is_the_host_s(gpu));
        },
    );
    // Override, unbind, reset, scrub and bind of two functions, each before and after.
    assert!(points > 20, "{points}");
}

#[test]
fn a_crash_while_a_device_comes_back_leaves_it_whole() {
    let owner = sandbox("a-0-1");
    let points = crash_everywhere(
        |bench, gpu, gpus| {
            take(&bench.gpus(), gpu, &owner).unwrap();
            bench.fake.tenant(gpu);
            gpus.release(gpu, &owner).unwrap();
        },
        |bench, gpu| {
            bench.gpus().recover(|_| false).unwrap();
            assert_eq!(bench.gpus().view(gpu).state, GpuState::Free);
            assert_whole(bench, gpu);
        },
    );
    assert!(points > 20, "{points}");
}

#[test]
fn a_second_crash_during_recovery_changes_nothing() {
    let owner = sandbox("a-0-1");
    for first in [3, 7, 11, 15] {
        crash_everywhere(
            |bench, gpu, gpus| {
                let dying = bench.dying(first);
                let _ = catch_unwind(AssertUnwindSafe(|| take(&dying, gpu, &owner)));
                bench.fake.tenant(gpu);
                gpus.recover(|_| false).unwrap();
            },
            |bench, gpu| {
                bench.gpus().recover(|_| false).unwrap();
                assert_eq!(bench.gpus().view(gpu).state, GpuState::Free);
                assert_whole(bench, gpu);
            },
        );
    }
}

#[test]
fn what_cannot_be_proven_clean_is_quarantined_until_it_can() {
    for broken in ["reset", "scrub", "unbind"] {
        let (bench, gpu, _) = Bench::with_gpus();
        let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
        take(&gpus, gpu, &owner).unwrap();
        bench.fake.tenant(gpu);
        bench.fake.change(gpu, |f| f.broken = vec![broken]);
        gpus.release(gpu, &owner).unwrap();
        // An agent that comes later knows it too, and so does one after a restart of the host.
        bench.gpus().recover(|_| false).unwrap();
        let view = bench.gpus_in("next boot").view(gpu);
        assert_eq!(view.state, GpuState::Quarantined, "{broken}");
        let reason = view.reason.unwrap();
        assert!(reason.starts_with("0000:01:00.0: ") && reason.contains("release-quarantine"), "{reason}");
        let error = take(&bench.gpus(), gpu, &sandbox("b-0-1")).unwrap_err().to_string();
        assert!(error.contains("quarantined"), "{error}");
        assert!(!bench.is_the_host_s(gpu));
        bench.gpus().release_quarantine(gpu).unwrap_err();
        bench.fake.change(gpu, |f| f.broken.clear());
        bench.gpus().release_quarantine(gpu).unwrap();
        assert_eq!(bench.gpus().view(gpu).state, GpuState::Free);
        assert!(bench.is_the_host_s(gpu));
        bench.assert_nothing_forbidden_happened();
    }
}

#[test]
fn a_probe_that_binds_nothing_is_a_failure() {
    let (bench, gpu, _) = Bench::with_gpus();
    bench.fake.change(gpu, |f| f.broken = vec![VFIO_PCI]);
    let gpus = bench.gpus();
    let error = take(&gpus, gpu, &sandbox("a-0-1")).unwrap_err().to_string();
    assert!(error.contains("cannot bind it to vfio-pci"), "{error}");
    assert_eq!(gpus.view(gpu).state, GpuState::Quarantined);
    // The host's driver does not take it back.
    let (bench, gpu, _) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    take(&gpus, gpu, &owner).unwrap();
    bench.fake.change(gpu, |f| f.broken = vec!["nvidia"]);
    gpus.release(gpu, &owner).unwrap();
    assert!(gpus.view(gpu).reason.unwrap().contains("cannot bind it to nvidia"));
}

#[test]
fn a_driver_that_does_not_let_go_keeps_its_device() {
    let (bench, gpu, _) = Bench::with_gpus();
    bench.fake.change("0000:01:00.1".parse().unwrap(), |f| f.broken = vec!["unbind"]);
    // The device holds no tenant's data: what was unbound goes back to the host's driver.
    bench.fake.change(gpu, |f| f.dirty = false);
    let gpus = bench.gpus();
    take(&gpus, gpu, &sandbox("a-0-1")).unwrap_err();
    assert!(bench.is_the_host_s(gpu), "{:?}", bench.drivers(gpu));
    assert_eq!(gpus.view(gpu).state, GpuState::Quarantined);
}

#[test]
fn refusals_name_the_reason_and_change_nothing() {
    let (bench, gpu, other) = Bench::with_gpus();
    let refusal = |gpus: &Gpus, address: HostPciAddress| {
        let before = format!("{:?}", bench.fake.model().functions);
        let error = take(gpus, address, &sandbox("a-0-1")).unwrap_err().to_string();
        assert_eq!(before, format!("{:?}", bench.fake.model().functions));
        assert_eq!(gpus.view(address).state, GpuState::Free);
        error
    };
    let gpus = bench.gpus();
    assert!(refusal(&gpus, CONVENTIONAL.parse().unwrap()).contains("it is a bridge"));
    assert!(refusal(&gpus, "0000:09:00.0".parse().unwrap()).contains("no such device"));
    // A function of the chipset would take the host's bridge to ISA along.
    let chipset = bench.fake.add("0000:00:1f.3", 0x0c0500, 8, None);
    bench.fake.add("0000:00:1f.0", 0x060100, 8, None);
    assert!(refusal(&gpus, chipset).contains("shares its IOMMU group with 0000:00:1f.0 (no driver)"));
    let stranger = bench.fake.add("0000:03:00.0", 0x010802, 1, Some("nvme"));
    let error = refusal(&gpus, gpu);
    assert!(error.contains("shares its IOMMU group with 0000:03:00.0 (nvme)"), "{error}");
    bench.fake.change(stranger, |f| f.group = 0);
    assert!(refusal(&gpus, stranger).contains("no IOMMU group"));
    bench.fake.change(other, |f| f.reset_method.clear());
    assert!(refusal(&gpus, other).contains("no reset"));
    bench.fake.change(other, |f| f.reset_method = "bus".into());
    let mut told = crate::inventory::fake_gpu(other);
    told.health = GpuHealth::Failed("Xid 94: its memory is broken".into());
    gpus.learn(std::slice::from_ref(&told));
    assert!(refusal(&gpus, other).contains("Xid 94"));
    told.health = GpuHealth::Healthy;
    gpus.learn(&[told]);
    gpus.check(other).unwrap();
    let gated = bench.gpus().gated(Box::new(|_| Err("Xid 79: it has fallen off the bus".into())));
    assert!(refusal(&gated, other).contains("Xid 79"));
}

#[test]
fn a_device_that_vanishes_is_quarantined_and_the_host_goes_on() {
    let (bench, gpu, other) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    take(&gpus, gpu, &owner).unwrap();
    take(&gpus, other, &owner).unwrap();
    bench.fake.change(gpu, |f| f.gone = true);
    gpus.release(gpu, &owner).unwrap();
    gpus.release(other, &owner).unwrap();
    assert!(gpus.view(gpu).reason.unwrap().contains("does not answer"));
    assert_eq!(gpus.view(other).state, GpuState::Free);
    bench.fake.change(gpu, |f| f.gone = false);
    gpus.release_quarantine(gpu).unwrap();
    assert!(bench.is_the_host_s(gpu));
}

#[test]
fn a_machine_that_still_runs_keeps_its_device() {
    let (bench, gpu, _) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    take(&gpus, gpu, &owner).unwrap();
    // Another sandbox cannot give back what is not its own.
    gpus.release(gpu, &sandbox("b-0-1")).unwrap();
    assert!(bench.is_lent(gpu));
    gpus.recover(|id| id == "a-0-1").unwrap();
    assert!(bench.is_lent(gpu));
    // The kernel's word counts more than the record's.
    bench.fake.change(gpu, |f| f.driver = Some("nvidia".into()));
    let view = gpus.view(gpu);
    assert_eq!(view.state, GpuState::Quarantined);
    assert!(view.reason.unwrap().contains("0000:01:00.0 is bound to nvidia"));
}

#[test]
fn the_inventory_tells_who_has_a_device_and_what_is_not_lent() {
    let (bench, gpu, other) = Bench::with_gpus();
    take(&bench.gpus(), gpu, &sandbox("a-0-1")).unwrap();
    let mut told = [gpu, other].map(crate::inventory::fake_gpu);
    bench.gpus().describe(&mut told);
    assert_eq!((told[0].state, told[0].task.as_deref()), (GpuState::InUse, Some("a-0-1")));
    assert_eq!((told[0].driver.as_deref(), told[0].host_driver.as_deref()), (Some(VFIO_PCI), Some("nvidia")));
    assert_eq!((told[1].state, told[1].problems.len()), (GpuState::Free, 0));
    let only = Gpus::on(
        Box::new(bench.fake.clone()),
        bench.dir.path().join("gpus"),
        "boot".into(),
        Policy::Named(vec![gpu]),
    );
    only.describe(&mut told);
    assert_eq!(told[0].problems.len(), 0);
    assert!(!told[1].is_usable() && told[1].problems[0].what.contains("--gpu-devices"));
}

#[test]
fn recovery_does_not_touch_what_was_taken_since_it_was_begun() {
    let (bench, gpu, other) = Bench::with_gpus();
    let gpus = bench.gpus();
    take(&gpus, gpu, &sandbox("gone-0-1")).unwrap();
    take(&gpus, other, &sandbox("old-0-1")).unwrap();
    let stale = gpus.stale(|_| false).unwrap();
    assert_eq!(stale.len(), 2);
    gpus.release(other, &sandbox("old-0-1")).unwrap();
    take(&gpus, other, &sandbox("new-0-1")).unwrap();
    gpus.take_back_stale(stale).unwrap();
    assert_eq!(gpus.view(gpu).state, GpuState::Free);
    assert_eq!(gpus.view(other).owner, Some(sandbox("new-0-1")));
    assert!(bench.is_lent(other));
}

#[test]
fn a_restart_of_the_host_does_not_launder_a_device() {
    let (bench, gpu, _) = Bench::with_gpus();
    take(&bench.gpus(), gpu, &sandbox("a-0-1")).unwrap();
    bench.fake.tenant(gpu);
    bench.fake.change(gpu, |f| f.dirty = true);
    bench.fake.reboot();
    let scrubs = bench.fake.model().scrubs;
    let gpus = bench.gpus_in("next boot");
    assert_ne!(gpus.view(gpu).state, GpuState::Free);
    gpus.recover(|_| true).unwrap();
    assert_eq!(gpus.view(gpu).state, GpuState::Free);
    assert!(bench.is_the_host_s(gpu) && !bench.fake.get(gpu).dirty);
    assert_eq!(bench.fake.model().scrubs, scrubs + 1);
}

#[test]
fn memory_that_was_open_once_may_not_be_closed_later() {
    let (bench, gpu, other) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    // One that is always closed is reset, and that is said.
    bench.fake.change(other, |f| f.closed = true);
    take(&gpus, other, &owner).unwrap();
    assert!(gpus.view(other).last.unwrap().contains("reset only: memory BAR 0 is closed"));
    take(&gpus, gpu, &owner).unwrap();
    bench.fake.change(gpu, |f| f.closed = true);
    gpus.release(gpu, &owner).unwrap();
    assert!(gpus.view(gpu).reason.unwrap().contains("BAR 0 held memory before"));
}

#[test]
fn a_start_that_is_repeated_gets_the_same_devices() {
    let (bench, gpu, other) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    let reserve = |count: usize, owner: &Owner| {
        let mut noted = Vec::new();
        let chosen = gpus.reserve(count, owner, |addresses| {
            noted = addresses.to_vec();
            Ok::<_, GpuError>(())
        })?;
        assert_eq!(noted, chosen, "in the journal before it is anybody's");
        Ok::<_, GpuError>(chosen)
    };
    assert_eq!(reserve(1, &owner).unwrap(), [gpu]);
    gpus.take(gpu, &owner).unwrap();
    assert_eq!(reserve(1, &owner).unwrap(), [gpu]);
    assert_eq!(reserve(2, &owner).unwrap(), [gpu, other]);
    let error = reserve(1, &sandbox("b-0-1")).unwrap_err();
    assert!(matches!(error, GpuError::TooFew { wanted: 1, free: 0, soon: 1, .. }), "{error}");
    // Given up before it was taken: what is reserved is free again, and cannot be taken any more.
    gpus.release(other, &owner).unwrap();
    assert!(gpus.take(other, &owner).is_err());
    assert!(bench.is_the_host_s(other));
}

#[test]
fn devices_that_were_planned_are_taken_or_refused_by_name() {
    let (bench, gpu, other) = Bench::with_gpus();
    let (gpus, owner, rival) = (bench.gpus(), sandbox("a-0-1"), sandbox("b-0-1"));
    let reserve = |addresses: &[HostPciAddress], owner: &Owner| {
        gpus.reserve_named(addresses, owner, |noted| {
            assert!(noted.iter().all(|address| addresses.contains(address)));
            Ok::<_, GpuError>(())
        })
    };
    assert_eq!(reserve(&[other], &owner).unwrap(), [other], "not the first one that is free");
    gpus.take(other, &owner).unwrap();
    assert_eq!(reserve(&[other], &owner).unwrap(), [other], "a start that is repeated");
    let error = reserve(&[gpu, other], &rival).unwrap_err().to_string();
    assert!(error.contains(&other.to_string()) && error.contains("a-0-1"), "{error}");
    assert!(bench.is_the_host_s(gpu), "none is taken if one cannot be");
    let error = reserve(&["0000:7f:1f.7".parse().unwrap()], &rival).unwrap_err().to_string();
    assert!(error.contains("0000:7f:1f.7") && error.contains("does not lend"), "{error}");
}

#[test]
fn two_sandboxes_never_get_one_device() {
    let (bench, ..) = Bench::with_gpus();
    let agents: Vec<Gpus> = (0..4).map(|_| bench.gpus()).collect();
    let got: Vec<HostPciAddress> = std::thread::scope(|scope| {
        let threads: Vec<_> = agents
            .iter()
            .enumerate()
            .map(|(index, gpus)| {
                scope.spawn(move || {
                    let owner = sandbox(&format!("a-{index}-1"));
                    // Different processes have no lock in common but the device's.
                    let chosen = gpus.reserve(1, &owner, |_| Ok::<_, GpuError>(())).ok()?;
                    gpus.take(chosen[0], &owner).ok().map(|_| chosen[0])
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    let mut distinct = got.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), got.len(), "{got:?}");
    assert!(!got.is_empty());
}

#[test]
fn all_goes_back_to_the_host_when_lathe_leaves() {
    let (bench, gpu, other) = Bench::with_gpus();
    let (gpus, owner) = (bench.gpus(), sandbox("a-0-1"));
    take(&gpus, gpu, &owner).unwrap();
    take(&gpus, other, &owner).unwrap();
    bench.fake.change(other, |f| f.broken = vec!["reset"]);
    gpus.give_all_back().unwrap();
    assert!(bench.is_the_host_s(gpu) && bench.is_the_host_s(other));
    // A later agent does not offer what was not proven clean.
    assert_eq!(gpus.view(gpu).state, GpuState::Free);
    assert_eq!(gpus.view(other).state, GpuState::Quarantined);
}
