//! The loopback interface and eth0's address.

use std::io;
use std::process::Command;

use crate::parameters::Parameters;

/// Brings `lo` and `eth0` up.
pub fn configure(parameters: &Parameters) -> io::Result<()> {
    busybox(&["ifconfig", "lo", "127.0.0.1", "up"])?;
    if let Some(address) = &parameters.address {
        busybox(&["ifconfig", "eth0", address, "netmask", "255.255.255.0", "up"])?;
    }
    if let Some(gateway) = &parameters.gateway {
        busybox(&["route", "add", "default", "gw", gateway])?;
    }
    Ok(())
}

fn busybox(arguments: &[&str]) -> io::Result<()> {
    let status = Command::new("/usr/bin/busybox").args(arguments).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{} failed with {status}", arguments.join(" "))))
    }
}
