//! What handlers take out of requests: who asks, and bounded bodies.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header;
use axum::http::request::Parts;
use http_body_util::{BodyExt, Limited};
use lathe_api::token::{TokenInfo, TokenKind};
use serde::de::DeserializeOwned;

use super::error::ApiError;
use crate::coordinator::Coordinator;
use crate::pki::NodeIdentity;
use crate::tokens;

/// The client certificate of the connection, if it showed one; verified against the cluster's CA.
#[derive(Clone, Debug, Default)]
pub struct Peer(pub Option<NodeIdentity>);

/// A person with a valid user or admin token.
#[derive(Clone, Debug)]
pub struct User(pub TokenInfo);

impl User {
    /// Whether they may see and change what belongs to this tenant.
    pub fn may(&self, tenant: &str) -> bool {
        self.is_admin() || self.0.tenant == tenant
    }

    /// Whether they operate the cluster.
    pub fn is_admin(&self) -> bool {
        self.0.kind == TokenKind::Admin
    }
}

/// A person with an admin token.
#[derive(Clone, Debug)]
pub struct Admin(pub TokenInfo);

/// A registered node, by the certificate of its last join.
#[derive(Clone, Debug)]
pub struct AgentNode(pub String);

/// A node or a person.
#[derive(Clone, Debug)]
pub struct Anyone;

impl FromRequestParts<Arc<Coordinator>> for User {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, coordinator: &Arc<Coordinator>) -> Result<Self, ApiError> {
        let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| value.strip_prefix("Bearer ")).ok_or_else(|| {
            ApiError::unauthorized("a bearer token is needed: `Authorization: Bearer TOKEN`")
        })?;
        let info = tokens::verify(&*coordinator.store, token.trim(), "bearer").await?;
        match info.kind {
            TokenKind::User | TokenKind::Admin => Ok(Self(info)),
            TokenKind::Join => Err(ApiError::forbidden("this is a join token; people need a user token")),
        }
    }
}

impl FromRequestParts<Arc<Coordinator>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, coordinator: &Arc<Coordinator>) -> Result<Self, ApiError> {
        let User(info) = User::from_request_parts(parts, coordinator).await?;
        match info.kind {
            TokenKind::Admin => Ok(Self(info)),
            _ => Err(ApiError::forbidden("this needs an admin token")),
        }
    }
}

impl FromRequestParts<Arc<Coordinator>> for AgentNode {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, coordinator: &Arc<Coordinator>) -> Result<Self, ApiError> {
        let peer = parts.extensions.get::<Peer>().and_then(|peer| peer.0.clone());
        let peer = peer.ok_or_else(|| {
            ApiError::unauthorized("a node's certificate is needed: join with a join token first")
        })?;
        // Joining returns when the view has it.
        let known = coordinator.view.read(|contents| contents.nodes.get(&peer.name).cloned());
        let known = known.ok_or_else(|| {
            ApiError::unauthorized(format!("node {:?} is not registered; join again", peer.name))
        })?;
        if known.value.certificate != peer.fingerprint {
            return Err(ApiError::unauthorized(format!(
                "this certificate of node {:?} was replaced by a later join; join again",
                peer.name
            )));
        }
        Ok(Self(peer.name))
    }
}

impl FromRequestParts<Arc<Coordinator>> for Anyone {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, coordinator: &Arc<Coordinator>) -> Result<Self, ApiError> {
        if parts.extensions.get::<Peer>().is_some_and(|peer| peer.0.is_some()) {
            AgentNode::from_request_parts(parts, coordinator).await?;
        } else {
            User::from_request_parts(parts, coordinator).await?;
        }
        Ok(Self)
    }
}

/// How long a body may take: a caller that sends a byte a minute would hold its memory for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON body of at most `LIMIT` bytes. Errors name the field.
#[derive(Clone, Debug)]
pub struct Json<T, const LIMIT: usize>(pub T);

impl<T: DeserializeOwned, const LIMIT: usize> FromRequest<Arc<Coordinator>> for Json<T, LIMIT> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &Arc<Coordinator>) -> Result<Self, ApiError> {
        let body = Limited::new(request.into_body(), LIMIT).collect();
        let body = tokio::time::timeout(BODY_TIMEOUT, body)
            .await
            .map_err(|_| ApiError::bad_request("the body did not arrive in time"))?
            .map_err(|error| {
                if error.is::<http_body_util::LengthLimitError>() {
                    ApiError::too_large(format!("the body is longer than {LIMIT} bytes"))
                } else {
                    ApiError::bad_request(format!("the body broke off: {error}"))
                }
            })?
            .to_bytes();
        let mut deserializer = serde_json::Deserializer::from_slice(&body);
        let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let path = error.path().to_string();
            let message = one_line(&error.inner().to_string());
            if error.inner().is_data() {
                ApiError::field(field_of(&path, &message), message)
            } else {
                ApiError::bad_request(format!("the body is not JSON: {message}"))
            }
        })?;
        deserializer
            .end()
            .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
        Ok(Self(value))
    }
}

/// The path, completed by a missing or unknown field's name, which serde gives in the message only.
fn field_of(path: &str, message: &str) -> String {
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
    match (path, missing) {
        (".", Some(name)) => name.to_owned(),
        (path, Some(name)) => format!("{path}.{name}"),
        (path, None) => path.to_owned(),
    }
}

fn one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}
