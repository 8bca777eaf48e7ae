//! Fingerprints of what something was computed from, to tell when it must be computed again.

use std::hash::{BuildHasherDefault, Hash, Hasher};

/// A multiply-and-fold hash: quick, and the same on every run and machine. Not for hostile keys: values are
/// told apart by it, and indices looked up, but nobody's words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fold(u64);

impl Default for Fold {
    fn default() -> Self {
        Self(0x243f_6a88_85a3_08d3)
    }
}

impl Fold {
    /// Of one value.
    pub(crate) fn of(value: &impl Hash) -> u64 {
        let mut hasher = Self::default();
        value.hash(&mut hasher);
        hasher.finish()
    }

    /// Of two numbers.
    #[inline]
    pub(crate) fn mix(one: u64, two: u64) -> u64 {
        let product = u128::from(one ^ 0x9e37_79b9_7f4a_7c15) * u128::from(two ^ 0xd1b5_4a32_d192_ed03);
        (product as u64) ^ ((product >> 64) as u64)
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        Self::mix(self.0, 0x1319_8a2e_0370_7344)
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.write_u64(u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.write_u64(u64::from_le_bytes(last) ^ (rest.len() as u64) << 56);
        }
    }

    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = Self::mix(self.0.rotate_left(23), value);
    }

    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
}

/// For tables whose keys are indices.
pub(crate) type Quick = BuildHasherDefault<Fold>;

/// For tables whose keys are fingerprints, which need no other hash.
pub(crate) type Printed = BuildHasherDefault<Same>;

/// Keys are hashes already.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = Fold::mix(self.0, byte.into());
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_values_have_different_fingerprints() {
        let mut seen = std::collections::HashSet::new();
        for one in 0_u64..200 {
            for two in 0_u64..200 {
                assert!(seen.insert(Fold::of(&(one, two))), "{one} {two}");
            }
        }
        assert_ne!(Fold::of(&"a"), Fold::of(&"a\0"));
        assert_eq!(Fold::of(&vec![1_u8, 2]), Fold::of(&vec![1_u8, 2]));
    }
}
