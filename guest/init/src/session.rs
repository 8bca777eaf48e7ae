//! The conversation with the host while a task lives: one thread, one `poll`.
//!
//! [`Lifecycle`] decides what each event means and is pure; [`run`] moves bytes. Nothing here
//! knows how a task is started or what a connection is made of.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use lathe_guest_protocol::{ExitStatus, FromGuest, MAX_OUTPUT, Output, Resources, ToGuest};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::clock::since_boot;
use crate::link::{BACKLOG_LIMIT, Link, LinkError};

/// How often the host hears what the task uses.
const USAGE_PERIOD: Duration = Duration::from_secs(5);

/// What becomes of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskEvent {
    /// Its program was executed, this long after the kernel's start.
    Started(Duration),
    /// It could not be started.
    Failed(String),
    /// Its first process ended; all its other processes are gone or going.
    Ended(ExitStatus),
}

/// A task as the session sees it.
///
/// Called from one thread. After [`TaskEvent::Failed`] or [`TaskEvent::Ended`] no further event
/// is asked for, and the streams reach their end once every process of the task is gone.
pub trait Task {
    /// Readable when [`Self::next_event`] would return something.
    fn events(&self) -> BorrowedFd<'_>;
    /// The next event, or none yet. Does not block.
    fn next_event(&mut self) -> Option<TaskEvent>;
    /// The reading end of a stream's pipe.
    fn stream(&self, which: Output) -> BorrowedFd<'_>;
    /// Sends a signal to the task's process group.
    fn signal(&mut self, number: i32);
    /// Kills every process of the task.
    fn kill(&mut self);
    /// What it used so far.
    fn usage(&self) -> Resources;
}

/// Something that becomes readable when the machine's power button is pressed.
pub trait PowerButton {
    /// The descriptors to wait for.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;
    /// Whether it was pressed since the last call.
    fn pressed(&mut self) -> bool;
}

/// What to do to the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Nothing,
    Signal(i32),
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The task lives, or is about to.
    Alive,
    /// It was asked to end and is killed at this time since boot.
    Stopping(Duration),
    /// It was killed, and its end is awaited.
    Killed,
    /// It has ended; its last output is on its way.
    Ended,
}

/// The decisions of a session. Times are since the kernel's start.
#[derive(Debug)]
struct Lifecycle {
    phase: Phase,
    grace: Duration,
    next_usage: Duration,
}

impl Lifecycle {
    fn new(grace: Duration, now: Duration) -> Self {
        Self { phase: Phase::Alive, grace, next_usage: now + USAGE_PERIOD }
    }

    fn on_message(&mut self, message: &ToGuest) -> Action {
        match message {
            ToGuest::Signal(number) if self.phase != Phase::Ended && (1..=64).contains(number) => {
                Action::Signal(*number)
            }
            ToGuest::Shutdown => self.kill(),
            // A second Start, or a signal for a task that has ended.
            ToGuest::Start { .. } | ToGuest::Signal(_) => Action::Nothing,
        }
    }

    fn on_power_button(&mut self, now: Duration) -> Action {
        if self.phase != Phase::Alive {
            return Action::Nothing;
        }
        self.phase = Phase::Stopping(now + self.grace);
        Action::Signal(libc::SIGTERM)
    }

    fn on_time(&mut self, now: Duration) -> Action {
        match self.phase {
            Phase::Stopping(deadline) if now >= deadline => self.kill(),
            _ => Action::Nothing,
        }
    }

    fn kill(&mut self) -> Action {
        match self.phase {
            Phase::Killed | Phase::Ended => Action::Nothing,
            Phase::Alive | Phase::Stopping(_) => {
                self.phase = Phase::Killed;
                Action::Kill
            }
        }
    }

    fn usage_due(&mut self, now: Duration) -> bool {
        let due = self.phase != Phase::Ended && now >= self.next_usage;
        if due {
            self.next_usage = now + USAGE_PERIOD;
        }
        due
    }

    /// When [`Self::on_time`] or [`Self::usage_due`] next have something to do.
    fn wake_at(&self) -> Option<Duration> {
        match self.phase {
            Phase::Ended => None,
            Phase::Stopping(deadline) => Some(deadline.min(self.next_usage)),
            Phase::Alive | Phase::Killed => Some(self.next_usage),
        }
    }
}

/// Reports `task` to the host until the task has ended and the host has been told everything.
///
/// # Errors
/// When the connection is lost. The task has been killed then.
pub fn run(
    link: &mut Link,
    task: &mut dyn Task,
    button: &mut dyn PowerButton,
    grace: Duration,
) -> Result<(), LinkError> {
    let mut session =
        Session { link, task, life: Lifecycle::new(grace, since_boot()), end: None, open: [true; 2] };
    let result = session.serve(button);
    if result.is_err() {
        session.task.kill();
    }
    result
}

/// The streams in the order of [`Session::open`].
const STREAMS: [Output; 2] = [Output::Stdout, Output::Stderr];

struct Session<'a> {
    link: &'a mut Link,
    task: &'a mut dyn Task,
    life: Lifecycle,
    /// The last message, held back until all output was queued.
    end: Option<FromGuest>,
    /// Which of [`STREAMS`] have not reached their end.
    open: [bool; 2],
}

/// What one `poll` found.
#[derive(Default)]
struct Ready {
    link: bool,
    events: bool,
    button: bool,
    streams: [bool; 2],
}

impl Session<'_> {
    fn serve(&mut self, button: &mut dyn PowerButton) -> Result<(), LinkError> {
        loop {
            let ready = self.wait(button)?;
            if ready.link {
                for message in self.link.receive()? {
                    let action = self.life.on_message(&message);
                    self.act(action);
                }
            }
            if ready.button && button.pressed() {
                let action = self.life.on_power_button(since_boot());
                self.act(action);
            }
            // Before the output, so that a start is reported ahead of what was written since.
            if ready.events
                && let Some(event) = self.task.next_event()
            {
                self.on_task(event)?;
            }
            for (index, stream) in STREAMS.into_iter().enumerate() {
                if ready.streams[index] {
                    self.pump(index, stream)?;
                }
            }
            self.on_time()?;
            if self.open == [false; 2]
                && let Some(end) = self.end.take()
            {
                self.link.queue(&end)?;
                return self.link.drain();
            }
            self.link.flush()?;
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Nothing => {}
            Action::Signal(number) => self.task.signal(number),
            Action::Kill => self.task.kill(),
        }
    }

    fn on_task(&mut self, event: TaskEvent) -> Result<(), LinkError> {
        match event {
            TaskEvent::Started(at) => {
                self.link.queue(&FromGuest::Started { since_boot_ns: at.as_nanos() as u64 })?;
            }
            TaskEvent::Failed(reason) => {
                self.life.phase = Phase::Ended;
                self.end = Some(FromGuest::Failed { reason });
            }
            TaskEvent::Ended(status) => {
                self.life.phase = Phase::Ended;
                self.end = Some(FromGuest::Exited { status, usage: self.task.usage() });
            }
        }
        Ok(())
    }

    fn on_time(&mut self) -> Result<(), LinkError> {
        let now = since_boot();
        let action = self.life.on_time(now);
        self.act(action);
        // A host that does not read gets no usage either: the backlog stays bounded.
        if self.life.usage_due(now) && self.link.backlog() < BACKLOG_LIMIT {
            self.link.queue(&FromGuest::Usage(self.task.usage()))?;
        }
        Ok(())
    }

    fn pump(&mut self, index: usize, stream: Output) -> Result<(), LinkError> {
        let mut data = vec![0; MAX_OUTPUT];
        match nix::unistd::read(self.task.stream(stream), &mut data) {
            Ok(0) => self.open[index] = false,
            Ok(len) => {
                data.truncate(len);
                self.link.queue(&FromGuest::Output { stream, data })?;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.open[index] = false,
        }
        Ok(())
    }

    fn wait(&self, button: &dyn PowerButton) -> Result<Ready, LinkError> {
        let backlog = self.link.backlog();
        let link = if backlog > 0 { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut fds = vec![PollFd::new(self.link.as_fd(), link)];
        // A pipe at its end reports that for ever, and a full backlog must stop the task: both are
        // left out of the set.
        let mut streams = [None; 2];
        for (index, stream) in STREAMS.into_iter().enumerate() {
            if self.open[index] && backlog < BACKLOG_LIMIT {
                streams[index] = Some(fds.len());
                fds.push(PollFd::new(self.task.stream(stream), PollFlags::POLLIN));
            }
        }
        let events = self.end.is_none().then_some(fds.len());
        if events.is_some() {
            fds.push(PollFd::new(self.task.events(), PollFlags::POLLIN));
        }
        let buttons = fds.len();
        fds.extend(button.descriptors().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));

        match poll(&mut fds, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let set = |index: usize| fds[index].any().unwrap_or(false);
        Ok(Ready {
            link: fds[0].revents().is_some_and(|found| found.intersects(!PollFlags::POLLOUT)),
            events: events.is_some_and(set),
            button: (buttons..fds.len()).any(set),
            streams: streams.map(|index| index.is_some_and(set)),
        })
    }

    fn timeout(&self) -> PollTimeout {
        let Some(at) = self.life.wake_at() else { return PollTimeout::NONE };
        // One more millisecond, or the loop would spin through the deadline's last one.
        let millis = at.saturating_sub(since_boot()).as_millis() + 1;
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
    }
}

#[cfg(test)]
mod tests;
