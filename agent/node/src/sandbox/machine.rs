//! The machine around a microVM's task: `vm.json`.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use lathe_api::sandbox::SandboxSpec;
use lathe_api::{HostPciAddress, MemorySize};
use lathe_vmm::config::{
    BootConfig, ConsoleConfig, CpuConfig, DiskConfig, DiskFormat, DiskIo, GpuDirectClique, MemoryConfig,
    NetworkConfig, PassthroughConfig, VfioConfig, VhostMode, VmConfig, VsockConfig,
};

use super::numa;
use crate::files;
use crate::network::address::{mac_of, mac_text};

/// What a guest's console may fill of the host's disk: a panic's trace fits many times.
const CONSOLE_LIMIT: MemorySize = MemorySize::from_mib(1);

/// Used where the guest bundle brings no `cmdline` of its own: nothing on the console but panics,
/// and a panic ends the machine at once by a reset that the VMM sees.
const DEFAULT_CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable random.trust_cpu=on";

/// Guest memory comes in pieces of this size.
pub(super) const GRANULE: u64 = 2 << 20;

/// Kernel, initramfs and command line of Linux microVMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestBundle {
    /// ELF or bzImage.
    pub kernel: PathBuf,
    /// With lathe-init as `/init`.
    pub initramfs: PathBuf,
    /// For the kernel.
    pub cmdline: String,
}

impl GuestBundle {
    /// The bundle in `dir`; the files need not exist yet.
    pub fn of(dir: &Path) -> Self {
        let cmdline = files::read_bounded(&dir.join("cmdline"), 4096).ok();
        let cmdline = cmdline.and_then(|bytes| String::from_utf8(bytes).ok());
        Self {
            kernel: dir.join("vmlinuz"),
            initramfs: dir.join("initramfs"),
            cmdline: cmdline.map_or(DEFAULT_CMDLINE.to_owned(), |text| text.trim().to_owned()),
        }
    }
}

/// What of the host a machine uses: made before it starts.
#[derive(Clone, Debug)]
pub struct MachineParts<'a> {
    /// What it boots.
    pub guest: &'a GuestBundle,
    /// Files of its disks, by serial. The writable one is `overlay`.
    pub disks: &'a BTreeMap<String, PathBuf>,
    /// Its tap device.
    pub tap: &'a str,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its vsock device's Unix socket.
    pub vsock: &'a Path,
    /// Where its serial console goes.
    pub console: &'a Path,
    /// Functions of the host that it gets, bound to `vfio-pci`.
    pub passthrough: &'a [HostPciAddress],
    /// The host's files: `/` but in tests.
    pub root: &'a Path,
}

/// The machine of `spec`.
pub fn vm_config(spec: &SandboxSpec, parts: &MachineParts<'_>) -> VmConfig {
    let disk = |(serial, path): (&String, &PathBuf)| DiskConfig {
        id: serial.clone(),
        path: path.clone(),
        format: DiskFormat::Raw,
        read_only: serial != "overlay",
        io: DiskIo::Auto,
    };
    let cpus = u8::try_from(spec.resources.cpus).unwrap_or(u8::MAX);
    let memory = MemorySize::from_bytes(spec.resources.memory.bytes().next_multiple_of(GRANULE));
    VmConfig {
        boot: BootConfig {
            kernel: parts.guest.kernel.clone(),
            initramfs: Some(parts.guest.initramfs.clone()),
            cmdline: parts.guest.cmdline.clone(),
        },
        cpus: CpuConfig { count: cpus, topology: None },
        memory: MemoryConfig { size: memory, hugepages: None },
        disks: parts.disks.iter().map(disk).collect(),
        networks: vec![NetworkConfig {
            id: "net0".into(),
            tap: parts.tap.to_owned(),
            mac: mac_text(mac_of(parts.address)),
            mtu: None,
            queue_pairs: 1,
            vhost: VhostMode::Auto,
        }],
        passthrough: passthrough(parts.passthrough),
        vfio: VfioConfig::default(),
        hotplug_slots: 0,
        numa: numa::near(parts.root, parts.passthrough, cpus, memory),
        // Unique on the host, although each VMM has its own socket: it reads well in a guest's log.
        vsock: Some(VsockConfig { cid: cid(parts.address), socket: parts.vsock.to_owned() }),
        rng: true,
        serial: ConsoleConfig::File { path: parts.console.to_owned(), limit: CONSOLE_LIMIT },
        console: None,
    }
}

/// `gpu0`, `gpu1`, ... for devices; the further functions of one are `gpu0-1`, `gpu0-2`, ...
fn passthrough(functions: &[HostPciAddress]) -> Vec<PassthroughConfig> {
    let (mut device, mut further) = (0, 0);
    let config = functions.iter().enumerate().map(|(index, address)| {
        let new = index.checked_sub(1).is_none_or(|before| !functions[before].shares_device(*address));
        (device, further) = if new { (device + 1, 0) } else { (device, further + 1) };
        let id =
            if further == 0 { format!("gpu{}", device - 1) } else { format!("gpu{}-{further}", device - 1) };
        PassthroughConfig { id, address: *address, gpudirect_clique: GpuDirectClique::default() }
    });
    config.collect()
}

/// 0 to 2 are taken by the protocol; the top byte keeps it clear of them.
fn cid(address: Ipv4Addr) -> u32 {
    0x1000_0000 | (address.to_bits() & 0x00ff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::spec;

    #[test]
    fn a_specification_becomes_this_machine() {
        let guest = GuestBundle::of(Path::new("/usr/lib/lathe/guest"));
        let disks = [("root", "/i.erofs"), ("data0", "/d.erofs"), ("overlay", "/s/overlay.img")]
            .map(|(serial, path)| (serial.to_owned(), PathBuf::from(path)));
        let parts = MachineParts {
            guest: &guest,
            disks: &BTreeMap::from(disks),
            tap: "lsb0123456789ab",
            address: Ipv4Addr::new(10, 42, 1, 2),
            vsock: Path::new("/run/lathe/s/0123456789ab/vsock"),
            console: Path::new("/var/lib/lathe/sandboxes/a-0-1/console.log"),
            passthrough: &[],
            root: Path::new("/"),
        };
        let config = vm_config(&spec("a-0-1"), &parts);
        insta::assert_snapshot!(serde_json::to_string_pretty(&config).unwrap());
        assert!(config.disks.iter().all(|disk| disk.id.len() <= 20));
    }

    #[test]
    fn passed_through_functions_are_named_by_their_device() {
        let functions = ["0000:65:00.0", "0000:65:00.1", "0000:66:00.0"].map(|text| text.parse().unwrap());
        let named = passthrough(&functions);
        let named: Vec<_> = named.iter().map(|p| format!("{} {}", p.id, p.address)).collect();
        assert_eq!(named, ["gpu0 0000:65:00.0", "gpu0-1 0000:65:00.1", "gpu1 0000:66:00.0"]);
    }
}
