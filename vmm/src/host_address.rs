//! The address of a PCI function on the host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Domain, bus, device and function, written as Linux does: `0000:65:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl HostPciAddress {
    /// The domain (segment group); Linux numbers those of VMD controllers beyond 16 bits.
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }

    /// Whether both are functions of one device.
    pub fn shares_device(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }
}

/// An address that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address: write domain:bus:device.function in hex, as in \"0000:65:00.0\"")]
pub struct ParseAddressError(String);

impl FromStr for HostPciAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Some(Self {
                domain: number(domain, 4..=8, u32::MAX)?,
                bus: number(bus, 2..=2, 0xff)? as u8,
                device: number(device, 2..=2, 0x1f)? as u8,
                function: number(function, 1..=1, 7)? as u8,
            })
        };
        parse().ok_or_else(|| ParseAddressError(text.to_owned()))
    }
}

/// A hexadecimal number of so many digits, at most `limit`. Signs are not digits.
fn number(text: &str, digits: std::ops::RangeInclusive<usize>, limit: u32) -> Option<u32> {
    let plain = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    let value = u32::from_str_radix(text, 16).ok()?;
    (plain && value <= limit).then_some(value)
}

impl fmt::Display for HostPciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl Serialize for HostPciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostPciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_linux_writes_them_and_in_no_other_way() {
        for text in ["0000:65:00.0", "0001:ff:1f.7", "10000:01:00.0"] {
            assert_eq!(text.parse::<HostPciAddress>().unwrap().to_string(), text);
        }
        let bad = ["65:00.0", "0000:65:00", "0000:65:20.0", "0000:65:00.8", "../../etc", "", "0000:+5:00.0"];
        for text in bad {
            assert!(text.parse::<HostPciAddress>().is_err(), "{text:?} was accepted");
        }
    }
}
