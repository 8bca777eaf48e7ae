//! What comes out of a guest beside its virtio devices.

use std::io;
use std::sync::{Arc, Mutex};

use lathe_agent::supervisor::session::Session;
use lathe_guest_protocol::{FromGuest, MAX_FRAME, TaskSpec, ToGuest, decode, encode, frame_length};
use lathe_vmm::bus::Bus;
use lathe_vmm::devices::Serial;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

/// A stream of frames, as the agent's supervisor reads it; then the same bytes as a host's messages.
pub fn messages(bytes: &[u8]) {
    let mut session = Session::new(TaskSpec::default());
    let mut rest = bytes;
    while let Some((prefix, after)) = rest.split_first_chunk::<4>() {
        let Ok(length) = frame_length(*prefix) else { break };
        assert!(length <= MAX_FRAME);
        let (body, after) = after.split_at(length.min(after.len()));
        rest = after;
        let Ok(message) = decode::<FromGuest>(body) else { break };
        let again = encode(&message).expect("what was read can be written");
        assert_eq!(decode::<FromGuest>(&again[4..]).as_ref(), Ok(&message));
        if session.receive(message, 0).is_err() {
            break;
        }
    }
    assert!(session.software().chars().all(|c| !c.is_control()), "a guest's name reaches a terminal");
    let _ = decode::<ToGuest>(bytes);
}

/// Reads and writes of the 16550's ports, with somebody typing.
pub fn serial_port(bytes: &[u8]) {
    const PORT: u64 = 0x3f8;
    let interrupt = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (serial, _drained) = Serial::with_input(interrupt, io::sink()).expect("an eventfd");
    let serial = Arc::new(Mutex::new(serial));
    let bus = Bus::new();
    bus.insert(PORT, 8, serial.clone()).expect("an empty bus");
    let mut input = Input(bytes);
    while let Some(step) = input.u8() {
        let (register, len) = (u64::from(step & 7), 1 + usize::from(step >> 3 & 3));
        match step >> 5 & 3 {
            0 => drop(bus.read(PORT + register, &mut [0; 4][..len])),
            1 | 2 => drop(bus.write(PORT + register, input.bytes(len))),
            _ => {
                let mut serial = serial.lock().expect("no panic before");
                let before = serial.room();
                serial.type_in(input.bytes(len));
                assert!(serial.room() <= before);
            }
        }
    }
}
