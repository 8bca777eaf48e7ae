//! PID 1 of the guests that devices are passed through to: drives each device as its users would, and says
//! what it saw. On a host, as an ordinary program, it does the same for comparison.
//!
//! In a guest the kernel's command line has the actions, joined by commas and done in that order, as
//! `lathe.test=ACTION,...`, and their options as `lathe.NAME=VALUE`. As a program it is called
//! `device-test ACTION,... NAME=VALUE...`. Each result is one line, a name and its values; the last line is
//! `DEVICES-DONE`, or `DEVICES-FAILED ACTION: why` at the first action that fails. Then the machine powers
//! off, or starts again when `reboot` was among the actions.
//!
//! | action | options (default) | what it does and prints |
//! | --- | --- | --- |
//! | `tree` | | the PCI tree, a `tree` line a device ([`tree`]) |
//! | `bars` | | `bar ADDRESS REGION START SIZE FLAGS` for each region ([`bars`]) |
//! | `numa` | | CPUs and memory of each NUMA node ([`numa`]) |
//! | `nvme` | `nvme` (nvme0n1), `mib` (whole disk), `writes` (64), `seed` (1) | reads and writes with checksums on all queues ([`nvme`]) |
//! | `nvme-verify` | `nvme`, `writes`, `seed` | checks what `nvme` with the same options wrote, after a reboot say |
//! | `nvme-iops` | `nvme`, `reads` (2000), `depth` (1) | `nvme_4k_read_ns N` and `nvme_4k_read_median_ns N`, with `depth` reads under way ([`reads`]) |
//! | `nvme-sriov` | `device` (the first disk), `functions` (2) | on a host: makes virtual functions and gives them queues ([`sriov`]) |
//! | `edu` | `device`, `pin` (on, or `off`) | identification, factorials by polling, INTx and MSI, DMA both ways ([`edu`]) |
//! | `edu-loop` | `rounds` (10) | DMA until the device has gone that many times ([`hotplug`]) |
//! | `e1000e` | `device`, `frames` (200) | sends frames to a peer that returns them ([`nic`]) |
//! | `vram-zero` | `device`, `stride` | `vram_zero yes`, or where the first other byte is ([`vram`]) |
//! | `vram-fill`, `vram-check` | `device`, `stride`, `seed` (1) | writes a pattern, and checks that it is still there |
//! | `hotplug-wait` | `devices` (1) | waits for so many devices that are not the VMM's own: `devices N` |
//! | `reboot` | | ends with a reset instead of a power-off |

mod bars;
mod direct;
mod edu;
mod hotplug;
mod interrupts;
mod memory;
mod nic;
mod numa;
mod nvme;
mod options;
mod reads;
mod sriov;
mod sysfs;
mod tree;
mod vfio;
mod vram;

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use options::{Mistake, Options};

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The kernel refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was asked for.
        what: String,
        #[source]
        source: io::Error,
    },
    /// A device did something other than it should have.
    #[error("{0}")]
    Wrong(String),
    #[error(transparent)]
    Option(#[from] Mistake),
}

impl Failure {
    /// For `map_err`: names what the kernel refused.
    fn at<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    fn wrong(what: impl Into<String>) -> Self {
        Self::Wrong(what.into())
    }
}

fn main() {
    let first = std::process::id() == 1;
    let options = if first {
        mount_pseudo_filesystems();
        Options::of_command_line(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    } else {
        Options::of_arguments(std::env::args().skip(1))
    };
    let result = options.and_then(|options| {
        options
            .actions()
            .try_for_each(|action| run(action, &options).map_err(|failure| format!("{action}: {failure}")))?;
        Ok(options.actions().any(|action| action == "reboot"))
    });
    match &result {
        Ok(_) => println!("DEVICES-DONE"),
        Err(reason) => println!("DEVICES-FAILED {reason}"),
    }
    if first {
        let mode = if result == Ok(true) { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF };
        nix::unistd::sync();
        let Err(errno) = reboot(mode);
        println!("the machine does not end: {errno}");
    }
    std::process::exit(i32::from(result.is_err()));
}

fn run(action: &str, options: &Options) -> Result<(), Failure> {
    match action {
        "tree" => tree::print(),
        "bars" => bars::print(),
        "numa" => numa::print(),
        "nvme" => nvme::exercise(options),
        "nvme-verify" => nvme::verify(options),
        "nvme-iops" => reads::time(options),
        "nvme-sriov" => sriov::enable(options),
        "edu" => edu::exercise(options),
        "edu-loop" => hotplug::edu_loop(options),
        "e1000e" => nic::exercise(options),
        "vram-zero" => vram::check_zero(options),
        "vram-fill" => vram::fill(options),
        "vram-check" => vram::check(options),
        "hotplug-wait" => hotplug::wait(options),
        // Done at the end.
        "reboot" => Ok(()),
        unknown => Err(Failure::wrong(format!("there is no action {unknown:?}"))),
    }
}

fn mount_pseudo_filesystems() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target);
        if let Err(errno) = mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            && errno != nix::errno::Errno::EBUSY
        {
            println!("cannot mount {target}: {errno}");
        }
    }
}
