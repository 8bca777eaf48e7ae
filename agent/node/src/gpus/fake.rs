//! A model of the kernel's driver core, for tests: functions, drivers, groups, and memory with a past.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use lathe_api::HostPciAddress;

use super::host::PciHost;
use super::scrub::{Bar, BarScrub, ScrubError};
use crate::pci::VFIO_PCI;

/// A function of the model.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) class: u32,
    pub(super) group: u32,
    /// The driver that takes it when nothing overrides.
    pub(super) native: Option<String>,
    pub(super) driver: Option<String>,
    pub(super) over: Option<String>,
    pub(super) reset_method: String,
    pub(super) enabled: u32,
    /// Whether a tenant's data is in its memory.
    pub(super) dirty: bool,
    /// Whether it still does what its tenant told it to.
    pub(super) running: bool,
    /// Memory takes no value.
    pub(super) closed: bool,
    /// What does not work: `reset`, `unbind`, `vfio-pci`, `scrub`.
    pub(super) broken: Vec<&'static str>,
    /// A process has it open.
    pub(super) open: bool,
    pub(super) gone: bool,
}

/// The model, shared between a process that crashes and the one that comes after.
#[derive(Clone, Default)]
pub(super) struct Fake(Arc<Mutex<Model>>);

#[derive(Default)]
pub(super) struct Model {
    pub(super) functions: BTreeMap<HostPciAddress, Function>,
    /// What must never happen and did.
    pub(super) violations: Vec<String>,
    pub(super) scrubs: u32,
}

impl Fake {
    pub(super) fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap()
    }

    /// Adds a function that is bound to `native`.
    pub(super) fn add(&self, address: &str, class: u32, group: u32, native: Option<&str>) -> HostPciAddress {
        let address = address.parse().unwrap();
        let native = native.map(str::to_owned);
        let function = Function {
            class,
            group,
            driver: native.clone(),
            native,
            over: None,
            reset_method: "flr bus".into(),
            enabled: 0,
            dirty: true,
            running: false,
            closed: false,
            broken: Vec::new(),
            open: false,
            gone: false,
        };
        self.model().functions.insert(address, function);
        address
    }

    pub(super) fn change(&self, address: HostPciAddress, change: impl FnOnce(&mut Function)) {
        change(self.model().functions.get_mut(&address).unwrap());
    }

    pub(super) fn get(&self, address: HostPciAddress) -> Function {
        self.model().functions[&address].clone()
    }

    /// What a tenant does with a device that it was lent.
    pub(super) fn tenant(&self, address: HostPciAddress) {
        self.change(address, |f| (f.dirty, f.running) = (true, true));
    }

    /// The host restarts: drivers are bound anew, memory keeps what was in it.
    pub(super) fn reboot(&self) {
        for function in self.model().functions.values_mut() {
            function.driver = function.native.clone();
            (function.over, function.open, function.enabled) = (None, false, 0);
        }
    }
}

impl Model {
    /// The kernel would refuse to open a group with such a bridge in it.
    fn watch_group(&mut self, address: HostPciAddress, driver: &str) {
        let Some(group) = self.functions.get(&address).map(|function| function.group) else { return };
        let mut mates = self.functions.values().filter(|function| function.group == group && group != 0);
        if driver == VFIO_PCI && mates.any(|function| function.driver.as_deref() == Some("shpchp")) {
            self.violations.push(format!("{address} was lent while the host has a bridge of its group"));
        }
    }

    fn at(&mut self, address: HostPciAddress) -> io::Result<&mut Function> {
        let there = self.functions.get_mut(&address).filter(|function| !function.gone);
        there.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn bind(&mut self, address: HostPciAddress, driver: &str) {
        self.watch_group(address, driver);
        if let Some(function) = self.functions.get_mut(&address) {
            function.driver = Some(driver.to_owned());
            let memory = function.class >> 16 == 0x03 && !function.closed;
            if memory && function.dirty {
                self.violations.push(format!("{address} went to {driver} with old data in it"));
            }
        }
    }
}

fn refused(what: &str) -> io::Error {
    io::Error::other(format!("the model refuses: {what}"))
}

impl PciHost for Fake {
    fn functions(&self) -> Vec<HostPciAddress> {
        self.model().functions.iter().filter(|(_, f)| !f.gone).map(|(address, _)| *address).collect()
    }

    fn answers(&self, function: HostPciAddress) -> bool {
        self.model().at(function).is_ok()
    }

    fn read(&self, function: HostPciAddress, attribute: &str) -> io::Result<String> {
        let mut model = self.model();
        let f = model.at(function)?;
        Ok(match attribute {
            "class" => format!("{:#08x}", f.class),
            "driver_override" => f.over.clone().unwrap_or("(null)".into()),
            "reset_method" => f.reset_method.clone(),
            "enable" => f.enabled.to_string(),
            "resource" => "0xc0000000 0xc0ffffff 0x42208\n".into(),
            _ => return Err(io::ErrorKind::NotFound.into()),
        })
    }

    fn has(&self, _: HostPciAddress, attribute: &str) -> bool {
        attribute == "reset"
    }

    fn write(&self, function: HostPciAddress, attribute: &str, value: &str) -> io::Result<()> {
        let mut model = self.model();
        let f = model.at(function)?;
        match attribute {
            "driver_override" => f.over = Some(value.trim().to_owned()).filter(|text| !text.is_empty()),
            "reset_method" => f.reset_method = value.to_owned(),
            "reset" if f.broken.contains(&"reset") => return Err(refused("reset")),
            "reset" => f.running = false,
            "enable" if f.driver.is_some() => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
            "enable" => f.enabled = if value == "1" { f.enabled + 1 } else { f.enabled.saturating_sub(1) },
            _ => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    fn driver(&self, function: HostPciAddress) -> Option<String> {
        self.model().at(function).ok()?.driver.clone()
    }

    fn group(&self, function: HostPciAddress) -> Option<Vec<HostPciAddress>> {
        let mut model = self.model();
        let group = model.at(function).ok()?.group;
        let members = model.functions.iter().filter(|(_, f)| f.group == group);
        (group != 0).then(|| members.map(|(address, _)| *address).collect())
    }

    fn path(&self, _: HostPciAddress) -> Vec<HostPciAddress> {
        Vec::new()
    }

    fn unbind(&self, function: HostPciAddress) -> io::Result<()> {
        let mut model = self.model();
        let f = model.at(function)?;
        if f.broken.contains(&"unbind") {
            return Err(refused("unbind"));
        }
        let (running, walled) = (f.running, f.driver.as_deref() == Some(VFIO_PCI));
        f.driver = None;
        if running && walled {
            model.violations.push(format!("{function} left VFIO while it still ran its tenant's orders"));
        }
        Ok(())
    }

    fn probe(&self, function: HostPciAddress) -> io::Result<()> {
        let mut model = self.model();
        let f = model.at(function)?;
        let wanted = f.over.clone().or(f.native.clone());
        let free = f.driver.is_none();
        // What it does not bind the kernel does not tell.
        let takes = |driver: &String| free && driver != "none" && !f.broken.contains(&driver.as_str());
        if let Some(driver) = wanted.filter(takes) {
            model.bind(function, &driver);
        }
        Ok(())
    }

    fn bind(&self, function: HostPciAddress, driver: &str) -> io::Result<()> {
        let mut model = self.model();
        let f = model.at(function)?;
        if f.broken.contains(&driver) || f.driver.is_some() {
            return Err(refused("bind"));
        }
        model.bind(function, driver);
        Ok(())
    }

    fn load_vfio(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_idle(&self, function: HostPciAddress) -> bool {
        self.model().at(function).is_ok_and(|f| !f.open)
    }

    fn scrub(&self, function: HostPciAddress, _: Bar) -> Result<BarScrub, ScrubError> {
        let mut model = self.model();
        model.scrubs += 1;
        let f = model.at(function).map_err(|_| ScrubError::Gone)?;
        if f.driver.is_some() || f.enabled == 0 || f.broken.contains(&"scrub") {
            return Err(ScrubError::NotZero { bar: 0, offset: 4096 });
        }
        if f.closed {
            return Ok(BarScrub::Closed);
        }
        f.dirty = false;
        Ok(BarScrub::Zero)
    }
}
