//! Images and datasets: named, and immutable by digest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::MemorySize;

/// A SHA-256 digest, written `sha256:<64 hexadecimal digits>` as in OCI.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = String, example = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(data).into())
    }

    /// The digest in lower-case hexadecimal, without the algorithm: safe as a file name.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: write \"sha256:\" and 64 lower-case hexadecimal digits")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError(text.chars().take(80).collect());
        let hex = text.strip_prefix("sha256:").ok_or_else(error)?;
        // One spelling only, so that equal digests are equal file names everywhere.
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(error());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| error())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An OCI image known to the cluster. Its blobs (manifest, configuration, layers) are in the
/// coordinator's blob store under their digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// A name of `[a-z0-9._/-]`, unique in the cluster.
    pub name: String,
    /// Digest of the image manifest (not of an index) for linux/amd64.
    pub digest: Digest,
    /// Sum of the compressed layers.
    pub size_bytes: u64,
}

/// A dataset: named files, immutable by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// A name of `[a-z0-9._-]`, unique in the cluster.
    pub name: String,
    /// Digest over the file list in canonical form: see [`Dataset::digest_of`].
    pub digest: Digest,
    /// Its files, sorted by path.
    pub files: Vec<DatasetFile>,
}

/// One file of a dataset.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetFile {
    /// Relative path of plain components (no `..`, no leading slash).
    pub path: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Length in bytes.
    pub size_bytes: u64,
}

impl Dataset {
    /// The digest of a file list: SHA-256 over lines `<digest> <size> <path>\n`, sorted by path.
    pub fn digest_of(files: &[DatasetFile]) -> Digest {
        let mut sorted: Vec<_> = files.iter().collect();
        sorted.sort_by(|a, b| a.path.cmp(&b.path));
        let text: String =
            sorted.iter().map(|f| format!("{} {} {}\n", f.digest, f.size_bytes, f.path)).collect();
        Digest::of(text.as_bytes())
    }

    /// The sum of its files.
    pub fn size(&self) -> MemorySize {
        MemorySize::from_bytes(self.files.iter().map(|file| file.size_bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_have_one_spelling() {
        let digest = Digest::of(b"test");
        let text = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
        for bad in [&text[7..], &text.to_uppercase(), &text[..70], "sha256:", "md5:00", "../../etc/passwd"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?} was accepted");
        }
    }
}
