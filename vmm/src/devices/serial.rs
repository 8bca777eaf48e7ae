//! The first serial port: a 16550 on port I/O, its interrupt an irqfd.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ConsoleOutput;
use crate::bus::BusDevice;

/// What went through a serial port.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes the guest wrote.
    pub written: AtomicU64,
    /// Bytes the guest wrote that could not be kept.
    pub lost: AtomicU64,
    /// Bytes the guest read.
    pub read: AtomicU64,
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Events {
    counters: Arc<SerialCounters>,
    /// Signalled when the guest has emptied the receive FIFO.
    drained: Option<EventFd>,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {
        self.counters.read.fetch_add(1, Ordering::Relaxed);
    }

    fn out_byte(&self) {
        self.counters.written.fetch_add(1, Ordering::Relaxed);
    }

    fn tx_lost_byte(&self) {
        self.counters.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {
        if let Some(drained) = &self.drained {
            // Fails only when the counter is full, and then it is signalled already.
            let _ = drained.write(1);
        }
    }
}

/// The serial port.
pub struct Serial<W: Write = ConsoleOutput> {
    uart: vm_superio::Serial<Interrupt, Events, W>,
    counters: Arc<SerialCounters>,
}

impl<W: Write + Send> Serial<W> {
    /// A port that writes to `output` and raises `interrupt`.
    pub fn new(interrupt: EventFd, output: W) -> Self {
        Self::with_events(interrupt, output, None)
    }

    /// A port that takes input too: the event is signalled when there is room for more.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn with_input(interrupt: EventFd, output: W) -> io::Result<(Self, EventFd)> {
        let drained = EventFd::new(EFD_NONBLOCK)?;
        let ours = drained.try_clone()?;
        Ok((Self::with_events(interrupt, output, Some(ours)), drained))
    }

    fn with_events(interrupt: EventFd, output: W, drained: Option<EventFd>) -> Self {
        let counters = Arc::new(SerialCounters::default());
        let events = Events { counters: Arc::clone(&counters), drained };
        Self { uart: vm_superio::Serial::with_events(Interrupt(interrupt), events, output), counters }
    }

    /// What went through so far.
    pub fn counters(&self) -> Arc<SerialCounters> {
        Arc::clone(&self.counters)
    }

    /// How many bytes of input fit now.
    pub fn room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Types `input`; what does not fit is dropped, as on a wire.
    pub fn type_in(&mut self, input: &[u8]) {
        let fits = input.len().min(self.room());
        // Fails only when the interrupt cannot be raised; the guest then finds the bytes by polling.
        let _ = self.uart.enqueue_raw_bytes(&input[..fits]);
    }
}

impl<W: Write + Send> BusDevice for Serial<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.uart.read(register as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            // Losses are counted by the events above; the guest must not notice them.
            let _ = self.uart.write(register as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_written_and_losses_are_counted() {
        struct Two(Vec<u8>);
        impl Write for Two {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.0.len() == 2 {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                self.0.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut serial = Serial::new(EventFd::new(EFD_NONBLOCK).unwrap(), Two(Vec::new()));
        for byte in b"abc" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(serial.uart.writer().0, b"ab");
        let counters = serial.counters();
        assert_eq!(counters.written.load(Ordering::Relaxed), 2);
        assert_eq!(counters.lost.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn input_waits_for_room_and_says_when_there_is() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let (mut serial, drained) = Serial::with_input(interrupt, io::sink()).unwrap();
        serial.type_in(&[b'x'; 100]);
        assert_eq!(serial.room(), 0);
        let mut byte = [0];
        for _ in 0..64 {
            assert!(drained.read().is_err(), "signalled before the FIFO was empty");
            serial.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        assert!(drained.read().is_ok());
    }
}
