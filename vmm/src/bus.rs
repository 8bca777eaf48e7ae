//! Address ranges and the devices behind them: port I/O and memory-mapped I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A device that answers accesses to a range of a [`Bus`].
///
/// The range's lock is held during a call, so a device sees one access at a time, from any vCPU's
/// thread. `offset` is from the start of the range; `data` is 1, 2, 4 or 8 bytes long and
/// `offset + data.len()` lies within the range. A device never panics on what a guest does.
pub trait BusDevice: Send {
    /// The guest reads. `data` is filled with ones beforehand, as an absent device would read.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device shared between a bus and whoever else holds it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Locks a device or a table. After a panic in a holder the machine is ending anyway; until it has,
/// the others go on rather than panic in turn.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A range that could not be claimed or released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Two devices at one address.
    #[error("{base:#x}..{end:#x} overlaps a device that is there already")]
    Overlap {
        /// First address.
        base: u64,
        /// First address after the range.
        end: u64,
    },
    /// Empty, or past the end of the address space.
    #[error("{size:#x} bytes at {base:#x} are not a range")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        size: u64,
    },
}

struct Entry {
    size: u64,
    device: SharedDevice,
}

/// A set of ranges, safe to look up from every vCPU while BARs move.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + size`.
    ///
    /// # Errors
    /// When the range is empty, wraps, or overlaps another.
    pub fn insert(&self, base: u64, size: u64, device: SharedDevice) -> Result<(), BusError> {
        let end = base.checked_add(size).filter(|_| size > 0).ok_or(BusError::BadRange { base, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let overlaps =
            ranges.range(..end).next_back().is_some_and(|(start, entry)| start + entry.size > base);
        if overlaps {
            return Err(BusError::Overlap { base, end });
        }
        ranges.insert(base, Entry { size, device });
        Ok(())
    }

    /// Takes away what starts at `base`; returns whether anything did.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Takes everything away.
    pub fn clear(&self) {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Reads from the device at `address`; returns false, leaving `data` all ones, if there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        lock(&device).read(offset, data);
        true
    }

    /// Writes to the device at `address`; returns false if there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        lock(&device).write(offset, data);
        true
    }

    /// The lookup lock is released before the device is called: a device may move ranges.
    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= entry.size);
        fits.then(|| (offset, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ram([u8; 16]);

    impl BusDevice for Ram {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    #[test]
    fn accesses_reach_the_device_or_read_ones() {
        let bus = Bus::new();
        bus.insert(0x100, 16, Arc::new(Mutex::new(Ram([0; 16])))).unwrap();
        assert!(bus.write(0x104, &[1, 2]));
        let mut data = [0; 4];
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [1, 2, 0, 0]);
        assert!(!bus.read(0x10e, &mut data), "an access over the end reaches nothing");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0xff, &[0]) && !bus.write(0x110, &[0]));
    }

    #[test]
    fn ranges_never_overlap() {
        let bus = Bus::new();
        let ram = || Arc::new(Mutex::new(Ram([0; 16]))) as SharedDevice;
        bus.insert(0x100, 16, ram()).unwrap();
        for base in [0xf1, 0x100, 0x10f] {
            assert!(matches!(bus.insert(base, 16, ram()), Err(BusError::Overlap { .. })));
        }
        assert!(bus.insert(u64::MAX, 2, ram()).is_err() && bus.insert(0, 0, ram()).is_err());
        bus.insert(0x110, 16, ram()).unwrap();
        assert!(bus.remove(0x100) && !bus.remove(0x100));
        bus.insert(0xf1, 16, ram()).unwrap();
    }
}
