//! A machine whose guest runs: pausing, resuming, the power button, and waiting for its end.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Serialize;
use utoipa::ToSchema;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::build::SerialPort;
use super::devices::VirtioDevices;
use super::passthrough::Passthrough;
use super::terminal::{Escape, RawTerminal};
use super::{DeviceCounters, Ending, MachineError};
use crate::bus::lock;
use crate::config::VmConfig;
use crate::devices::SerialCounters;
use crate::exit::ExitReason;
use crate::kvm::{Buses, KickError, VcpuControl, VcpuThread};

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// They do.
    Running,
    /// They are stopped, and so are the devices.
    Paused,
}

/// What a running machine is made of.
pub(super) struct Parts {
    pub(super) config: VmConfig,
    pub(super) started: Instant,
    pub(super) ending: Arc<Ending>,
    pub(super) control: Arc<VcpuControl>,
    pub(super) threads: Vec<VcpuThread>,
    pub(super) power_button: EventFd,
    pub(super) serial: Arc<SerialCounters>,
    pub(super) devices: VirtioDevices,
    pub(super) passthrough: Arc<Passthrough>,
}

/// What others may do to a running machine, from any thread.
pub struct Controls {
    config: VmConfig,
    started: Instant,
    ending: Arc<Ending>,
    control: Arc<VcpuControl>,
    threads: Vec<VcpuThread>,
    power_button: EventFd,
    serial: Arc<SerialCounters>,
    /// Locked while the machine changes between the two.
    state: Mutex<State>,
    devices: Mutex<VirtioDevices>,
    passthrough: Arc<Passthrough>,
}

impl Controls {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { config, started, ending, control, threads, power_button, serial, devices, passthrough } =
            parts;
        let state = Mutex::new(State::Running);
        let devices = Mutex::new(devices);
        Self { config, started, ending, control, threads, power_button, serial, state, devices, passthrough }
    }

    /// The machine's description.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Time since the guest's first instruction, pauses included.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether the vCPUs run.
    pub fn state(&self) -> State {
        *lock(&self.state)
    }

    /// The vCPUs, in order.
    pub fn vcpus(&self) -> &[VcpuThread] {
        &self.threads
    }

    /// What went through the serial port.
    pub fn serial(&self) -> &SerialCounters {
        &self.serial
    }

    /// Stops the vCPUs, then the devices. Pausing a paused machine does nothing.
    ///
    /// # Errors
    /// When a vCPU does not stop; the machine runs on.
    pub fn pause(&self) -> Result<(), KickError> {
        let mut state = lock(&self.state);
        if *state == State::Running {
            self.control.pause(&self.threads)?;
            lock(&self.devices).pause();
            *state = State::Paused;
        }
        Ok(())
    }

    /// Undoes [`pause`](Self::pause). Resuming a running machine does nothing.
    pub fn resume(&self) {
        let mut state = lock(&self.state);
        if *state == State::Paused {
            lock(&self.devices).resume();
            self.control.resume();
            *state = State::Running;
        }
    }

    /// Presses the power button; what follows is the guest's choice.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power_button.write(1)
    }

    /// Ends the machine as if its plug were pulled.
    pub fn kill(&self) {
        self.ending.set(ExitReason::Killed, None);
    }

    /// Its passed-through devices and slots.
    pub fn passthrough(&self) -> &Passthrough {
        &self.passthrough
    }

    /// What the devices count.
    pub fn devices(&self) -> Vec<DeviceCounters> {
        lock(&self.devices).counters().cloned().collect()
    }

    /// Stops all vCPUs for good, then the devices, which finish what is in flight and are gone.
    fn stop(&self) -> Result<(), KickError> {
        self.control.stop(&self.threads)?;
        self.passthrough.stop();
        std::mem::take(&mut *lock(&self.devices)).stop();
        Ok(())
    }
}

/// A machine whose guest runs.
pub struct RunningMachine {
    controls: Arc<Controls>,
    serial: SerialPort,
    buses: Buses,
}

/// What the wait below is woken by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    Ended = 0,
    Signal = 1,
    Input = 2,
    Room = 3,
}

impl RunningMachine {
    pub(super) fn new(controls: Arc<Controls>, serial: SerialPort, buses: Buses) -> Self {
        Self { controls, serial, buses }
    }

    /// What others may do to it.
    pub fn controls(&self) -> Arc<Controls> {
        Arc::clone(&self.controls)
    }

    /// Moves input to the serial port until the machine ends, then stops all of it.
    ///
    /// `signals` are blocked in every thread; any of them ends the machine.
    ///
    /// # Errors
    /// When the host refuses to be waited for, or a vCPU does not stop.
    pub fn wait(self, signals: &SigSet) -> Result<(ExitReason, Option<String>), MachineError> {
        let waited = self.wait_for_end(signals).map_err(MachineError::host("waiting for the machine"));
        let ending = &self.controls.ending;
        if waited.is_err() {
            ending.set(ExitReason::Internal, None);
        }
        self.controls.stop().map_err(|error| MachineError::Host {
            what: "stopping the machine",
            source: io::Error::other(error),
        })?;
        // The devices hold files that go with them: sockets, locks.
        self.buses.mmio.clear();
        self.buses.ports.clear();
        waited.map(|()| ending.get().unwrap_or((ExitReason::Internal, None)))
    }

    fn wait_for_end(&self, signals: &SigSet) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, wake: Wake| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, wake as u64))
        };
        let ending = &self.controls.ending;
        let signal_fd = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        add(ending.event().as_raw_fd(), Wake::Ended)?;
        add(signal_fd.as_raw_fd(), Wake::Signal)?;
        let mut input = match &self.serial.drained {
            // A regular file or /dev/null cannot be waited for: then nobody types.
            Some(drained) if add(io::stdin().as_raw_fd(), Wake::Input).is_ok() => {
                add(drained.as_raw_fd(), Wake::Room)?;
                Some(Typing::new(&epoll)?)
            }
            _ => None,
        };
        loop {
            let mut events = [EpollEvent::default(); 4];
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in &events[..count] {
                match event.data() {
                    wake if wake == Wake::Ended as u64 => return Ok(()),
                    wake if wake == Wake::Signal as u64 => {
                        if let Ok(Some(info)) = signal_fd.read_signal() {
                            let name =
                                Signal::try_from(info.ssi_signo as i32).map_or("a signal", Signal::as_str);
                            ending.set(ExitReason::Killed, Some(format!("ended by {name}")));
                        }
                    }
                    _ => {
                        if let (Some(typing), Some(drained)) = (&mut input, &self.serial.drained) {
                            typing.pump(&self.serial, drained, &self.controls)?;
                        }
                    }
                }
            }
        }
    }
}

/// Standard input on its way to the serial port.
struct Typing<'a> {
    epoll: &'a Epoll,
    /// Whether standard input is waited for: not while the port is full, nor after its end.
    waiting: bool,
    ended: bool,
    escape: Escape,
    _terminal: Option<RawTerminal>,
}

impl<'a> Typing<'a> {
    fn new(epoll: &'a Epoll) -> io::Result<Self> {
        let terminal = RawTerminal::of_stdin()?;
        let escape = Escape::new(terminal.is_some());
        Ok(Self { epoll, waiting: true, ended: false, escape, _terminal: terminal })
    }

    fn pump(&mut self, serial: &SerialPort, drained: &EventFd, controls: &Controls) -> io::Result<()> {
        // Empty when it was standard input that woke us.
        let _ = drained.read();
        let room = lock(&serial.device).room();
        if self.ended {
            return Ok(());
        }
        if room == 0 {
            return self.wait_for_input(false);
        }
        if !self.waiting {
            return self.wait_for_input(true);
        }
        let mut bytes = [0; 64];
        let length = io::stdin().lock().read(&mut bytes[..room.min(64)])?;
        if length == 0 {
            self.ended = true;
            return self.wait_for_input(false);
        }
        let (typed, quit) = self.escape.filter(&bytes[..length]);
        if quit {
            controls.kill();
        }
        lock(&serial.device).type_in(&typed);
        Ok(())
    }

    fn wait_for_input(&mut self, wait: bool) -> io::Result<()> {
        if self.waiting == wait {
            return Ok(());
        }
        self.waiting = wait;
        let operation = if wait { ControlOperation::Add } else { ControlOperation::Delete };
        let event = EpollEvent::new(EventSet::IN, Wake::Input as u64);
        self.epoll.ctl(operation, io::stdin().as_raw_fd(), event)
    }
}
