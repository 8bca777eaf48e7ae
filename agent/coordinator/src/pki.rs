//! The cluster's certificate authority: the coordinator's certificate, the nodes' certificates, and
//! who a peer is.
//!
//! The authority signs two kinds of certificate, told apart by their extended key usage, so that a
//! node's certificate cannot serve as a coordinator's: `serverAuth` for the coordinator, made anew at
//! each start from the addresses kept in the store, and `clientAuth` for nodes, whose common name is
//! the node's name. Nodes keep their private keys; only the public key of a signing request is used,
//! none of the names or extensions it asks for.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lathe_api::artefact::Digest;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// How long certificates are valid. A node's ends with the next join of that name at the latest,
/// so this is not what keeps stolen keys out.
const VALIDITY: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How far back validity begins: hosts whose clocks run behind must still be able to connect.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(2 * 86_400);

/// File of the authority's certificate in the data directory.
pub const CA_FILE: &str = "ca.pem";
/// File of the authority's private key.
pub const CA_KEY_FILE: &str = "ca.key";

/// The authority could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file of the data directory.
    #[error("cannot read {path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
    /// Signing or key generation failed.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(String),
    /// A node's signing request is malformed.
    #[error("not a certificate signing request in PEM: {0}")]
    BadRequest(rcgen::Error),
    /// What the coordinator listens as is not a name or address.
    #[error("{0:?} is not a host name or IP address")]
    BadName(String),
}

/// The authority's certificate and key.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a peer's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The node's name.
    pub name: String,
    /// Digest of the certificate.
    pub fingerprint: Digest,
}

impl Authority {
    /// Makes a new authority: its certificate and key, PEM.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn create() -> Result<(String, String), PkiError> {
        let key = KeyPair::generate()?;
        let mut params = params("Lathe cluster CA");
        // May sign certificates, but no further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    }

    /// Reads the authority from the data directory.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn load(data_dir: &Path) -> Result<Self, PkiError> {
        let read = |name: &str| {
            let path = data_dir.join(name);
            std::fs::read_to_string(&path).map_err(|source| file_error(&path, &source))
        };
        let certificate_pem = read(CA_FILE)?;
        let key = KeyPair::from_pem(&read(CA_KEY_FILE)?)
            .map_err(|source| file_error(&data_dir.join(CA_KEY_FILE), &source))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|source| file_error(&data_dir.join(CA_FILE), &source))?;
        Ok(Self { certificate_pem, issuer })
    }

    /// TLS for the coordinator under these names and addresses. A client certificate is optional,
    /// and verified against the authority when there is one.
    ///
    /// # Errors
    /// When a name is not one.
    pub fn server_tls(&self, names: &[String]) -> Result<ServerConfig, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = params("lathe-coordinator");
        for name in names {
            let named =
                CertificateParams::new(vec![name.clone()]).map_err(|_| PkiError::BadName(name.clone()))?;
            params.subject_alt_names.extend(named.subject_alt_names);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));

        let tls = |source: &dyn std::fmt::Display| PkiError::Tls(source.to_string());
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate()?).map_err(|source| tls(&source))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|source| tls(&source))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|source| tls(&source))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(|source| tls(&source))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Signs a node's request: its certificate in PEM, and the certificate's fingerprint.
    ///
    /// # Errors
    /// When the request is malformed or not signed with its own key.
    pub fn sign_node(&self, csr_pem: &str, name: &str) -> Result<(String, Digest), PkiError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(PkiError::BadRequest)?;
        let mut params = params(name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        request.params = params;
        let certificate = request.signed_by(&self.issuer)?;
        Ok((certificate.pem(), Digest::of(certificate.der())))
    }

    fn certificate(&self) -> Result<CertificateDer<'static>, PkiError> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|source| PkiError::Tls(source.to_string()))
    }
}

/// The node a verified client certificate belongs to.
pub fn node_identity(certificate: &CertificateDer<'_>) -> Option<NodeIdentity> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    Some(NodeIdentity { name, fingerprint: Digest::of(certificate) })
}

fn params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(crate::clock::now_ms());
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = now + VALIDITY;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

fn file_error(path: &Path, reason: &dyn std::fmt::Display) -> PkiError {
    PkiError::File { path: path.display().to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority() -> Authority {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (certificate, key) = Authority::create().expect("made");
        std::fs::write(dir.path().join(CA_FILE), certificate).expect("written");
        std::fs::write(dir.path().join(CA_KEY_FILE), key).expect("written");
        Authority::load(dir.path()).expect("loaded")
    }

    #[test]
    fn a_node_gets_the_name_it_was_given_not_the_one_it_asks_for() {
        let key = KeyPair::generate().expect("key");
        let mut asked = CertificateParams::new(vec!["admin".to_owned()]).expect("params");
        asked.distinguished_name.push(DnType::CommonName, "admin");
        asked.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = asked.serialize_request(&key).expect("request").pem().expect("PEM");
        let (pem, fingerprint) = authority().sign_node(&csr, "n1").expect("signed");
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        let identity = NodeIdentity { name: "n1".to_owned(), fingerprint };
        assert_eq!(node_identity(&der), Some(identity));
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).expect("parses");
        assert!(!parsed.is_ca());
        assert!(parsed.subject_alternative_name().expect("no duplicate").is_none());
    }

    #[test]
    fn nonsense_is_not_signed() {
        let authority = authority();
        for csr in
            ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
        {
            assert!(matches!(authority.sign_node(csr, "n1"), Err(PkiError::BadRequest(_))), "{csr:?}");
        }
        assert!(authority.server_tls(&["bad name!".to_owned(), "ü".to_owned()]).is_err());
    }
}
