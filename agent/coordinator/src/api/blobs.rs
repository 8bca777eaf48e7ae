//! Blobs over HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use lathe_api::artefact::Digest;
use lathe_api::problem::Problem;

use super::error::ApiError;
use super::extract::{Anyone, User};
use crate::coordinator::Coordinator;

/// An upload that stands still for so long has broken off.
const UPLOAD_IDLE: Duration = Duration::from_secs(60);

/// A blob's content; with `HEAD`, its length.
#[utoipa::path(get, path = "/v1/blobs/{digest}", tag = "blobs", params(("digest" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
              (status = "4XX", body = Problem)))]
pub async fn get(
    State(coordinator): State<Arc<Coordinator>>,
    _: Anyone,
    Path(digest): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let digest = parse(&digest)?;
    let missing = || ApiError::not_found("blob", &digest.to_string());
    let headers = |length: u64| {
        [
            (header::CONTENT_LENGTH, length.to_string()),
            (header::CONTENT_TYPE, "application/octet-stream".into()),
        ]
    };
    if request.method() == axum::http::Method::HEAD {
        let length = coordinator.blobs.size(&digest).await?.ok_or_else(missing)?;
        return Ok((headers(length), Body::empty()).into_response());
    }
    let (length, content) = coordinator.blobs.get(&digest).await?.ok_or_else(missing)?;
    Ok((headers(length), Body::from_stream(content)).into_response())
}

/// Stores a blob. Content that does not match its digest is refused and removed.
#[utoipa::path(put, path = "/v1/blobs/{digest}", tag = "blobs", params(("digest" = String, Path)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201), (status = "4XX", body = Problem)))]
pub async fn put(
    State(coordinator): State<Arc<Coordinator>>,
    _: User,
    Path(digest): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let digest = parse(&digest)?;
    let content = Box::pin(bounded(request.into_body()));
    coordinator.blobs.put(&digest, content).await?;
    Ok(StatusCode::CREATED)
}

/// The body, ended by an error when it stands still.
fn bounded(body: Body) -> impl Stream<Item = Result<Bytes, String>> {
    futures_util::stream::unfold(Some(body.into_data_stream()), |stream| async move {
        let mut stream = stream?;
        match tokio::time::timeout(UPLOAD_IDLE, stream.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(stream))),
            Ok(Some(Err(error))) => Some((Err(error.to_string()), None)),
            Ok(None) => None,
            Err(_) => Some((Err(format!("nothing came for {} s", UPLOAD_IDLE.as_secs())), None)),
        }
    })
}

fn parse(digest: &str) -> Result<Digest, ApiError> {
    digest
        .parse()
        .map_err(|error: lathe_api::artefact::ParseDigestError| ApiError::bad_request(error.to_string()))
}
