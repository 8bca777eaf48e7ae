//! IPv4 subnets and the addresses derived from them.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 subnet: the address of the network and its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

/// A subnet that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an IPv4 subnet for sandboxes: write it as 10.42.3.0/24, with a prefix from 8 to 30")]
pub struct ParseSubnetError(String);

impl FromStr for Subnet {
    type Err = ParseSubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseSubnetError(text.chars().take(40).collect());
        let (network, prefix) = text.split_once('/').ok_or_else(error)?;
        let network: Ipv4Addr = network.parse().map_err(|_| error())?;
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        let subnet = Self { network, prefix };
        let plain = (8..=30).contains(&prefix) && network.to_bits() & !subnet.mask() == 0;
        if plain { Ok(subnet) } else { Err(error()) }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl Subnet {
    fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }

    /// The network's own address.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of the prefix.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first address: the bridge's, which is the sandboxes' gateway.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() + 1)
    }

    /// Whether a sandbox may have `address`: inside, and not the network's, gateway's or broadcast.
    pub fn is_host(self, address: Ipv4Addr) -> bool {
        let bits = address.to_bits();
        bits & self.mask() == self.network.to_bits()
            && address != self.gateway()
            && bits & !self.mask() != 0
            && bits | self.mask() != u32::MAX
    }
}

/// The hardware address that belongs to an IPv4 address: locally administered, so that no vendor
/// has it, and unique where addresses are.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x4c, a, b, c, d]
}

/// A hardware address as people and nft write it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_strict() {
        let subnet: Subnet = "10.42.3.0/24".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 42, 3, 1));
        assert_eq!(subnet.to_string(), "10.42.3.0/24");
        for bad in ["10.42.3.1/24", "10.42.3.0", "10.42.3.0/31", "10.0.0.0/0", "x/24", "::1/64"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        let host = |d| subnet.is_host(Ipv4Addr::new(10, 42, 3, d));
        assert_eq!((host(0), host(1), host(2), host(254), host(255)), (false, false, true, true, false));
        assert!(!subnet.is_host(Ipv4Addr::new(10, 42, 4, 2)));
    }

    #[test]
    fn hardware_addresses_are_local_and_unicast() {
        let mac = mac_of(Ipv4Addr::new(10, 42, 3, 255));
        assert_eq!(mac_text(mac), "02:4c:0a:2a:03:ff");
        assert_eq!(mac[0] & 3, 2);
    }
}
