//! `lathe token`: who may join the cluster and who may use it.

use clap::{Subcommand, ValueEnum};
use lathe_api::client::Client;
use lathe_api::token::{TokenKind, TokenRequest};

use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands, for the cluster's admin.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a token and print it: the only time that it is shown.
    Create {
        /// What it is good for.
        kind: Kind,
        /// Whose jobs its holder submits.
        #[arg(long, default_value = "default")]
        tenant: String,
        /// For how many hours it is accepted.
        #[arg(long, default_value_t = 24)]
        hours: u64,
    },
    /// List the tokens, without their secrets.
    List,
    /// Make a token worthless at once.
    Revoke {
        /// As `lathe token list` shows it.
        id: String,
    },
}

/// Kinds of tokens that can be made.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// Lets a host join as a node.
    Join,
    /// Lets a person use the cluster as one tenant.
    User,
    /// Lets a person administer the cluster.
    Admin,
}

impl From<Kind> for TokenKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Join => Self::Join,
            Kind::User => Self::User,
            Kind::Admin => Self::Admin,
        }
    }
}

/// Runs a subcommand.
///
/// # Errors
/// What the coordinator said.
pub async fn run(command: Command, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Create { kind, tenant, hours } => {
            let request =
                TokenRequest { kind: kind.into(), tenant, expires_seconds: hours.saturating_mul(3600) };
            let created = client.create_token(&request).await?;
            match format {
                Format::Json => output::json(&created)?,
                Format::Table => println!("{}", created.token),
            }
        }
        Command::List => {
            let tokens = client.tokens().await?;
            match format {
                Format::Json => output::json(&tokens)?,
                Format::Table => {
                    let mut table = output::table(&["ID", "KIND", "TENANT", "MADE", "EXPIRES"]);
                    for token in &tokens {
                        table.add_row([
                            token.id.clone(),
                            format!("{:?}", token.kind).to_lowercase(),
                            token.tenant.clone(),
                            format!("{} ago", output::age(token.created_ms)),
                            output::until(token.expires_ms),
                        ]);
                    }
                    println!("{table}");
                }
            }
        }
        Command::Revoke { id } => client.revoke_token(&id).await?,
    }
    Ok(Exit::Success)
}
