//! A console through the transport.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::Console;
use crate::virtio::test_machine::{BUFFERS, TestMachine, readable, writable};

/// Takes a number of bytes, then no more.
#[derive(Clone)]
struct Sink(Arc<Mutex<Vec<u8>>>, usize);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = self.0.lock().unwrap();
        let count = bytes.len().min(self.1 - taken.len());
        taken.extend_from_slice(&bytes[..count]);
        if count == 0 { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(count) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn output_arrives_until_the_sink_is_full_and_the_guest_goes_on() {
    let sink = Sink(Arc::default(), 5000);
    let console = Console::new(sink.clone(), None);
    let counters = console.counters();
    let machine = TestMachine::new(console);
    let mut queues = machine.start();
    machine.memory.write_slice(&[b'x'; 3000], GuestAddress(BUFFERS)).unwrap();
    for _ in 0..4 {
        let head = queues[1].send(&[readable(BUFFERS, 1000), readable(BUFFERS + 1000, 2000)]);
        assert_eq!(queues[1].wait(), (head, 0));
    }
    assert_eq!(sink.0.lock().unwrap().len(), 5000);
    assert_eq!(counters.written.load(Ordering::Relaxed), 12000);
    assert_eq!(counters.lost.load(Ordering::Relaxed), 7000);
}

#[test]
fn input_waits_for_room_and_is_complete() {
    let (reader, mut writer) = io::pipe().unwrap();
    let input = File::from(OwnedFd::from(reader));
    let machine = TestMachine::new(Console::new(io::sink(), Some(input)));
    let mut queues = machine.start();
    let receive = &mut queues[0];
    // Before there is a buffer, with one that is too short, and at the end.
    writer.write_all(b"hello ").unwrap();
    writer.write_all(b"world").unwrap();
    let mut got = Vec::new();
    while got.len() < 11 {
        let head = receive.send(&[writable(BUFFERS, 4)]);
        let (used, length) = receive.wait();
        assert_eq!(used, head);
        let mut piece = vec![0; length as usize];
        machine.memory.read_slice(&mut piece, GuestAddress(BUFFERS)).unwrap();
        got.extend(piece);
    }
    assert_eq!(got, b"hello world");
    receive.send(&[writable(BUFFERS, 4)]);
    machine.device.lock().unwrap().pause();
    machine.device.lock().unwrap().resume();
    writer.write_all(b"!").unwrap();
    drop(writer);
    assert_eq!(receive.wait().1, 1);
    machine.set_status(0);
}

#[test]
fn a_file_is_input_too() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"typed").unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let machine = TestMachine::new(Console::new(io::sink(), Some(file)));
    let mut queues = machine.start();
    queues[0].send(&[writable(BUFFERS, 64)]);
    assert_eq!(queues[0].wait().1, 5);
    let mut typed = [0; 5];
    machine.memory.read_slice(&mut typed, GuestAddress(BUFFERS)).unwrap();
    assert_eq!(&typed, b"typed");
}
