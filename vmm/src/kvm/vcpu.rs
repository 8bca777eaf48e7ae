//! vCPUs: their registers at the start, the thread that runs each, and how they are stopped.
//!
//! Another thread stops a vCPU in three steps: note the wish, set `immediate_exit` in the page shared
//! with the kernel, signal the thread. A vCPU in the guest leaves it because of the signal, one
//! outside never enters because of the flag; so no order of events loses the wish. The vCPU clears
//! the flag before it looks at the wish.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_IO_OUT, kvm_msr_entry, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, FileOffset, GuestMemoryMmap, MmapRegion, VolatileMemory};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{KvmError, Vm};
use crate::arch::native::cpuid::CpuIdTemplate;
use crate::arch::native::registers::Entry;
use crate::bus::Bus;
use crate::exit::ExitReason;
use crate::machine::Ending;

/// Labels of [`ExitCounters`], in order.
pub const EXIT_KINDS: [&str; 5] = ["io", "mmio", "interrupted", "hlt", "other"];

/// Indices of [`EXIT_KINDS`].
#[derive(Clone, Copy)]
enum ExitKind {
    Io,
    Mmio,
    Interrupted,
    Hlt,
    Other,
}

/// What one vCPU left the guest for.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; EXIT_KINDS.len()]);

impl ExitCounters {
    fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often each of [`EXIT_KINDS`] happened.
    pub fn read(&self) -> [u64; EXIT_KINDS.len()] {
        std::array::from_fn(|kind| self.0[kind].load(Ordering::Relaxed))
    }
}

/// What the machine wants of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct ControlState {
    wish: Wish,
    /// vCPUs that are outside the guest because of the wish, for good if it is to stop.
    parked: usize,
}

/// The wish common to all vCPUs, and how far they followed it.
#[derive(Debug)]
pub struct VcpuControl {
    state: Mutex<ControlState>,
    changed: Condvar,
}

impl Default for VcpuControl {
    fn default() -> Self {
        let state = Mutex::new(ControlState { wish: Wish::Run, parked: 0 });
        Self { state, changed: Condvar::new() }
    }
}

impl VcpuControl {
    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU outside the guest: waits while paused; false means stop.
    fn may_run(&self) -> bool {
        let mut state = self.lock();
        if state.wish == Wish::Pause {
            state.parked += 1;
            self.changed.notify_all();
            while state.wish == Wish::Pause {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.parked -= 1;
        }
        state.wish == Wish::Run
    }

    fn park_for_good(&self) {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
    }

    fn set(&self, wish: Wish) {
        self.lock().wish = wish;
        self.changed.notify_all();
    }

    /// Waits until `count` vCPUs are parked; false when they are not in time.
    fn wait_parked(&self, count: usize, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.parked < count {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets paused vCPUs run again.
    pub fn resume(&self) {
        self.set(Wish::Run);
    }

    /// Pauses all of `threads`; when this returns none is in the guest or in a device.
    ///
    /// # Errors
    /// When one does not react within ten seconds; all run on then.
    pub fn pause(&self, threads: &[VcpuThread]) -> Result<(), KickError> {
        self.stop_running(Wish::Pause, threads).inspect_err(|_| self.resume())
    }

    /// Stops all of `threads` for good.
    ///
    /// # Errors
    /// When one does not react within ten seconds.
    pub fn stop(&self, threads: &[VcpuThread]) -> Result<(), KickError> {
        self.stop_running(Wish::Stop, threads)
    }

    fn stop_running(&self, wish: Wish, threads: &[VcpuThread]) -> Result<(), KickError> {
        /// A device may hold a vCPU for as long as a slow disk takes, but not longer.
        const LIMIT: Duration = Duration::from_secs(10);
        self.set(wish);
        for thread in threads {
            thread.kick()?;
        }
        if self.wait_parked(threads.len(), LIMIT) { Ok(()) } else { Err(KickError::Stuck) }
    }
}

/// A vCPU that cannot be stopped.
#[derive(Debug, thiserror::Error)]
pub enum KickError {
    /// The signal or the shared page failed.
    #[error("kicking a vCPU: {0}")]
    Host(#[from] io::Error),
    /// It is stuck in a device.
    #[error("a vCPU did not stop within 10 s")]
    Stuck,
}

/// A vCPU before it runs.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    /// The guest runs in it: it must stay mapped for as long as this vCPU may run.
    _memory: GuestMemoryMmap,
    /// The kernel detaches all irqfds when the last descriptor of the VM goes.
    _vm: Arc<VmFd>,
}

impl Vcpu {
    /// Creates vCPU `index`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create(vm: &Vm, index: u8, apic_id: u32) -> Result<Self, KvmError> {
        let fd = vm.fd.create_vcpu(apic_id.into()).map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
        Ok(Self { fd, index, _memory: vm.memory(), _vm: Arc::clone(&vm.fd) })
    }

    /// The frequency of its TSC, where KVM tells.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Sets its registers; `entry` is for the first one, the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn configure(&self, cpuid: &CpuIdTemplate, entry: Option<Entry>) -> Result<(), KvmError> {
        let cpuid = cpuid.for_cpu(self.index).map_err(KvmError::CpuId)?;
        self.fd.set_cpuid2(&cpuid).map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
        set_msrs(&self.fd)?;
        let Some(entry) = entry else { return Ok(()) };
        let mut sregs = self.fd.get_sregs().map_err(KvmError::ioctl("KVM_GET_SREGS"))?;
        entry.set_mode(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(KvmError::ioctl("KVM_SET_SREGS"))?;
        self.fd.set_regs(&entry.registers()).map_err(KvmError::ioctl("KVM_SET_REGS"))
    }

    /// Runs it on a thread of its own until the machine ends.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(
        mut self,
        buses: Buses,
        control: Arc<VcpuControl>,
        ending: Arc<Ending>,
    ) -> io::Result<VcpuThread> {
        install_kick_handler()?;
        // SAFETY: the descriptor is open: `self.fd` owns it and outlives the borrow.
        let borrowed = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        let fd = File::from(borrowed.try_clone_to_owned()?);
        let counters = Arc::new(ExitCounters::default());
        let thread_counters = Arc::clone(&counters);
        let handle = thread::Builder::new().name(format!("vcpu{}", self.index)).stack_size(256 << 10).spawn(
            move || {
                let parked = ParkAtEnd(&control);
                self.run(&buses, parked.0, &ending, &thread_counters);
            },
        )?;
        Ok(VcpuThread { handle, fd, counters })
    }

    fn run(&mut self, buses: &Buses, control: &VcpuControl, ending: &Ending, counters: &ExitCounters) {
        while !ending.is_set() {
            match self.enter(buses, counters) {
                Ok(Next::Run) => {}
                Ok(Next::Look) => {
                    self.fd.set_kvm_immediate_exit(0);
                    if !control.may_run() {
                        return;
                    }
                }
                Err((reason, message)) => ending.set(reason, Some(message)),
            }
        }
        // Another part ended the machine, or this CPU did; either way the machine now stops all.
    }

    fn enter(&mut self, buses: &Buses, counters: &ExitCounters) -> Result<Next, (ExitReason, String)> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                counters.count(ExitKind::Interrupted);
                return Ok(Next::Look);
            }
            Err(error) => return Err((ExitReason::Internal, format!("KVM_RUN: {error}"))),
        };
        match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => {
                counters.count(ExitKind::Io);
                port_io(self.fd.get_kvm_run(), &buses.ports);
            }
            VcpuExit::MmioRead(address, data) => {
                counters.count(ExitKind::Mmio);
                buses.mmio.read(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                counters.count(ExitKind::Mmio);
                buses.mmio.write(address, data);
            }
            VcpuExit::Hlt => counters.count(ExitKind::Hlt),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => counters.count(ExitKind::Interrupted),
            VcpuExit::Shutdown => return Err((ExitReason::Crash, "triple fault".to_owned())),
            VcpuExit::InternalError => return Err(self.internal_error()),
            VcpuExit::FailEntry(reason, _) => {
                let message = format!("the processor refused to enter the guest, reason {reason:#x}");
                return Err((ExitReason::Internal, message));
            }
            VcpuExit::SystemEvent(kind, _) => {
                return Err((ExitReason::Crash, format!("system event {kind}")));
            }
            VcpuExit::MemoryFault { gpa, .. } => {
                let message = format!("the host has no page for guest address {gpa:#x}");
                return Err((ExitReason::Internal, message));
            }
            other => {
                counters.count(ExitKind::Other);
                return Err((ExitReason::Internal, format!("unexpected exit: {other:?}")));
            }
        }
        Ok(Next::Run)
    }

    fn internal_error(&mut self) -> (ExitReason, String) {
        const EMULATION_FAILED: u32 = 1;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this
        // member; and every bit pattern is a valid integer.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        if suberror != EMULATION_FAILED {
            return (ExitReason::Crash, format!("KVM internal error {suberror} at rip {rip:#x}"));
        }
        let failed = format!("KVM could not emulate the instruction at rip {rip:#x}");
        if crate::probe::hardware_virtualization() {
            (ExitReason::Crash, failed)
        } else {
            (ExitReason::Unsupported, format!("{failed}: {}", crate::probe::CANNOT_BOOT))
        }
    }
}

enum Next {
    Run,
    Look,
}

/// A thread that ends, by a panic too, is out of the guest for good: nobody need wait for it.
struct ParkAtEnd<'a>(&'a VcpuControl);

impl Drop for ParkAtEnd<'_> {
    fn drop(&mut self) {
        self.0.park_for_good();
    }
}

/// Where a vCPU's accesses go.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// String instructions move several items with one exit: each goes to the bus by itself.
fn port_io(run: &mut kvm_run, ports: &Bus) {
    // SAFETY: the exit reason was KVM_EXIT_IO, for which the kernel fills this member; and every
    // bit pattern is a valid value of its integers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = usize::from(io.size) * io.count as usize;
    let start: *mut kvm_run = run;
    // SAFETY: the kernel put `length` bytes at this offset into the vCPU's shared area, which is
    // mapped as a whole for as long as `run` is borrowed.
    let data = unsafe { start.cast::<u8>().add(io.data_offset as usize) };
    // SAFETY: as above; nothing else touches the bytes while the vCPU is outside the guest.
    let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
    for item in data.chunks_exact_mut(usize::from(io.size).max(1)) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            ports.write(io.port.into(), item);
        } else {
            ports.read(io.port.into(), item);
        }
    }
}

/// Caching on, as firmware would leave it: Linux trusts the default type for all of RAM.
fn set_msrs(fd: &VcpuFd) -> Result<(), KvmError> {
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    let entry =
        kvm_msr_entry { index: MTRR_DEFAULT_TYPE, data: MTRR_ENABLE | WRITE_BACK, ..Default::default() };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).map_err(KvmError::CpuId)?;
    fd.set_msrs(&msrs).map(|_| ()).map_err(KvmError::ioctl("KVM_SET_MSRS"))
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The handler does nothing: interrupting KVM_RUN is the signal's whole purpose.
fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// A running vCPU's thread, as others see it.
#[derive(Debug)]
pub struct VcpuThread {
    handle: JoinHandle<()>,
    /// A second descriptor of the vCPU, to share its page with the kernel.
    fd: File,
    /// What it left the guest for.
    pub counters: Arc<ExitCounters>,
}

impl VcpuThread {
    fn kick(&self) -> io::Result<()> {
        let fd = FileOffset::new(self.fd.try_clone()?, 0);
        let page: MmapRegion = MmapRegion::from_file(fd, size_of::<kvm_run>()).map_err(io::Error::other)?;
        page.as_volatile_slice()
            .write_obj(1_u8, offset_of!(kvm_run, immediate_exit))
            .map_err(io::Error::other)?;
        // A thread that has ended ignores it: it is parked for good.
        self.handle.kill(SIGRTMIN()).map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}
