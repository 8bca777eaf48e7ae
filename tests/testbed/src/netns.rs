//! The network of a bed: a network namespace with a bridge, a tap a host, and this machine's end at
//! 10.88.0.1. Nothing of it is visible outside the namespace.

use std::path::Path;
use std::process::{Command, Output};

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// `ip` is part of iproute2.
    #[error("cannot run ip: {0}; run scripts/setup")]
    NoIp(#[source] std::io::Error),
    /// Most often for lack of privileges.
    #[error("`ip {command}` failed: {message}")]
    Ip {
        /// What was run.
        command: String,
        /// What it said.
        message: String,
    },
}

/// A namespace that is removed when dropped.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace and its bridge.
    pub(crate) fn create(name: String) -> Result<Self, NetworkError> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        for command in
            ["link set lo up", "link add br0 type bridge", "addr add 10.88.0.1/24 dev br0", "link set br0 up"]
        {
            namespace.ip(command)?;
        }
        Ok(namespace)
    }

    /// Adds a tap to the bridge.
    pub(crate) fn add_tap(&self, tap: &str) -> Result<(), NetworkError> {
        self.ip(&format!("tuntap add dev {tap} mode tap"))?;
        self.ip(&format!("link set {tap} up"))?;
        self.connect(tap)
    }

    /// Removes a tap.
    pub(crate) fn remove_tap(&self, tap: &str) {
        // The namespace may be going as well.
        let _ = self.ip(&format!("link del {tap}"));
    }

    /// Puts a tap into the bridge.
    pub(crate) fn connect(&self, tap: &str) -> Result<(), NetworkError> {
        self.ip(&format!("link set {tap} master br0"))
    }

    /// Takes a tap out of the bridge: frames are lost in silence, as on a broken cable behind a switch.
    pub(crate) fn disconnect(&self, tap: &str) -> Result<(), NetworkError> {
        self.ip(&format!("link set {tap} nomaster"))
    }

    /// A command that runs in the namespace `name`, sharing everything else with this machine.
    pub(crate) fn command_in(name: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={NAMESPACES}/{name}")).arg("--").arg(program);
        command
    }

    fn ip(&self, command: &str) -> Result<(), NetworkError> {
        let mut arguments = vec!["-n", &self.name];
        arguments.extend(command.split(' '));
        ip(&arguments)
    }

    /// Removes a namespace by name, if it is there.
    pub(crate) fn remove(name: &str) -> Result<(), NetworkError> {
        if Path::new(NAMESPACES).join(name).exists() { ip(&["netns", "del", name]) } else { Ok(()) }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(e) = Self::remove(&self.name) {
            eprintln!("lathe-testbed: {e}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), NetworkError> {
    let Output { status, stderr, .. } =
        Command::new("ip").args(arguments).output().map_err(NetworkError::NoIp)?;
    if status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&stderr).trim().replace('\n', "; ");
    Err(NetworkError::Ip { command: arguments.join(" "), message })
}
