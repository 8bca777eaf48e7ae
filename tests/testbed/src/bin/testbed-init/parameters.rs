//! What the harness tells the host on the kernel command line, as `testbed.NAME=VALUE`.

use std::{fs, io};

/// The harness's wishes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// The host's name.
    pub hostname: String,
    /// IPv4 address of eth0 in its /24, and the gateway; none: leave eth0 alone.
    pub address: Option<String>,
    /// See `address`.
    pub gateway: Option<String>,
    /// 2 MiB pages to reserve.
    pub huge_pages: u64,
    /// Load drivers for all PCI devices, as udev does.
    pub coldplug: bool,
    /// Mount the harness's directory at /share.
    pub share: bool,
}

impl Parameters {
    /// Reads `/proc/cmdline`.
    pub fn read() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/cmdline")?)
    }

    fn parse(line: &str) -> io::Result<Self> {
        let mut parameters = Self { hostname: "host".into(), ..Self::default() };
        for (name, value) in line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("testbed."))
            .filter_map(|word| word.split_once('='))
        {
            match name {
                "hostname" => parameters.hostname = value.into(),
                "address" => parameters.address = Some(value.into()),
                "gateway" => parameters.gateway = Some(value.into()),
                "huge_pages" => {
                    parameters.huge_pages = value.parse().map_err(|_| bad(name, value))?;
                }
                "coldplug" => parameters.coldplug = value == "1",
                "share" => parameters.share = value == "1",
                _ => return Err(bad(name, value)),
            }
        }
        Ok(parameters)
    }
}

fn bad(name: &str, value: &str) -> io::Error {
    io::Error::other(format!("testbed.{name}={value} on the kernel command line is not understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_words_among_the_kernels() {
        let line = "console=ttyS0 testbed.hostname=n1 quiet testbed.address=10.88.0.11 testbed.huge_pages=4";
        let parameters = Parameters::parse(line).unwrap();
        assert_eq!(parameters.hostname, "n1");
        assert_eq!(parameters.address.as_deref(), Some("10.88.0.11"));
        assert_eq!(parameters.huge_pages, 4);
        assert!(!parameters.share);
    }

    #[test]
    fn a_misspelt_word_is_an_error() {
        assert!(Parameters::parse("testbed.adress=10.88.0.11").is_err());
    }
}
