//! The framed, non-blocking connection to the host.
//!
//! It is any stream socket: virtio-vsock in a guest, a socket pair in tests. What is queued for
//! the host is bounded by its users, who stop reading the task's pipes while [`Link::backlog`] is
//! over [`BACKLOG_LIMIT`]; then the pipes fill up and the task blocks in its write.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lathe_guest_protocol::{FrameError, FromGuest, ToGuest, decode, encode, frame_length};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Queued bytes above which no more output is taken from the task.
pub const BACKLOG_LIMIT: usize = 256 * 1024;

/// Read at once from the host; it says little.
const CHUNK: usize = 16 * 1024;

/// The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The host went away.
    #[error("the host closed the connection")]
    Closed,
    /// A system call on the connection failed.
    #[error("the connection to the host failed: {0}")]
    Io(#[from] Errno),
    /// The host sent something that is not the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A connection to the host.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    inbound: Vec<u8>,
    outbound: Vec<u8>,
    /// Bytes of `outbound` that were written already.
    sent: usize,
}

impl Link {
    /// Takes over a connected stream socket and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> Result<Self, LinkError> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { fd, inbound: Vec::new(), outbound: Vec::new(), sent: 0 })
    }

    /// Bytes queued and not written.
    pub fn backlog(&self) -> usize {
        self.outbound.len() - self.sent
    }

    /// Queues a message; [`Self::flush`] writes it.
    pub fn queue(&mut self, message: &FromGuest) -> Result<(), LinkError> {
        let frame = encode(message)?;
        if self.sent == self.outbound.len() {
            self.outbound.clear();
            self.sent = 0;
        } else if self.sent > BACKLOG_LIMIT {
            self.outbound.drain(..self.sent);
            self.sent = 0;
        }
        self.outbound.extend_from_slice(&frame);
        Ok(())
    }

    /// Writes as much of the backlog as the connection takes now.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while self.backlog() > 0 {
            match nix::unistd::write(&self.fd, &self.outbound[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Writes everything out, however long the host takes to read it.
    pub fn drain(&mut self) -> Result<(), LinkError> {
        loop {
            self.flush()?;
            if self.backlog() == 0 {
                return Ok(());
            }
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads what has arrived. One call reads a bounded amount, so a talkative host cannot keep
    /// the caller from its other work.
    pub fn receive(&mut self) -> Result<Vec<ToGuest>, LinkError> {
        let mut chunk = [0; CHUNK];
        match nix::unistd::read(&self.fd, &mut chunk) {
            Ok(0) => return Err(LinkError::Closed),
            Ok(len) => self.inbound.extend_from_slice(&chunk[..len]),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.take_messages()
    }

    fn take_messages(&mut self) -> Result<Vec<ToGuest>, LinkError> {
        let mut messages = Vec::new();
        let mut rest = &self.inbound[..];
        while let Some((prefix, body)) = rest.split_first_chunk::<4>() {
            let len = frame_length(*prefix)?;
            let Some((body, after)) = body.split_at_checked(len) else { break };
            messages.push(decode(body)?);
            rest = after;
        }
        let consumed = self.inbound.len() - rest.len();
        self.inbound.drain(..consumed);
        Ok(messages)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_guest_protocol::{MAX_FRAME, Output};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Link::new(ours.into()).unwrap(), theirs)
    }

    #[test]
    fn frames_split_anywhere_arrive_whole() {
        let (mut link, mut host) = pair();
        let bytes = [encode(&ToGuest::Signal(15)).unwrap(), encode(&ToGuest::Shutdown).unwrap()].concat();
        let mut got = Vec::new();
        for byte in bytes {
            host.write_all(&[byte]).unwrap();
            got.extend(link.receive().unwrap());
        }
        assert_eq!(got, [ToGuest::Signal(15), ToGuest::Shutdown]);
        assert!(link.receive().unwrap().is_empty());
    }

    #[test]
    fn an_oversized_frame_ends_the_connection_before_its_body() {
        let (mut link, mut host) = pair();
        host.write_all(&(MAX_FRAME as u32 + 1).to_le_bytes()).unwrap();
        assert!(matches!(link.receive(), Err(LinkError::Frame(FrameError::TooLong(_)))));
    }

    #[test]
    fn a_gone_host_is_told_apart_from_silence() {
        let (mut link, host) = pair();
        assert!(link.receive().unwrap().is_empty());
        drop(host);
        assert!(matches!(link.receive(), Err(LinkError::Closed)));
    }

    #[test]
    fn an_unread_backlog_stays_queued_and_in_order() {
        let (mut link, mut host) = pair();
        let mut expected = Vec::new();
        for i in 0..64 {
            let message = FromGuest::Output { stream: Output::Stdout, data: vec![i; 16 * 1024] };
            expected.extend(encode(&message).unwrap());
            link.queue(&message).unwrap();
            link.flush().unwrap();
        }
        assert!(link.backlog() > 0, "a socket buffer does not hold a megabyte");
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            host.read_to_end(&mut got).unwrap();
            got
        });
        link.drain().unwrap();
        drop(link);
        assert_eq!(reader.join().unwrap(), expected);
    }
}
