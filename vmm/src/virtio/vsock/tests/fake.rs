//! Host programs that live in memory.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::rc::Rc;

use crate::virtio::vsock::connection::HostStream;
use crate::virtio::vsock::muxer::{Host, StreamId};

/// Both ends of a stream.
#[derive(Default)]
pub struct Pipe {
    /// What the program wrote and the device has not read.
    pub to_guest: VecDeque<u8>,
    /// What the device wrote and the program has not read.
    pub to_program: VecDeque<u8>,
    /// What `to_program` holds at most.
    pub capacity: usize,
    /// The program will write no more.
    pub program_ended: bool,
    /// The program is gone.
    pub program_gone: bool,
    /// The device will write no more.
    pub device_ended: bool,
}

/// The device's end.
pub struct FakeStream(pub Rc<RefCell<Pipe>>);

impl Read for FakeStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.to_guest.is_empty() {
            let ended = pipe.program_ended || pipe.program_gone;
            return if ended { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let len = buf.len().min(pipe.to_guest.len());
        for (to, from) in buf.iter_mut().zip(pipe.to_guest.drain(..len)) {
            *to = from;
        }
        Ok(len)
    }
}

impl Write for FakeStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.program_gone || pipe.device_ended {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let len = buf.len().min(pipe.capacity - pipe.to_program.len());
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        pipe.to_program.extend(&buf[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HostStream for FakeStream {
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Read {
            self.0.borrow_mut().device_ended = true;
        }
        Ok(())
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        self.0.borrow_mut().device_ended = true;
    }
}

/// A new pipe whose program reads at most `capacity` bytes at a time.
pub fn pipe(capacity: usize) -> (FakeStream, Rc<RefCell<Pipe>>) {
    let pipe = Rc::new(RefCell::new(Pipe { capacity, ..Pipe::default() }));
    (FakeStream(Rc::clone(&pipe)), pipe)
}

/// Programs listen at even ports.
pub struct FakeHost {
    pub capacity: usize,
    /// The programs that the guest was connected to, by port, the latest.
    pub programs: Rc<RefCell<HashMap<u32, Rc<RefCell<Pipe>>>>>,
    /// The streams being watched.
    pub watched: Rc<RefCell<Vec<StreamId>>>,
}

impl FakeHost {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, programs: Rc::default(), watched: Rc::default() }
    }
}

impl Host for FakeHost {
    type Stream = FakeStream;

    fn connect(&mut self, port: u32) -> io::Result<FakeStream> {
        if port % 2 == 1 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let (stream, program) = pipe(self.capacity);
        self.programs.borrow_mut().insert(port, program);
        Ok(stream)
    }

    fn watch(&mut self, _stream: &FakeStream, id: StreamId) -> io::Result<()> {
        self.watched.borrow_mut().push(id);
        Ok(())
    }
}
