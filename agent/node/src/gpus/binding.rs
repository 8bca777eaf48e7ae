//! Takes functions from the host's drivers to `vfio-pci` and back.
//!
//! Each step is written down, then taken, then read back from the kernel: a probe that binds nothing, or
//! something else, reports success all the same. From [`seize`] on, `driver_override` keeps every driver but
//! `vfio-pci` away, so nothing takes a device that is between two owners, whatever is loaded meanwhile.
//!
//! A group is lent only if no driver has any of it that may do DMA for the host; the kernel refuses to open it else
//! ("the group is viable", Linux Documentation/driver-api/vfio.rst). It takes a driver on a bridge for one too, unless
//! the driver says otherwise (`driver_managed_dma`), as `pcieport` does and `shpchp`, for slots of conventional PCI,
//! does not. Such a driver is taken from the bridge meanwhile; a bridge itself is never given to `vfio-pci`.

use std::io;
use std::time::Instant;

use lathe_api::HostPciAddress;

use super::GpuError;
use super::host::PciHost;
use super::record::{Function, Ledger, Step};
use crate::pci::{self, VFIO_PCI};

/// Bridges (class 0x0604) in a group need not be handed over: they do no DMA of their own.
const PCI_BRIDGE: u32 = 0x0604;

/// The base class of bridges of any kind.
pub const BRIDGES: u32 = 0x06;

/// Drivers that the kernel lets keep a member of a group that is lent: they do no DMA.
const HARMLESS_DRIVERS: [&str; 3] = [VFIO_PCI, "pci-stub", "pcieport"];

/// What `driver_override` names to keep all drivers away (Linux Documentation/ABI/testing/sysfs-bus-pci).
const NO_DRIVER: &str = "none";

/// What `driver_override` shows when it is not set.
const NO_OVERRIDE: &str = "(null)";

/// Its 24-bit class code.
pub fn class_of(host: &dyn PciHost, function: HostPciAddress) -> u32 {
    pci::class(&host.read(function, "class").unwrap_or_default())
}

/// The functions that have to be handed over with `address`, itself first: those of the same device in its
/// IOMMU group. A group with anybody else's functions cannot be handed over.
///
/// # Errors
/// When there is no group, or others are in it.
pub fn unit_of(host: &dyn PciHost, address: HostPciAddress) -> Result<Vec<HostPciAddress>, GpuError> {
    let refused = |why: String| GpuError::Refused { address, why };
    let group = host.group(address).ok_or_else(|| {
        refused("it is in no IOMMU group: switch the IOMMU on in the firmware and with intel_iommu=on".into())
    })?;
    let endpoints = group.into_iter().filter(|member| class_of(host, *member) >> 8 != PCI_BRIDGE);
    // The host needs its other bridges (to ISA, to itself), whatever device they are part of.
    let goes_along =
        |member: &HostPciAddress| member.shares_device(address) && class_of(host, *member) >> 16 != BRIDGES;
    let (mut unit, others): (Vec<_>, Vec<_>) = endpoints.partition(goes_along);
    if !others.is_empty() {
        let list = others.iter().map(|other| {
            let driver = host.driver(*other).unwrap_or_else(|| "no driver".into());
            format!("{other} ({driver})")
        });
        return Err(refused(format!(
            "it shares its IOMMU group with {}; move it to a slot below its own root port, or behind a \
             switch with ACS",
            list.collect::<Vec<_>>().join(", ")
        )));
    }
    unit.sort_unstable_by_key(|function| (*function != address, *function));
    Ok(unit)
}

/// The bridges in the group of `address` whose drivers would keep the group the host's. All that is behind them is
/// lent with it: see [`unit_of`].
pub fn bridges_of(host: &dyn PciHost, address: HostPciAddress) -> Vec<HostPciAddress> {
    let is_in_the_way = |member: &HostPciAddress| {
        let driver = host.driver(*member);
        class_of(host, *member) >> 8 == PCI_BRIDGE
            && driver.is_some_and(|driver| !HARMLESS_DRIVERS.contains(&driver.as_str()))
    };
    host.group(address).unwrap_or_default().into_iter().filter(is_in_the_way).collect()
}

/// What a function is bound to at the moment.
pub fn function_now(host: &dyn PciHost, address: HostPciAddress) -> Function {
    let text = |attribute: &str| host.read(address, attribute).ok();
    Function {
        address,
        driver: host.driver(address),
        driver_override: text("driver_override").filter(|text| text != NO_OVERRIDE && !text.is_empty()),
        reset_method: text("reset_method"),
    }
}

fn failed(address: HostPciAddress, what: impl Into<String>) -> impl FnOnce(io::Error) -> GpuError {
    let what = what.into();
    move |source| GpuError::Step { address, what, source }
}

/// Keeps all drivers but `vfio-pci` away from every function, and all from the bridges; those that are bound make go.
///
/// # Errors
/// When a driver does not let go.
pub fn seize(host: &dyn PciHost, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
    let begun = Instant::now();
    let functions = ledger.record.addresses().into_iter().map(|address| (address, VFIO_PCI));
    let bridges = ledger.record.bridges.iter().map(|bridge| (bridge.address, NO_DRIVER));
    let all: Vec<_> = functions.chain(bridges).collect();
    for (address, driver) in &all {
        ledger.step(Step::Override(*address), |_| {
            host.write(*address, "driver_override", driver).map_err(failed(*address, "set driver_override"))
        })?;
    }
    for (address, _) in all {
        let Some(driver) = host.driver(address) else { continue };
        ledger.step(Step::Unbind(address), |_| {
            // A driver that goes by itself in this moment has let go as well.
            let result = host.unbind(address);
            match host.driver(address) {
                None => Ok(()),
                Some(_) if result.is_err() => {
                    result.map_err(failed(address, format!("unbind it from {driver}")))
                }
                Some(found) => Err(GpuError::Bound { address, wanted: "no driver".into(), found }),
            }
        })?;
    }
    ledger.record.times.unbind_ms = millis(begun);
    Ok(())
}

/// Has `vfio-pci` take every function.
///
/// # Errors
/// When another driver, or none, is bound then.
pub fn lend(host: &dyn PciHost, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
    let begun = Instant::now();
    for address in ledger.record.addresses() {
        ledger.step(Step::Lend(address), |_| take_up(host, address, VFIO_PCI))?;
    }
    ledger.record.times.bind_ms = millis(begun);
    Ok(())
}

/// Gives every function and bridge back to the driver that had it.
///
/// # Errors
/// When it does not come back; then no driver has it, or another one.
pub fn give_back(host: &dyn PciHost, ledger: &mut Ledger<'_>) -> Result<(), GpuError> {
    let begun = Instant::now();
    let functions = [ledger.record.functions.clone(), ledger.record.bridges.clone()].concat();
    for function in &functions {
        ledger.step(Step::Restore(function.address), |_| restore(host, function))?;
    }
    for function in &functions {
        let address = function.address;
        match &function.driver {
            // Already there: it was never taken, or a crash came after this step.
            Some(driver) if host.driver(address).as_ref() == Some(driver) => {}
            Some(driver) => ledger.step(Step::Return(address), |_| take_up(host, address, driver))?,
            None => {
                if let Some(found) = host.driver(address) {
                    return Err(GpuError::Bound { address, wanted: "no driver".into(), found });
                }
            }
        }
    }
    ledger.record.times.bind_ms = millis(begun);
    Ok(())
}

fn restore(host: &dyn PciHost, function: &Function) -> Result<(), GpuError> {
    let address = function.address;
    // An empty line clears it.
    let text = function.driver_override.as_deref().unwrap_or("\n");
    host.write(address, "driver_override", text).map_err(failed(address, "restore driver_override"))?;
    if let Some(methods) = &function.reset_method
        && host.read(address, "reset_method").is_ok_and(|now| now != *methods)
        && !methods.is_empty()
        && let Err(error) = host.write(address, "reset_method", methods)
    {
        tracing::warn!(%address, methods, %error, "cannot restore reset_method");
    }
    Ok(())
}

/// Offers a function that no driver has to the drivers, and reads back which one took it.
fn take_up(host: &dyn PciHost, address: HostPciAddress, driver: &str) -> Result<(), GpuError> {
    let result = host.probe(address);
    match host.driver(address) {
        Some(found) if found == driver => Ok(()),
        Some(found) => Err(GpuError::Bound { address, wanted: driver.into(), found }),
        None => {
            result.map_err(failed(address, format!("probe it for {driver}")))?;
            // The probe keeps the driver's word to itself; asked directly it may even take the device.
            let word = host.bind(address, driver);
            match (host.driver(address), word) {
                (Some(found), _) if found == driver => Ok(()),
                (_, Err(source)) => Err(failed(address, format!("bind it to {driver}"))(source)),
                (found, Ok(())) => Err(GpuError::Bound {
                    address,
                    wanted: driver.into(),
                    found: found.unwrap_or_else(|| "no driver".into()),
                }),
            }
        }
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
