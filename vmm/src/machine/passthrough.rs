//! Passed-through devices while the guest runs: plugging, unplugging, and what the host has to say of them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use serde::Serialize;
use utoipa::ToSchema;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::pci::{named, wire_pin};
use crate::bus::lock;
use crate::check::FieldError;
use crate::config::PassthroughConfig;
use crate::pci::hotplug::SlotError;
use crate::pci::root::{PciRoot, SharedPciDevice};
use crate::vfio::VfioError;
use crate::vfio::function::HostFunction;
use crate::vfio::host::HostDevice;
use crate::vfio::passthrough::{AttachTimes, Context, Device, Opened};

/// A device that could not be plugged or unplugged.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// A field of the request.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The device, or the host.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The host has no descriptor left.
    #[error("watching the device: {0}")]
    Watch(#[source] io::Error),
}

/// A passed-through device, as the API shows it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DeviceView {
    /// As it was described.
    #[serde(flatten)]
    pub config: PassthroughConfig,
    /// The kernel's interface in use: `iommufd` or `container`.
    pub backend: &'static str,
    /// The guest's slot, whose number it knows too.
    pub slot: Option<u16>,
    /// Where the guest sees it, as `01:00.0`, unless it made that unreachable.
    pub guest_address: Option<String>,
    /// How it was reset before the guest got it.
    pub reset: &'static str,
    /// How long that took, in milliseconds.
    pub reset_ms: f64,
    /// Whether other devices reach its BARs.
    pub peer_to_peer: bool,
}

/// Why a device is taken from the guest that answers no more, whatever the kernel signalled.
const LOST: &str = "it answers no more: pulled out of the host, off, or hung";

/// What is counted for a device and the stages of attaching it.
#[derive(Clone, Debug)]
pub struct DeviceStatistics {
    /// Its ID.
    pub id: String,
    /// Times a kind of interrupt was turned on, vectors connected, and interrupts that the host refused.
    pub interrupts: [(&'static str, u64); 3],
}

#[derive(Default)]
struct State {
    opened: Option<Opened>,
    times: AttachTimes,
    noted: Noted,
}

/// What is kept of devices beside themselves.
#[derive(Default)]
struct Noted {
    /// What the host signals about each one that is there.
    watched: BTreeMap<String, Watched>,
    /// Resets before the guest got them, of those that have gone too.
    resets: BTreeMap<&'static str, u64>,
}

struct Watched {
    /// The host wants the device back.
    requested: EventFd,
    /// An uncorrectable error.
    failed: EventFd,
}

/// The passed-through devices of a machine, and its slots for more.
pub struct Passthrough {
    context: Context,
    root: Arc<Mutex<PciRoot>>,
    hotplug_slots: u8,
    state: Mutex<State>,
    /// Wakes the watching thread: there is another descriptor to watch, or the machine ends.
    changed: EventFd,
}

impl Passthrough {
    /// For a machine whose root complex has the opened devices in place.
    ///
    /// # Errors
    /// When the host has no descriptor or thread left.
    pub(super) fn new(
        context: Context,
        root: Arc<Mutex<PciRoot>>,
        opened: Option<Opened>,
        hotplug_slots: u8,
    ) -> Result<Arc<Self>, PlugError> {
        let wanted = opened.is_some() || hotplug_slots > 0;
        let times = opened.as_ref().map(Opened::times).unwrap_or_default();
        let mut noted = Noted::default();
        for device in opened.iter().flat_map(Opened::devices) {
            noted.add(device).map_err(PlugError::Watch)?;
        }
        let state = Mutex::new(State { opened, times, noted });
        let changed = EventFd::new(EFD_NONBLOCK).map_err(PlugError::Watch)?;
        let this = Arc::new(Self { context, root, hotplug_slots, state, changed });
        if wanted {
            let release = lock(&this.root).release_event().map_err(PlugError::Watch)?;
            let changed = this.changed.try_clone().map_err(PlugError::Watch)?;
            let weak = Arc::downgrade(&this);
            thread::Builder::new()
                .name("devices".to_owned())
                .spawn(move || watch(&weak, &release, &changed))
                .map_err(PlugError::Watch)?;
        }
        Ok(this)
    }

    /// The devices there are.
    pub fn devices(&self) -> Vec<DeviceView> {
        let state = lock(&self.state);
        let Some(opened) = &state.opened else { return Vec::new() };
        let root = lock(&self.root);
        opened.devices().iter().map(|device| view(&root, opened, device)).collect()
    }

    /// Counters of each device.
    pub fn statistics(&self) -> Vec<DeviceStatistics> {
        use std::sync::atomic::Ordering::Relaxed;
        let state = lock(&self.state);
        let devices = state.opened.iter().flat_map(Opened::devices);
        let of = |device: &Device| DeviceStatistics {
            id: device.config.id.clone(),
            interrupts: [
                ("interrupts_enabled", device.interrupts.enabled.load(Relaxed)),
                ("vectors_connected", device.interrupts.connected.load(Relaxed)),
                ("interrupt_failures", device.interrupts.failures.load(Relaxed)),
            ],
        };
        devices.map(of).collect()
    }

    /// How long the stages took, at the start or for the device that was plugged last.
    pub fn times(&self) -> Option<AttachTimes> {
        let state = lock(&self.state);
        (state.times != AttachTimes::default()).then_some(state.times)
    }

    /// Resets by method.
    pub fn resets(&self) -> Vec<(&'static str, u64)> {
        lock(&self.state).noted.resets.iter().map(|(method, count)| (*method, *count)).collect()
    }

    /// Plugs a device into a free slot.
    ///
    /// # Errors
    /// When it cannot be passed through, or there is no slot that it fits; nothing has changed then.
    pub fn plug(&self, config: PassthroughConfig) -> Result<DeviceView, PlugError> {
        config.check("device")?;
        let mut state = lock(&self.state);
        if state.opened.iter().flat_map(Opened::devices).any(|device| device.config.id == config.id) {
            return Err(VfioError::Exists(config.id).into());
        }
        if lock(&self.root).slots().iter().all(|slot| slot.occupied) {
            return Err(VfioError::NoSlot(self.hotplug_slots).into());
        }
        let host = HostDevice::find(config.address, "address")?;
        let id = config.id.clone();
        let result = self.open_and_insert(&mut state, config, host);
        if result.is_err() {
            state.give_back(&id);
        }
        result
    }

    fn open_and_insert(
        &self,
        state: &mut State,
        config: PassthroughConfig,
        host: HostDevice,
    ) -> Result<DeviceView, PlugError> {
        let missing = VfioError::NoSuchDevice(config.id.clone());
        state.open(&self.context, config, host)?;
        let opened = state.opened.as_ref();
        let found = opened.and_then(|opened| Some((opened, opened.devices().last()?)));
        let (opened, device) = found.ok_or(missing)?;
        let functions = vec![(0, named(device))];
        let mut root = lock(&self.root);
        let slot = root.slot_for(&functions)?.ok_or(VfioError::NoSlot(self.hotplug_slots))?;
        root.plug(slot, functions)?;
        wire_pin(&root, device);
        let view = view(&root, opened, device);
        drop(root);
        self.wake();
        Ok(view)
    }

    /// Asks the guest to let go of a device; it is given back when the guest has.
    ///
    /// # Errors
    /// When there is no such device, or it sits in no slot.
    pub fn request_unplug(&self, id: &str) -> Result<(), PlugError> {
        let slot = self.slot(id)?;
        Ok(lock(&self.root).request_unplug(slot)?)
    }

    /// Takes a device away, whatever the guest does with it.
    ///
    /// # Errors
    /// When there is no such device, or it sits in no slot.
    pub fn surprise_remove(&self, id: &str) -> Result<(), PlugError> {
        let slot = self.slot(id)?;
        let removed = lock(&self.root).surprise_remove(slot)?;
        lock(&self.state).removed(removed);
        self.wake();
        Ok(())
    }

    fn slot(&self, id: &str) -> Result<u16, PlugError> {
        let state = lock(&self.state);
        let missing = || VfioError::NoSuchDevice(id.to_owned());
        let mut devices = state.opened.iter().flat_map(Opened::devices);
        let device = devices.find(|device| device.config.id == id).ok_or_else(missing)?;
        let shared = Arc::clone(&device.pci) as SharedPciDevice;
        Ok(lock(&self.root).slot_of(&shared).ok_or_else(missing)?)
    }

    /// Ends DMA and interrupts, resets the devices and closes them; the vCPUs are stopped already.
    pub(super) fn stop(&self) {
        let opened = {
            let mut state = lock(&self.state);
            state.noted.watched.clear();
            state.opened.take()
        };
        if let Some(mut opened) = opened {
            opened.stop();
        }
        self.wake();
    }

    /// Gives back what the guest has let go of.
    fn take_released(&self) {
        let released: Vec<u16> = {
            let root = lock(&self.root);
            root.slots().iter().filter(|slot| slot.released).map(|slot| slot.number).collect()
        };
        for slot in released {
            // Somebody else may have been quicker.
            let Ok(removed) = lock(&self.root).unplug(slot) else { continue };
            lock(&self.state).removed(removed);
        }
    }

    /// The host wants a device back, or it failed: the guest loses it at once, as if it had been pulled out.
    fn take_back(&self, id: &str, why: &str) {
        {
            let mut state = lock(&self.state);
            // The guest may have been quicker.
            let Some(device) = state.opened.as_mut().and_then(|opened| opened.device(id)) else { return };
            device.lost = !device.kernel.answers();
            let (address, why) = (device.host.address, if device.lost { LOST } else { why });
            crate::notice(format_args!("device {id}: {address}: {why}; it is taken from the guest"));
        }
        match self.surprise_remove(id) {
            Ok(()) => {}
            Err(error) => {
                crate::notice(format_args!("device {id}: {error}"));
                lock(&self.state).give_back(id);
            }
        }
    }

    fn wake(&self) {
        // Non-blocking: fails only when the thread has 2^64 - 2 reasons to wake up already.
        let _ = self.changed.write(1);
    }
}

fn view(root: &PciRoot, opened: &Opened, device: &Device) -> DeviceView {
    let shared = Arc::clone(&device.pci) as SharedPciDevice;
    let slot = root.slot_of(&shared);
    let slots = root.slots();
    let address = slots.iter().find(|state| Some(state.number) == slot).and_then(|state| state.address);
    DeviceView {
        config: device.config.clone(),
        backend: opened.backend(),
        slot,
        guest_address: address.map(|address| address.to_string()),
        reset: device.reset.method.name(),
        reset_ms: device.reset.duration.as_secs_f64() * 1e3,
        peer_to_peer: opened.peer_to_peer(),
    }
}

impl Noted {
    fn add(&mut self, device: &Device) -> io::Result<()> {
        *self.resets.entry(device.reset.method.name()).or_default() += 1;
        self.watched.insert(device.config.id.clone(), Watched::new(device)?);
        Ok(())
    }
}

impl State {
    /// Opens a device beside those there are. The first one brings the address space along: guest memory is mapped.
    fn open(
        &mut self,
        context: &Context,
        config: PassthroughConfig,
        host: HostDevice,
    ) -> Result<(), PlugError> {
        match &mut self.opened {
            Some(opened) => opened.plug(config, host)?,
            none => {
                *none = Opened::new(context, vec![(config, host)])?;
                none.iter_mut().try_for_each(Opened::map)?;
            }
        }
        let Some(opened) = &self.opened else { return Ok(()) };
        self.times = opened.times();
        opened.devices().last().map_or(Ok(()), |device| self.noted.add(device)).map_err(PlugError::Watch)
    }

    /// Closes the devices that the guest's bus has no longer. Whoever sees them gone from the list finds nothing of
    /// them open: the last references go here.
    fn removed(&mut self, functions: Vec<SharedPciDevice>) {
        let Some(opened) = &self.opened else { return };
        let gone = |device: &&Device| {
            let shared = Arc::clone(&device.pci) as SharedPciDevice;
            functions.iter().any(|function| Arc::ptr_eq(function, &shared))
        };
        let ids: Vec<String> = opened.devices().iter().filter(gone).map(|d| d.config.id.clone()).collect();
        for id in ids {
            self.give_back(&id);
        }
    }

    fn give_back(&mut self, id: &str) {
        self.noted.watched.remove(id);
        let Some(opened) = &mut self.opened else { return };
        opened.remove(id);
        if opened.devices().is_empty() {
            // Guest memory is unmapped and unlocked with it.
            self.opened = None;
        }
    }
}

impl Watched {
    fn new(device: &Device) -> io::Result<Self> {
        let watched = Self { requested: EventFd::new(EFD_NONBLOCK)?, failed: EventFd::new(EFD_NONBLOCK)? };
        device.kernel.watch(&watched.requested, &watched.failed);
        Ok(watched)
    }
}

/// Waits for the guest to release slots and for the host to want devices back, until the machine is gone.
fn watch(passthrough: &Weak<Passthrough>, release: &EventFd, changed: &EventFd) {
    loop {
        let Some(this) = passthrough.upgrade() else { return };
        let stopped = |error: io::Error| {
            crate::notice(format_args!("passed-through devices are not watched any more: {error}"));
        };
        let epoll = match watch_list(&this, release, changed) {
            Ok(epoll) => epoll,
            Err(error) => return stopped(error),
        };
        // While this waits the machine may end: it holds nothing of it.
        drop(this);
        let mut events = [EpollEvent::default(); 8];
        match epoll.wait(-1, &mut events) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return stopped(error),
        }
        let _ = changed.read();
        let Some(this) = passthrough.upgrade() else { return };
        if release.read().is_ok() {
            this.take_released();
        }
        let signalled: Vec<(String, &str)> = {
            let state = lock(&this.state);
            let of = |(id, watched): (&String, &Watched)| {
                let why = if watched.requested.read().is_ok() {
                    "the host wants it back"
                } else if watched.failed.read().is_ok() {
                    "it reported an uncorrectable error"
                } else {
                    return None;
                };
                Some((id.clone(), why))
            };
            state.noted.watched.iter().filter_map(of).collect()
        };
        for (id, why) in signalled {
            this.take_back(&id, why);
        }
    }
}

fn watch_list(this: &Passthrough, release: &EventFd, changed: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |event: &EventFd| {
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
    };
    add(release)?;
    add(changed)?;
    for watched in lock(&this.state).noted.watched.values() {
        add(&watched.requested)?;
        add(&watched.failed)?;
    }
    Ok(epoll)
}

impl Drop for Passthrough {
    fn drop(&mut self) {
        self.wake();
    }
}
