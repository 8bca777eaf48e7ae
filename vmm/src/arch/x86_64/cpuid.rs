//! What CPUID answers: what KVM supports on this host, with the topology of the configuration.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::topology::Topology;

/// Hypervisor leaf with the TSC's and the APIC timer's frequency in kHz, as VMware defined it.
const TIMING_LEAF: u32 = 0x4000_0010;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HYPERVISOR_PRESENT: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;
/// KVM's paravirtual features (Linux Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
/// An interrupt's end is noted in memory and costs no exit.
const PV_EOI: u32 = 1 << 6;
/// The frequency of KVM's local APIC timer.
const APIC_TIMER_KHZ: u32 = 1_000_000;

/// Width of physical addresses on this host, which its guests share.
pub fn host_physical_bits() -> u32 {
    use std::arch::x86_64::__cpuid;
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    if __cpuid(0x8000_0000).eax < ADDRESS_SIZES { 36 } else { __cpuid(ADDRESS_SIZES).eax & 0xff }
}

/// Whether this host is itself emulated by QEMU, without KVM.
fn host_is_emulated() -> bool {
    use std::arch::x86_64::__cpuid;
    let Some(bytes) = (__cpuid(1).ecx & HYPERVISOR_PRESENT != 0).then(|| __cpuid(HYPERVISOR_LEAF)) else {
        return false;
    };
    let signature = [bytes.ebx, bytes.ecx, bytes.edx].map(u32::to_le_bytes);
    signature.as_flattened() == b"TCGTCGTCGTCG"
}

/// Leaves common to all CPUs of a machine, and what completes them for one.
#[derive(Debug)]
pub struct CpuIdTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

impl CpuIdTemplate {
    /// What this host's KVM supports.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn of_host(kvm: &Kvm, topology: Topology) -> Result<Self, kvm_ioctls::Error> {
        let entries = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?.as_slice().to_vec();
        let mut template = Self { entries, topology };
        // In-kernel APICs have the deadline timer on every host, though KVM leaves it to us to say so.
        if kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer)
            && let Some(features) = template.leaf(1)
        {
            features.ecx |= TSC_DEADLINE;
        }
        if host_is_emulated() {
            template.hide_pv_eoi();
        }
        Ok(template)
    }

    /// QEMU's SVM may deliver an injected interrupt again until the guest's next exit (tests/testbed/README.md).
    /// Ending an interrupt, which a guest does first, then has to be an exit: what is left of that time is
    /// a few instructions that hold no lock.
    fn hide_pv_eoi(&mut self) {
        if let Some(features) = self.leaf(KVM_FEATURES_LEAF) {
            features.eax &= !PV_EOI;
        }
    }

    /// Width of guest physical addresses.
    pub fn physical_bits(&self) -> u32 {
        self.entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xff)
    }

    /// Tells the guest the frequency of its TSC, so that it need not measure it.
    pub fn set_tsc_khz(&mut self, khz: u32) {
        let Some(base) = self.leaf(HYPERVISOR_LEAF) else { return };
        base.eax = base.eax.max(TIMING_LEAF);
        self.entries.retain(|entry| entry.function != TIMING_LEAF);
        self.entries.push(kvm_cpuid_entry2 {
            function: TIMING_LEAF,
            eax: khz,
            ebx: APIC_TIMER_KHZ,
            ..Default::default()
        });
    }

    /// The leaves of CPU `index`.
    ///
    /// # Errors
    /// When there are more leaves than KVM takes.
    pub fn for_cpu(&self, index: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let apic_id = self.topology.apic_id(index);
        let mut entries = self.entries.clone();
        // Each level of the extended topology is a subleaf; KVM reports one at most.
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        for function in [0xb, 0x1f] {
            if self.max_basic_leaf() >= function {
                entries.extend(self.extended_topology(function, apic_id));
            }
        }
        for entry in &mut entries {
            self.set_topology(entry, apic_id);
        }
        CpuId::from_entries(&entries)
    }

    fn leaf(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries.iter_mut().find(|entry| entry.function == function)
    }

    fn max_basic_leaf(&self) -> u32 {
        self.entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax)
    }

    fn set_topology(&self, entry: &mut kvm_cpuid_entry2, apic_id: u32) {
        let topology = self.topology;
        let threads = topology.threads_per_socket();
        match entry.function {
            0x1 => {
                // Bits 31..24 initial APIC ID, 23..16 logical processors a package.
                entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | threads.min(255) << 16;
                entry.ecx |= HYPERVISOR_PRESENT;
                entry.edx &= !HYPER_THREADING;
                entry.edx |= if threads > 1 { HYPER_THREADING } else { 0 };
            }
            0x4 => set_cache_sharing(entry, topology),
            0x8000_001d => set_cache_sharing(entry, topology),
            // Bits 7..0 threads a package less one, 15..12 width of the APIC ID's core field.
            0x8000_0008 => entry.ecx = topology.core_bits() << 12 | (threads - 1),
            0x8000_001e => {
                entry.eax = apic_id;
                let core = apic_id >> topology.thread_bits();
                entry.ebx = (topology.threads_per_core() - 1) << 8 | core & 0xff;
                entry.ecx = 0;
                entry.edx = 0;
            }
            _ => {}
        }
    }

    /// Leaves 0xb and 0x1f: one subleaf a level, then an invalid one (Intel SDM 2A, CPUID).
    fn extended_topology(&self, function: u32, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
        const SIGNIFICANT_INDEX: u32 = 1;
        const THREAD_LEVEL: u32 = 1;
        const CORE_LEVEL: u32 = 2;
        let topology = self.topology;
        let level = |index, shift, logical, kind| kvm_cpuid_entry2 {
            function,
            index,
            flags: SIGNIFICANT_INDEX,
            eax: shift,
            ebx: logical,
            ecx: kind << 8 | index,
            edx: apic_id,
            ..Default::default()
        };
        [
            level(0, topology.thread_bits(), topology.threads_per_core(), THREAD_LEVEL),
            level(1, topology.core_bits(), topology.threads_per_socket(), CORE_LEVEL),
            level(2, 0, 0, 0),
        ]
    }
}

/// Levels 1 and 2 are a core's own, level 3 is the socket's. Leaf 4 also counts the cores.
fn set_cache_sharing(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 0x7);
    if kind == 0 {
        return;
    }
    let sharing = match level {
        1 | 2 => 1 << topology.thread_bits(),
        _ => 1_u32 << topology.core_bits(),
    };
    entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
    if entry.function == 0x4 {
        let cores = 1_u32 << (topology.core_bits() - topology.thread_bits());
        entry.eax |= (cores - 1).min(63) << 26;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CpuConfig, CpuTopology};

    fn template(sockets: u8, cores: u8, threads: u8) -> CpuIdTemplate {
        let topology = Some(CpuTopology { sockets, cores, threads });
        let topology = Topology::of(&CpuConfig { count: sockets * cores * threads, topology });
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let cache = kvm_cpuid_entry2 { index: 3, ..entry(4, 0x163) };
        let entries = vec![
            entry(0, 0x1f),
            entry(1, 0),
            entry(4, 0x121),
            cache,
            entry(0xb, 0),
            entry(0x4000_0000, 0x4000_0001),
            entry(0x8000_0008, 0x3028),
            entry(0x8000_001e, 0),
        ];
        CpuIdTemplate { entries, topology }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        let cpuid = template(2, 3, 2).for_cpu(9).unwrap();
        let apic_id = 0b1011;
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, apic_id);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 6);
        for leaf in [0xb, 0x1f] {
            let [threads, cores, end] = [0, 1, 2].map(|index| find(&cpuid, leaf, index));
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (1, 2, 0x100, apic_id));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
            assert_eq!((end.ebx, end.ecx), (0, 2));
        }
        assert_eq!(find(&cpuid, 4, 0).eax >> 14 & 0xfff, 1, "two threads share the first level");
        assert_eq!(find(&cpuid, 4, 3).eax >> 14 & 0xfff, 7, "the socket's IDs share the last");
        assert_eq!(find(&cpuid, 4, 3).eax >> 26, 3);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).ebx, 1 << 8 | 0b101);
    }

    #[test]
    fn a_lone_cpu_has_no_siblings() {
        let cpuid = template(1, 1, 1).for_cpu(0).unwrap();
        assert_eq!(find(&cpuid, 1, 0).edx & HYPER_THREADING, 0);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0);
        assert_eq!(find(&cpuid, 4, 3).eax >> 14, 0);
    }

    #[test]
    fn only_the_end_of_interrupts_is_hidden_on_an_emulated_host() {
        let mut template = template(1, 1, 1);
        template.entries.push(kvm_cpuid_entry2 {
            function: KVM_FEATURES_LEAF,
            eax: !0,
            ..Default::default()
        });
        template.hide_pv_eoi();
        assert_eq!(find(&template.for_cpu(0).unwrap(), KVM_FEATURES_LEAF, 0).eax, !(1 << 6));
    }

    #[test]
    fn the_timing_leaf_is_announced_once() {
        let mut template = template(1, 1, 1);
        template.set_tsc_khz(2_000_000);
        template.set_tsc_khz(2_500_000);
        let cpuid = template.for_cpu(0).unwrap();
        assert_eq!(find(&cpuid, 0x4000_0000, 0).eax, TIMING_LEAF);
        assert_eq!(find(&cpuid, TIMING_LEAF, 0).eax, 2_500_000);
        assert_eq!(cpuid.as_slice().iter().filter(|e| e.function == TIMING_LEAF).count(), 1);
    }
}
