//! Devices that come and go.

use std::time::Duration;

use crate::Failure;
use crate::edu::{self, Edu, Engine, Memory};
use crate::options::Options;
use crate::sysfs::{self, Device};

/// Waits for devices that the VMM does not emulate itself: `devices N`.
pub fn wait(options: &Options) -> Result<(), Failure> {
    let wanted: usize = options.number("devices")?.unwrap_or(1);
    let found = sysfs::wait_for(&format!("there are not {wanted} devices"), || {
        let found = sysfs::devices()?.iter().filter(|device| device.passed_through()).count();
        Ok((found >= wanted).then_some(found))
    })?;
    println!("devices {found}");
    Ok(())
}

/// Drives an edu device while it is there, as often as it comes: `plugged ADDRESS` once it has moved data,
/// then `unplugged ADDRESS after N transfers`.
pub fn edu_loop(options: &Options) -> Result<(), Failure> {
    let rounds: u64 = options.number("rounds")?.unwrap_or(10);
    for round in 0..rounds {
        let device = sysfs::find(options, "edu device", |device| device.id == edu::ID)?;
        let transfers = drive(&device, round)?;
        println!("unplugged {} after {transfers} transfers", device.address);
        sysfs::wait_for(&format!("{} is still on the bus", device.address), || {
            Ok((!device.path.exists()).then_some(()))
        })?;
    }
    Ok(())
}

/// Moves data until the device is asked back or gone; how many times it came back as it was sent.
fn drive(device: &Device, seed: u64) -> Result<u64, Failure> {
    let memory = Memory::new()?;
    let edu = Edu::open(device)?;
    edu.identify()?;
    let request = edu.request()?;
    let mut engine = Engine::new(&edu, &memory, seed);
    let mut transfers = 0;
    loop {
        let result = engine.round_trip(None);
        let asked_back = request.wait(Duration::ZERO)?;
        match result {
            Ok(_) => transfers += 1,
            // Torn out in the middle of a transfer, the device does not answer; with it still there, it is wrong.
            Err(_) if asked_back || edu.identify().is_err() => return Ok(transfers),
            Err(failure) => return Err(failure),
        }
        if transfers == 1 {
            println!("plugged {}", device.address);
        }
        if asked_back {
            return Ok(transfers);
        }
    }
}
