//! Makes a cluster: its certificate authority, store, first tokens.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lathe_api::token::{TokenKind, TokenRequest};
use serde::Serialize;

use crate::network::Cidr;
use crate::pki::{Authority, CA_FILE, CA_KEY_FILE, PkiError};
use crate::records::{self, CLUSTER, ClusterRecord};
use crate::store::redb::RedbStore;
use crate::store::{Store, StoreError, Transaction};
use crate::tokens::{self, TokenError};

/// File of the store in the data directory.
pub const STORE_FILE: &str = "store.redb";
/// File of the first administrator's token.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// File of the first join token.
pub const JOIN_TOKEN_FILE: &str = "join.token";

/// Files `init` makes; also what it removes when it cannot finish.
const FILES: [&str; 5] = [CA_FILE, CA_KEY_FILE, STORE_FILE, ADMIN_TOKEN_FILE, JOIN_TOKEN_FILE];

/// What to make.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// Where; must not hold a cluster.
    pub data_dir: PathBuf,
    /// `HOST:PORT` first; then further names and addresses, with or without ports.
    pub addresses: Vec<String>,
    /// Sandboxes' addresses.
    pub cidr: Cidr,
    /// How long the first tokens live.
    pub token_expires_seconds: u64,
}

/// What was made; printed as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Initialized {
    /// `HOST:PORT` for agents and people.
    pub address: String,
    /// The CA's certificate: give it to agents and people.
    pub ca: PathBuf,
    /// File with the administrator's token.
    pub admin_token: PathBuf,
    /// File with the join token for agents.
    pub join_token: PathBuf,
}

/// The cluster could not be made; nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one already.
    #[error("{} already holds a cluster ({file} exists): choose another --data-dir, or remove it first", dir.display())]
    Exists {
        /// Where.
        dir: PathBuf,
        /// What was found.
        file: &'static str,
    },
    /// An address is malformed.
    #[error("--address {0:?}: write HOST:PORT, then further names after commas")]
    BadAddress(String),
    /// A file could not be made.
    #[error("cannot write {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Tokens.
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// Makes the cluster. Call within a Tokio runtime.
///
/// # Errors
/// When the directory holds one, an address is malformed, or a file cannot be written.
pub async fn init(options: &InitOptions) -> Result<Initialized, InitError> {
    let cluster = cluster_record(options)?;
    let dir = &options.data_dir;
    for file in FILES {
        if dir.join(file).exists() {
            return Err(InitError::Exists { dir: dir.clone(), file });
        }
    }
    let made_dir = !dir.exists();
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| InitError::File { path: dir.clone(), source })?;
    let result = fill(dir, &cluster, options.token_expires_seconds).await;
    if result.is_err() {
        // Best effort: the error that matters is the first one.
        for file in FILES {
            let _ = fs::remove_file(dir.join(file));
        }
        if made_dir {
            let _ = fs::remove_dir(dir);
        }
    }
    result
}

async fn fill(dir: &Path, cluster: &ClusterRecord, expires_seconds: u64) -> Result<Initialized, InitError> {
    let (certificate, key) = Authority::create()?;
    write(dir, CA_KEY_FILE, &key, 0o600)?;
    write(dir, CA_FILE, &certificate, 0o644)?;
    // The names must be good for a certificate now, not at the first start.
    Authority::load(dir)?.server_tls(&cluster.names)?;

    let store = RedbStore::open(&dir.join(STORE_FILE))?;
    let transaction = Transaction { expect: vec![], writes: vec![records::put(CLUSTER, cluster)?] };
    let _ = store.commit(transaction).await?;
    for (kind, file) in [(TokenKind::Admin, ADMIN_TOKEN_FILE), (TokenKind::Join, JOIN_TOKEN_FILE)] {
        let request = TokenRequest { kind, tenant: "default".to_owned(), expires_seconds };
        let created = tokens::create(&store, &request).await?;
        write(dir, file, &format!("{}\n", created.token), 0o600)?;
    }
    Ok(Initialized {
        address: cluster.address.clone(),
        ca: dir.join(CA_FILE),
        admin_token: dir.join(ADMIN_TOKEN_FILE),
        join_token: dir.join(JOIN_TOKEN_FILE),
    })
}

fn cluster_record(options: &InitOptions) -> Result<ClusterRecord, InitError> {
    let mut names = Vec::new();
    for address in &options.addresses {
        let name = host(address).ok_or_else(|| InitError::BadAddress(address.clone()))?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let address = options.addresses.first().ok_or_else(|| InitError::BadAddress(String::new()))?;
    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if !has_port {
        return Err(InitError::BadAddress(address.clone()));
    }
    // The operator's own tools on the coordinator's machine.
    for local in ["localhost", "127.0.0.1"] {
        if !names.iter().any(|name| name == local) {
            names.push(local.to_owned());
        }
    }
    Ok(ClusterRecord { names, address: address.clone(), cidr: options.cidr.to_string() })
}

/// The host of `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
fn host(address: &str) -> Option<String> {
    if let Some(rest) = address.strip_prefix('[') {
        let (ip, port) = rest.split_once(']')?;
        let port = port.strip_prefix(':');
        return (port.is_none_or(|port| port.parse::<u16>().is_ok())
            && ip.parse::<std::net::Ipv6Addr>().is_ok())
        .then(|| ip.to_owned());
    }
    let host = match address.split_once(':') {
        Some((host, port)) => {
            port.parse::<u16>().ok()?;
            host
        }
        None => address,
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    (!host.is_empty() && host.len() <= 253 && host.bytes().all(plain)).then(|| host.to_owned())
}

fn write(dir: &Path, name: &str, content: &str, mode: u32) -> Result<(), InitError> {
    let path = dir.join(name);
    let open = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
    open.and_then(|mut file| {
        file.write_all(content.as_bytes())?;
        file.sync_all()
    })
    .map_err(|source| InitError::File { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, addresses: &[&str]) -> InitOptions {
        InitOptions {
            data_dir: dir.join("data"),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            cidr: "10.42.0.0/16".parse().expect("a CIDR"),
            token_expires_seconds: 3600,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn secrets_are_for_their_owner_only_and_a_second_init_changes_nothing() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = options(dir.path(), &["127.0.0.1:7700", "coordinator.example"]);
        let made = init(&options).await.expect("made");
        for secret in [&made.admin_token, &made.join_token, &options.data_dir.join(CA_KEY_FILE)] {
            let mode = fs::metadata(secret).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", secret.display());
        }
        let before = fs::read(&made.ca).expect("there");
        let error = init(&options).await.expect_err("it exists").to_string();
        assert!(error.contains("already holds a cluster"), "{error}");
        assert_eq!(fs::read(&made.ca).expect("there"), before);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_bad_address_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for bad in [&[][..], &["host"], &["host:99999"], &["bad name:1"], &[":1"], &["a:1", "b c"]] {
            assert!(init(&options(dir.path(), bad)).await.is_err(), "{bad:?} was accepted");
            assert!(!dir.path().join("data").exists());
        }
    }
}
