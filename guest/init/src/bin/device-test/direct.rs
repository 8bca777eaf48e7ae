//! Direct I/O, and blocks that say what they are.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// Direct I/O wants buffers, offsets and lengths aligned to the disk's blocks, of which this is a multiple.
pub const BLOCK: usize = 4096;

/// A buffer for direct I/O.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// One of zeroes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, len }
    }

    /// All of it.
    pub fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Opens a disk past the page cache; with its size in bytes.
pub fn open(path: &str, write: bool) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(path)?;
    let size = (&file).seek(SeekFrom::End(0))?;
    Ok((file, size))
}

/// Numbers that look random and are the same for the same seed (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts at a seed; neighbouring seeds have nothing in common.
    pub fn new(seed: u64) -> Self {
        let mixed = (seed ^ seed >> 30).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The generator would stay at 0.
        Self(mixed | 1)
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Fills a buffer.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// Fills `buffer` with the block `index` of a pattern: where it is, then what only this place and seed have.
/// A block that landed in the wrong place is told from one that was damaged.
pub fn pattern(buffer: &mut [u8], index: u64, seed: u64) {
    let (head, body) = buffer.split_at_mut(8);
    head.copy_from_slice(&index.to_le_bytes());
    Random::new(seed.rotate_left(32) ^ index).fill(body);
}

/// What is wrong with a block that should have the pattern.
pub fn difference(found: &[u8], index: u64, seed: u64) -> Option<String> {
    let mut expected = vec![0; found.len()];
    pattern(&mut expected, index, seed);
    let at = found.iter().zip(&expected).position(|(a, b)| a != b)?;
    let says = u64::from_le_bytes(found.first_chunk().copied().unwrap_or_default());
    Some(format!("block {index} differs from byte {at} on; its first word is {says:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_differ_by_place_and_by_seed() {
        let block = |index, seed| {
            let mut bytes = vec![0; BLOCK];
            pattern(&mut bytes, index, seed);
            bytes
        };
        assert_ne!(block(1, 1), block(2, 1));
        assert_ne!(block(1, 1)[8..], block(1, 2)[8..]);
        assert_ne!(block(1, 0)[8..], block(0, 1)[8..]);
        assert_eq!(difference(&block(7, 3), 7, 3), None);
    }

    #[test]
    fn damage_is_described() {
        let mut bytes = vec![0; BLOCK];
        pattern(&mut bytes, 5, 1);
        bytes[100] ^= 1;
        let text = difference(&bytes, 5, 1).unwrap();
        assert!(text.contains("byte 100") && text.contains("0x5"), "{text}");
    }

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = Aligned::new(3 * BLOCK);
        assert_eq!(buffer.get().as_ptr().align_offset(BLOCK), 0);
        assert_eq!(buffer.get().len(), 3 * BLOCK);
    }
}
