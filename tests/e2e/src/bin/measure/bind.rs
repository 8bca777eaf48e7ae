//! Gives a PCI function to `vfio-pci`, as the agent does, or back to the host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// The kernel's writes in sysfs.
const PCI: &str = "/sys/bus/pci";

/// Binds `address` to `driver`, or with `none` to whichever driver wants it; how long that took.
pub fn bind(address: &str, driver: &str) -> anyhow::Result<Duration> {
    let device = Path::new(PCI).join("devices").join(address);
    let write = |path: &Path, text: &str| {
        fs::write(path, text).with_context(|| format!("cannot write {text:?} to {}", path.display()))
    };
    let wanted = if driver == "none" { "\n" } else { driver };
    let start = Instant::now();
    write(&device.join("driver_override"), wanted)?;
    if device.join("driver").exists() {
        write(&device.join("driver/unbind"), address)?;
    }
    write(&Path::new(PCI).join("drivers_probe"), address)?;
    let took = start.elapsed();
    if driver != "none" {
        let bound =
            fs::read_link(device.join("driver")).with_context(|| format!("{address} has no driver"))?;
        ensure!(bound.ends_with(driver), "{address} is bound to {}", bound.display());
    }
    Ok(took)
}
