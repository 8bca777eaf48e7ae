//! PID 1 of Linux microVMs.
//!
//! It brings up what a task needs, is told the task by the host over virtio-vsock, runs it, reports
//! it, and powers the machine off. It never outlives its task and never waits for a person.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`boot`], [`modules`] | init's own mounts, kernel modules, the connection to the host |
//! | [`disk`], [`network`], [`clock`] | the machine's devices |
//! | [`task`] | root filesystem, namespaces, cgroup, privileges, and the process itself |
//! | [`link`], [`session`] | the conversation with the host |
//! | [`power`] | the power button, and the ways to end the machine |
//!
//! Everything runs on one thread, so the forks in [`task`] copy no lock that somebody holds.

mod boot;
mod clock;
mod disk;
mod link;
mod modules;
mod network;
mod power;
mod session;
mod task;

use std::os::fd::AsFd;
use std::time::Duration;

use lathe_guest_protocol::{FromGuest, TaskSpec, ToGuest, VERSION};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use link::{Link, LinkError};
use power::InputButton;
use session::PowerButton;
use task::LinuxTask;

/// Why init ended without having run a task to its end.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    #[error(transparent)]
    Link(#[from] LinkError),
}

fn main() {
    if std::process::id() != 1 {
        eprintln!("lathe-init: this is PID 1 of a microVM; it does nothing elsewhere");
        std::process::exit(2);
    }
    power::reboot_on_panic();
    if let Err(error) = serve() {
        eprintln!("lathe-init: {error}");
    }
    power::off();
}

fn serve() -> Result<(), InitError> {
    boot::mount_pseudo_filesystems()?;
    modules::load_all();
    let mut link = Link::new(boot::connect_to_host()?)?;
    link.queue(&FromGuest::Hello {
        version: VERSION,
        software: concat!("lathe-init ", env!("CARGO_PKG_VERSION")).to_owned(),
        since_boot_ns: clock::since_boot().as_nanos() as u64,
    })?;
    link.flush()?;

    let mut button = InputButton::open();
    let Some((version, wall_clock_ns, spec)) = wait_for_start(&mut link, &mut button)? else {
        return Ok(());
    };
    if version != VERSION {
        let reason = format!(
            "the host speaks version {version} of the guest protocol and this guest {VERSION}; rebuild the guest bundle (images/guest/build)"
        );
        return Ok(refuse(&mut link, reason)?);
    }
    let grace = Duration::from_secs(spec.grace_seconds.into());
    match prepare(wall_clock_ns, *spec) {
        Ok(mut task) => Ok(session::run(&mut link, &mut task, &mut button, grace)?),
        Err(reason) => Ok(refuse(&mut link, reason)?),
    }
}

/// Sets up the machine for the task and starts it; the error is the line that the user reads.
fn prepare(wall_clock_ns: u64, spec: TaskSpec) -> Result<LinuxTask, String> {
    clock::set_wall_clock(wall_clock_ns).map_err(|errno| format!("cannot set the guest's clock: {errno}"))?;
    network::configure(spec.network.as_ref()).map_err(|error| error.to_string())?;
    LinuxTask::spawn(spec).map_err(|error| error.to_string())
}

/// Tells the host that there will be no task, and waits until it has taken the message.
fn refuse(link: &mut Link, reason: String) -> Result<(), LinkError> {
    link.queue(&FromGuest::Failed { reason })?;
    link.drain()
}

type Start = (u16, u64, Box<TaskSpec>);

/// The host's answer to Hello; `None` when the machine is to end before it has a task.
fn wait_for_start(link: &mut Link, button: &mut InputButton) -> Result<Option<Start>, LinkError> {
    loop {
        let mut fds = vec![PollFd::new(link.as_fd(), PollFlags::POLLIN)];
        fds.extend(button.descriptors().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if button.pressed() {
            return Ok(None);
        }
        link.flush()?;
        for message in link.receive()? {
            match message {
                ToGuest::Start { version, wall_clock_ns, task } => {
                    return Ok(Some((version, wall_clock_ns, task)));
                }
                ToGuest::Shutdown => return Ok(None),
                ToGuest::Signal(_) => {}
            }
        }
    }
}
