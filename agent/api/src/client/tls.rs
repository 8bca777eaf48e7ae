//! TLS towards one cluster: its CA is the only root.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::{ClientError, ClientIdentity};

pub(super) fn config(ca_pem: &str, identity: Option<&ClientIdentity>) -> Result<ClientConfig, ClientError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca_pem, "CA certificate")? {
        roots
            .add(certificate)
            .map_err(|source| ClientError::BadPem { what: "CA certificate", reason: source.to_string() })?;
    }
    // The provider is named here because no process-wide default is installed: a library has no
    // business choosing one for its user.
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|source| ClientError::Setup(source.to_string()))?
        .with_root_certificates(roots);
    let Some(identity) = identity else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(&identity.certificate_pem, "node certificate")?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())
        .map_err(|source| ClientError::BadPem { what: "node key", reason: source.to_string() })?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|source| ClientError::BadPem { what: "node key", reason: source.to_string() })
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|source| ClientError::BadPem { what, reason: source.to_string() })?;
    if found.is_empty() {
        return Err(ClientError::BadPem { what, reason: "no PEM certificate in it".to_owned() });
    }
    Ok(found)
}
