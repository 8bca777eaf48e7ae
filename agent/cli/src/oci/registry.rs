//! Images in a registry: pulled into an image layout on this machine, and from there on handled like
//! any other. The layout goes through the same digest checks, so a registry is not trusted.

use std::path::Path;

use lathe_api::artefact::Digest;
use oci_client::client::{ClientConfig, ClientProtocol, linux_amd64_resolver};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::fs;

/// The most bytes a layer may have: a registry must not fill the disk.
const MAX_BLOB: i64 = 64 << 30;

/// A pull that failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The reference is none.
    #[error("{0:?} is neither a file nor an image reference like registry.example/team/image:tag")]
    BadReference(String),
    /// The registry refused or could not be reached.
    #[error("{reference}: {reason}")]
    Refused {
        /// The image.
        reference: String,
        /// What the registry or the network said.
        reason: String,
    },
    /// The local disk refused.
    #[error("cannot write the pulled image: {0}")]
    Disk(#[from] std::io::Error),
}

/// Credentials for the registry.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// User name; absent means anonymous.
    pub username: Option<String>,
    /// Password or access token.
    pub password: Option<String>,
}

/// Pulls the linux/amd64 image behind `reference` into an image layout at `dir`, calling `progress` with the
/// bytes of each blob that has arrived.
///
/// # Errors
/// When the reference is none, or the registry refuses; `dir` may then hold part of the image.
pub async fn pull(
    reference: &str,
    dir: &Path,
    plain_http: bool,
    credentials: &Credentials,
    mut progress: impl FnMut(u64),
) -> Result<(), RegistryError> {
    let bad = |_| RegistryError::BadReference(reference.to_owned());
    let image: Reference = reference.parse().map_err(bad)?;
    let refused = |reason: String| RegistryError::Refused { reference: reference.to_owned(), reason };
    // oci-client takes the process's default. Err means that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::new(ClientConfig {
        protocol: if plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
        platform_resolver: Some(Box::new(linux_amd64_resolver)),
        ..ClientConfig::default()
    });
    let auth = match (&credentials.username, &credentials.password) {
        (Some(username), Some(password)) => RegistryAuth::Basic(username.clone(), password.clone()),
        _ => RegistryAuth::Anonymous,
    };
    let say = |error: oci_client::errors::OciDistributionError| refused(error.to_string());
    let (manifest, digest) = client.pull_image_manifest(&image, &auth).await.map_err(say)?;
    let exact: Reference =
        format!("{}/{}@{digest}", image.resolve_registry(), image.repository()).parse().map_err(bad)?;
    let media_type = manifest.media_type.clone().unwrap_or_else(|| OCI_MANIFEST.to_owned());
    let (text, _) = client.pull_manifest_raw(&exact, &auth, &[&media_type]).await.map_err(say)?;
    let digest: Digest = digest.parse().map_err(|error| refused(format!("{error}")))?;

    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).await?;
    fs::write(blobs.join(digest.hex()), &text).await?;
    for descriptor in std::iter::once(&manifest.config).chain(&manifest.layers) {
        if !(0..=MAX_BLOB).contains(&descriptor.size) {
            return Err(refused(format!("a layer of {} bytes is over the limit", descriptor.size)));
        }
        let blob: Digest = descriptor.digest.parse().map_err(|error| refused(format!("{error}")))?;
        let path = blobs.join(blob.hex());
        if fs::try_exists(&path).await? {
            continue;
        }
        let file = fs::File::create(&path).await?;
        client.pull_blob(&exact, descriptor, file).await.map_err(say)?;
        progress(descriptor.size.unsigned_abs());
    }
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": text.len(),
            "platform": {"architecture": "amd64", "os": "linux"},
        }],
    });
    fs::write(dir.join("index.json"), index.to_string()).await?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).await?;
    Ok(())
}

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::oci::LocalImage;

    /// A registry on loopback that serves one image by tag and by digest, for as long as the test runs.
    fn registry(layer: &'static [u8], layer_digest: Digest) -> (String, Digest) {
        let config = b"{}";
        let config_digest = Digest::of(config);
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":2}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer_digest}","size":{}}}]}}"#,
            layer.len()
        );
        let digest = Digest::of(manifest.as_bytes());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let request = lines.next().unwrap().unwrap();
                while !lines.next().unwrap().unwrap().is_empty() {}
                let path = request.split(' ').nth(1).unwrap();
                let (status, kind, body): (&str, &str, &[u8]) = if path == "/v2/" {
                    ("200 OK", "application/json", b"{}")
                } else if path.ends_with("/manifests/v1") || path.ends_with(&format!("/manifests/{digest}")) {
                    ("200 OK", OCI_MANIFEST, manifest.as_bytes())
                } else if path.ends_with(&format!("/blobs/{config_digest}")) {
                    ("200 OK", "application/octet-stream", config)
                } else if path.ends_with(&format!("/blobs/{layer_digest}")) {
                    ("200 OK", "application/octet-stream", layer)
                } else {
                    ("404 Not Found", "application/json", br#"{"errors":[]}"#)
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
                     Connection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all(head.as_bytes()).unwrap();
                if !request.starts_with("HEAD") {
                    stream.write_all(body).unwrap();
                }
            }
        });
        (format!("{address}/team/image:v1"), digest)
    }

    #[tokio::test]
    async fn a_pulled_image_is_an_ordinary_layout() {
        let (reference, digest) = registry(b"a layer", Digest::of(b"a layer"));
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = 0;
        pull(&reference, dir.path(), true, &Credentials::default(), |n| bytes += n).await.unwrap();
        let image = LocalImage::open(dir.path()).unwrap();
        assert_eq!((image.manifest, image.layers_bytes, bytes), (digest, 7, 9));
    }

    #[tokio::test]
    async fn a_registry_that_lies_or_is_missing_is_named() {
        let (reference, _) = registry(b"a layer", Digest::of(b"another layer"));
        let dir = tempfile::tempdir().unwrap();
        let none = Credentials::default();
        let error = pull(&reference, dir.path(), true, &none, drop).await.unwrap_err();
        assert!(matches!(&error, RegistryError::Refused { .. }), "{error}");
        let missing = reference.replace(":v1", ":v2");
        let error = pull(&missing, dir.path(), true, &none, drop).await.unwrap_err();
        assert!(error.to_string().contains(":v2"), "{error}");
        let error = pull("not a reference", dir.path(), true, &none, drop).await.unwrap_err();
        assert!(matches!(error, RegistryError::BadReference(_)), "{error}");
    }
}
