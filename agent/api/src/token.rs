//! Tokens: what people and joining nodes show the coordinator.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// A node joins with it.
    Join,
    /// A person of one tenant: sees and cancels that tenant's jobs only.
    User,
    /// An operator: every tenant's jobs, and tokens.
    Admin,
}

/// Body of `POST /v1/tokens` (admin).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What it is good for.
    pub kind: TokenKind,
    /// Whose jobs its holder submits; `[a-z0-9-]`, 1 to 63 characters. Ignored for join tokens.
    #[serde(default = "default_tenant")]
    pub tenant: String,
    /// For how long it is accepted; 1 second to 10 years.
    pub expires_seconds: u64,
}

fn default_tenant() -> String {
    "default".to_owned()
}

/// The answer: the only time the token itself is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    /// The token; keep it secret.
    pub token: String,
    /// What the coordinator keeps of it.
    pub info: TokenInfo,
}

/// A token as the API shows it. The coordinator itself has only a salted hash of the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// Names the token, for revoking it. Not secret.
    pub id: String,
    /// What it is good for.
    pub kind: TokenKind,
    /// Whose.
    pub tenant: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// When it stops being accepted.
    pub expires_ms: u64,
}
