//! What keeps a PCI function from being given to a sandbox, found before anything is tried, with what
//! to do about each. Reads files below a root and nothing else, so that hosts that are not at hand can
//! be tested.

use std::collections::BTreeSet;

use lathe_api::HostPciAddress;
use lathe_api::gpu::{DeviceCheck, GpuProblem, GroupMember, Severity};

use super::HostFiles;
use super::config_space::{Acs, ConfigSpace, PortType};
use super::gpus::Function;
use super::room::{AddressSpace, room_for};
use super::users::Users;
use crate::pci::VFIO_PCI;

const NVIDIA: u16 = 0x10de;

/// A bridge of no other kind (PCI code and ID assignment 1.7): what NVSwitches are.
const CLASS_OTHER_BRIDGE: u32 = 0x06_80_00;

/// What holds for all functions of a host.
pub(super) struct Preflight<'a> {
    host: &'a HostFiles<'a>,
    users: Users,
    nvswitches: usize,
    /// What stands in the way of any passthrough here.
    host_problems: Vec<GpuProblem>,
}

pub(super) fn blocks(what: impl Into<String>, fix: impl Into<String>) -> GpuProblem {
    GpuProblem { severity: Severity::Blocks, what: what.into(), fix: fix.into() }
}

pub(super) fn warns(what: impl Into<String>, fix: impl Into<String>) -> GpuProblem {
    GpuProblem { severity: Severity::Warns, what: what.into(), fix: fix.into() }
}

impl<'a> Preflight<'a> {
    /// Looks at the host.
    pub(super) fn new(host: &'a HostFiles<'a>) -> Self {
        let functions = host.names("sys/bus/pci/devices").into_iter().filter_map(|name| name.parse().ok());
        let nvswitches = functions
            .map(|address| Function { host, address })
            .filter(|function| function.class() == CLASS_OTHER_BRIDGE && function.id("vendor") == NVIDIA)
            .count();
        let host_problems = [iommu(host), interrupt_remapping(host), vfio_driver(host), vfio_files(host)];
        let host_problems = host_problems.into_iter().flatten().collect();
        Self { host, users: Users::read(host), nvswitches, host_problems }
    }

    /// One function as `lathe gpu check` shows it.
    pub(super) fn report(&self, address: HostPciAddress) -> DeviceCheck {
        let function = Function { host: self.host, address };
        let mut problems = self.check(address);
        problems.extend(self.users.of_vfio(&function));
        let what = if function.exists() {
            let (vendor, device) = (function.id("vendor"), function.id("device"));
            format!("{} {vendor:04x}:{device:04x}", class_name(function.class()))
        } else {
            String::new()
        };
        DeviceCheck { address, what, problems }
    }

    /// What is in the way of one function, what matters most first. Use by a sandbox is not: see
    /// [`Users::of_vfio`].
    pub(super) fn check(&self, address: HostPciAddress) -> Vec<GpuProblem> {
        let function = Function { host: self.host, address };
        if let Some(problem) = nothing_to_pass(&function) {
            // All else would only follow from it.
            return vec![problem];
        }
        let mut problems = self.host_problems.clone();
        problems.extend(group(&function));
        problems.extend(path(&function));
        problems.extend(boot_vga(&function));
        problems.extend(reset(&function));
        problems.extend(bars(&function));
        problems.extend(self.users.of_driver(&function));
        problems.extend(sr_iov(&function));
        problems.extend(self.fabric(&function));
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
        problems
    }

    fn fabric(&self, function: &Function<'_>) -> Option<GpuProblem> {
        if self.nvswitches == 0 || !function.is_gpu() || function.id("vendor") != NVIDIA {
            return None;
        }
        Some(warns(
            format!("the host has {} NVSwitches, which join its GPUs", self.nvswitches),
            "run Fabric Manager in its shared NVSwitch mode and activate the partition of the GPUs that a guest \
             gets; alone, a GPU may wait for the fabric for ever",
        ))
    }
}

/// Whether this is a device at all, and one that can be passed.
fn nothing_to_pass(function: &Function<'_>) -> Option<GpuProblem> {
    let address = function.address;
    if !function.exists() {
        return Some(blocks(
            format!("there is no PCI device {address}"),
            "lspci -D lists those there are; after a surprise removal: echo 1 > /sys/bus/pci/rescan",
        ));
    }
    let config = config_space(function);
    if config.is_absent() {
        return Some(blocks(
            "it does not answer: its configuration space reads as ones",
            "it is off, hung or removed: reset its slot or restart the host, then check power and seating",
        ));
    }
    (function.is_bridge() || config.is_bridge())
        .then(|| blocks("it is a bridge", "pass the devices behind it; guests get bridges of their own"))
}

fn config_space(function: &Function<'_>) -> ConfigSpace {
    ConfigSpace::new(function.host.bytes(function.file("config")))
}

/// The host's IOMMU is on when the kernel made groups.
fn iommu(host: &HostFiles<'_>) -> Option<GpuProblem> {
    if !host.names("sys/kernel/iommu_groups").is_empty() {
        return None;
    }
    let amd = host.text("proc/cpuinfo").contains("AuthenticAMD");
    let (technology, table, parameter) = if amd {
        ("AMD-Vi (IOMMU)", "sys/firmware/acpi/tables/IVRS", "amd_iommu=on iommu=pt")
    } else {
        ("VT-d", "sys/firmware/acpi/tables/DMAR", "intel_iommu=on iommu=pt")
    };
    let fix = if host.path(table).exists() {
        format!("the firmware has {technology} on: boot with {parameter}, and without iommu=off")
    } else {
        format!("enable {technology} in the firmware's settings and boot with {parameter}")
    };
    Some(blocks("the IOMMU is off: the kernel has no IOMMU groups", fix))
}

/// Without it a device could raise any interrupt of the host, and VFIO refuses it.
fn interrupt_remapping(host: &HostFiles<'_>) -> Option<GpuProblem> {
    if host.names("sys/kernel/iommu_groups").is_empty() {
        // It is the IOMMU that remaps, which was said to be off.
        return None;
    }
    // The kernel's names of interrupt chips behind remapping begin so, on Intel and AMD alike.
    if host.has("proc/interrupts", "IR-") {
        return None;
    }
    let what = "interrupt remapping is off: a guest could raise any interrupt of the host";
    let fix = "enable it (x2APIC, VT-d or AMD-Vi) in the firmware's settings and boot without intremap=off";
    let unsafe_allowed = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    Some(if host.text(unsafe_allowed) == "Y" {
        warns(what, format!("{fix}; VFIO was told to allow it (allow_unsafe_interrupts)"))
    } else {
        blocks(what, fix)
    })
}

fn vfio_driver(host: &HostFiles<'_>) -> Option<GpuProblem> {
    (!host.path(format!("sys/bus/pci/drivers/{VFIO_PCI}")).exists()).then(|| {
        blocks(
            "the driver vfio-pci is not loaded",
            "modprobe vfio-pci; where there is no such module, use a kernel with CONFIG_VFIO_PCI",
        )
    })
}

fn vfio_files(host: &HostFiles<'_>) -> Option<GpuProblem> {
    let there = host.path("dev/vfio/vfio").exists() || host.path("dev/iommu").exists();
    (!there).then(|| {
        blocks(
            "there is neither /dev/vfio/vfio nor /dev/iommu",
            "modprobe vfio_iommu_type1, or iommufd on a kernel with CONFIG_IOMMUFD",
        )
    })
}

/// The group is given away as a whole, so nothing else of the host may be in it.
fn group(function: &Function<'_>) -> Vec<GpuProblem> {
    let Some(group) = function.iommu_group() else {
        // Without an IOMMU nothing has one, which was said.
        let others_have = !function.host.names("sys/kernel/iommu_groups").is_empty();
        let problem = blocks(
            "the kernel gave it no IOMMU group",
            "its root complex is behind no IOMMU: boot without iommu exclusions such as intel_iommu=igfx_off, or \
             move the card",
        );
        return others_have.then_some(problem).into_iter().collect();
    };
    let same_card = |member: &GroupMember| member.address.shares_device(function.address);
    let (own, foreign): (Vec<_>, Vec<_>) = function.group_members().into_iter().partition(same_card);
    let name = |member: &GroupMember| {
        let driver = member.driver.as_deref().unwrap_or("none");
        format!("{} ({}, driver {driver})", member.address, class_name(member.class))
    };
    let list = |members: &[GroupMember]| members.iter().map(name).collect::<Vec<_>>().join(", ");
    let mut problems = Vec::new();
    if !foreign.is_empty() {
        problems.push(blocks(
            format!("it shares IOMMU group {group} with {}", list(&foreign)),
            "pass all of them to one guest, move the card below a root port of its own, or enable ACS in the \
             firmware's settings",
        ));
    }
    if !own.is_empty() {
        problems.push(warns(
            format!("other functions of the card are in its IOMMU group {group}: {}", list(&own)),
            "they are taken from the host together with it: let nothing else use them",
        ));
    }
    problems
}

/// Ports above it that let neighbours reach each other past the IOMMU. The kernel knows ports that are
/// safe without saying so; only where it put more than the function into the group is it worth a line.
fn path(function: &Function<'_>) -> Vec<GpuProblem> {
    let Some(group) = function.iommu_group() else { return Vec::new() };
    if function.group().is_empty() {
        return Vec::new();
    }
    let bridges = function.bridges().into_iter();
    let problems = bridges.filter_map(|address| {
        let config = config_space(&Function { address, ..*function });
        let kind = config.port_type()?;
        let (why, fix) = match (kind, config.acs()) {
            (PortType::PciBridge, _) => {
                ("joins all devices behind it into one", "move the card to a PCI Express slot")
            }
            (PortType::RootPort | PortType::Downstream, Acs::Missing) => (
                "has no ACS: devices below it and beside it can reach each other past the IOMMU",
                "move the card below another root port or switch; pcie_acs_override only hides it",
            ),
            (PortType::RootPort | PortType::Downstream, Acs::Off) => (
                "has ACS, and it is off: devices can reach each other past the IOMMU",
                "enable ACS in the firmware's settings, and boot without pci=disable_acs_redir",
            ),
            _ => return None,
        };
        Some(warns(format!("{address} above it ({}) {why}; hence IOMMU group {group}", kind.name()), fix))
    });
    problems.collect()
}

fn boot_vga(function: &Function<'_>) -> Option<GpuProblem> {
    (function.text("boot_vga") == "1").then(|| {
        blocks(
            "the host's console is on it (boot VGA)",
            "make another adapter, such as the management controller's, the primary one in the firmware's \
             settings",
        )
    })
}

fn reset(function: &Function<'_>) -> Option<GpuProblem> {
    let fix = "put it alone below a root port, so that its bus can be reset";
    let methods = function.reset_methods();
    let has = |file: &str| function.host.path(function.file(file)).exists();
    if methods.is_empty() {
        if has("reset_method") {
            let allow = format!("echo default > /sys/bus/pci/devices/{}/reset_method", function.address);
            return Some(blocks("it must not be reset: somebody emptied its file reset_method", allow));
        }
        // An older kernel has a way and no list; the bridge above a card of several functions resets them all.
        if !has("reset") && (!has("../reset_subordinate") || beside(function).is_some()) {
            let what =
                "the kernel knows no way to reset it: the next guest would find what the last one left";
            return Some(blocks(what, fix));
        }
        return None;
    }
    // The kernel lists methods when it finds a function, before it has found those beside it.
    if methods.iter().any(|method| method != "bus" && method != "slot") {
        return None;
    }
    let beside = beside(function)?;
    Some(blocks(format!("it can only be reset by its bus, which it shares with {beside}"), fix))
}

/// A function on the same bus that is not of the same card: those of the card are taken together with it.
fn beside(function: &Function<'_>) -> Option<HostPciAddress> {
    let place = |of: HostPciAddress| (of.domain(), of.bus());
    let all = function.host.names("sys/bus/pci/devices").into_iter();
    all.filter_map(|name| name.parse::<HostPciAddress>().ok())
        .find(|other| place(*other) == place(function.address) && other.device() != function.address.device())
}

/// Guest addresses have to exist in the CPU and in the IOMMU alike.
fn bars(function: &Function<'_>) -> Vec<GpuProblem> {
    let space = AddressSpace::read(function);
    let problems = function.resources().into_iter().filter_map(|resource| {
        let (index, size) = (resource.index, resource.size_bytes);
        if resource.is_unset() {
            return Some(blocks(
                format!("BAR {index} of {} has no address: the host ran out of room", size_name(size)),
                "enable Above 4G Decoding in the firmware's settings, or boot with pci=realloc",
            ));
        }
        let fits = resource.is_io() || !resource.is_wide() || room_for(size, space.bits(), &space.reserved);
        (!fits).then(|| {
            blocks(
                format!(
                    "BAR {index} of {} does not fit into the guest's addresses: {space}",
                    size_name(size)
                ),
                "use a host with more address bits; where the firmware limits VT-d to 39 bits, lift that",
            )
        })
    });
    problems.collect()
}

fn sr_iov(function: &Function<'_>) -> Option<GpuProblem> {
    if let Some(parent) = function.host.link_name(function.file("physfn")) {
        return Some(warns(
            format!("it is a virtual function of {parent}"),
            format!("leave {parent} with its driver, which serves it: it ends when that driver does"),
        ));
    }
    let enabled: u32 = function.host.number(function.file("sriov_numvfs")).unwrap_or(0);
    (enabled > 0).then(|| {
        blocks(
            format!("it has {enabled} virtual functions (SR-IOV), which would end with it"),
            format!("pass those, or: echo 0 > /sys/bus/pci/devices/{}/sriov_numvfs", function.address),
        )
    })
}

/// Bytes in the largest unit that leaves a whole number.
fn size_name(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes >> shift != 0 && bytes.trailing_zeros() >= *shift);
    unit.map_or_else(|| format!("{bytes} bytes"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

/// What a class code is called, as far as it matters beside a GPU.
fn class_name(class: u32) -> &'static str {
    match (class >> 16, class >> 8) {
        (_, 0x0108) => "NVMe disk",
        (0x01, _) => "storage controller",
        (0x02, _) => "network controller",
        (_, 0x0300) => "VGA controller",
        (_, 0x0302) => "3D controller",
        (0x03, _) => "display controller",
        (_, 0x0403) => "audio",
        (_, 0x0604) => "PCI bridge",
        (0x06, _) => "bridge",
        (_, 0x0c03) => "USB controller",
        (_, 0x0c80) => "serial bus controller",
        (_, 0x1200) => "processing accelerator",
        _ => "device",
    }
}

/// Every function that is a GPU, for a check of all.
pub(super) fn gpu_addresses(host: &HostFiles<'_>) -> BTreeSet<HostPciAddress> {
    let addresses = host.names("sys/bus/pci/devices").into_iter().filter_map(|name| name.parse().ok());
    addresses.filter(|&address| Function { host, address }.is_gpu()).collect()
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
