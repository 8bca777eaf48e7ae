//! Where everything of a node lies, and the short names derived from a sandbox's ID.

use std::fmt;
use std::path::{Path, PathBuf};

use lathe_api::artefact::Digest;

/// The agent's directories.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Survives a reboot: identity, caches, journals, overlay disks, output not yet shipped.
    pub state: PathBuf,
    /// Gone after a reboot: sockets and mount points.
    pub run: PathBuf,
    /// Kernel and initramfs of microVMs.
    pub guest: PathBuf,
    /// The VMM's binary.
    pub vmm: PathBuf,
}

impl Paths {
    /// All sandboxes' directories.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// One sandbox's durable directory.
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.sandboxes().join(id)
    }

    /// All sandboxes' runtime directories.
    pub fn runs(&self) -> PathBuf {
        self.run.join("s")
    }

    /// One sandbox's runtime directory. Short, because socket paths end at 107 bytes.
    pub fn sandbox_run(&self, key: &SandboxKey) -> PathBuf {
        self.runs().join(&key.0)
    }

    /// Images, one EROFS each.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Datasets, one EROFS each.
    pub fn datasets(&self) -> PathBuf {
        self.state.join("datasets")
    }

    /// Half-made artefacts; emptied when the agent starts.
    pub fn staging(&self) -> PathBuf {
        self.state.join("staging")
    }

    /// Records of devices that are or were lent, one file each.
    pub fn gpus(&self) -> PathBuf {
        self.state.join(GPUS)
    }

    /// The node's key and certificate.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity")
    }
}

/// Twelve hexadecimal digits that stand for a sandbox's ID where names are short: network
/// interfaces have 15 bytes, socket paths 107, and an ID may have 96.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxKey(String);

impl SandboxKey {
    /// The key of a sandbox.
    pub fn of(id: &str) -> Self {
        Self(Digest::of(id.as_bytes()).hex()[..12].to_owned())
    }

    /// The host's network interface of the sandbox: exactly the 15 bytes that Linux allows.
    pub fn interface(&self) -> String {
        format!("{INTERFACE_PREFIX}{}", self.0)
    }
}

impl fmt::Display for SandboxKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<Path> for SandboxKey {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

/// The name of [`Paths::gpus`] in the state directory.
pub const GPUS: &str = "gpus";

/// How the names of all sandboxes' interfaces begin: filters and clean-up find them by it.
pub const INTERFACE_PREFIX: &str = "lsb";

/// Whether `id` may be a directory's name: what the coordinator says is checked again here,
/// because these bytes become paths.
pub fn is_valid_id(id: &str) -> bool {
    (1..=96).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_fit_their_limits() {
        let key = SandboxKey::of(&"a".repeat(96));
        assert_eq!(key.interface().len(), 15);
        let paths =
            Paths { state: "/s".into(), run: "/run/lathe".into(), guest: "/g".into(), vmm: "/v".into() };
        assert!(paths.sandbox_run(&key).join("vsock_1024").as_os_str().len() < 107);
        assert_ne!(SandboxKey::of("a-0-1"), SandboxKey::of("a-0-2"));
    }

    #[test]
    fn ids_cannot_leave_their_directory() {
        for bad in ["", "..", "a/b", "A", "a.b", &"a".repeat(97)] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
        assert!(is_valid_id("longley-x7k2qf-0-1"));
    }
}
