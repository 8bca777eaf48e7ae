//! Errors on the wire: problem documents (RFC 9457).

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lathe_api::problem::Problem;

use crate::blobs::BlobError;
use crate::dry_run::DryRunError;
use crate::logs::LogError;
use crate::observe::JoinError;
use crate::pki::PkiError;
use crate::store::StoreError;
use crate::tokens::TokenError;

/// An error as the API answers it.
#[derive(Debug)]
pub struct ApiError(Box<Problem>);

impl ApiError {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            title: status.canonical_reason().unwrap_or("error").to_lowercase(),
            status: status.as_u16(),
            detail: Some(detail.into()),
            field: None,
        }))
    }

    /// 422: a field of the body is at fault. `field` is its dotted path.
    pub fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail);
        error.0.title = "invalid field".to_owned();
        error.0.field = Some(field.into());
        error
    }

    /// 400: not what this endpoint takes.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 401: who is this?
    pub fn unauthorized(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    /// 403: known, but may not.
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, detail)
    }

    /// 404.
    pub fn not_found(what: &str, name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no {what} {name:?}"))
    }

    /// 409: not as things are now.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    /// 413.
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    }

    /// 500; what happened is logged, for it concerns the operator, not the caller.
    fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(%error, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the coordinator failed; its log says why")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let content_type = HeaderValue::from_static("application/problem+json");
        (status, [(header::CONTENT_TYPE, content_type)], body).into_response()
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Contended(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
            other => Self::internal(&other),
        }
    }
}

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Unknown(_) | TokenError::Expired { .. } => Self::unauthorized(error.to_string()),
            TokenError::Store(error) => error.into(),
            TokenError::NoRandomness => Self::internal(&error),
        }
    }
}

impl From<JoinError> for ApiError {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Taken(_) | JoinError::NoSubnet(_) => Self::conflict(error.to_string()),
            JoinError::Store(error) => error.into(),
        }
    }
}

impl From<PkiError> for ApiError {
    fn from(error: PkiError) -> Self {
        match error {
            PkiError::BadRequest(_) => Self::field("csr_pem", error.to_string()),
            other => Self::internal(&other),
        }
    }
}

impl From<BlobError> for ApiError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Mismatch { .. } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            BlobError::TooLong { .. } => Self::too_large(error.to_string()),
            BlobError::Upload(_) => Self::bad_request(error.to_string()),
            BlobError::File { .. } => Self::internal(&error),
        }
    }
}

impl From<DryRunError> for ApiError {
    fn from(error: DryRunError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
    }
}

impl From<LogError> for ApiError {
    fn from(error: LogError) -> Self {
        Self::internal(&error)
    }
}
