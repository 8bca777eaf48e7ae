//! Disks by serial.
//!
//! The serial is the one name that host and guest agree on: the order of PCI devices is the
//! VMM's business, and `vda` follows from it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::clock::since_boot;

/// Disks are probed before init runs; this covers drivers loaded as modules a moment ago.
const PATIENCE: Duration = Duration::from_secs(2);

/// No such disk.
#[derive(Debug, thiserror::Error)]
#[error("no disk has the serial {serial:?}; the machine has {present}")]
pub struct NoSuchDisk {
    serial: String,
    present: String,
}

/// The device node of the disk with this serial.
pub fn find(serial: &str) -> Result<PathBuf, NoSuchDisk> {
    let deadline = since_boot() + PATIENCE;
    loop {
        let disks = serials(Path::new("/sys/block"));
        if let Some((name, _)) = disks.iter().find(|(_, found)| found == serial) {
            return Ok(Path::new("/dev").join(name));
        }
        if since_boot() >= deadline {
            let present =
                disks.iter().map(|(_, serial)| format!("{serial:?}")).collect::<Vec<_>>().join(", ");
            let present = if present.is_empty() { "none".to_owned() } else { present };
            return Err(NoSuchDisk { serial: serial.to_owned(), present });
        }
        sleep(Duration::from_millis(5));
    }
}

/// Name and serial of each disk under a `/sys/block`.
fn serials(block: &Path) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(block) else { return Vec::new() };
    let mut disks: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
            let serial = serial.trim_end_matches(['\n', '\0']).to_owned();
            Some((entry.file_name().into_string().ok()?, serial))
        })
        .collect();
    disks.sort();
    disks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_without_a_serial_are_passed_over() {
        let sys = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("root\n")), ("vdb", Some("data-0")), ("loop0", None)] {
            fs::create_dir(sys.path().join(name)).unwrap();
            if let Some(serial) = serial {
                fs::write(sys.path().join(name).join("serial"), serial).unwrap();
            }
        }
        let found = serials(sys.path());
        assert_eq!(found, [("vda".to_owned(), "root".to_owned()), ("vdb".to_owned(), "data-0".to_owned())]);
    }
}
