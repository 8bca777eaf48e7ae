//! Images on this machine: an OCI image layout (image-spec 1.1, image-layout.md) as a folder or as
//! a tar archive of one.
//!
//! Every digest is checked here, before anything is sent: an image that does not match its own
//! digests is refused by name, and the cluster never hears of it.

pub mod registry;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lathe_api::artefact::Digest;
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};
use sha2::Digest as _;

/// The most bytes an index or a manifest may have: they are read into memory.
const MAX_DOCUMENT: u64 = 4 << 20;

/// How deep an index may point to indexes.
const MAX_DEPTH: usize = 4;

/// An image that cannot be read or is not what it says.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A part is missing.
    #[error("{}: not an OCI image layout: {what} is missing", path.display())]
    Missing {
        /// The layout.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// A JSON document is broken.
    #[error("{}: {what}: {reason}", path.display())]
    Document {
        /// The layout.
        path: PathBuf,
        /// Which document.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A blob's content is not what its name says.
    #[error("{}: blob {expected} has digest {found}: the image is damaged, make or download it again", path.display())]
    Mismatch {
        /// The layout.
        path: PathBuf,
        /// The digest it is filed under.
        expected: Digest,
        /// The digest it has.
        found: Digest,
    },
    /// There is no image for our machines.
    #[error("{}: no image for linux/amd64 in it", path.display())]
    NoPlatform {
        /// The layout.
        path: PathBuf,
    },
}

/// A blob on this machine.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Its digest, checked.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The file that is its content.
    pub path: PathBuf,
}

/// One image for linux/amd64.
#[derive(Debug)]
pub struct LocalImage {
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Manifest, configuration and layers, each once, layers in order and last.
    pub blobs: Vec<Blob>,
    /// Sum of the layers' lengths.
    pub layers_bytes: u64,
    /// Where an archive was unpacked to, for as long as the blobs are needed.
    _unpacked: Option<tempfile::TempDir>,
}

impl LocalImage {
    /// Reads and checks the image in `path`.
    ///
    /// # Errors
    /// When it is no layout, has no image for linux/amd64, or any digest does not match.
    pub fn open(path: &Path) -> Result<Self, OciError> {
        let layout = Layout::open(path)?;
        let index = layout.document("index.json", "index.json")?;
        let index: ImageIndex = layout.parse(&index, "index.json")?;
        let (digest, manifest) = layout.find_manifest(&index, 0)?;
        let mut blobs = vec![layout.blob(digest)?];
        let mut layers_bytes = 0;
        let parts = std::iter::once((manifest.config(), false))
            .chain(manifest.layers().iter().map(|layer| (layer, true)));
        for (descriptor, is_layer) in parts {
            let blob = layout.described(descriptor)?;
            if is_layer {
                layers_bytes += blob.size;
            }
            if !blobs.iter().any(|known| known.digest == blob.digest) {
                blobs.push(blob);
            }
        }
        for blob in &blobs {
            layout.verify(blob)?;
        }
        Ok(Self { manifest: digest, blobs, layers_bytes, _unpacked: layout.unpacked })
    }
}

/// An image layout in a folder.
struct Layout {
    /// What the user named, for messages.
    path: PathBuf,
    dir: PathBuf,
    unpacked: Option<tempfile::TempDir>,
}

impl Layout {
    fn open(path: &Path) -> Result<Self, OciError> {
        let io_error = |source| OciError::Io { path: path.to_owned(), source };
        if path.is_dir() {
            return Ok(Self { path: path.to_owned(), dir: path.to_owned(), unpacked: None });
        }
        let unpacked = tempfile::tempdir().map_err(io_error)?;
        unpack(path, unpacked.path()).map_err(io_error)?;
        Ok(Self { path: path.to_owned(), dir: unpacked.path().to_owned(), unpacked: Some(unpacked) })
    }

    fn blob(&self, digest: Digest) -> Result<Blob, OciError> {
        let name = format!("blobs/sha256/{}", digest.hex());
        let path = self.dir.join(&name);
        match path.symlink_metadata() {
            Ok(meta) if meta.is_file() => Ok(Blob { digest, size: meta.len(), path }),
            _ => Err(OciError::Missing { path: self.path.clone(), what: name }),
        }
    }

    fn document(&self, name: &str, what: &str) -> Result<Vec<u8>, OciError> {
        let path = self.dir.join(name);
        let missing = |_| OciError::Missing { path: self.path.clone(), what: name.to_owned() };
        let mut text = Vec::new();
        let mut file = File::open(&path).map_err(missing)?.take(MAX_DOCUMENT + 1);
        file.read_to_end(&mut text).map_err(|source| OciError::Io { path, source })?;
        if text.len() as u64 > MAX_DOCUMENT {
            let reason = format!("it has more than the {MAX_DOCUMENT} bytes allowed");
            return Err(OciError::Document { path: self.path.clone(), what: what.to_owned(), reason });
        }
        Ok(text)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &[u8], what: &str) -> Result<T, OciError> {
        serde_json::from_slice(text).map_err(|error| OciError::Document {
            path: self.path.clone(),
            what: what.to_owned(),
            reason: error.to_string(),
        })
    }

    fn described(&self, descriptor: &Descriptor) -> Result<Blob, OciError> {
        let text = descriptor.digest().to_string();
        let digest =
            text.parse().map_err(|error: lathe_api::artefact::ParseDigestError| OciError::Document {
                path: self.path.clone(),
                what: "manifest".to_owned(),
                reason: error.to_string(),
            })?;
        self.blob(digest)
    }

    fn find_manifest(&self, index: &ImageIndex, depth: usize) -> Result<(Digest, ImageManifest), OciError> {
        for descriptor in index.manifests() {
            let ours = descriptor.platform().as_ref().is_none_or(|platform| {
                *platform.architecture() == Arch::Amd64 && *platform.os() == Os::Linux
            });
            if !ours {
                continue;
            }
            let blob = self.described(descriptor)?;
            let what = format!("blob {}", blob.digest);
            let name = format!("blobs/sha256/{}", blob.digest.hex());
            let text = self.document(&name, &what)?;
            let found = Digest::of(&text);
            if found != blob.digest {
                return Err(OciError::Mismatch { path: self.path.clone(), expected: blob.digest, found });
            }
            match descriptor.media_type() {
                MediaType::ImageIndex if depth < MAX_DEPTH => {
                    return self.find_manifest(&self.parse(&text, &what)?, depth + 1);
                }
                MediaType::ImageManifest => return Ok((blob.digest, self.parse(&text, &what)?)),
                _ => {}
            }
        }
        Err(OciError::NoPlatform { path: self.path.clone() })
    }

    fn verify(&self, blob: &Blob) -> Result<(), OciError> {
        let io_error = |source| OciError::Io { path: self.path.clone(), source };
        let mut hasher = sha2::Sha256::new();
        let mut file = File::open(&blob.path).map_err(io_error)?;
        io::copy(&mut file, &mut hasher).map_err(io_error)?;
        let found = Digest::from_bytes(hasher.finalize().into());
        if found == blob.digest {
            Ok(())
        } else {
            Err(OciError::Mismatch { path: self.path.clone(), expected: blob.digest, found })
        }
    }
}

/// Takes an archive's plain files out into `dir`. Members that would land elsewhere are passed over by
/// `unpack_in`, and links and devices are never made.
fn unpack(archive: &Path, dir: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(File::open(archive)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if matches!(entry.header().entry_type(), tar::EntryType::Regular | tar::EntryType::Directory) {
            entry.unpack_in(dir)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn put(dir: &Path, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(digest.hex()), content).unwrap();
        digest
    }

    fn layout(arch: &str) -> (tempfile::TempDir, Digest) {
        let dir = tempfile::tempdir().unwrap();
        let layer = put(dir.path(), b"a layer");
        let config = put(dir.path(), b"{}");
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":2}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":7}}]}}"#
        );
        let digest = put(dir.path(), manifest.as_bytes());
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "digest":"{digest}","size":{},"platform":{{"architecture":"{arch}","os":"linux"}}}}]}}"#,
            manifest.len()
        );
        fs::write(dir.path().join("index.json"), index).unwrap();
        (dir, digest)
    }

    #[test]
    fn folder_and_archive_are_the_same_image() {
        let (dir, digest) = layout("amd64");
        let folder = LocalImage::open(dir.path()).unwrap();
        assert_eq!((folder.manifest, folder.blobs.len(), folder.layers_bytes), (digest, 3, 7));

        let archive = tempfile::NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(archive.reopen().unwrap());
        tar.append_dir_all(".", dir.path()).unwrap();
        tar.finish().unwrap();
        let archived = LocalImage::open(archive.path()).unwrap();
        assert_eq!(archived.manifest, digest);
        assert_eq!(fs::read_to_string(&archived.blobs[2].path).unwrap(), "a layer");
    }

    #[test]
    fn a_damaged_blob_is_named() {
        let (dir, _) = layout("amd64");
        let layer = Digest::of(b"a layer");
        fs::write(dir.path().join("blobs/sha256").join(layer.hex()), b"b layer").unwrap();
        let error = LocalImage::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&layer.to_string()) && error.contains("damaged"), "{error}");
    }

    #[test]
    fn other_platforms_and_other_folders_are_refused() {
        let (dir, _) = layout("arm64");
        assert!(matches!(LocalImage::open(dir.path()), Err(OciError::NoPlatform { .. })));
        let empty = tempfile::tempdir().unwrap();
        let error = LocalImage::open(empty.path()).unwrap_err().to_string();
        assert!(error.contains("index.json is missing"), "{error}");
    }
}
