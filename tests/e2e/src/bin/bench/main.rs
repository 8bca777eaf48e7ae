//! Benchmarks: each prints a table and writes `target/bench/NAME.json` (`NAME-PART.json` with parts), a list of records
//! `{"metric", "subject", "value", "unit"}`. Peers run in the same host in the same run.
//!
//! Times are virtual: the host's clock advances one nanosecond an instruction, so they repeat to a
//! percent on any machine, and count instructions rather than cache misses or device latency; those of
//! the scheduler are CPU time of one thread of this machine.

mod boot;
mod coordinator;
mod qemu;
mod record;
mod scheduler;
mod traces;
mod vfio;

use std::process::ExitCode;

use anyhow::bail;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let parts: Vec<String> = args.collect();
    if name != "scheduler" && !parts.is_empty() {
        bail!("{name} has no parts: {}", parts.join(" "));
    }
    let (records, print): (_, fn(&[record::Record])) = match name.as_str() {
        "boot" => (boot::run()?, record::print),
        "coordinator" => (coordinator::run()?, record::print),
        "vfio" => (vfio::run()?, vfio::print),
        "scheduler" => (scheduler::run(&parts)?, scheduler::print),
        _ => bail!("no benchmark {name:?}; there are boot, vfio, coordinator and scheduler"),
    };
    print(&records);
    // Parts that run alone leave each other's figures.
    let file = std::iter::once(name).chain(parts).collect::<Vec<_>>().join("-");
    let path = record::write(&file, &records)?;
    println!("\n{} written", path.display());
    Ok(())
}
