//! Addresses of sandboxes: a /24 of the cluster's range for each node, an address of it for each
//! sandbox.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// First host part given to a sandbox: .0 is the network, .1 the node's bridge.
const FIRST_HOST: u8 = 2;
/// Last one: .255 is the broadcast address.
const LAST_HOST: u8 = 254;

/// Sandboxes a node has addresses for.
pub const SANDBOXES_PER_NODE: u32 = LAST_HOST as u32 - FIRST_HOST as u32 + 1;

/// The cluster's range for sandboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    base: Ipv4Addr,
    prefix: u8,
}

/// A range that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no range for sandboxes: write a private IPv4 network of /8 to /24, such as 10.42.0.0/16")]
pub struct ParseCidrError(String);

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseCidrError(text.to_owned());
        let (base, prefix) = text.split_once('/').ok_or_else(error)?;
        let base: Ipv4Addr = base.parse().map_err(|_| error())?;
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        let in_range = (8..=24).contains(&prefix);
        // Sandboxes with public addresses would cut their nodes off from whoever owns those.
        if !in_range || !base.is_private() || base.to_bits().trailing_zeros() < u32::from(32 - prefix) {
            return Err(error());
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl Cidr {
    /// The first /24 that is not taken, as `10.42.3.0/24`; none when all are.
    pub fn free_subnet(&self, taken: &BTreeSet<String>) -> Option<String> {
        let count = 1_u32 << (24 - self.prefix);
        (0..count)
            .map(|index| format!("{}/24", Ipv4Addr::from_bits(self.base.to_bits() + (index << 8))))
            .find(|subnet| !taken.contains(subnet))
    }
}

/// The next address of the subnet after `last` that is not taken.
pub fn free_address(
    subnet: &str,
    last: Option<Ipv4Addr>,
    taken: impl Fn(Ipv4Addr) -> bool,
) -> Option<Ipv4Addr> {
    let base: Ipv4Addr = subnet.strip_suffix("/24")?.parse().ok()?;
    let count = LAST_HOST - FIRST_HOST + 1;
    let start = last.map_or(0, |last| last.octets()[3].saturating_sub(FIRST_HOST - 1) % count);
    let [a, b, c, _] = base.octets();
    (0..count)
        .map(|step| {
            let offset = (u16::from(start) + u16::from(step)) % u16::from(count);
            // Below `count`, which is a byte.
            let host = FIRST_HOST + u8::try_from(offset).unwrap_or(0);
            Ipv4Addr::new(a, b, c, host)
        })
        .find(|address| !taken(*address))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_private_aligned_networks() {
        for good in ["10.42.0.0/16", "10.0.0.0/8", "192.168.7.0/24", "172.16.0.0/12"] {
            assert_eq!(good.parse::<Cidr>().expect(good).to_string(), good);
        }
        for bad in ["10.42.0.0", "10.42.0.1/16", "10.42.0.0/25", "8.8.0.0/16", "::/64", "10.0.0.0/7", "x/16"]
        {
            assert!(bad.parse::<Cidr>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn subnets_run_out_without_wrapping() {
        let cidr: Cidr = "10.42.0.0/23".parse().expect("a range");
        let mut taken = BTreeSet::new();
        for expected in ["10.42.0.0/24", "10.42.1.0/24"] {
            let subnet = cidr.free_subnet(&taken).expect("free");
            assert_eq!(subnet, expected);
            taken.insert(subnet);
        }
        assert_eq!(cidr.free_subnet(&taken), None);
    }

    proptest! {
        #[test]
        fn every_address_is_given_once_before_one_is_given_again(start in 2_u8..=254) {
            let mut taken = BTreeSet::new();
            let mut last = Some(Ipv4Addr::new(10, 42, 3, start));
            for _ in 0..SANDBOXES_PER_NODE {
                let address = free_address("10.42.3.0/24", last, |a| taken.contains(&a)).expect("free");
                prop_assert!((2..=254).contains(&address.octets()[3]));
                prop_assert!(taken.insert(address));
                last = Some(address);
            }
            prop_assert_eq!(free_address("10.42.3.0/24", last, |a| taken.contains(&a)), None);
            // The longest unused one is next.
            let next = free_address("10.42.3.0/24", last, |_| false).expect("free");
            prop_assert_eq!(next.octets()[3], if start == 254 { 2 } else { start + 1 });
        }
    }
}
