//! What PID 1 and the shepherd tell each other: one packet, one message.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use lathe_guest_protocol::ExitStatus;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

/// Reasons are cut to this; the longest that are useful name two paths.
const MAX_REASON: usize = 4096;

/// What the shepherd reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The program was executed, this long after the kernel's start.
    Started(Duration),
    /// It was not, and why. The last report.
    Failed(String),
    /// The task's first process ended. The last report.
    Ended(ExitStatus),
}

impl Report {
    fn encode(&self) -> Vec<u8> {
        let tagged = |tag: u8, value: &[u8]| [&[tag], value].concat();
        match self {
            Self::Started(at) => tagged(b's', &(at.as_nanos() as u64).to_ne_bytes()),
            Self::Failed(reason) => tagged(b'f', &reason.as_bytes()[..reason.len().min(MAX_REASON)]),
            Self::Ended(ExitStatus::Code(code)) => tagged(b'c', &code.to_ne_bytes()),
            Self::Ended(ExitStatus::Signal(number)) => tagged(b'k', &number.to_ne_bytes()),
            Self::Ended(ExitStatus::OutOfMemory) => tagged(b'm', &[]),
        }
    }

    fn decode(packet: &[u8]) -> Option<Self> {
        let (tag, value) = packet.split_first()?;
        let word = || value.try_into().ok().map(i32::from_ne_bytes);
        Some(match tag {
            b's' => Self::Started(Duration::from_nanos(u64::from_ne_bytes(value.try_into().ok()?))),
            b'f' => Self::Failed(String::from_utf8_lossy(value).into_owned()),
            b'c' => Self::Ended(ExitStatus::Code(word()?)),
            b'k' => Self::Ended(ExitStatus::Signal(word()?)),
            b'm' => Self::Ended(ExitStatus::OutOfMemory),
            _ => return None,
        })
    }
}

/// One end of the pair.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

impl Channel {
    /// PID 1's end, which never blocks, and the shepherd's, which does.
    pub fn pair() -> Result<(Self, Self), Errno> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { fd: ours }, Self { fd: theirs }))
    }

    /// The shepherd's next report; `None` once it is gone.
    pub fn report(&self) -> Result<Option<Report>, Errno> {
        let mut packet = [0; MAX_REASON + 1];
        let len = recv(self.fd.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        if len == 0 {
            return Ok(None);
        }
        Report::decode(&packet[..len]).map(Some).ok_or(Errno::EBADMSG)
    }

    /// Reports to PID 1.
    pub fn send_report(&self, report: &Report) -> Result<(), Errno> {
        send(self.fd.as_raw_fd(), &report.encode(), MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// Asks the shepherd to signal the task.
    pub fn send_signal(&self, number: i32) -> Result<(), Errno> {
        send(self.fd.as_raw_fd(), &number.to_ne_bytes(), MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// The next signal to pass on; `None` once PID 1 is gone.
    pub fn signal(&self) -> Result<Option<i32>, Errno> {
        let mut packet = [0; 4];
        match recv(self.fd.as_raw_fd(), &mut packet, MsgFlags::empty())? {
            4 => Ok(Some(i32::from_ne_bytes(packet))),
            _ => Ok(None),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_arrive_one_by_one_and_then_the_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        assert_eq!(ours.report(), Err(Errno::EAGAIN));
        let reports = [
            Report::Started(Duration::from_millis(7)),
            Report::Failed("no".to_owned()),
            Report::Ended(ExitStatus::Code(-1)),
            Report::Ended(ExitStatus::Signal(9)),
            Report::Ended(ExitStatus::OutOfMemory),
        ];
        for report in &reports {
            theirs.send_report(report).unwrap();
        }
        for report in reports {
            assert_eq!(ours.report(), Ok(Some(report)));
        }
        ours.send_signal(15).unwrap();
        assert_eq!(theirs.signal(), Ok(Some(15)));
        drop(theirs);
        assert_eq!(ours.report(), Ok(None));
    }
}
