//! Xids of GPUs, from the kernel log: NVML tells of them only while somebody waits for them.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use lathe_api::HostPciAddress;

use super::health::urgency;

/// A record is cut off by the kernel at 1 KiB of text (`PRINTKRB_RECORD_MAX`), escapes included.
const RECORD: usize = 8192;

/// The kernel's buffer holds a few MiB; a log that grows as fast as it is read must not hold us.
const MAX_RECORDS: usize = 1 << 17;

/// The gravest Xid of each GPU that the kernel still remembers, the last one of those that ask for the same. None where
/// the log cannot be read.
pub(super) fn gravest_xids(root: &Path) -> BTreeMap<HostPciAddress, u32> {
    let mut found = BTreeMap::new();
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(root.join("dev/kmsg"));
    let Ok(mut log) = opened else { return found };
    let mut record = [0; RECORD];
    for _ in 0..MAX_RECORDS {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(length) => {
                String::from_utf8_lossy(&record[..length]).lines().for_each(|line| note(line, &mut found))
            }
            // Overwritten before it was read: the next one is there.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    found
}

/// Takes a line in: an Xid, or the sign that what came before is over.
fn note(line: &str, found: &mut BTreeMap<HostPciAddress, u32>) {
    // Each load of the driver initialises every GPU anew.
    if line.contains("NVRM: loading NVIDIA") {
        found.clear();
    } else if let Some((address, xid)) = parse(line) {
        // The catalogue has some follow from others: 45 from 95, 154 from any. They must not hide what came first.
        let gravest = found.entry(address).or_insert(xid);
        if urgency(xid) >= urgency(*gravest) {
            *gravest = xid;
        }
    } else if let Some(address) = reset(line) {
        found.remove(&address);
    }
}

/// `NVRM: Xid (PCI:0000:65:00): 79, pid=...`; the function is not written, and is 0.
fn parse(line: &str) -> Option<(HostPciAddress, u32)> {
    let rest = line.split_once("NVRM: Xid (PCI:")?.1;
    let (address, rest) = rest.split_once("): ")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((format!("{address}.0").parse().ok()?, digits.parse().ok()?))
}

/// `vfio-pci 0000:65:00.0: resetting`: the PCI core's line about a function that it resets.
fn reset(line: &str) -> Option<HostPciAddress> {
    let line = line.strip_suffix(": reset done")?;
    line.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::fake::FakeHost;

    #[test]
    fn the_gravest_xid_of_each_gpu_counts_until_a_reset_or_a_new_driver() {
        let log = "6,1,10,-;NVRM: Xid (PCI:0000:65:00): 13, pid=4, name=python3\n\
                   6,2,11,-;NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', name=<unknown>\n\
                   6,3,12,-;NVRM: Xid (PCI:0000:65:00): 154, GPU recovery action changed\n\
                   6,3,12,-;NVRM: Xid (PCI:0000:66:00): 13, pid=4, name=python3\n\
                   6,3,12,-;NVRM: Xid (PCI:0000:66:00): 31\n\
                   6,4,13,-;NVRM: Xid (PCI:nonsense): 5, x\n\
                   6,5,14,-;NVRM: Xid (PCI:0000:67:00): 99999999999, x\n";
        let read = |log: String| gravest_xids(FakeHost::new().file("dev/kmsg", log).root());
        let address = |text: &str| text.parse::<HostPciAddress>().unwrap();
        let xids = read(log.to_owned());
        assert_eq!(
            xids.into_iter().collect::<Vec<_>>(),
            [(address("0000:65:00.0"), 79), (address("0000:66:00.0"), 31)]
        );
        let reset = format!("{log}4,6,15,-;vfio-pci 0000:65:00.0: reset done\n");
        assert_eq!(read(reset).into_keys().collect::<Vec<_>>(), [address("0000:66:00.0")]);
        let loaded = format!("{log}4,6,15,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.1\n");
        assert!(read(loaded).is_empty());
        assert!(gravest_xids(FakeHost::new().root()).is_empty());
    }
}
