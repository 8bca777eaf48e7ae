//! What this machine's KVM can do, found without creating a VM: for `lathe doctor`, and for a
//! clear word before a boot that cannot work.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

/// What `/dev/kvm` is good for.
#[derive(Debug)]
pub enum KvmSupport {
    /// Hardware virtualization is there: unmodified kernels boot.
    Full,
    /// KVM without VMX or SVM underneath: it emulates guest kernels instruction by instruction and
    /// lacks instructions that real kernels need. Only small hand-written guests run.
    EmulatedOnly,
    /// `/dev/kvm` does not open.
    Unavailable(io::Error),
}

impl KvmSupport {
    /// One sentence for people, with what to do about it.
    pub fn advice(&self) -> String {
        match self {
            Self::Full => "KVM boots unmodified kernels".to_owned(),
            Self::EmulatedOnly => CANNOT_BOOT.to_owned(),
            Self::Unavailable(error) => match error.kind() {
                io::ErrorKind::NotFound => {
                    "/dev/kvm is missing: enable virtualization in the firmware and load kvm-intel or kvm-amd"
                        .to_owned()
                }
                io::ErrorKind::PermissionDenied => {
                    "/dev/kvm may not be opened: add the user to the group kvm".to_owned()
                }
                _ => format!("/dev/kvm does not open: {error}"),
            },
        }
    }
}

/// Said wherever an unmodified kernel was to boot on [`KvmSupport::EmulatedOnly`].
pub const CANNOT_BOOT: &str = "this machine's KVM cannot boot unmodified kernels (its CPUs offer neither VMX \
                               nor SVM): run it on a host with hardware virtualization, or on an emulated \
                               one from `scripts/testbed up`";

/// Opens `/dev/kvm` and looks at the CPU.
pub fn kvm() -> KvmSupport {
    kvm_at(Path::new("/dev/kvm"))
}

fn kvm_at(path: &Path) -> KvmSupport {
    match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) => KvmSupport::Unavailable(error),
        Ok(_) if hardware_virtualization() => KvmSupport::Full,
        Ok(_) => KvmSupport::EmulatedOnly,
    }
}

/// Whether the CPU has VMX or SVM. Asks the processor: /proc/cpuinfo takes milliseconds to
/// read on large machines.
#[cfg(target_arch = "x86_64")]
pub fn hardware_virtualization() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let extended = __cpuid(0x8000_0000).eax;
    __cpuid(1).ecx & VMX != 0 || extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_do() {
        let support = kvm_at(Path::new("/nonexistent/kvm"));
        assert!(matches!(support, KvmSupport::Unavailable(_)));
        assert!(support.advice().contains("load kvm-intel or kvm-amd"));
    }

    #[test]
    fn cpuid_agrees_with_the_kernel() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let listed = info.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        assert_eq!(hardware_virtualization(), listed);
    }
}
