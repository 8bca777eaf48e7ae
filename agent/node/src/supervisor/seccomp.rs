//! System calls that a container may not make.
//!
//! A deny list in the spirit of the OCI runtimes' default profile: everything that changes the
//! machine rather than the process (modules, clocks, mounts, reboot), opens other kernels'
//! attack surface (bpf, perf, userfaultfd, io_uring, keyrings), or makes namespaces in which the
//! caller would be privileged. Calls through the x32 entry get numbers of their own, which no
//! list here names, so they are refused as a whole.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// Refused with EPERM, whatever the arguments.
const DENIED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_sysfs,
    libc::SYS_syslog,
    libc::SYS__sysctl,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_uselib,
    libc::SYS_userfaultfd,
    libc::SYS_ustat,
    libc::SYS_vhangup,
];

/// Flags of clone(2) that make namespaces; clone3 hides them in memory where no filter can look, so
/// it is refused with ENOSYS and libraries fall back to clone.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP) as u64;

/// Numbers of the x32 entry have this bit.
const X32: u32 = 0x4000_0000;

/// A filter that could not be made or put in place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Making it.
    #[error("seccomp filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// Installing it.
    #[error("seccomp filter refused by the kernel: {0}")]
    Install(#[from] seccompiler::Error),
}

/// The programs, to be installed in this order.
///
/// # Errors
/// When the tables above are contradictory.
pub fn programs() -> Result<Vec<BpfProgram>, SeccompError> {
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    let rule = |arg, len, op, value| SeccompRule::new(vec![SeccompCondition::new(arg, len, op, value)?]);
    let mut rules = Vec::new();
    for bit in (0..64).map(|shift| 1_u64 << shift).filter(|bit| NAMESPACES & bit != 0) {
        rules.push(rule(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bit), bit)?);
    }
    denied.insert(libc::SYS_clone, rules);
    // Pushes characters into the terminal of whoever looks at it.
    let tiocsti = rule(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::TIOCSTI)?;
    denied.insert(libc::SYS_ioctl, vec![tiocsti]);
    // Reaches the host's and other guests' agents past the network's filter.
    let vsock = rule(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_VSOCK as u64)?;
    denied.insert(libc::SYS_socket, vec![vsock]);
    let personality = [0xffff_ffff_u64, 0, 0x0002_0000, 0x8, 0x0002_0008];
    let other: Result<Vec<_>, _> = personality
        .iter()
        .map(|allowed| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, *allowed))
        .collect();
    denied.insert(libc::SYS_personality, vec![SeccompRule::new(other?)?]);

    let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok(vec![x32(), filter(denied, libc::EPERM)?, filter(absent, libc::ENOSYS)?])
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> Result<BpfProgram, SeccompError> {
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?;
    Ok(BpfProgram::try_from(filter)?)
}

/// Refuses every system call of the x32 entry: load the number, compare, return.
fn x32() -> BpfProgram {
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    vec![
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Puts the filters on this thread, for good. `no_new_privs` is set already.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> Result<(), SeccompError> {
    for program in programs()? {
        seccompiler::apply_filter(&program)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn a_filtered_thread_works_but_cannot_change_the_machine() {
        // Filters are a thread's own; this one ends here.
        let outcome = std::thread::spawn(|| {
            install().unwrap();
            let file = std::fs::read("/proc/self/stat").map(|_| ());
            let namespace = unshare(CloneFlags::CLONE_NEWUSER);
            let mount = nix::mount::umount2("/nonexistent", nix::mount::MntFlags::empty());
            let thread = std::thread::Builder::new().spawn(|| 7).map(|t| t.join().unwrap());
            (file.is_ok(), namespace, mount, thread.ok())
        });
        let (file, namespace, mount, thread) = outcome.join().unwrap();
        assert!(file);
        assert_eq!(namespace, Err(Errno::EPERM));
        assert_eq!(mount, Err(Errno::EPERM));
        // Threads are clone without namespaces.
        assert_eq!(thread, Some(7));
    }

    #[test]
    fn no_program_is_longer_than_the_kernel_takes() {
        for program in programs().unwrap() {
            assert!((2..=4096).contains(&program.len()));
        }
    }
}
