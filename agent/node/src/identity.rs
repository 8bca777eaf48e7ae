//! The node's key and certificate, and how it gets them.
//!
//! The key is made here and never leaves the node; the coordinator signs its request against a
//! join token, once. Later starts use what is stored.

use std::path::Path;

use lathe_api::client::{Client, ClientError, ClientIdentity, ClientOptions};
use lathe_api::node::JoinRequest;
use rcgen::{CertificateParams, DnType, KeyPair};

use crate::files::{self, FileError};

/// An identity that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Stored files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The coordinator.
    #[error("cannot join the cluster: {0}")]
    Join(#[from] ClientError),
    /// No token, and none was needed so far.
    #[error("this node has not joined yet: give --join-token-file")]
    NoToken,
    /// Making the key or the request.
    #[error("cannot make the node's key: {0}")]
    Key(#[from] rcgen::Error),
    /// Not text.
    #[error("{0} is not text")]
    NotText(String),
}

/// Reads a small text file.
///
/// # Errors
/// When it is missing or no text.
pub fn read_text(path: &Path) -> Result<String, IdentityError> {
    let bytes = files::read_bounded(path, 1 << 20)?;
    String::from_utf8(bytes).map_err(|_| IdentityError::NotText(path.display().to_string()))
}

/// The stored identity, if the node has joined.
///
/// # Errors
/// When it is there but cannot be read.
pub fn stored(dir: &Path) -> Result<Option<ClientIdentity>, IdentityError> {
    let (certificate, key) = (dir.join("certificate.pem"), dir.join("key.pem"));
    if !certificate.exists() || !key.exists() {
        return Ok(None);
    }
    Ok(Some(ClientIdentity { certificate_pem: read_text(&certificate)?, key_pem: read_text(&key)? }))
}

/// Joins the cluster as `name`, and stores key and certificate in `dir`.
///
/// # Errors
/// When the coordinator refuses the token or the name, or cannot be reached.
pub async fn join(
    dir: &Path,
    coordinator: &str,
    ca_pem: &str,
    token: &str,
    name: &str,
) -> Result<ClientIdentity, IdentityError> {
    files::make_private_dir(dir)?;
    let key = key(&dir.join("key.pem"))?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    let csr_pem = params.serialize_request(&key)?.pem()?;
    let client = Client::new(&ClientOptions {
        address: coordinator.to_owned(),
        ca_pem: ca_pem.to_owned(),
        identity: None,
        token: None,
    })?;
    let request = JoinRequest { token: token.trim().to_owned(), name: name.to_owned(), csr_pem };
    let certificate_pem = client.join(&request).await?.certificate_pem;
    // Last: with it stored the node counts as joined.
    files::write_atomic(&dir.join("certificate.pem"), certificate_pem.as_bytes(), 0o600)?;
    Ok(ClientIdentity { certificate_pem, key_pem: key.serialize_pem() })
}

/// The node's key, made on first use: a join that was cut off goes on with the same one.
fn key(path: &Path) -> Result<KeyPair, IdentityError> {
    if path.exists() {
        return Ok(KeyPair::from_pem(&read_text(path)?)?);
    }
    let key = KeyPair::generate()?;
    files::write_atomic(path, key.serialize_pem().as_bytes(), 0o600)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_key_is_private_and_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let first = key(&path).unwrap().serialize_pem();
        assert_eq!(key(&path).unwrap().serialize_pem(), first);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(stored(dir.path()).unwrap().is_none());
    }
}
