//! Blobs: files named by the digest of their content, in one directory.
//!
//! A blob appears under its name only when complete, verified and on disk, and is verified again
//! while it is read: a damaged one is set aside, so that it can be uploaded anew. A second kind of
//! storage (S3) would become a trait here; with one there is nothing to abstract from.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use lathe_api::artefact::Digest;
use sha2::{Digest as _, Sha256};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Ending of unfinished uploads; whatever has it at start is a leftover.
const PARTIAL: &str = ".partial";

/// A blob that could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The content is something else.
    #[error("the content's digest is {actual}, not {expected}: nothing was stored")]
    Mismatch {
        /// What it should have been.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// Too long.
    #[error("longer than {limit} bytes, the limit for a blob: nothing was stored")]
    TooLong {
        /// The limit.
        limit: u64,
    },
    /// The upload broke off.
    #[error("the upload broke off: {0}")]
    Upload(String),
    /// The directory failed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// `write`, `read`, ...
        action: &'static str,
        /// What.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The directory.
pub struct Blobs {
    dir: PathBuf,
    limit_bytes: u64,
}

impl Blobs {
    /// Opens the directory, or makes it, and removes unfinished uploads.
    ///
    /// # Errors
    /// When it cannot be made or listed.
    pub fn open(dir: &Path, limit_bytes: u64) -> Result<Self, BlobError> {
        std::fs::create_dir_all(dir).map_err(file_error("make", dir))?;
        for entry in std::fs::read_dir(dir).map_err(file_error("list", dir))? {
            let path = entry.map_err(file_error("list", dir))?.path();
            if path.to_string_lossy().ends_with(PARTIAL) {
                std::fs::remove_file(&path).map_err(file_error("remove", &path))?;
            }
        }
        Ok(Self { dir: dir.to_owned(), limit_bytes })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// A blob's length, if it is here.
    ///
    /// # Errors
    /// When the directory fails.
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let path = self.path(digest);
        match fs::metadata(&path).await {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(file_error("read", &path)(source)),
        }
    }

    /// Stores a blob. One that is here already stays as it is.
    ///
    /// # Errors
    /// When the content does not match, is too long, breaks off, or cannot be written. Then nothing
    /// is left behind.
    pub async fn put<E: std::fmt::Display>(
        &self,
        digest: &Digest,
        mut content: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<u64, BlobError> {
        let partial = Partial(self.dir.join(format!("{}{PARTIAL}", uuid::Uuid::new_v4().simple())));
        let mut file = File::create_new(&partial.0).await.map_err(file_error("make", &partial.0))?;
        let mut hasher = Sha256::new();
        let mut length = 0_u64;
        while let Some(chunk) = content.next().await {
            let chunk = chunk.map_err(|error| BlobError::Upload(error.to_string()))?;
            length += chunk.len() as u64;
            if length > self.limit_bytes {
                return Err(BlobError::TooLong { limit: self.limit_bytes });
            }
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(file_error("write", &partial.0))?;
        }
        let actual = Digest::from_bytes(hasher.finalize().into());
        if actual != *digest {
            return Err(BlobError::Mismatch { expected: *digest, actual });
        }
        file.sync_all().await.map_err(file_error("flush", &partial.0))?;
        let path = self.path(digest);
        fs::rename(&partial.0, &path).await.map_err(file_error("rename", &partial.0))?;
        // The name must survive a power cut too, before anybody is told that the blob is here.
        let dir = File::open(&self.dir).await.map_err(file_error("open", &self.dir))?;
        dir.sync_all().await.map_err(file_error("flush", &self.dir))?;
        Ok(length)
    }

    /// A blob's length and content, if it is here. The last part of the content comes only once all
    /// of it was verified; a damaged blob ends in an error instead.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn get(
        &self,
        digest: &Digest,
    ) -> Result<Option<(u64, impl Stream<Item = io::Result<Bytes>> + Send + use<>)>, BlobError> {
        let path = self.path(digest);
        let file = match File::open(&path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(file_error("read", &path)(source)),
        };
        let length = file.metadata().await.map_err(file_error("read", &path))?.len();
        let reader = Reader { file, path, digest: *digest, hasher: Sha256::new(), held: None };
        Ok(Some((length, reader.into_stream())))
    }

    /// A whole small blob.
    ///
    /// # Errors
    /// When it is longer than `limit`, damaged, or cannot be read.
    pub async fn get_small(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>, BlobError> {
        let Some((length, content)) = self.get(digest).await? else { return Ok(None) };
        if length > limit {
            return Err(BlobError::TooLong { limit });
        }
        let mut whole = Vec::new();
        let mut content = std::pin::pin!(content);
        while let Some(chunk) = content.next().await {
            whole.extend_from_slice(&chunk.map_err(file_error("read", &self.path(digest)))?);
        }
        Ok(Some(whole))
    }
}

struct Reader {
    file: File,
    path: PathBuf,
    digest: Digest,
    hasher: Sha256,
    /// Read and hashed, not given out yet.
    held: Option<Bytes>,
}

impl Reader {
    fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        futures_util::stream::unfold(Some(self), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            (&mut self.file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk).await?;
            if chunk.is_empty() {
                let actual = Digest::from_bytes(std::mem::take(&mut self.hasher).finalize().into());
                if self.held.is_some() || self.digest == Digest::of(b"") {
                    self.check(actual).await?;
                }
                return Ok(self.held.take());
            }
            self.hasher.update(&chunk);
            if let Some(held) = self.held.replace(Bytes::from(chunk)) {
                return Ok(Some(held));
            }
        }
    }

    async fn check(&self, actual: Digest) -> io::Result<()> {
        if actual == self.digest {
            return Ok(());
        }
        tracing::error!(digest = %self.digest, %actual, "a stored blob is damaged; it is set aside");
        fs::rename(&self.path, self.path.with_extension("damaged")).await?;
        Err(io::Error::new(io::ErrorKind::InvalidData, "the stored blob is damaged; upload it again"))
    }
}

/// Goes away unless it was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // Not there any more in the good case.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn file_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> BlobError + use<> {
    let path = path.display().to_string();
    move |source| BlobError::File { action, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Chunk = Result<Bytes, io::Error>;

    fn content(parts: &[&'static [u8]]) -> impl Stream<Item = Chunk> + Unpin + use<> {
        let parts: Vec<Chunk> = parts.iter().map(|part| Ok(Bytes::from_static(part))).collect();
        futures_util::stream::iter(parts)
    }

    fn files(dir: &Path) -> usize {
        std::fs::read_dir(dir).expect("listed").count()
    }

    #[tokio::test]
    async fn what_comes_back_is_what_was_stored() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let blobs = Blobs::open(dir.path(), 1 << 20).expect("opened");
        let long = vec![7_u8; 3 * CHUNK_BYTES + 5];
        for blob in [&b""[..], b"x", &long] {
            let digest = Digest::of(blob);
            assert_eq!(blobs.size(&digest).await.expect("works"), None);
            let stream = futures_util::stream::iter([Chunk::Ok(Bytes::copy_from_slice(blob))]);
            blobs.put(&digest, stream).await.expect("stored");
            assert_eq!(blobs.size(&digest).await.expect("works"), Some(blob.len() as u64));
            assert_eq!(blobs.get_small(&digest, 1 << 20).await.expect("works").expect("there"), blob);
        }
    }

    #[tokio::test]
    async fn a_bad_upload_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let blobs = Blobs::open(dir.path(), 8).expect("opened");
        let digest = Digest::of(b"right");
        let wrong = blobs.put(&digest, content(&[b"wrong"])).await;
        assert!(matches!(wrong, Err(BlobError::Mismatch { .. })), "{wrong:?}");
        let long = blobs.put(&digest, content(&[b"12345", b"6789"])).await;
        assert!(matches!(long, Err(BlobError::TooLong { limit: 8 })), "{long:?}");
        let broken =
            futures_util::stream::iter([Ok(Bytes::from_static(b"rig")), Err(io::Error::other("cut"))]);
        assert!(matches!(blobs.put(&digest, broken).await, Err(BlobError::Upload(_))));
        assert_eq!(files(dir.path()), 0);
    }

    #[tokio::test]
    async fn a_damaged_blob_is_not_served_and_can_be_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let blobs = Blobs::open(dir.path(), 1 << 20).expect("opened");
        let digest = Digest::of(b"content");
        blobs.put(&digest, content(&[b"content"])).await.expect("stored");
        std::fs::write(dir.path().join(digest.hex()), b"CONTENT").expect("damaged");
        assert!(blobs.get_small(&digest, 100).await.is_err());
        assert_eq!(blobs.size(&digest).await.expect("works"), None);
        blobs.put(&digest, content(&[b"content"])).await.expect("stored again");
        assert_eq!(blobs.get_small(&digest, 100).await.expect("works").expect("there"), b"content");
    }

    #[tokio::test]
    async fn leftovers_of_a_crash_are_removed_at_start() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("abc.partial"), b"half").expect("written");
        Blobs::open(dir.path(), 8).expect("opened");
        assert_eq!(files(dir.path()), 0);
    }
}
