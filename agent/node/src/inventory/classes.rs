//! Which isolation classes a host can run, and what to do about those it cannot.

use std::path::Path;

use lathe_api::job::IsolationClass;

use crate::cgroup::CgroupTree;
use crate::paths::Paths;

/// What decides it, besides the kernel's files.
#[derive(Clone, Copy, Debug)]
pub struct ClassInputs<'a> {
    /// `/` but in tests.
    pub root: &'a Path,
    /// Where VMM and guest bundle should be.
    pub paths: &'a Paths,
    /// Folders with programs.
    pub search: &'a str,
}

/// The classes that can run, and one line for each that cannot.
pub fn classes(inputs: ClassInputs<'_>) -> (Vec<IsolationClass>, Vec<String>) {
    let checks = [
        (IsolationClass::Microvm, "microvm", inputs.microvm()),
        (IsolationClass::Container, "container", inputs.container()),
    ];
    let (mut can, mut problems) = (Vec::new(), Vec::new());
    for (class, name, problem) in checks {
        match problem {
            None => can.push(class),
            Some(problem) => problems.push(format!("{name}: {problem}")),
        }
    }
    problems.push("unikernel: not available yet".to_owned());
    (can, problems)
}

impl ClassInputs<'_> {
    fn microvm(&self) -> Option<String> {
        self.kvm()
            .or_else(|| self.missing_file(&self.paths.vmm, "install lathe-vmm there, or give --vmm"))
            .or_else(|| {
                self.missing_file(
                    &self.paths.guest.join("vmlinuz"),
                    "install the guest bundle (images/guest/build)",
                )
            })
            .or_else(|| {
                self.missing_file(
                    &self.paths.guest.join("initramfs"),
                    "install the guest bundle (images/guest/build)",
                )
            })
            .or_else(|| self.missing_device("net/tun", "load the module tun"))
            .or_else(|| {
                CgroupTree::find(self.root)
                    .0
                    .is_none()
                    .then(|| "no cgroup v2 filesystem is mounted".to_owned())
            })
            .or_else(|| self.tools(&["mkfs.erofs", "mkfs.ext4", "nft"]))
    }

    fn container(&self) -> Option<String> {
        let cgroups = CgroupTree::find(self.root).1.map(|problem| problem.to_string());
        cgroups
            .or_else(|| self.filesystem("overlay"))
            .or_else(|| self.filesystem("erofs"))
            .or_else(|| self.missing_device("loop-control", "load the module loop"))
            .or_else(|| self.tools(&["mkfs.erofs", "mkfs.ext4", "nft"]))
    }

    /// KVM there, and able to boot a kernel: some clouds' kernels offer a KVM that emulates guest
    /// kernels instruction by instruction, and Linux does not get through it.
    fn kvm(&self) -> Option<String> {
        if !self.root.join("dev/kvm").exists() {
            return Some(
                "no /dev/kvm: enable virtualization in the firmware and load kvm-intel or kvm-amd".into(),
            );
        }
        let info = std::fs::read_to_string(self.root.join("proc/cpuinfo")).unwrap_or_default();
        let hardware = info
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "svm" || flag == "vmx"));
        (!hardware).then(|| {
            "/dev/kvm is here without SVM or VMX in the CPU: it cannot boot an unmodified kernel; use a bare-metal \
             host or one with nested virtualization"
                .into()
        })
    }

    fn missing_file(&self, path: &Path, remedy: &str) -> Option<String> {
        let there = self.root.join(path.strip_prefix("/").unwrap_or(path)).exists();
        (!there).then(|| format!("no {}: {remedy}", path.display()))
    }

    fn missing_device(&self, name: &str, remedy: &str) -> Option<String> {
        (!self.root.join("dev").join(name).exists()).then(|| format!("no /dev/{name}: {remedy}"))
    }

    fn filesystem(&self, name: &str) -> Option<String> {
        let known = std::fs::read_to_string(self.root.join("proc/filesystems")).unwrap_or_default();
        let there = known.lines().any(|line| line.split_whitespace().next_back() == Some(name));
        (!there).then(|| format!("the kernel does not know the filesystem {name}: load the module {name}"))
    }

    fn tools(&self, names: &[&str]) -> Option<String> {
        let missing = names.iter().find(|name| {
            !self.search.split(':').any(|dir| self.root.join(dir.trim_start_matches('/')).join(name).exists())
        })?;
        let package = match *missing {
            "mkfs.erofs" => "erofs-utils",
            "mkfs.ext4" => "e2fsprogs",
            _ => "nftables",
        };
        Some(format!("no {missing} on the PATH: install {package}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::tests::host;

    const WHOLE: [(&str, &str); 13] = [
        ("dev/kvm", ""),
        ("dev/net/tun", ""),
        ("dev/loop-control", ""),
        ("proc/cpuinfo", "flags\t\t: fpu svm\n"),
        ("proc/filesystems", "nodev\toverlay\n\terofs\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory pids"),
        ("usr/bin/lathe-vmm", ""),
        ("guest/vmlinuz", ""),
        ("guest/initramfs", ""),
        ("usr/bin/mkfs.erofs", ""),
        ("usr/bin/mkfs.ext4", ""),
        ("usr/bin/nft", ""),
        ("x", ""),
    ];

    fn check(files: &[(&str, &str)]) -> (Vec<IsolationClass>, Vec<String>) {
        let root = host(files);
        let paths = Paths {
            state: "/s".into(),
            run: "/r".into(),
            guest: "/guest".into(),
            vmm: "/usr/bin/lathe-vmm".into(),
        };
        classes(ClassInputs { root: root.path(), paths: &paths, search: "/usr/bin" })
    }

    #[test]
    fn a_whole_host_runs_both_classes() {
        let (can, _) = check(&WHOLE);
        assert_eq!(can, [IsolationClass::Microvm, IsolationClass::Container]);
    }

    #[test]
    fn each_missing_thing_is_named_with_its_remedy() {
        for (gone, class, words) in [
            ("dev/kvm", "microvm", "firmware"),
            ("proc/cpuinfo", "microvm", "SVM or VMX"),
            ("usr/bin/lathe-vmm", "microvm", "--vmm"),
            ("guest/initramfs", "microvm", "images/guest/build"),
            ("dev/net/tun", "microvm", "module tun"),
            ("sys/fs/cgroup/cgroup.controllers", "container", "cgroup2"),
            ("proc/filesystems", "container", "module overlay"),
            ("dev/loop-control", "container", "module loop"),
            ("usr/bin/mkfs.erofs", "microvm", "erofs-utils"),
            ("usr/bin/nft", "container", "nftables"),
        ] {
            let files: Vec<_> = WHOLE.into_iter().filter(|(path, _)| *path != gone).collect();
            let (_, problems) = check(&files);
            assert!(
                problems.iter().any(|p| p.starts_with(class) && p.contains(words)),
                "without {gone}: {problems:?}"
            );
        }
    }
}
