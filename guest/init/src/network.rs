//! Loopback, and the one Ethernet interface, through rtnetlink.
//!
//! Four fixed requests are all that is ever sent, so they are laid out here (rtnetlink(7))
//! rather than by a netlink library, which would be larger than the rest of init.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use lathe_guest_protocol::{Address, Network};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// The network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A network was asked for and there is no interface for it.
    #[error("the task has a network but the machine has no Ethernet interface")]
    NoInterface,
    /// The kernel refused a step.
    #[error("cannot {step}: {source}")]
    Refused {
        /// What was asked, with its values.
        step: String,
        /// Why not.
        #[source]
        source: Errno,
    },
}

/// Brings up loopback and, if there is a `network`, the first Ethernet interface.
pub fn configure(network: Option<&Network>) -> Result<(), NetworkError> {
    let netlink = Netlink::open()?;
    netlink.link_up("lo", None)?;
    let Some(network) = network else { return Ok(()) };
    let name = first_ethernet(Path::new("/sys/class/net")).ok_or(NetworkError::NoInterface)?;
    netlink.link_up(&name, Some(network.mtu))?;
    netlink.add_address(&name, network.address)?;
    if let Some(gateway) = network.gateway {
        netlink.add_default_route(&name, gateway, network.address)?;
    }
    Ok(())
}

/// The first interface, by name, that is Ethernet and backed by a device.
fn first_ethernet(class: &Path) -> Option<String> {
    /// `ARPHRD_ETHER`.
    const ETHERNET: &str = "1";
    let mut names: Vec<_> = fs::read_dir(class)
        .ok()?
        .flatten()
        .filter(|entry| {
            let kind = fs::read_to_string(entry.path().join("type")).unwrap_or_default();
            kind.trim() == ETHERNET && entry.path().join("device").exists()
        })
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.into_iter().next()
}

/// One request: `nlmsghdr`, a fixed header, attributes.
struct Request {
    bytes: Vec<u8>,
}

impl Request {
    fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]); // sequence and port: one request at a time on a socket of its own
        bytes.extend(header);
        Self { bytes }
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend((4 + value.len() as u16).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }
}

/// The request that sets an interface up, with its MTU if given.
fn link_request(index: u32, mtu: Option<u16>) -> Vec<u8> {
    let up = (libc::IFF_UP as u32).to_ne_bytes();
    // struct ifinfomsg: family, padding, type, index, flags, mask of flags to change
    let header = [&[0; 4][..], &index.to_ne_bytes(), &up, &up].concat();
    let request = Request::new(libc::RTM_NEWLINK, 0, &header);
    match mtu {
        Some(mtu) => request.attribute(libc::IFLA_MTU, &u32::from(mtu).to_ne_bytes()),
        None => request,
    }
    .finish()
}

/// The request that gives an interface its address.
fn address_request(index: u32, address: Address) -> Vec<u8> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index
    let header =
        [&[libc::AF_INET as u8, address.prefix, 0, libc::RT_SCOPE_UNIVERSE][..], &index.to_ne_bytes()];
    Request::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &header.concat())
        .attribute(libc::IFA_LOCAL, &address.octets)
        .attribute(libc::IFA_ADDRESS, &address.octets)
        .finish()
}

/// The request for the default route.
fn route_request(index: u32, gateway: [u8; 4], own: Address) -> Vec<u8> {
    /// `RTNH_F_ONLINK` of linux/rtnetlink.h.
    const ON_LINK: u32 = 4;
    // A gateway outside the prefix (a /32 on a routed tap) is taken to be on the link.
    let flags = if in_prefix(gateway, own) { 0 } else { ON_LINK };
    // struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags
    let route = [
        libc::AF_INET as u8,
        0,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_BOOT,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_UNICAST,
    ];
    let header = [&route[..], &flags.to_ne_bytes()].concat();
    Request::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &header)
        .attribute(libc::RTA_GATEWAY, &gateway)
        .attribute(libc::RTA_OIF, &index.to_ne_bytes())
        .finish()
}

fn in_prefix(address: [u8; 4], network: Address) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix.min(32))).unwrap_or(0);
    (u32::from_be_bytes(address) ^ u32::from_be_bytes(network.octets)) & mask == 0
}

struct Netlink {
    fd: OwnedFd,
}

impl Netlink {
    fn open() -> Result<Self, NetworkError> {
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC);
        let fd = socket(kind.0, kind.1, kind.2, SockProtocol::NetlinkRoute)
            .map_err(|source| NetworkError::Refused { step: "open a netlink socket".to_owned(), source })?;
        Ok(Self { fd })
    }

    fn link_up(&self, name: &str, mtu: Option<u16>) -> Result<(), NetworkError> {
        let step = || match mtu {
            Some(mtu) => format!("bring up {name} with MTU {mtu}"),
            None => format!("bring up {name}"),
        };
        self.ask(step, name, |index| link_request(index, mtu))
    }

    fn add_address(&self, name: &str, address: Address) -> Result<(), NetworkError> {
        let text = std::net::Ipv4Addr::from(address.octets);
        let step = || format!("give {name} the address {text}/{}", address.prefix);
        self.ask(step, name, |index| address_request(index, address))
    }

    fn add_default_route(&self, name: &str, gateway: [u8; 4], own: Address) -> Result<(), NetworkError> {
        let step = || format!("set the default route to {}", std::net::Ipv4Addr::from(gateway));
        self.ask(step, name, |index| route_request(index, gateway, own))
    }

    fn ask(
        &self,
        step: impl Fn() -> String,
        name: &str,
        request: impl Fn(u32) -> Vec<u8>,
    ) -> Result<(), NetworkError> {
        let asked = if_nametoindex(name).and_then(|index| self.exchange(&request(index)));
        asked.map_err(|source| NetworkError::Refused { step: step(), source })
    }

    /// Sends one request and reads its acknowledgement: `nlmsghdr` and a negative errno or zero.
    fn exchange(&self, request: &[u8]) -> Result<(), Errno> {
        sendto(self.fd.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0; 512];
        let len = recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let error =
            answer[..len].get(16..20).and_then(|bytes| bytes.try_into().ok()).ok_or(Errno::EBADMSG)?;
        match i32::from_ne_bytes(error) {
            0 => Ok(()),
            negative => Err(Errno::from_raw(-negative)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_their_length_and_aligned_attributes() {
        let address = Address { octets: [10, 1, 2, 3], prefix: 24 };
        for request in [
            link_request(2, Some(1500)),
            address_request(2, address),
            route_request(2, [10, 1, 2, 1], address),
        ] {
            assert_eq!(u32::from_ne_bytes(request[..4].try_into().unwrap()) as usize, request.len());
            assert_eq!(request.len() % 4, 0);
        }
        // nlmsghdr 16, ifaddrmsg 8, two attributes of 4 + 4
        assert_eq!(address_request(2, address).len(), 40);
    }

    #[test]
    fn gateways_outside_the_prefix_are_on_the_link() {
        let wide = Address { octets: [10, 1, 2, 3], prefix: 24 };
        let host = Address { octets: [10, 1, 2, 3], prefix: 32 };
        let all = Address { octets: [10, 1, 2, 3], prefix: 0 };
        assert!(in_prefix([10, 1, 2, 254], wide) && !in_prefix([10, 1, 3, 1], wide));
        assert!(!in_prefix([10, 1, 2, 1], host) && in_prefix([192, 0, 2, 1], all));
    }

    #[test]
    fn a_bridge_or_loopback_is_not_the_interface() {
        let class = tempfile::tempdir().unwrap();
        for (name, kind, device) in
            [("lo", "772", false), ("br0", "1", false), ("eth1", "1", true), ("eth0", "1", true)]
        {
            fs::create_dir(class.path().join(name)).unwrap();
            fs::write(class.path().join(name).join("type"), format!("{kind}\n")).unwrap();
            if device {
                fs::create_dir(class.path().join(name).join("device")).unwrap();
            }
        }
        assert_eq!(first_ethernet(class.path()).as_deref(), Some("eth0"));
    }
}
