//! The conversation with a guest, as a state machine without I/O.
//!
//! The guest is hostile: every message is checked against what may come next, and the first that
//! may not ends the sandbox. Lengths of frames are bounded before this module sees them.

use lathe_guest_protocol::{
    ExitStatus, FromGuest, MAX_OUTPUT, Output, Resources, TaskSpec, ToGuest, VERSION,
};

/// The most characters of a guest's own words that reach a user.
const MAX_WORDS: usize = 512;

/// What a message means for the supervisor.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// Answer with this.
    Send(ToGuest),
    /// The task's process runs.
    Started,
    /// It wrote this.
    Output(Output, Vec<u8>),
    /// It used this much so far.
    Usage(Resources),
    /// It ended. The guest powers off next.
    Exited(ExitStatus, Resources),
    /// It could not be started, for this reason. The guest powers off next.
    Failed(String),
}

/// A message that may not come now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Built from other sources.
    #[error(
        "the guest speaks version {0} of the protocol, this agent {VERSION}: use the guest of this release"
    )]
    Version(u16),
    /// Out of order.
    #[error("the guest sent {0} when it may not")]
    Unexpected(&'static str),
    /// Larger than agreed.
    #[error("the guest sent {0} bytes of output at once, over the limit of {MAX_OUTPUT}")]
    TooMuch(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    AwaitHello,
    Starting,
    Running,
    Over,
}

/// One guest's conversation.
#[derive(Debug)]
pub struct Session {
    phase: Phase,
    task: Option<Box<TaskSpec>>,
    software: String,
}

impl Session {
    /// A conversation that will hand out `task`, once.
    pub fn new(task: TaskSpec) -> Self {
        Self { phase: Phase::AwaitHello, task: Some(Box::new(task)), software: String::new() }
    }

    /// Takes one message. `wall_clock_ns` is the time now, for the guest's clock.
    ///
    /// # Errors
    /// When the message may not come now. The conversation is over.
    pub fn receive(&mut self, message: FromGuest, wall_clock_ns: u64) -> Result<Event, Violation> {
        let result = self.step(message, wall_clock_ns);
        if result.is_err() {
            self.phase = Phase::Over;
        }
        result
    }

    fn step(&mut self, message: FromGuest, wall_clock_ns: u64) -> Result<Event, Violation> {
        match (self.phase, message) {
            (Phase::AwaitHello, FromGuest::Hello { version, software, .. }) => {
                if version != VERSION {
                    return Err(Violation::Version(version));
                }
                self.software = words(&software);
                self.phase = Phase::Starting;
                let task = self.task.take().ok_or(Violation::Unexpected("a second Hello"))?;
                Ok(Event::Send(ToGuest::Start { version: VERSION, wall_clock_ns, task }))
            }
            (Phase::Starting, FromGuest::Started { .. }) => {
                self.phase = Phase::Running;
                Ok(Event::Started)
            }
            // Output and use may overtake the news of the start: they are different pipes in the guest.
            (Phase::Starting | Phase::Running, FromGuest::Output { stream, data }) => match data.len() {
                0..=MAX_OUTPUT => Ok(Event::Output(stream, data)),
                len => Err(Violation::TooMuch(len)),
            },
            (Phase::Starting | Phase::Running, FromGuest::Usage(usage)) => Ok(Event::Usage(usage)),
            (Phase::Running, FromGuest::Exited { status, usage }) => {
                self.phase = Phase::Over;
                Ok(Event::Exited(status, usage))
            }
            (Phase::AwaitHello | Phase::Starting | Phase::Running, FromGuest::Failed { reason }) => {
                self.phase = Phase::Over;
                Ok(Event::Failed(words(&reason)))
            }
            (_, other) => Err(Violation::Unexpected(kind(&other))),
        }
    }

    /// Whether the guest has said its first word.
    pub fn is_connected(&self) -> bool {
        self.phase > Phase::AwaitHello
    }

    /// What the guest calls itself; empty before it spoke.
    pub fn software(&self) -> &str {
        &self.software
    }
}

/// A guest's words made safe to show: one line, printable, bounded.
fn words(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect()
}

fn kind(message: &FromGuest) -> &'static str {
    match message {
        FromGuest::Hello { .. } => "Hello",
        FromGuest::Started { .. } => "Started",
        FromGuest::Output { .. } => "Output",
        FromGuest::Usage(_) => "Usage",
        FromGuest::Exited { .. } => "Exited",
        FromGuest::Failed { .. } => "Failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(version: u16) -> FromGuest {
        FromGuest::Hello { version, software: "init\n1".into(), since_boot_ns: 1 }
    }

    fn exited() -> FromGuest {
        FromGuest::Exited { status: ExitStatus::Code(0), usage: Resources::default() }
    }

    #[test]
    fn a_task_runs_from_hello_to_exit() {
        let mut session = Session::new(TaskSpec { rank: 3, ..TaskSpec::default() });
        let Event::Send(ToGuest::Start { wall_clock_ns: 9, task, .. }) =
            session.receive(hello(VERSION), 9).unwrap()
        else {
            panic!("no start")
        };
        assert_eq!((task.rank, session.software()), (3, "init 1"));
        assert_eq!(session.receive(FromGuest::Started { since_boot_ns: 2 }, 0), Ok(Event::Started));
        let output = FromGuest::Output { stream: Output::Stdout, data: b"x".to_vec() };
        assert_eq!(session.receive(output, 0), Ok(Event::Output(Output::Stdout, b"x".to_vec())));
        assert!(matches!(session.receive(exited(), 0), Ok(Event::Exited(ExitStatus::Code(0), _))));
        assert_eq!(session.receive(exited(), 0), Err(Violation::Unexpected("Exited")));
    }

    #[test]
    fn another_version_is_named() {
        let error = Session::new(TaskSpec::default()).receive(hello(77), 0).unwrap_err();
        assert!(error.to_string().contains("77"), "{error}");
    }

    fn any_message() -> impl Strategy<Value = FromGuest> {
        prop_oneof![
            Just(hello(VERSION)),
            Just(FromGuest::Started { since_boot_ns: 0 }),
            (0..MAX_OUTPUT + 9).prop_map(|n| FromGuest::Output { stream: Output::Stderr, data: vec![0; n] }),
            Just(FromGuest::Usage(Resources::default())),
            Just(exited()),
            ".*".prop_map(|reason| FromGuest::Failed { reason }),
        ]
    }

    proptest! {
        #[test]
        fn the_task_is_handed_out_once_and_nothing_follows_the_end(
            messages in proptest::collection::vec(any_message(), 0..20)
        ) {
            let mut session = Session::new(TaskSpec::default());
            let (mut starts, mut over) = (0, false);
            for message in messages {
                let result = session.receive(message, 0);
                if over { prop_assert!(result.is_err()); }
                match result {
                    Ok(Event::Send(ToGuest::Start { .. })) => starts += 1,
                    Ok(Event::Output(_, data)) => prop_assert!(data.len() <= MAX_OUTPUT),
                    Ok(Event::Failed(reason)) => {
                        prop_assert!(reason.chars().count() <= MAX_WORDS && !reason.contains('\n'));
                        over = true;
                    }
                    Ok(Event::Exited(..)) | Err(_) => over = true,
                    Ok(_) => {}
                }
            }
            prop_assert!(starts <= 1);
        }
    }
}
