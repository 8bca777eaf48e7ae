//! The far end of a network card's cable, held by a test.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// No frame is longer: QEMU's own limit, with room for offloads.
const LONGEST: usize = 68 * 1024;

/// A cable between a card of a host and this process: each datagram is a frame.
///
/// ```no_run
/// use lathe_testbed::{DeviceKind, Device, HostDescription, Wire};
/// let wire = Wire::new("wire0")?;
/// let card = Device::from(DeviceKind::E1000e).property("netdev", "wire0");
/// let host = HostDescription::new("n1").wire(&wire).device(Device::root_port(card));
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Wire {
    name: String,
    socket: UnixDatagram,
    directory: TempDir,
}

impl Wire {
    /// A cable whose name a card's property `netdev` has.
    ///
    /// # Errors
    /// When there is no room for a socket in the directory for temporary files.
    pub fn new(name: impl Into<String>) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = UnixDatagram::bind(directory.path().join("here"))?;
        Ok(Self { name: name.into(), socket, directory })
    }

    fn qemu_end(&self) -> PathBuf {
        self.directory.path().join("qemu")
    }

    /// QEMU's option for its end.
    pub(crate) fn netdev(&self) -> String {
        let directory = self.directory.path().display();
        format!(
            "dgram,id={},local.type=unix,local.path={directory}/qemu,remote.type=unix,remote.path={directory}/here",
            self.name
        )
    }

    /// Sends a frame, without its checksum.
    ///
    /// # Errors
    /// When the host is off.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send_to(frame, self.qemu_end()).map(drop)
    }

    /// The next frame that the card sends; `None` when none came in time.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn receive(&self, limit: Duration) -> io::Result<Option<Vec<u8>>> {
        let mut frame = vec![0; LONGEST];
        // No time at all would mean for ever.
        self.socket.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        match self.socket.recv(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Returns frames of one EtherType to the card that sent them, with addresses swapped, until there were
    /// `count`; those that came until `limit` was over. Others on the wire, such as a kernel's own, are dropped.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn echo(&self, ether_type: u16, count: usize, limit: Duration) -> io::Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + limit;
        let mut frames = Vec::new();
        while frames.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(frame) = self.receive(left)? else { break };
            if frame.get(12..14) != Some(&ether_type.to_be_bytes()) {
                continue;
            }
            self.send(&swapped(&frame))?;
            frames.push(frame);
        }
        Ok(frames)
    }
}

/// The frame on its way back. Where it was sent to all, the answer comes from an address of nobody.
fn swapped(frame: &[u8]) -> Vec<u8> {
    const NOBODY: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0xfe];
    let mut back = frame.to_vec();
    let (destination, source) = (&frame[..6], &frame[6..12]);
    back[..6].copy_from_slice(source);
    let group = destination[0] & 1 != 0;
    back[6..12].copy_from_slice(if group { &NOBODY } else { destination });
    back
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_one_kind_return() {
        let wire = Wire::new("wire0").unwrap();
        let card = UnixDatagram::bind(wire.qemu_end()).unwrap();
        let frame = |ether_type: u16, body: &[u8]| {
            [&[0xff; 6][..], &[0x52, 0x54, 0, 0x12, 0x34, 0x56], &ether_type.to_be_bytes(), body].concat()
        };
        for frame in [frame(0x86dd, b"noise"), frame(0x88b5, b"one"), frame(0x88b5, b"two")] {
            card.send_to(&frame, wire.directory.path().join("here")).unwrap();
        }
        let seen = wire.echo(0x88b5, 3, Duration::from_millis(50)).unwrap();
        assert_eq!(seen, [frame(0x88b5, b"one"), frame(0x88b5, b"two")]);
        let mut back = [0; 64];
        let len = card.recv(&mut back).unwrap();
        assert_eq!(&back[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(&back[14..len], b"one");
    }
}
