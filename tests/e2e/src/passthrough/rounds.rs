//! A device that comes to a running machine and goes from it again, as often as it takes to see what is left behind.

use anyhow::ensure;
use lathe_testbed::{Host, Status};
use serde_json::json;

use super::{Machine, Running, SOCKET};
use crate::wait::PATIENCE;

/// How often it goes because it was asked for.
pub const ROUNDS: usize = 10;

/// Plugs the `edu` device at `address` into a machine, has the guest move data by its engine, asks for the device and
/// sees it go, ten times over; what the VMM holds of the host has to be the same after each round. Once more it comes,
/// and is taken away without asking while data moves. `first` is done while it is there for the first time.
///
/// # Errors
/// When a round fails, or the VMM holds more than before, with all that was printed.
pub fn comes_and_goes(
    host: &Host,
    backend: &str,
    address: &str,
    first: impl FnOnce(&Running<'_>),
) -> anyhow::Result<()> {
    let machine = Machine::new(&format!("edu-loop lathe.rounds={}", ROUNDS + 1), &[]);
    let mut running = machine.with("hotplug_slots", json!(1)).backend(backend).start(host)?;
    let mut first = Some(first);
    let mut held = Vec::new();
    for round in 1..=ROUNDS {
        running.plug_edu(address, round)?;
        let devices = running.devices()?;
        ensure!(devices.len() == 1 && devices[0]["backend"] == backend, "{devices:?}");
        if let Some(first) = first.take() {
            first(&running);
        }
        unplug(&running, &["edu"])?;
        running.wait_for_devices(0)?;
        running.wait_for("unplugged", round)?;
        held.push(running.held()?);
    }
    // What is made once is there after the second round.
    ensure!(held[1..].iter().all(|round| *round == held[1]), "{backend}: {held:#?}");

    running.plug_edu(address, ROUNDS + 1)?;
    unplug(&running, &["edu", "--surprise"])?;
    let devices = running.devices()?;
    ensure!(devices.is_empty(), "{devices:?}");
    let ended = running.process.wait(PATIENCE)?;
    let text = running.text()?;
    ensure!(ended == Some(Status::Exited(0)) && text.contains("DEVICES-DONE"), "{ended:?}: {text}");
    host.shell(&format!("rm -f {SOCKET}"))?;
    Ok(())
}

/// Takes a device from a machine, in `words` of `lathe vm device unplug`.
///
/// # Errors
/// When that fails, with what was said.
pub fn unplug(running: &Running<'_>, words: &[&str]) -> anyhow::Result<()> {
    let output = running.device("unplug", words)?;
    let said = || format!("{}{}", output.text(), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", said());
    Ok(())
}
