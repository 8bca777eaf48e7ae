//! Where blobs come from: the coordinator, or a folder.

use std::path::{Path, PathBuf};

use lathe_api::artefact::Digest;
use lathe_api::client::{Client, ClientError};
use sha2::{Digest as _, Sha256};

use crate::files::FileError;

/// A source of blobs by digest.
#[derive(Clone)]
pub enum BlobSource {
    /// The cluster's blob store.
    Coordinator(Client),
    /// A folder with the blobs under their hexadecimal digests, as `blobs/sha256` of an OCI layout.
    Folder(PathBuf),
}

/// A blob that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The coordinator does not give it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The file does not.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its content is not what its name says.
    #[error("the blob {0} in the folder is damaged: its content has another digest")]
    Damaged(Digest),
    /// It is larger than was announced or allowed.
    #[error("blob {digest} has {size} bytes, {limit} were expected at most")]
    TooLarge {
        /// Which.
        digest: Digest,
        /// Its length.
        size: u64,
        /// What was allowed.
        limit: u64,
    },
    /// Nobody has it.
    #[error("blob {0} is not in the blob store; upload the image or dataset again")]
    Missing(Digest),
}

impl BlobSource {
    /// Copies a blob of at most `limit` bytes to `path`, verified.
    ///
    /// # Errors
    /// When it is missing, damaged or too large.
    pub async fn fetch(&self, digest: &Digest, limit: u64, path: &Path) -> Result<(), BlobError> {
        match self {
            Self::Coordinator(client) => {
                let size = client.blob_size(digest).await?.ok_or(BlobError::Missing(*digest))?;
                check_size(digest, size, limit)?;
                client.get_blob(digest, path, |_| ()).await?;
                Ok(())
            }
            Self::Folder(folder) => {
                let (source, path, digest) = (folder.join(digest.hex()), path.to_owned(), *digest);
                blocking(move || copy_verified(&source, &path, &digest, limit)).await
            }
        }
    }

    /// A blob of at most `limit` bytes, in memory.
    ///
    /// # Errors
    /// When it is missing, damaged or too large.
    pub async fn read(&self, digest: &Digest, limit: usize) -> Result<Vec<u8>, BlobError> {
        match self {
            Self::Coordinator(client) => Ok(client.get_small_blob(digest, limit).await?),
            Self::Folder(folder) => {
                let bytes = crate::files::read_bounded(&folder.join(digest.hex()), limit as u64)?;
                if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(BlobError::Damaged(*digest)) }
            }
        }
    }
}

/// Runs blocking work off the runtime's threads.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        // A panic in the work is a panic here; cancelling only happens when the runtime ends.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn check_size(digest: &Digest, size: u64, limit: u64) -> Result<(), BlobError> {
    if size > limit { Err(BlobError::TooLarge { digest: *digest, size, limit }) } else { Ok(()) }
}

fn copy_verified(source: &Path, path: &Path, digest: &Digest, limit: u64) -> Result<(), BlobError> {
    let size = std::fs::metadata(source).map_err(FileError::io("read the blob", source))?.len();
    check_size(digest, size, limit)?;
    std::fs::copy(source, path).map_err(FileError::io("write", path))?;
    if digest_of_file(path)? == *digest { Ok(()) } else { Err(BlobError::Damaged(*digest)) }
}

/// The digest of a file's content.
///
/// # Errors
/// When it cannot be read.
pub fn digest_of_file(path: &Path) -> Result<Digest, FileError> {
    let hash = || {
        let mut hasher = Sha256::new();
        std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
        Ok(Digest::from_bytes(hasher.finalize().into()))
    };
    hash().map_err(FileError::io("read", path))
}
