//! Tokens: `KIND-ID-SECRET`, of which the store has a salted hash of the secret.
//!
//! The secret has 256 random bits, so a plain SHA-256 is enough: there is nothing to guess, and the
//! salt keeps equal hashes from meaning equal secrets. The ID in the token finds the record, so that
//! no lookup depends on the secret.

use lathe_api::artefact::Digest;
use lathe_api::token::{TokenCreated, TokenInfo, TokenKind, TokenRequest};

use crate::clock::now_ms;
use crate::records::{self, TOKENS, TokenRecord};
use crate::store::{Outcome, Store, StoreError, Transaction, Write};

/// Longest life of a token: ten years.
pub const MAX_EXPIRES_SECONDS: u64 = 10 * 365 * 86_400;

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It is no token of this cluster, or was revoked.
    #[error("the {0} token is not one of this cluster, or was revoked")]
    Unknown(&'static str),
    /// It was one.
    #[error("the {kind} token expired {} ago; make another with `lathe-coordinator token create --kind {kind}`", ago(*.ago_ms))]
    Expired {
        /// What it was good for.
        kind: &'static str,
        /// Milliseconds since.
        ago_ms: u64,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    NoRandomness,
}

fn ago(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// The kind as in tokens and on the command line.
pub fn kind_name(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::Join => "join",
        TokenKind::User => "user",
        TokenKind::Admin => "admin",
    }
}

/// Makes a token and stores its hash.
///
/// # Errors
/// When the store fails.
pub async fn create(store: &dyn Store, request: &TokenRequest) -> Result<TokenCreated, TokenError> {
    let (id, salt, secret) = (random_hex(6)?, random_hex(16)?, random_hex(32)?);
    let created_ms = now_ms();
    let info = TokenInfo {
        id: id.clone(),
        kind: request.kind,
        tenant: request.tenant.clone(),
        created_ms,
        expires_ms: created_ms.saturating_add(request.expires_seconds.saturating_mul(1000)),
    };
    let record = TokenRecord { info: info.clone(), hash: hash(&salt, &secret), salt };
    let key = format!("{TOKENS}{id}");
    let transaction =
        Transaction { expect: vec![(key.clone(), None)], writes: vec![records::put(key, &record)?] };
    match store.commit(transaction).await? {
        Outcome::Committed(_) => {
            Ok(TokenCreated { token: format!("{}-{id}-{secret}", kind_name(request.kind)), info })
        }
        Outcome::Conflict { key } => Err(StoreError::Contended(key).into()),
    }
}

/// What a token is good for, if it is one. `role` is what the caller expects, for the message.
///
/// # Errors
/// When it is unknown, revoked or expired.
pub async fn verify(store: &dyn Store, token: &str, role: &'static str) -> Result<TokenInfo, TokenError> {
    let mut parts = token.splitn(3, '-');
    let (Some(_), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(TokenError::Unknown(role));
    };
    if id.is_empty() || id.len() > 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(TokenError::Unknown(role));
    }
    let record = records::load::<TokenRecord>(store, &format!("{TOKENS}{id}")).await?;
    let record = record.ok_or(TokenError::Unknown(role))?.value;
    // Digests of secrets the caller does not know are compared: the time this takes tells nothing.
    if hash(&record.salt, secret) != record.hash {
        return Err(TokenError::Unknown(role));
    }
    let now = now_ms();
    if now >= record.info.expires_ms {
        let ago_ms = now - record.info.expires_ms;
        return Err(TokenError::Expired { kind: kind_name(record.info.kind), ago_ms });
    }
    Ok(record.info)
}

/// All tokens, also expired ones.
///
/// # Errors
/// When the store fails.
pub async fn list(store: &dyn Store) -> Result<Vec<TokenInfo>, StoreError> {
    let records = records::load_all::<TokenRecord>(store, TOKENS).await?;
    Ok(records.into_iter().map(|(_, record)| record.value.info).collect())
}

/// Removes a token: from now on it is unknown. Whether there was one.
///
/// # Errors
/// When the store fails.
pub async fn revoke(store: &dyn Store, id: &str) -> Result<bool, StoreError> {
    let key = format!("{TOKENS}{id}");
    let Some(entry) = store.get(&key).await? else { return Ok(false) };
    let transaction = Transaction {
        expect: vec![(key.clone(), Some(entry.revision))],
        writes: vec![Write::Delete { key }],
    };
    // A conflict means that somebody else revoked it just now.
    store.commit(transaction).await.map(|_| true)
}

fn hash(salt: &str, secret: &str) -> Digest {
    Digest::of(format!("{salt}:{secret}").as_bytes())
}

/// Random bytes from the system, in hexadecimal.
///
/// # Errors
/// When the system has none.
pub fn random_hex(bytes: usize) -> Result<String, TokenError> {
    let mut buffer = vec![0; bytes];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut buffer)
        .map_err(|_| TokenError::NoRandomness)?;
    Ok(buffer.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::redb::RedbStore;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_token_works_until_it_expires_or_is_revoked_and_only_whole() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = RedbStore::open(&dir.path().join("s")).expect("a store");
        let request =
            |expires_seconds| TokenRequest { kind: TokenKind::User, tenant: "a".into(), expires_seconds };
        let created = create(&store, &request(3600)).await.expect("made");
        assert_eq!(verify(&store, &created.token, "user").await.expect("good"), created.info);

        let secret = created.token.rsplit('-').next().expect("a secret");
        let stored = store.get(&format!("{TOKENS}{}", created.info.id)).await.expect("works").expect("there");
        assert!(!String::from_utf8_lossy(&stored.value).contains(secret), "the secret is in the store");

        for bad in ["", "user", "user-", &created.token[..created.token.len() - 1], "user-../nodes/x-1"] {
            assert!(matches!(verify(&store, bad, "user").await, Err(TokenError::Unknown(_))), "{bad}");
        }
        let expired = create(&store, &request(0)).await.expect("made");
        let error = verify(&store, &expired.token, "user").await.expect_err("expired").to_string();
        assert!(error.contains("expired") && error.contains("token create"), "{error}");

        assert!(revoke(&store, &created.info.id).await.expect("works"));
        assert!(verify(&store, &created.token, "user").await.is_err());
        assert!(!revoke(&store, &created.info.id).await.expect("works"));
    }
}
