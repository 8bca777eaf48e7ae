//! The thread on which a device works, and how its owner stops it.
//!
//! A [`Worker`] is a thread and one eventfd that wakes it. The owner (the transport, on a vCPU's or
//! the control API's thread) asks for a pause or an end and waits until the thread has obeyed; the
//! thread looks at its [`Control`] whenever it wakes. What wakes the thread besides is up to it: a device
//! with one queue can sleep on that eventfd alone, by making it the queue's kick, which
//! saves the `epoll_wait`; others put it in an epoll set among their descriptors ([`run_epoll`]).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Ended,
}

#[derive(Debug)]
struct Shared {
    /// What is wanted, what is.
    states: Mutex<(State, State)>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (State, State)> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, (State, State)>) -> MutexGuard<'a, (State, State)> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker's thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Go on working.
    Work,
    /// Finish what is in flight, then call [`Control::pause`].
    Pause,
    /// Finish what is in flight, then return.
    End,
}

/// The thread's side.
#[derive(Debug)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// What is asked for now.
    pub fn request(&self) -> Request {
        match self.shared.lock().0 {
            State::Running => Request::Work,
            State::Paused => Request::Pause,
            State::Ended => Request::End,
        }
    }

    /// Says that nothing is in flight any more and sleeps until something else is asked for, which
    /// it returns. Look at every queue after it: a kick may have come before the pause.
    pub fn pause(&self) -> Request {
        let mut states = self.shared.lock();
        states.1 = State::Paused;
        self.shared.changed.notify_all();
        while states.0 == State::Paused {
            states = self.shared.wait(states);
        }
        states.1 = State::Running;
        drop(states);
        self.request()
    }
}

impl Control {
    /// Sleeps for `time`, or until something else than work is asked for.
    pub fn sleep(&self, time: Duration) {
        let states = self.shared.lock();
        let idle = |states: &mut (State, State)| states.0 == State::Running;
        // A poisoned lock means the owner is gone, and `request` says what to do.
        drop(self.shared.changed.wait_timeout_while(states, time, idle));
    }
}

impl Drop for Control {
    /// However the thread ends, by a panic too, nobody waits for it in vain.
    fn drop(&mut self) {
        self.shared.lock().1 = State::Ended;
        self.shared.changed.notify_all();
    }
}

/// The owner's side. Dropping it ends the thread and waits for it.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Runs `body` on a thread called `name` (15 bytes show in the host). `wake` is written to
    /// whenever the [`Control`] has news for it.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn spawn(
        name: &str,
        wake: &EventFd,
        body: impl FnOnce(Control) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            states: Mutex::new((State::Running, State::Running)),
            changed: Condvar::new(),
        });
        let wake = wake.try_clone()?;
        let control = Control { shared: Arc::clone(&shared) };
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            ask_for_short_slices();
            body(control);
        })?;
        Ok(Self { shared, wake, thread: Some(thread) })
    }

    /// Returns when the thread has paused, or has ended.
    pub fn pause(&self) {
        self.ask(State::Paused);
        let mut states = self.shared.lock();
        while states.1 == State::Running {
            states = self.shared.wait(states);
        }
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        self.ask(State::Running);
    }

    fn ask(&self, state: State) {
        self.shared.lock().0 = state;
        self.shared.changed.notify_all();
        // Fails only when the counter is full, and then the thread is about to wake.
        let _ = self.wake.write(1);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ask(State::Ended);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Has the scheduler run this thread soon after it wakes, in turns of 0.1 ms (Linux 6.12: a waking
/// thread with a shorter slice preempts). On a host whose CPUs are all taken by vCPUs the guest that
/// kicked then finds its request done before it goes idle, which would cost it several exits.
/// The thread's share of the CPU stays the same. Older hosts ignore it, so a failure is no loss.
fn ask_for_short_slices() {
    const SLICE_NS: u64 = 100_000;
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    let mut attributes = std::mem::MaybeUninit::<libc::sched_attr>::zeroed();
    // SAFETY: sched_getattr(2) of this thread writes at most SIZE bytes, for which there is room.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attributes.as_mut_ptr(), SIZE, 0) };
    // SAFETY: plain integers, for which zeros are valid.
    let mut attributes = unsafe { attributes.assume_init() };
    if got != 0 || attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return;
    }
    attributes.sched_runtime = SLICE_NS;
    // SAFETY: sched_setattr(2) reads `size` bytes of the structure, which lives through the call.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

/// Where a [`Handler`] says what wakes it.
pub struct Sources<'a> {
    epoll: &'a Epoll,
}

impl Sources<'_> {
    /// Wakes the handler with `token` on `events` of `fd`. Level-triggered unless told otherwise.
    ///
    /// # Errors
    /// What `epoll_ctl` said; regular files cannot be waited for.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)
    }

    /// Changes what `fd` wakes for.
    ///
    /// # Errors
    /// What `epoll_ctl` said.
    pub fn modify(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    /// Forgets `fd`. Do so before closing it.
    ///
    /// # Errors
    /// What `epoll_ctl` said.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        token: u32,
        events: EventSet,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, u64::from(token)))
    }
}

/// What a device does on its thread, when more than one thing can wake it.
pub trait Handler: Send {
    /// Called once, before the thread starts.
    ///
    /// # Errors
    /// When a source cannot be added; no thread is started then.
    fn start(&mut self, sources: &Sources<'_>) -> io::Result<()>;

    /// `token`'s descriptor has `events`. (A descriptor removed a moment ago may still be reported once.) Does a bounded amount of work, leaving the rest
    /// to the next call; never blocks.
    fn handle(&mut self, token: u32, events: EventSet, sources: &Sources<'_>);

    /// Waits for what is in flight: the device is about to pause or to end. Then, after a
    /// pause, [`resumed`](Self::resumed).
    fn drain(&mut self) {}

    /// A pause is over: look at every queue once.
    fn resumed(&mut self, sources: &Sources<'_>);
}

/// The token under which [`run_epoll`] keeps the eventfd that wakes it; not for handlers.
const WAKE: u64 = u64::MAX;

/// A [`Worker`] that waits with epoll for whatever `handler` asks for.
///
/// # Errors
/// When the host has no descriptor or thread left.
pub fn run_epoll(name: &str, mut handler: impl Handler + 'static) -> io::Result<Worker> {
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let epoll = Epoll::new()?;
    epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
    handler.start(&Sources { epoll: &epoll })?;
    let receiver = wake.try_clone()?;
    Worker::spawn(name, &wake, move |control| epoll_loop(&epoll, &receiver, &control, &mut handler))
}

fn epoll_loop(epoll: &Epoll, wake: &EventFd, control: &Control, handler: &mut impl Handler) {
    let sources = Sources { epoll };
    let mut ready = [EpollEvent::default(); 16];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Nothing but a bug makes epoll fail; a device that spins would be worse than one that stops.
            Err(_) => return,
        };
        for event in &ready[..count] {
            if event.data() != WAKE {
                handler.handle(event.data() as u32, event.event_set(), &sources);
                continue;
            }
            let _ = wake.read();
            let mut request = control.request();
            while request == Request::Pause {
                handler.drain();
                request = control.pause();
                if request == Request::Work {
                    handler.resumed(&sources);
                }
            }
            if request == Request::End {
                handler.drain();
                return;
            }
        }
    }
}

/// What a device with one queue does on its thread.
pub trait KickHandler: Send {
    /// The queue was kicked, or something else signalled the kick's eventfd. Does a bounded amount
    /// of work; returns whether it should be called again before the thread sleeps.
    fn serve(&mut self, control: &Control) -> bool;

    /// Waits for what is in flight: the device is about to pause or to end.
    fn drain(&mut self) {}
}

/// A [`Worker`] that sleeps on a queue's `kick` and on nothing else, which costs one system
/// call a wake-up where epoll costs two. `serve` runs once before the first sleep.
///
/// # Errors
/// When the host has no descriptor or thread left.
pub fn run_kick(name: &str, kick: EventFd, mut handler: impl KickHandler + 'static) -> io::Result<Worker> {
    set_blocking(&kick)?;
    let wake = kick.try_clone()?;
    Worker::spawn(name, &wake, move |control| {
        loop {
            match control.request() {
                Request::Work => {}
                Request::Pause => {
                    handler.drain();
                    control.pause();
                    continue;
                }
                Request::End => return handler.drain(),
            }
            if handler.serve(&control) {
                continue;
            }
            match kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The eventfd is ours and open: only a bug gets here, and spinning would hide it.
                Err(_) => return handler.drain(),
            }
        }
    })
}

/// The transport makes kicks non-blocking, for epoll loops. The flag belongs to the open file, so
/// this holds for all its descriptors; only the worker reads it.
fn set_blocking(event: &EventFd) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument and `event` is open.
    let flags = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes an int and `event` is open.
    let result = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
