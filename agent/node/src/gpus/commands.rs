//! `lathe-agent gpus`: the same hand-over by hand, for trying a host and for repair.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use lathe_api::HostPciAddress;
use lathe_api::gpu::GpuState;
use serde::Serialize;

use super::{GpuError, Gpus, Owner, Policy, View, scrub_bar};
use crate::inventory;
use crate::paths::GPUS as DIR;

/// Which devices this host lends.
#[derive(Clone, Debug, Default, Args)]
pub struct GpuArguments {
    /// Lend these PCI devices alone, GPUs or not, as 0000:65:00.0,...; without it all GPUs but the console's.
    #[arg(long, value_name = "ADDRESS,...", value_delimiter = ',', conflicts_with = "no_gpus")]
    gpu_devices: Vec<HostPciAddress>,
    /// Lend none.
    #[arg(long)]
    no_gpus: bool,
}

impl GpuArguments {
    /// The policy they mean.
    pub fn policy(self) -> Policy {
        match (self.no_gpus, self.gpu_devices) {
            (true, _) => Policy::Off,
            (false, named) if named.is_empty() => Policy::All,
            (false, named) => Policy::Named(named),
        }
    }
}

/// Where the records are.
#[derive(Clone, Debug, Args)]
pub struct Records {
    /// What survives a reboot: the records of devices.
    #[arg(long, default_value = "/var/lib/lathe")]
    state_dir: PathBuf,
}

/// What can be done by hand.
#[derive(Debug, Subcommand)]
pub enum GpusCommand {
    /// List the devices that this host lends, and those on record, with their states.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        records: Records,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        gpus: GpuArguments,
    },
    /// Take devices from the host's drivers, prove them clean and bind them to vfio-pci, for a virtual machine
    /// started by hand. They stay taken until released.
    Take {
        /// As 0000:65:00.0; without any, --count free ones that are close to each other.
        #[arg(required_unless_present = "count", conflicts_with = "count")]
        addresses: Vec<HostPciAddress>,
        /// How many.
        #[arg(long)]
        count: Option<usize>,
        /// Whose they are, for the list.
        #[arg(long = "as", default_value = "root")]
        name: String,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        records: Records,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        gpus: GpuArguments,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        fault: Fault,
    },
    /// Give devices back that were taken by hand, once they are proven clean.
    Release {
        /// As 0000:65:00.0.
        #[arg(required = true)]
        addresses: Vec<HostPciAddress>,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        records: Records,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        fault: Fault,
    },
    /// Reset quarantined devices and prove them clean again; those that pass are free.
    ReleaseQuarantine {
        /// As 0000:65:00.0.
        #[arg(required = true)]
        addresses: Vec<HostPciAddress>,
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        records: Records,
    },
    /// Give back what a crash has left half-taken; an agent does that when it starts.
    Recover {
        #[command(flatten)]
        #[allow(missing_docs, reason = "clap would print it")]
        records: Records,
    },
    /// Overwrite the memory behind a BAR and read it back; started by whoever scrubs.
    #[command(hide = true)]
    ScrubBar {
        /// The BAR's file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
}

/// Ends the command in the middle, for tests of what a crash leaves.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Fault {
    /// Abort before or after this effect, counted from 1.
    #[arg(long, hide = true)]
    abort_at: Option<u32>,
}

impl Fault {
    fn apply(self, gpus: Gpus) -> Gpus {
        let Some(at) = self.abort_at else { return gpus };
        let passed = AtomicU32::new(0);
        gpus.crashing(Box::new(move || {
            if passed.fetch_add(1, Ordering::Relaxed) + 1 == at {
                std::process::abort();
            }
        }))
    }
}

/// A device in the list.
#[derive(Serialize)]
struct Row {
    address: HostPciAddress,
    state: GpuState,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_driver: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<String>,
}

impl Row {
    fn of(gpus: &Gpus, address: HostPciAddress) -> Self {
        let View { state, reason, owner, host_driver, last, .. } = gpus.view(address);
        let owner = owner.map(|owner| owner.to_string());
        Self { address, state, owner, reason, driver: gpus.driver(address), host_driver, last }
    }

    fn print(&self) -> anyhow::Result<()> {
        let state = serde_json::to_value(self.state)?;
        let state = state.as_str().unwrap_or_default();
        let driver = self.driver.as_deref().unwrap_or("none");
        let mut line = format!("{} {state:<11} driver {driver}", self.address);
        for (what, text) in [("", &self.owner), ("last: ", &self.last), ("because: ", &self.reason)] {
            if let Some(text) = text {
                line.push_str(&format!(", {what}{text}"));
            }
        }
        println!("{line}");
        Ok(())
    }
}

/// Does it.
///
/// # Errors
/// When a device cannot be taken, or is not given back.
pub fn run(command: GpusCommand) -> anyhow::Result<()> {
    crate::agent::load_modules();
    match command {
        GpusCommand::List { json, records, gpus } => list(&open(&records, gpus.policy())?, json),
        GpusCommand::Take { addresses, count, name, records, gpus, fault } => {
            let gpus = fault.apply(open(&records, gpus.policy())?);
            take(&gpus, addresses, count, &Owner::Operator(name))
        }
        GpusCommand::Release { addresses, records, fault } => {
            release(&fault.apply(open(&records, Policy::Off)?), &addresses)
        }
        GpusCommand::ReleaseQuarantine { addresses, records } => {
            let gpus = open(&records, Policy::Off)?;
            each(&addresses, |address| {
                gpus.release_quarantine(address)?;
                Row::of(&gpus, address).print()
            })
        }
        GpusCommand::Recover { records } => {
            let gpus = open(&records, Policy::Off)?;
            // Sandboxes are an agent's business: none is taken for dead here.
            gpus.recover(|_| true)?;
            list(&gpus, false)
        }
        GpusCommand::ScrubBar { path, size_bytes } => {
            scrub_bar(&path, size_bytes);
            Ok(())
        }
    }
}

fn open(records: &Records, policy: Policy) -> anyhow::Result<Gpus> {
    let dir = std::path::absolute(&records.state_dir)?.join(DIR);
    Ok(Gpus::new(dir, inventory::boot_id(Path::new("/")), policy))
}

fn take(
    gpus: &Gpus,
    mut addresses: Vec<HostPciAddress>,
    count: Option<usize>,
    owner: &Owner,
) -> anyhow::Result<()> {
    match count {
        Some(count) => addresses = gpus.reserve(count, owner, |_| Ok::<_, GpuError>(()))?,
        None => addresses.iter().try_for_each(|address| gpus.reserve_one(*address, owner))?,
    }
    each(&addresses, |address| {
        gpus.take(address, owner)?;
        Row::of(gpus, address).print()
    })
}

fn release(gpus: &Gpus, addresses: &[HostPciAddress]) -> anyhow::Result<()> {
    each(addresses, |address| {
        let view = gpus.view(address);
        let Some(owner @ Owner::Operator(_)) = view.owner else {
            let has = view.owner.map_or("no operator has it".to_owned(), |owner| format!("{owner} has it"));
            anyhow::bail!("{address} was not taken by hand: {has}");
        };
        gpus.release(address, &owner)?;
        Row::of(gpus, address).print()?;
        ensure!(gpus.view(address).state == GpuState::Free, "{address} is not free: it is quarantined");
        Ok(())
    })
}

/// All of them, however some end; the last error is returned, the others are printed.
fn each(
    addresses: &[HostPciAddress],
    mut act: impl FnMut(HostPciAddress) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut failed = None;
    for address in addresses {
        if let Err(error) = act(*address)
            && let Some(before) = failed.replace(error)
        {
            eprintln!("lathe-agent: {before:#}");
        }
    }
    failed.map_or(Ok(()), Err)
}

fn list(gpus: &Gpus, json: bool) -> anyhow::Result<()> {
    let all = gpus.lent_or_on_record().context("cannot read the records")?;
    let rows: Vec<Row> = all.into_iter().map(|address| Row::of(gpus, address)).collect();
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    rows.iter().try_for_each(Row::print)
}
