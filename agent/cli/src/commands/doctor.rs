//! `lathe doctor`: what this machine can do, one line each, and what to do about each no.
//!
//! Reads procfs, sysfs and /dev only. It is told where their root is, so that tests can hand it
//! machines that are not at hand.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::Exit;
use crate::output::{self, Format};

/// One capability.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    name: &'static str,
    /// Whether it is there.
    ok: bool,
    /// What was found.
    found: String,
    /// What to do about a no.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
    /// Which sandboxes need it.
    needed_for: &'static str,
}

/// Prints the checks. The exit status is 0 when microVMs and containers can both run here.
pub fn run(format: Format) -> anyhow::Result<Exit> {
    let checks = examine(Path::new("/"));
    match format {
        Format::Json => output::json(&checks)?,
        Format::Table => {
            for check in &checks {
                let mark = if check.ok { "yes" } else { "no " };
                let fix = check.fix.as_ref().map(|fix| format!("; for {}: {fix}", check.needed_for));
                println!("{mark} {:<19} {}{}", check.name, check.found, fix.unwrap_or_default());
            }
        }
    }
    let can_run = checks.iter().all(|check| check.ok || !REQUIRED.contains(&check.name));
    Ok(if can_run { Exit::Success } else { Exit::Unavailable })
}

/// Without these neither class runs; the others only make things faster or are for passthrough.
const REQUIRED: [&str; 6] = ["kvm", "unmodified kernels", "tun", "cgroups", "nftables", "erofs tools"];

fn examine(root: &Path) -> Vec<Check> {
    let machine = Machine { root: root.to_owned() };
    vec![
        machine.kvm(),
        machine.unmodified_kernels(),
        machine.iommu(),
        machine.device("vfio", "dev/vfio/vfio", "load the module: modprobe vfio-pci", "GPU passthrough"),
        machine.device(
            "iommufd",
            "dev/iommu",
            "use a kernel with CONFIG_IOMMUFD and load iommufd; without it the older VFIO groups are used",
            "faster passthrough",
        ),
        machine.hugepages(),
        machine.cgroups(),
        machine.user_namespaces(),
        machine.device(
            "vhost-net",
            "dev/vhost-net",
            "load the module: modprobe vhost_net; without it the VMM moves the frames itself",
            "faster networking",
        ),
        machine.device("tun", "dev/net/tun", "load the module: modprobe tun", "microVM networking"),
        machine.program("nftables", "nft", "apt-get install nftables", "keeping tenants apart"),
        machine.program("erofs tools", "mkfs.erofs", "apt-get install erofs-utils", "images"),
    ]
}

struct Machine {
    root: PathBuf,
}

impl Machine {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok()
    }

    fn cpu_flag(&self, flags: &[&str]) -> Option<String> {
        let cpuinfo = self.read("proc/cpuinfo")?;
        let line = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
        line.split_whitespace().find(|flag| flags.contains(flag)).map(str::to_owned)
    }

    fn kvm(&self) -> Check {
        let opened = fs::OpenOptions::new().read(true).write(true).open(self.path("dev/kvm"));
        let fix = match &opened {
            Ok(_) => None,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Some("run as root, or join the group that owns /dev/kvm".to_owned())
            }
            Err(_) => Some("enable virtualization in the firmware and load kvm_intel or kvm_amd".to_owned()),
        };
        Check {
            name: "kvm",
            ok: opened.is_ok(),
            found: match opened {
                Ok(_) => "/dev/kvm opens".to_owned(),
                Err(error) => format!("/dev/kvm: {error}"),
            },
            fix,
            needed_for: "microVMs",
        }
    }

    fn unmodified_kernels(&self) -> Check {
        let flag = self.cpu_flag(&["vmx", "svm"]);
        Check {
            name: "unmodified kernels",
            ok: flag.is_some(),
            found: match &flag {
                Some(flag) => format!("the CPU has {flag}"),
                None => "the CPU shows neither vmx nor svm: KVM here cannot boot Linux".to_owned(),
            },
            fix: flag.is_none().then(|| {
                "use bare metal or a VM with nested virtualization; to try Lathe here, scripts/testbed emulates hosts"
                    .to_owned()
            }),
            needed_for: "microVMs",
        }
    }

    fn iommu(&self) -> Check {
        let groups = fs::read_dir(self.path("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
        Check {
            name: "iommu",
            ok: groups > 0,
            found: format!("{groups} IOMMU groups"),
            fix: (groups == 0).then(|| {
                "enable VT-d or AMD-Vi in the firmware and boot with intel_iommu=on iommu=pt".to_owned()
            }),
            needed_for: "GPU passthrough",
        }
    }

    fn hugepages(&self) -> Check {
        let mut pools: Vec<(u64, u64)> = fs::read_dir(self.path("sys/kernel/mm/hugepages"))
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                let pages = self.read(&format!("sys/kernel/mm/hugepages/{name}/nr_hugepages"))?;
                Some((kib, pages.trim().parse().ok()?))
            })
            .collect();
        pools.sort_unstable();
        let total: u64 = pools.iter().map(|(_, pages)| pages).sum();
        let found = if pools.is_empty() {
            "the kernel has none".to_owned()
        } else {
            let each = pools.iter().map(|(kib, pages)| format!("{pages} of {} MiB", kib / 1024));
            each.collect::<Vec<_>>().join(", ")
        };
        Check {
            name: "hugepages",
            ok: total > 0,
            found,
            fix: (total == 0).then(|| {
                "reserve some: sysctl vm.nr_hugepages=N (2 MiB each), or hugepagesz= at boot".to_owned()
            }),
            needed_for: "faster large guests",
        }
    }

    fn cgroups(&self) -> Check {
        let controllers = self.read("sys/fs/cgroup/cgroup.controllers");
        let missing: Vec<&str> = match &controllers {
            Some(list) => {
                let have: Vec<&str> = list.split_whitespace().collect();
                ["cpu", "memory", "pids"].into_iter().filter(|c| !have.contains(c)).collect()
            }
            None => vec!["all"],
        };
        Check {
            name: "cgroups",
            ok: missing.is_empty(),
            found: match (&controllers, missing.is_empty()) {
                (Some(_), true) => "v2 with cpu, memory and pids".to_owned(),
                (Some(_), false) => format!("v2 without {}", missing.join(", ")),
                (None, _) => "/sys/fs/cgroup is not a v2 tree".to_owned(),
            },
            fix: (!missing.is_empty()).then(|| {
                "boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all so that v2 has every controller"
                    .to_owned()
            }),
            needed_for: "microVMs and containers",
        }
    }

    fn user_namespaces(&self) -> Check {
        let limit: u64 = self
            .read("proc/sys/user/max_user_namespaces")
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        Check {
            name: "user namespaces",
            ok: limit > 0,
            found: format!("at most {limit}"),
            fix: (limit == 0).then(|| "sysctl user.max_user_namespaces=15000".to_owned()),
            needed_for: "rootless containers",
        }
    }

    fn device(&self, name: &'static str, path: &str, fix: &str, needed_for: &'static str) -> Check {
        let ok = self.path(path).exists();
        Check {
            name,
            ok,
            found: format!("/{path} {}", if ok { "is there" } else { "is not there" }),
            fix: (!ok).then(|| fix.to_owned()),
            needed_for,
        }
    }

    fn program(&self, name: &'static str, program: &str, fix: &str, needed_for: &'static str) -> Check {
        let place = ["usr/sbin", "usr/bin", "sbin", "bin", "usr/local/sbin", "usr/local/bin"]
            .into_iter()
            .map(|dir| format!("{dir}/{program}"))
            .find(|path| self.path(path).exists());
        Check {
            name,
            ok: place.is_some(),
            found: place.as_ref().map_or_else(|| format!("no {program}"), |place| format!("/{place}")),
            fix: place.is_none().then(|| fix.to_owned()),
            needed_for,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn check<'a>(checks: &'a [Check], name: &str) -> &'a Check {
        checks.iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn an_empty_machine_gets_a_fix_for_everything() {
        let dir = machine(&[]);
        for check in examine(dir.path()) {
            assert!(!check.ok && check.fix.is_some(), "{check:?}");
        }
    }

    #[test]
    fn a_full_machine_needs_nothing() {
        let dir = machine(&[
            ("dev/kvm", ""),
            ("dev/vfio/vfio", ""),
            ("dev/iommu", ""),
            ("dev/vhost-net", ""),
            ("dev/net/tun", ""),
            ("proc/cpuinfo", "processor : 0\nflags : fpu svm lm\n"),
            ("proc/sys/user/max_user_namespaces", "1000\n"),
            ("sys/kernel/iommu_groups/0/type", "DMA\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "64\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
            ("usr/sbin/nft", ""),
            ("usr/bin/mkfs.erofs", ""),
        ]);
        for check in examine(dir.path()) {
            assert!(check.ok && check.fix.is_none(), "{check:?}");
        }
    }

    #[test]
    fn kvm_without_hardware_support_names_the_testbed() {
        let dir = machine(&[("dev/kvm", ""), ("proc/cpuinfo", "flags : fpu lm\n")]);
        let checks = examine(dir.path());
        assert!(check(&checks, "kvm").ok);
        let kernels = check(&checks, "unmodified kernels");
        assert!(!kernels.ok && kernels.fix.as_ref().unwrap().contains("scripts/testbed"));
    }

    #[test]
    fn a_missing_controller_is_named() {
        let dir = machine(&[("sys/fs/cgroup/cgroup.controllers", "cpu pids\n")]);
        let checks = examine(dir.path());
        assert_eq!(check(&checks, "cgroups").found, "v2 without memory");
    }
}
