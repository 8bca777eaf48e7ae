//! What a task may do to its machine: capabilities, user, resource limits.

use lathe_guest_protocol::Limits;
use nix::errno::Errno;
use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::user::Identity;

/// Open files of a process when nothing is asked for: what container runtimes give.
const DEFAULT_OPEN_FILES: u64 = 1 << 20;

/// Capabilities that a task keeps if it runs as root, by number (linux/capability.h).
///
/// The usual set of OCI runtimes without `MKNOD`, `NET_RAW` and `AUDIT_WRITE`, as in Podman:
/// there is no device cgroup here that would make `MKNOD` harmless, and ping works without the
/// second.
const KEPT: [u32; 11] = [
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    10, // NET_BIND_SERVICE
    18, // SYS_CHROOT
    31, // SETFCAP
];

/// What a task that drives devices keeps besides, for loading a driver and reaching what it drives.
const KEPT_FOR_DEVICES: [u32; 3] = [
    16, // SYS_MODULE
    17, // SYS_RAWIO
    27, // MKNOD
];

/// The capabilities that a task as root keeps.
fn kept(drives_devices: bool) -> Vec<u32> {
    let more: &[u32] = if drives_devices { &KEPT_FOR_DEVICES } else { &[] };
    KEPT.iter().chain(more).copied().collect()
}

/// Applies the limits that are per process.
pub fn set_resource_limits(limits: &Limits) -> Result<(), Errno> {
    let files = if limits.open_files == 0 { DEFAULT_OPEN_FILES } else { limits.open_files };
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    // A crash must not fill the overlay; a task that wants core files raises its soft limit.
    setrlimit(Resource::RLIMIT_CORE, 0, libc::RLIM_INFINITY)
}

/// Becomes `identity` with what [`kept`] leaves, for good: also across an exec of a setuid program.
pub fn drop_to(identity: &Identity, drives_devices: bool) -> Result<(), Errno> {
    let kept = kept(drives_devices);
    // The bounding set goes first: dropping from it needs SETPCAP, which a user has not.
    drop_bounding_set(&kept)?;
    let groups: Vec<_> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    if uid.is_root() {
        set_capabilities(mask(&kept))?;
    }
    set_no_new_privs()
}

/// Bit mask of capability numbers.
fn mask(capabilities: &[u32]) -> u64 {
    capabilities.iter().fold(0, |mask, capability| mask | 1 << capability)
}

fn drop_bounding_set(kept: &[u32]) -> Result<(), Errno> {
    for capability in (0..64).filter(|capability| !kept.contains(capability)) {
        // SAFETY: this prctl takes an integer and touches no memory of ours.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) => {}
            // Past the last capability that this kernel knows.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`: one for the low, one for the high 32 capabilities.
#[repr(C)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes `mask` the effective and permitted set and empties the inheritable one.
fn set_capabilities(mask: u64) -> Result<(), Errno> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let header = CapabilityHeader { version: VERSION, pid: 0 };
    let half = |bits: u64| CapabilityData { effective: bits as u32, permitted: bits as u32, inheritable: 0 };
    let data = [half(mask & 0xffff_ffff), half(mask >> 32)];
    // SAFETY: version 3 reads one header and two data structures, which live across the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangerous_capabilities_are_not_kept() {
        // DAC_READ_SEARCH, NET_ADMIN, NET_RAW, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN,
        // SYS_BOOT, SYS_TIME, MKNOD, BPF
        for capability in [2, 12, 13, 16, 17, 19, 21, 22, 25, 27, 39] {
            assert_eq!(mask(&kept(false)) & (1 << capability), 0, "capability {capability}");
        }
    }
}
