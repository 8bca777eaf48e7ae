//! Images and datasets as read-only EROFS files, one each per digest.
//!
//! An artefact is fetched, unpacked and converted in a staging folder and appears in the cache by a
//! rename, so a crash leaves either the whole of it or something that the next start sweeps away.
//! Beside each EROFS lies its record with the file's own digest: a cache that rotted is noticed
//! before its first use after the agent's start, and made again. Several ranks that need the same
//! artefact wait for one maker.
//!
//! Nothing here is compressed: under emulation, and on fast disks, reading plain blocks is cheaper.

pub mod blobs;
pub mod manifest;
pub mod unpack;

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use lathe_api::artefact::{Dataset, Digest};
use lathe_api::node::{CachedArtefact, MAX_ARTEFACTS};
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};
use blobs::{BlobError, BlobSource, blocking, digest_of_file};
use manifest::{MAX_DOCUMENT, ManifestError, RunConfig};
use unpack::{Limits, UnpackError, Unpacker};

/// An artefact that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A blob could not be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The description is wrong.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A layer cannot be unpacked.
    #[error("layer {layer}: {source}")]
    Unpack {
        /// Which, from 1.
        layer: usize,
        /// Why not.
        source: UnpackError,
    },
    /// A file of a dataset would lie outside its folder.
    #[error("the dataset's file {0:?} has a path that is not of plain components")]
    BadPath(String),
    /// The digest of the file list differs.
    #[error("the dataset {name} does not match its digest: its file list has {actual}")]
    DatasetDigest {
        /// Which.
        name: String,
        /// Of the list.
        actual: Digest,
    },
    /// mkfs.erofs failed.
    #[error("mkfs.erofs failed: {0}")]
    Mkfs(String),
    /// The disk refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// An artefact in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artefact {
    /// Digest of the EROFS file.
    erofs: Digest,
    /// How to run it; default for datasets.
    pub config: RunConfig,
    /// Where the EROFS is. Not part of the record: the state directory may move.
    #[serde(skip)]
    pub path: PathBuf,
}

/// The cache.
pub struct ImageStore {
    images: PathBuf,
    datasets: PathBuf,
    staging: PathBuf,
    source: BlobSource,
    /// One maker for each artefact.
    makers: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    /// Whose files were checked since the agent's start.
    verified: Mutex<HashSet<Digest>>,
}

impl ImageStore {
    /// Opens the cache and removes what a crash left half-made.
    ///
    /// # Errors
    /// When its folders cannot be made.
    pub fn open(
        images: PathBuf,
        datasets: PathBuf,
        staging: PathBuf,
        source: BlobSource,
    ) -> Result<Self, FileError> {
        files::remove(&staging)?;
        for dir in [&images, &datasets, &staging] {
            files::make_private_dir(dir)?;
        }
        Ok(Self { images, datasets, staging, source, makers: Mutex::default(), verified: Mutex::default() })
    }

    /// The image with this manifest digest; made if it is not there.
    ///
    /// # Errors
    /// When it cannot be fetched or converted.
    pub async fn image(&self, digest: &Digest) -> Result<Artefact, ImageError> {
        let _maker = self.maker(digest).await;
        let target = self.images.join(format!("{}.erofs", digest.hex()));
        if let Some(cached) = self.cached(digest, &target).await? {
            return Ok(cached);
        }
        let staging = Staging::new(&self.staging)?;
        let manifest = self.source.read(digest, MAX_DOCUMENT).await?;
        let (config, layers) = manifest::parse_manifest(&manifest)?;
        let config = manifest::parse_config(&self.source.read(&config, MAX_DOCUMENT).await?)?;
        let root = staging.0.join("root");
        files::make_private_dir(&root)?;
        // What the image's own root would have; nothing is above it that should stay private.
        std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(FileError::io("change the mode of", &root))?;
        let mut unpacker = Unpacker::new(&root, Limits::default())
            .map_err(|source| ImageError::Unpack { layer: 0, source })?;
        for (index, layer) in layers.into_iter().enumerate() {
            let blob = staging.0.join("blob");
            self.source.fetch(&layer.digest, layer.size, &blob).await?;
            unpacker = blocking(move || {
                let file = std::fs::File::open(&blob).map_err(FileError::io("read", &blob))?;
                let unpacked = unpacker.layer(std::io::BufReader::new(file), layer.size, layer.compression);
                unpacked.map_err(|source| ImageError::Unpack { layer: index + 1, source })?;
                files::remove(&blob)?;
                Ok::<_, ImageError>(unpacker)
            })
            .await?;
        }
        self.make(digest, &target, &staging, config).await
    }

    /// The dataset's files; made if they are not there.
    ///
    /// # Errors
    /// When a file cannot be fetched or has an impossible path.
    pub async fn dataset(&self, dataset: &Dataset) -> Result<Artefact, ImageError> {
        let actual = Dataset::digest_of(&dataset.files);
        if actual != dataset.digest {
            return Err(ImageError::DatasetDigest { name: dataset.name.clone(), actual });
        }
        let _maker = self.maker(&dataset.digest).await;
        let target = self.datasets.join(format!("{}.erofs", dataset.digest.hex()));
        if let Some(cached) = self.cached(&dataset.digest, &target).await? {
            return Ok(cached);
        }
        let staging = Staging::new(&self.staging)?;
        let root = staging.0.join("root");
        make_readable_dir(&root)?;
        for file in &dataset.files {
            let relative = Path::new(&file.path);
            let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
            if !plain || file.path.is_empty() || file.path.len() > 4000 {
                return Err(ImageError::BadPath(file.path.chars().take(200).collect()));
            }
            let path = root.join(relative);
            make_readable_dir(path.parent().unwrap_or(&root))?;
            self.source.fetch(&file.digest, file.size_bytes, &path).await?;
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444))
                .map_err(FileError::io("change the mode of", &path))?;
        }
        self.make(&dataset.digest, &target, &staging, RunConfig::default()).await
    }

    /// What is in the cache: the largest [`MAX_ARTEFACTS`], by digest. What cannot be read is left out: it
    /// would be fetched again.
    pub fn list(&self) -> Vec<CachedArtefact> {
        let files = [&self.images, &self.datasets].into_iter().filter_map(|dir| std::fs::read_dir(dir).ok());
        let mut found: Vec<CachedArtefact> = files
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let made = path.extension().is_some_and(|extension| extension == "erofs");
                let hex = path.file_stem().filter(|_| made && record_of(&path).exists())?.to_str()?;
                let digest = format!("sha256:{hex}").parse().ok()?;
                Some(CachedArtefact { digest, bytes: path.metadata().ok()?.len() })
            })
            .collect();
        found.sort_unstable_by_key(|artefact| (std::cmp::Reverse(artefact.bytes), artefact.digest));
        found.truncate(MAX_ARTEFACTS);
        found.sort_unstable_by_key(|artefact| artefact.digest);
        found
    }

    async fn maker(&self, digest: &Digest) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut makers = self.makers.lock().unwrap_or_else(PoisonError::into_inner);
            makers.entry(*digest).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// The artefact in the cache, if it is there and sound. Asked with its maker's lock held.
    async fn cached(&self, digest: &Digest, target: &Path) -> Result<Option<Artefact>, ImageError> {
        let record = match files::read_json::<Artefact>(&record_of(target)) {
            Ok(record) => Artefact { path: target.to_owned(), ..record },
            Err(_) => return Ok(None),
        };
        if self.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(digest) && target.exists() {
            return Ok(Some(record));
        }
        let path = target.to_owned();
        match blocking(move || digest_of_file(&path)).await {
            Ok(actual) if actual == record.erofs => {
                self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest);
                Ok(Some(record))
            }
            found => {
                tracing::warn!(path = %target.display(), ?found, "the cached file is damaged and is made again");
                files::remove(target)?;
                files::remove(&record_of(target))?;
                Ok(None)
            }
        }
    }

    async fn make(
        &self,
        digest: &Digest,
        target: &Path,
        staging: &Staging,
        config: RunConfig,
    ) -> Result<Artefact, ImageError> {
        let made = staging.0.join("made.erofs");
        mkfs(&made, &staging.0.join("root"), digest).await?;
        let file = made.clone();
        let erofs = blocking(move || {
            let synced = std::fs::File::open(&file).and_then(|file| file.sync_all());
            synced.map_err(FileError::io("flush", &file))?;
            digest_of_file(&file)
        })
        .await?;
        let artefact = Artefact { erofs, config, path: target.to_owned() };
        // The record last: a file without one is made again.
        std::fs::rename(&made, target).map_err(FileError::io("rename to", target))?;
        files::write_json(&record_of(target), &artefact)?;
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest);
        Ok(artefact)
    }
}

fn record_of(target: &Path) -> PathBuf {
    target.with_extension("json")
}

fn make_readable_dir(path: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(FileError::io("make the directory", path))
}

/// A folder that goes away.
struct Staging(PathBuf);

impl Staging {
    fn new(parent: &Path) -> Result<Self, FileError> {
        let dir = parent.join(uuid::Uuid::new_v4().simple().to_string());
        files::make_private_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = files::remove(&self.0) {
            tracing::warn!(%error, "staging left behind until the next start");
        }
    }
}

/// Makes an EROFS of `root`, the same bytes for the same files: the filesystem's own time and UUID
/// come from the digest, files keep theirs.
async fn mkfs(target: &Path, root: &Path, digest: &Digest) -> Result<(), ImageError> {
    let mut bytes = [0; 16];
    let hex = digest.hex();
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("0");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    let output = tokio::process::Command::new("mkfs.erofs")
        .args(["--quiet", "-T0", "--preserve-mtime", "-x-1"])
        .arg(format!("-U{}", uuid::Builder::from_random_bytes(bytes).into_uuid()))
        .arg(target)
        .arg(root)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| ImageError::Mkfs(format!("{error}; install erofs-utils")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|l| l.contains("rror") || l.contains("<E>")).or(text.lines().next());
    Err(ImageError::Mkfs(line.unwrap_or("no reason given").chars().take(300).collect()))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
