//! Tokens, for administrators.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use lathe_api::problem::Problem;
use lathe_api::token::{TokenCreated, TokenInfo, TokenRequest};

use super::error::ApiError;
use super::extract::{Admin, Json};
use crate::check::check_name;
use crate::coordinator::Coordinator;
use crate::tokens::{self, MAX_EXPIRES_SECONDS};

const REQUEST_BYTES: usize = 64 << 10;

/// Makes a token. The answer is the only time it is shown.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = TokenRequest,
    responses((status = 201, body = TokenCreated), (status = "4XX", body = Problem)))]
pub async fn create(
    State(coordinator): State<Arc<Coordinator>>,
    _: Admin,
    Json(request): Json<TokenRequest, REQUEST_BYTES>,
) -> Result<(StatusCode, axum::Json<TokenCreated>), ApiError> {
    check(&request)?;
    let created = tokens::create(&*coordinator.store, &request).await?;
    tracing::info!(token = created.info.id, kind = ?request.kind, tenant = request.tenant, "token made");
    Ok((StatusCode::CREATED, axum::Json(created)))
}

/// Checks what a token is asked to be.
///
/// # Errors
/// Names the field.
pub fn check(request: &TokenRequest) -> Result<(), ApiError> {
    check_name(&request.tenant).map_err(|reason| ApiError::field("tenant", reason))?;
    if !(1..=MAX_EXPIRES_SECONDS).contains(&request.expires_seconds) {
        let detail = format!("{}: 1 to {MAX_EXPIRES_SECONDS} seconds", request.expires_seconds);
        return Err(ApiError::field("expires_seconds", detail));
    }
    Ok(())
}

/// All tokens, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens",
    responses((status = 200, body = Vec<TokenInfo>), (status = "4XX", body = Problem)))]
pub async fn list(
    State(coordinator): State<Arc<Coordinator>>,
    _: Admin,
) -> Result<axum::Json<Vec<TokenInfo>>, ApiError> {
    Ok(axum::Json(tokens::list(&*coordinator.store).await?))
}

/// Revokes a token.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "tokens", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn revoke(
    State(coordinator): State<Arc<Coordinator>>,
    _: Admin,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    if !tokens::revoke(&*coordinator.store, &id).await? {
        return Err(ApiError::not_found("token", &id));
    }
    tracing::info!(token = id, "token revoked");
    Ok(StatusCode::NO_CONTENT)
}
