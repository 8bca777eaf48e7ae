//! What went wrong, in one line a person can act on.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError};

use super::Client;
use crate::artefact::Digest;
use crate::problem::Problem;

/// A request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("{0:?} is not a coordinator's address: write HOST:PORT")]
    BadAddress(String),
    /// A certificate or key could not be read.
    #[error("the {what} is malformed: {reason}")]
    BadPem {
        /// Which.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The client itself could not be made.
    #[error("cannot set up the client: {0}")]
    Setup(String),
    /// Nothing could be said to the coordinator.
    #[error("coordinator {address}: {cause}")]
    Unreachable {
        /// `HOST:PORT`.
        address: String,
        /// What happened, the likely cause, what to do.
        cause: String,
    },
    /// It showed a certificate that the cluster's CA did not issue, or refused ours.
    #[error("coordinator {address}: {cause}")]
    Untrusted {
        /// `HOST:PORT`.
        address: String,
        /// Which side refused which certificate, and why.
        cause: String,
    },
    /// It answered with an error.
    #[error("coordinator {address}: {problem}")]
    Refused {
        /// `HOST:PORT`.
        address: String,
        /// The answer.
        problem: Box<Problem>,
    },
    /// It answered with something that is no answer.
    #[error(
        "coordinator {address} gave an answer that cannot be read: {reason}; is it a Lathe coordinator of this version?"
    )]
    BadAnswer {
        /// `HOST:PORT`.
        address: String,
        /// Why.
        reason: String,
    },
    /// A blob's content is not what its digest says.
    #[error("blob {expected} from {origin} is damaged: its content is {actual}")]
    Damaged {
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
        /// File or coordinator.
        origin: String,
    },
    /// A local file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ClientError {
    /// The status of a refusal; none if no answer came.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { problem, .. } => Some(problem.status),
            _ => None,
        }
    }

    /// The problem document of a refusal.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused { problem, .. } => Some(problem),
            _ => None,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything: the
    /// coordinator is away, or is overloaded.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { problem, .. } => matches!(problem.status, 429 | 500..=599),
            _ => false,
        }
    }
}

impl Client {
    pub(super) fn error(&self, source: &reqwest::Error) -> ClientError {
        let address = self.address().to_owned();
        if let Some(tls) = find::<rustls::Error>(source) {
            return ClientError::Untrusted { address, cause: tls_cause(tls) };
        }
        if source.is_decode() {
            return ClientError::BadAnswer { address, reason: root_cause(source) };
        }
        let io = find::<io::Error>(source).map(io::Error::kind);
        let cause = match io {
            Some(io::ErrorKind::ConnectionRefused) => {
                "connection refused: nothing listens there; is lathe-coordinator running?".to_owned()
            }
            Some(io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
                "no route to it: check the address and this machine's network".to_owned()
            }
            _ if source.is_timeout() && source.is_connect() => {
                "no answer to the connection: the host is down, or a firewall is in between".to_owned()
            }
            _ if source.is_timeout() => "it stopped answering: hung, overloaded or cut off".to_owned(),
            _ if source.is_connect() => {
                format!("cannot connect: {}; check the address", root_cause(source))
            }
            _ => format!(
                "the connection broke ({}): the coordinator may have been stopped or restarted",
                root_cause(source)
            ),
        };
        ClientError::Unreachable { address, cause }
    }

    pub(super) fn bad_answer(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::BadAnswer { address: self.address().to_owned(), reason: reason.to_string() }
    }

    /// Reads the problem document of an unsuccessful response.
    pub(super) async fn problem(&self, response: reqwest::Response) -> ClientError {
        // Far above any problem document; an error page of something else is cut off here.
        const MAX_PROBLEM_BYTES: usize = 64 << 10;
        let status = response.status();
        let problem = match self.body(response, MAX_PROBLEM_BYTES).await {
            Ok(body) => serde_json::from_slice(&body).unwrap_or_else(|_| Problem {
                title: status.canonical_reason().unwrap_or("error").to_owned(),
                status: status.as_u16(),
                detail: None,
                field: None,
            }),
            Err(error) => return error,
        };
        ClientError::Refused { address: self.address().to_owned(), problem: Box::new(problem) }
    }
}

fn tls_cause(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "its certificate is not of this cluster: the CA file given here did not issue it; wrong \
              address, or the CA file of another cluster"
            .to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "its certificate has expired (or this machine's clock is wrong)".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "its certificate is not valid yet: this machine's clock is behind".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is of this cluster but not for this address: make the cluster with this \
              address among its --address values, or use one of those"
            .to_owned(),
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied,
        ) => "it refused this node's certificate: it is of another cluster; join again with a join token \
              of this one"
            .to_owned(),
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "this node's certificate has expired; join again with a join token".to_owned()
        }
        rustls::Error::InvalidMessage(_) => "what listens there does not speak TLS".to_owned(),
        other => format!("TLS failed: {other}"),
    }
}

/// The first error of this type in the chain, looking also into what an [`io::Error`] carries:
/// that is where rustls' errors travel.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        if let Some(carried) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && let Some(found) = find::<T>(carried)
        {
            return Some(found);
        }
        current = error.source();
    }
    None
}

/// The innermost message: the outer ones repeat the URL and say "error sending request".
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}
