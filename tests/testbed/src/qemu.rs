//! QEMU's command line for a host: a pure function of the description and of where things are.

use std::path::{Path, PathBuf};

use crate::description::{HostDescription, Iommu};
use crate::pci::Lowering;

/// Files and addresses that the bed chose for one host.
#[derive(Clone, Debug)]
pub struct Places {
    /// What starts QEMU.
    pub qemu: PathBuf,
    /// bzImage.
    pub kernel: PathBuf,
    /// The archives, concatenated.
    pub initramfs: PathBuf,
    /// Data disk, raw.
    pub disk: PathBuf,
    /// Where sockets and the console's log go.
    pub directory: PathBuf,
    /// Tap interface in the bed's network namespace.
    pub tap: String,
    /// Number of the host in its bed, from 1; gives its addresses.
    pub number: u8,
}

impl Places {
    /// The host's address in the bed's network.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.88.0.{}", 10 + u16::from(self.number))
    }

    /// Serial console's log.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// Socket of the exec channel.
    #[must_use]
    pub fn exec_socket(&self) -> PathBuf {
        self.directory.join("exec.sock")
    }

    /// Socket of QEMU's monitor.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.directory.join("qmp.sock")
    }
}

/// All arguments.
#[must_use]
pub fn arguments(host: &HostDescription, at: &Places) -> Vec<String> {
    let mut line = Line(Vec::new());
    machine(&mut line, host);
    line.add("-kernel", path(&at.kernel));
    line.add("-initrd", path(&at.initramfs));
    line.add("-append", kernel_command_line(host, at));
    own_devices(&mut line, host, at);
    line.0.extend(Lowering::arguments(&host.devices));
    line.0.extend(host.qemu_args.iter().cloned());
    line.0
}

struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

/// A path as a value of an option, where a comma is written twice.
fn path(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn machine(line: &mut Line, host: &HostDescription) {
    line.add("-name", host.name.clone());
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        line.flag(flag);
    }
    line.add("-display", "none");
    // A thread for each CPU: with one for all, an interrupt to any CPU may make QEMU deliver a guest's
    // interrupt twice (README.md). Only the counted clock needs the one thread, and has a single CPU.
    // Enough translated code for the host's kernel and a guest's, so that neither evicts the other.
    let threads = if host.deterministic { "single" } else { "multi" };
    line.add("-accel", format!("tcg,thread={threads},tb-size=256"));
    line.add("-M", "q35,kernel-irqchip=split");
    // Without this QEMU's firmware would plug and unplug through ACPI. Servers do it through the ports.
    line.add("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    // Linux copies with `rep movsb` where the CPU calls it fast; QEMU emulates it byte by byte.
    line.add("-cpu", "max,+svm,+npt,-erms,-fsrm");
    line.add("-smp", host.cpus.to_string());
    line.add("-m", format!("{}M", host.memory_mib));
    if host.deterministic {
        line.add("-icount", "shift=0,sleep=off");
        // Neither the wall clock nor this machine's randomness may steer the host.
        line.add("-rtc", "base=2026-01-01T00:00:00,clock=vm");
        line.add("-seed", "1");
    }
    let mut first_cpu = 0;
    for (number, node) in host.numa.iter().enumerate() {
        line.add("-object", format!("memory-backend-ram,id=mem{number},size={}M", node.memory_mib));
        let cpus = match node.cpus {
            0 => String::new(),
            1 => format!(",cpus={first_cpu}"),
            n => format!(",cpus={first_cpu}-{}", first_cpu + n - 1),
        };
        line.add("-numa", format!("node,nodeid={number}{cpus},memdev=mem{number}"));
        first_cpu += node.cpus;
    }
    match host.iommu {
        Iommu::Intel => line.add("-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"),
        Iommu::Amd => line.add("-device", "amd-iommu,intremap=on"),
        Iommu::None => {}
    }
}

fn kernel_command_line(host: &HostDescription, at: &Places) -> String {
    let mut words: Vec<String> = [
        "console=ttyS0",
        "quiet",
        "panic=-1",
        // The test of the timer's interrupt counts ticks against a clock that a loaded machine outruns.
        "no_timer_check",
        "intel_iommu=on",
        "iommu=pt",
        "cgroup_no_v1=all",
        // Self-tests and mitigations that an emulated CPU pays for and nobody gains from.
        "mitigations=off",
        "cryptomgr.notests",
        "audit=0",
        "nokaslr",
    ]
    .map(String::from)
    .into();
    if host.deterministic {
        // A halted CPU lets this clock jump to the next timer: hours pass in an idle minute, and the
        // jumps keep QEMU too busy to deliver input. A polling one waits for next to nothing.
        words.push("idle=poll".into());
    }
    words.push(format!("testbed.hostname={}", host.name));
    words.push(format!("testbed.address={}", at.address()));
    words.push("testbed.gateway=10.88.0.1".into());
    if host.huge_pages > 0 {
        words.push(format!("testbed.huge_pages={}", host.huge_pages));
    }
    if !host.devices.is_empty() {
        words.push("testbed.coldplug=1".into());
    }
    if host.share.is_some() {
        words.push("testbed.share=1".into());
    }
    words.extend(host.kernel_args.iter().cloned());
    words.join(" ")
}

/// What every host has: console, exec channel, monitor, eth0, data disk, shared directory.
fn own_devices(line: &mut Line, host: &HostDescription, at: &Places) {
    line.add("-chardev", format!("file,id=console,path={},append=on", path(&at.console())));
    line.add("-serial", "chardev:console");
    line.add("-qmp", format!("unix:{},server=on,wait=off", path(&at.qmp_socket())));
    line.add("-chardev", format!("socket,id=exec,path={},server=on,wait=off", path(&at.exec_socket())));
    line.add("-device", "virtio-serial-pci,id=serial0,max_ports=2,addr=0x2");
    line.add("-device", "virtserialport,bus=serial0.0,chardev=exec,name=lathe.exec");
    line.add("-netdev", format!("tap,id=net0,ifname={},script=no,downscript=no", at.tap));
    line.add(
        "-device",
        format!("virtio-net-pci,netdev=net0,mac=52:54:00:88:00:{:02x},addr=0x3,romfile=", at.number),
    );
    if host.disk_mib > 0 {
        // Written to the page cache only: the disk has to survive QEMU, not this machine.
        line.add(
            "-drive",
            format!("file={},if=none,id=data,format=raw,cache=unsafe,discard=unmap", path(&at.disk)),
        );
        line.add("-device", "virtio-blk-pci,drive=data,serial=lathe-data,addr=0x4");
    }
    if let Some(directory) = &host.share {
        line.add(
            "-fsdev",
            format!("local,id=share,path={},security_model=none,readonly=on", path(directory)),
        );
        line.add("-device", "virtio-9p-pci,fsdev=share,mount_tag=share,addr=0x5");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Device, DeviceKind};

    fn places() -> Places {
        Places {
            qemu: "/c/bin/qemu-system-x86_64".into(),
            kernel: "/c/vmlinuz".into(),
            initramfs: "/b/n1.cpio".into(),
            disk: "/b/n1.disk".into(),
            directory: "/r/n1".into(),
            tap: "tap1".into(),
            number: 1,
        }
    }

    /// One option with its value a line, as a person would write it.
    fn lines(host: &HostDescription) -> String {
        let mut text = String::new();
        for argument in arguments(host, &places()) {
            let separator = if argument.starts_with('-') { "\n" } else { " " };
            text.push_str(separator);
            text.push_str(&argument);
        }
        text
    }

    #[test]
    fn default_host() {
        insta::assert_snapshot!(lines(&HostDescription::new("n1")));
    }

    #[test]
    fn deterministic_host() {
        insta::assert_snapshot!(lines(&HostDescription::new("n1").deterministic().iommu(Iommu::None)));
    }

    #[test]
    fn functions_virtual_functions_and_names() {
        let host = HostDescription::new("n1")
            .device(Device::root_port(Device::nvme_sriov("/d/a.img", "abc", 2).id("disk")).id("port"))
            .device(Device::functions([DeviceKind::Edu.into(), DeviceKind::E1000e.into()]))
            .device(Device::root_port(Device::from(DeviceKind::Edu).property("dma_mask", "268435455")));
        host.validate().unwrap();
        insta::assert_snapshot!(
            Lowering::arguments(&host.devices).join("\n").replace("-device\n", "-device ")
        );
    }

    #[test]
    fn devices_numa_and_share() {
        let host = HostDescription::new("n1")
            .cpus(4)
            .memory_mib(4096)
            .numa_node(3, 3072)
            .numa_node(1, 1024)
            .iommu(Iommu::Amd)
            .share("/art,efacts")
            .huge_pages(64)
            .kernel_arg("debug")
            .qemu_arg("-no-shutdown")
            .device(Device::root_port(Device::nvme("/d/a.img", "abc").property("max_ioqpairs", "4")))
            .device(Device::root_port(Device::switch([
                DeviceKind::Edu.into(),
                DeviceKind::IvshmemPlain { size_mib: 1024 }.into(),
            ])))
            .device(Device::root_port(Device::pci_bridge([
                DeviceKind::E1000e.into(),
                DeviceKind::BochsDisplay.into(),
            ])))
            .device(Device::expander_bridge(
                128,
                Some(1),
                [Device::root_port(Device::other("virtio-rng-pci"))],
            ));
        host.validate().unwrap();
        insta::assert_snapshot!(lines(&host));
        // The same tree survives its file form.
        let toml = toml::to_string(&host).unwrap();
        assert_eq!(toml::from_str::<HostDescription>(&toml).unwrap(), host, "{toml}");
    }
}
