//! Ethernet addresses of guests.

use std::str::FromStr;

/// The address of one interface: not a group's, and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Its bytes, in the order of transmission.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

/// A text that is no address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a guest's MAC address: write six bytes as in \"02:00:00:00:00:01\", the first even")]
pub struct ParseMacError(String);

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let error = || ParseMacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(error());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let group = octets[0] & 1 != 0;
        if parts.next().is_some() || group || octets == [0; 6] {
            return Err(error());
        }
        Ok(Self(octets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_interfaces_are_taken() {
        let mac: MacAddress = "02:00:5e:Ff:00:01".parse().unwrap();
        assert_eq!(mac.octets(), [2, 0, 0x5e, 0xff, 0, 1]);
        let bad = [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "03:00:00:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
        ];
        for bad in bad {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad:?} was accepted");
        }
    }
}
