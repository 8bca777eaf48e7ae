//! The parts of OCI manifests and configurations that matter here, with limits.
//!
//! Images are hostile: what they say of sizes is checked again when the bytes come.

use lathe_api::artefact::Digest;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::{Deserialize, Serialize};

/// Longest manifest or configuration, as registries limit them.
pub const MAX_DOCUMENT: usize = 4 << 20;

/// Most layers of an image; overlay filesystems of other runtimes stop at 128.
const MAX_LAYERS: usize = 128;

/// Largest compressed layer.
const MAX_LAYER: u64 = 64 << 30;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the compressed blob.
    pub digest: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// How to read it.
    pub compression: Compression,
}

/// An image's description that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the document it should be.
    #[error("the image's {0} is not a valid OCI document: {1}")]
    Malformed(&'static str, oci_spec::OciSpecError),
    /// A digest of another algorithm.
    #[error("the image's manifest has a digest that is not SHA-256: {0}")]
    Digest(String),
    /// A layer of another kind.
    #[error("the image has a layer of type {0:?}: only tar, tar+gzip and tar+zstd can be unpacked")]
    LayerType(String),
    /// Too many or too large.
    #[error("the image's manifest is over a limit: {0}")]
    Limit(String),
    /// Built for something else.
    #[error("the image is for {os}/{architecture}, this host runs linux/amd64")]
    Platform {
        /// As the image says.
        os: String,
        /// As the image says.
        architecture: String,
    },
}

/// The configuration's digest and the layers, lowest first.
///
/// # Errors
/// When the manifest is not one, or over a limit.
pub fn parse_manifest(bytes: &[u8]) -> Result<(Digest, Vec<Layer>), ManifestError> {
    let manifest = ImageManifest::from_reader(bytes).map_err(|e| ManifestError::Malformed("manifest", e))?;
    if manifest.layers().len() > MAX_LAYERS {
        return Err(ManifestError::Limit(format!(
            "{} layers, at most {MAX_LAYERS}",
            manifest.layers().len()
        )));
    }
    let config = parse_digest(manifest.config().digest().as_ref())?;
    let layers = manifest.layers().iter().map(|layer| {
        let kind = layer.media_type().to_string();
        let compression = match kind.rsplit(['.', '+']).next() {
            _ if !kind.contains("layer") && !kind.contains("rootfs") => {
                return Err(ManifestError::LayerType(kind));
            }
            Some("tar") => Compression::None,
            Some("gzip") => Compression::Gzip,
            Some("zstd") => Compression::Zstd,
            _ => return Err(ManifestError::LayerType(kind)),
        };
        if layer.size() > MAX_LAYER {
            return Err(ManifestError::Limit(format!("a layer of {} bytes", layer.size())));
        }
        Ok(Layer { digest: parse_digest(layer.digest().as_ref())?, size: layer.size(), compression })
    });
    Ok((config, layers.collect::<Result<_, _>>()?))
}

fn parse_digest(text: &str) -> Result<Digest, ManifestError> {
    text.parse().map_err(|_| ManifestError::Digest(text.chars().take(80).collect()))
}

/// What an image says of how to run it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, as `NAME=value`.
    pub env: Vec<String>,
    /// `WorkingDir`.
    pub cwd: String,
    /// `User`.
    pub user: String,
}

/// Reads an image configuration.
///
/// # Errors
/// When it is not one, or for another platform.
pub fn parse_config(bytes: &[u8]) -> Result<RunConfig, ManifestError> {
    let config =
        ImageConfiguration::from_reader(bytes).map_err(|e| ManifestError::Malformed("configuration", e))?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    if os != "linux" || architecture != "amd64" {
        return Err(ManifestError::Platform { os, architecture });
    }
    let Some(run) = config.config() else { return Ok(RunConfig::default()) };
    Ok(RunConfig {
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        cwd: run.working_dir().clone().unwrap_or_default(),
        user: run.user().clone().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(kind: &str) -> String {
        let digest = Digest::of(b"x");
        format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":2}},
            "layers":[{{"mediaType":"{kind}","digest":"{digest}","size":9}}]}}"#
        )
    }

    #[test]
    fn layer_types_of_both_families_are_known() {
        for (kind, compression) in [
            ("application/vnd.oci.image.layer.v1.tar", Compression::None),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
        ] {
            assert_eq!(parse_manifest(manifest(kind).as_bytes()).unwrap().1[0].compression, compression);
        }
        let error = parse_manifest(manifest("application/wasm").as_bytes()).unwrap_err();
        assert!(error.to_string().contains("application/wasm"));
        assert!(parse_manifest(b"{}").is_err());
    }

    #[test]
    fn another_platform_is_refused_by_name() {
        let text = r#"{"os":"linux","architecture":"arm64","rootfs":{"type":"layers","diff_ids":[]}}"#;
        assert!(parse_config(text.as_bytes()).unwrap_err().to_string().contains("arm64"));
        let text = r#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"Cmd":["a"],"User":"1000"}}"#;
        assert_eq!(parse_config(text.as_bytes()).unwrap().user, "1000");
    }
}
