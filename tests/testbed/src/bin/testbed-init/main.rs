//! PID 1 of an emulated bare-metal host: sets the machine up as a Linux distribution would have,
//! then runs the server that executes the harness's commands.
//!
//! Two processes: PID 1 does nothing but reap, and the server, its child, starts the commands. Were
//! they one, reaping orphans would race with waiting for commands.
//!
//! [`mounts`] makes the root and its filesystems, [`modules`] loads drivers, [`network`] and
//! [`parameters`] do what their names say, [`serve`] answers the harness.

mod modules;
mod mounts;
mod network;
mod parameters;
mod serve;

use std::process::{Command, ExitCode};
use std::{fs, io};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, sethostname};

use crate::parameters::Parameters;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--serve") {
        return match serve::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                log(&format!("the exec server failed: {e}"));
                ExitCode::FAILURE
            }
        };
    }
    if getpid() != Pid::from_raw(1) {
        eprintln!("testbed-init is PID 1 of the testbed's emulated hosts; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    if let Err(e) = set_up() {
        log(&format!("set-up failed: {e}"));
        // The harness sees QEMU exit and shows the console with the line above.
        return power_off();
    }
    match Command::new("/proc/self/exe").arg("--serve").spawn() {
        Ok(server) => reap(server.id()),
        Err(e) => log(&format!("cannot start the exec server: {e}")),
    }
    power_off()
}

/// A line on the host's console.
pub fn log(message: &str) {
    println!("testbed-init: {message}");
}

fn set_up() -> io::Result<()> {
    mounts::switch_root()?;
    mounts::kernel_filesystems()?;
    let parameters = Parameters::read()?;
    sethostname(&parameters.hostname)?;
    // Builtin drivers have made their devices by now, the modules' come as they load.
    let loader = modules::Loader::new()?;
    for name in ["virtio_net", "virtio_blk", "ext4", "vfio_iommu_type1", "vfio_pci"] {
        loader.load_or_log(name);
    }
    for name in ["tun", "vhost_net", "vhost_vsock"] {
        loader.load_or_log(name);
    }
    if parameters.coldplug {
        loader.coldplug()?;
    }
    modules::wait_for_tsc();
    loader.load_or_log("kvm_amd");
    if parameters.huge_pages > 0 {
        fs::write("/proc/sys/vm/nr_hugepages", parameters.huge_pages.to_string())?;
    }
    network::configure(&parameters)?;
    mounts::data_disk()?;
    if parameters.share {
        loader.load_or_log("9pnet_virtio");
        mounts::share()?;
    }
    Ok(())
}

/// Waits for every process of the machine that has no other parent, until the server is gone.
fn reap(server: u32) {
    loop {
        match waitpid(None::<Pid>, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))
                if pid.as_raw() as u32 == server =>
            {
                log("the exec server ended; powering off");
                return;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => {
                log(&format!("wait failed: {e}"));
                return;
            }
        }
    }
}

fn power_off() -> ExitCode {
    nix::unistd::sync();
    let Err(e) = reboot(RebootMode::RB_POWER_OFF);
    log(&format!("cannot power off: {e}"));
    ExitCode::FAILURE
}
