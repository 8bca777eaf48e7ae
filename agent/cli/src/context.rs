//! Where the coordinator is and who we are: flags, else the environment, else the configuration file.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use lathe_api::client::{Client, ClientOptions};
use serde::{Deserialize, Serialize};

/// Flags of every command that talks to the coordinator.
#[derive(Debug, Args)]
pub struct Connection {
    /// The coordinator's address, as https://10.0.0.1:7700.
    #[arg(long, global = true, env = "LATHE_COORDINATOR", value_name = "URL", help_heading = "Connection")]
    coordinator: Option<String>,
    /// The cluster's CA certificate (PEM).
    #[arg(long, global = true, env = "LATHE_CA", value_name = "FILE", help_heading = "Connection")]
    ca: Option<PathBuf>,
    /// File that holds the bearer token.
    #[arg(long, global = true, env = "LATHE_TOKEN_FILE", value_name = "FILE", help_heading = "Connection")]
    token_file: Option<PathBuf>,
}

/// The configuration file, TOML.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// As `--coordinator`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<String>,
    /// As `--ca`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// As `--token-file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

/// What keeps a client from being made.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Nothing says where the coordinator is.
    #[error("no {what}: give --{flag}, set {variable}, or run `lathe cluster init` on this machine")]
    Missing {
        /// For people.
        what: &'static str,
        /// The flag.
        flag: &'static str,
        /// The environment variable.
        variable: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration file is wrong.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// `$LATHE_CONFIG`, else `lathe/config.toml` in the user's configuration folder.
pub fn config_path() -> PathBuf {
    if let Some(path) = std::env::var_os("LATHE_CONFIG") {
        return path.into();
    }
    let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".config")
    });
    base.join("lathe/config.toml")
}

fn read(path: &Path) -> Result<String, ContextError> {
    fs::read_to_string(path).map_err(|source| ContextError::Unreadable { path: path.to_owned(), source })
}

fn config_file(path: &Path) -> Result<ConfigFile, ContextError> {
    if !path.exists() {
        return Ok(ConfigFile::default());
    }
    toml::from_str(&read(path)?).map_err(|error| ContextError::BadFile {
        path: path.to_owned(),
        reason: error.to_string().trim().replace('\n', " "),
    })
}

impl Connection {
    /// A client for the coordinator. Nothing is sent yet.
    ///
    /// # Errors
    /// When the coordinator, the CA or the token is nowhere named or cannot be read.
    pub fn client(&self) -> anyhow::Result<Client> {
        let file = config_file(&config_path())?;
        let missing = |what, flag, variable| ContextError::Missing { what, flag, variable };
        let coordinator = self
            .coordinator
            .clone()
            .or(file.coordinator)
            .ok_or_else(|| missing("coordinator's address", "coordinator", "LATHE_COORDINATOR"))?;
        let ca = self.ca.clone().or(file.ca).ok_or_else(|| missing("CA certificate", "ca", "LATHE_CA"))?;
        let token_file = self
            .token_file
            .clone()
            .or(file.token_file)
            .ok_or_else(|| missing("bearer token", "token-file", "LATHE_TOKEN_FILE"))?;
        let options = ClientOptions {
            address: coordinator,
            ca_pem: read(&ca)?,
            identity: None,
            token: Some(read(&token_file)?.trim().to_owned()),
        };
        Ok(Client::new(&options)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_setting_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "cordinator = \"https://x\"\n").unwrap();
        let error = config_file(file.path()).unwrap_err().to_string();
        assert!(error.contains("cordinator"), "{error}");
    }

    #[test]
    fn no_file_is_an_empty_one() {
        let file = config_file(Path::new("/nonexistent/lathe.toml")).unwrap();
        assert!(file.coordinator.is_none() && file.ca.is_none() && file.token_file.is_none());
    }
}
