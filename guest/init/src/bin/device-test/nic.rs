//! An e1000e network card through the kernel's own driver and a raw socket. The peer returns each frame with
//! its addresses swapped; frames of every length are sent:
//!
//! ```text
//! e1000e_link eth0 52:54:00:12:34:56
//! e1000e_sent FRAMES SHA-256          of all frames in order
//! e1000e_received FRAMES SHA-256      the same sum when each came back, in order and whole
//! ```

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recvmsg,
    sendmsg, socket,
};
use sha2::{Digest, Sha256};

use crate::Failure;
use crate::direct::Random;
use crate::options::Options;
use crate::sysfs;

/// Intel 82574L, as QEMU's e1000e.
const ID: (u16, u16) = (0x8086, 0x10d3);

/// IEEE 802's local experimental EtherType 1: nothing else on the wire has it.
const ETHER_TYPE: u16 = 0x88b5;
const HEADER: usize = 14;
/// Without its checksum.
const SHORTEST: usize = 60;
const LONGEST: usize = 1514;

/// Frames under way at once: as many as the peer's socket surely holds.
const WINDOW: usize = 16;

/// For a frame to come back; emulation on a busy machine takes its time.
const LIMIT: Duration = Duration::from_secs(10);

type Mac = [u8; 6];

/// Sends and receives.
pub fn exercise(options: &Options) -> Result<(), Failure> {
    let frames: usize = options.number("frames")?.unwrap_or(200);
    let device = sysfs::find(options, "e1000e", |device| device.id == ID)?;
    let name = sysfs::wait_for(&format!("{} has no network interface", device.address), || {
        let Ok(mut entries) = fs::read_dir(device.path.join("net")) else { return Ok(None) };
        Ok(entries.next().and_then(Result::ok).map(|entry| entry.file_name().to_string_lossy().into_owned()))
    })?;
    bring_up(&name)?;
    let class = Path::new("/sys/class/net").join(&name);
    // A carrier is not enough: the kernel makes the interface's queue from a work queue after that, and drops
    // what is sent before, without a word. It does both under a lock that bringing it up takes, too.
    sysfs::wait_for(&format!("{name} has no link"), || {
        Ok(fs::read_to_string(class.join("operstate")).is_ok_and(|state| state.trim() == "up").then_some(()))
    })?;
    bring_up(&name)?;
    let address = fs::read_to_string(class.join("address")).map_err(Failure::at("reading the address"))?;
    println!("e1000e_link {name} {}", address.trim());
    let own = parse_mac(address.trim()).ok_or_else(|| Failure::wrong(format!("no address: {address:?}")))?;
    let card = Card { socket: open(&name)?, own };
    let (mut sent, mut received) = (Sha256::new(), Sha256::new());
    for first in (0..frames).step_by(WINDOW) {
        let window: Vec<_> = (first..frames.min(first + WINDOW)).map(|number| frame(own, number)).collect();
        for frame in &window {
            card.send(frame)?;
            sent.update(&frame[HEADER..]);
        }
        for (number, frame) in (first..).zip(&window) {
            let back = card.receive(number)?;
            let body = body(&back, &window, number - first)
                .map_err(|what| Failure::wrong(format!("frame {number} of {} bytes: {what}", frame.len())))?;
            received.update(body);
        }
    }
    println!("e1000e_sent {frames} {:x}", sent.finalize());
    println!("e1000e_received {frames} {:x}", received.finalize());
    Ok(())
}

struct Card {
    socket: OwnedFd,
    own: Mac,
}

impl Card {
    fn send(&self, frame: &[u8]) -> Result<(), Failure> {
        let sent =
            sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(frame)], &[], MsgFlags::empty(), None);
        match sent.map_err(Failure::at("sending a frame"))? {
            len if len == frame.len() => Ok(()),
            len => Err(Failure::wrong(format!("{len} of a frame's {} bytes were sent", frame.len()))),
        }
    }

    /// The next frame to this card.
    fn receive(&self, number: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; LONGEST];
        loop {
            let mut events = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(LIMIT).unwrap_or(PollTimeout::MAX);
            if poll(&mut events, limit).map_err(Failure::at("waiting for a frame"))? == 0 {
                return Err(Failure::wrong(format!(
                    "frame {number} did not come back in {} s",
                    LIMIT.as_secs()
                )));
            }
            let len = {
                let mut parts = [IoSliceMut::new(&mut bytes)];
                let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::empty());
                message.map_err(Failure::at("receiving a frame"))?.bytes
            };
            // The socket also sees what it sends.
            if bytes[..6] == self.own {
                bytes.truncate(len);
                return Ok(bytes);
            }
        }
    }
}

/// What is in a frame that should be the one at this place of the window; which of them it is, if it is another.
fn body<'a>(back: &'a [u8], window: &[Vec<u8>], at: usize) -> Result<&'a [u8], String> {
    // A short frame may come back with padding.
    let is = |frame: &Vec<u8>| back.get(HEADER..frame.len()) == Some(&frame[HEADER..]);
    match window.iter().position(is) {
        Some(found) if found == at => Ok(&back[HEADER..window[at].len()]),
        Some(found) if found > at => Err(format!("the one {} later came back", found - at)),
        Some(found) => Err(format!("the one {} before came back again", at - found)),
        None => Err("it came back changed".to_owned()),
    }
}

/// The frame with a number: lengths go through all there are, bodies are random.
fn frame(from: Mac, number: usize) -> Vec<u8> {
    // A step without a common divisor with the count of lengths visits them all.
    let len = SHORTEST + number * 617 % (LONGEST - SHORTEST + 1);
    let mut bytes = vec![0; len];
    bytes[..6].copy_from_slice(&[0xff; 6]);
    bytes[6..12].copy_from_slice(&from);
    bytes[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
    Random::new(number as u64).fill(&mut bytes[HEADER..]);
    bytes
}

fn parse_mac(text: &str) -> Option<Mac> {
    let bytes: Vec<u8> = text.split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().ok()
}

/// A socket of one interface and one EtherType.
fn open(name: &str) -> Result<OwnedFd, Failure> {
    // In network byte order, as packet(7) has it.
    let protocol = ETHER_TYPE.to_be();
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)
        .map_err(Failure::at("making a packet socket"))?;
    let index = nix::net::if_::if_nametoindex(name).map_err(Failure::at(format!("the index of {name}")))?;
    // SAFETY: all fields of the structure are numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let start = (&raw const address).cast();
    // SAFETY: the pointer is to a `sockaddr_ll` of the length given, and the family says so.
    let address = unsafe { LinkAddr::from_raw(start, Some(size_of::<libc::sockaddr_ll>() as u32)) };
    let address = address.ok_or_else(|| Failure::wrong("a packet socket's address was refused"))?;
    bind(socket.as_raw_fd(), &address).map_err(Failure::at(format!("binding to {name}")))?;
    Ok(socket)
}

fn bring_up(name: &str) -> Result<(), Failure> {
    let what = format!("bringing {name} up");
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(Failure::at(what.clone()))?;
    // SAFETY: all fields of the structure are numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the argument is the structure that this request takes, and lives over the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } {
        0 => Ok(()),
        _ => Err(Failure::at(what)(io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn frames_have_every_length_and_their_own_body() {
        let count = LONGEST - SHORTEST + 1;
        let lengths: BTreeSet<_> = (0..count).map(|number| frame([0; 6], number).len()).collect();
        assert_eq!(
            (lengths.len(), lengths.first(), lengths.last()),
            (count, Some(&SHORTEST), Some(&LONGEST))
        );
        assert_ne!(frame([0; 6], 0)[HEADER..SHORTEST], frame([0; 6], count)[HEADER..SHORTEST]);
    }

    #[test]
    fn a_frame_that_is_not_the_next_is_told_from_a_changed_one() {
        let window: Vec<_> = (0..3).map(|number| frame([2; 6], number)).collect();
        let padded = [&window[1][..], &[0; 4]].concat();
        assert_eq!(body(&padded, &window, 1), Ok(&window[1][HEADER..]));
        assert_eq!(body(&window[2], &window, 0).unwrap_err(), "the one 2 later came back");
        assert_eq!(body(&window[0], &window, 1).unwrap_err(), "the one 1 before came back again");
        let mut changed = window[1].clone();
        changed[HEADER] ^= 1;
        assert_eq!(body(&changed, &window, 1).unwrap_err(), "it came back changed");
        assert_eq!(body(&window[1][..30], &window, 1).unwrap_err(), "it came back changed");
    }

    #[test]
    fn addresses() {
        assert_eq!(parse_mac("52:54:00:12:34:56"), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!(parse_mac("52:54"), None);
        assert_eq!(parse_mac(""), None);
    }
}
