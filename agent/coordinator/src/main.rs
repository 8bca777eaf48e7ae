//! `lathe-coordinator`: makes clusters, serves them, makes tokens.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use lathe_api::client::{Client, ClientOptions};
use lathe_api::node::NODE_EXPIRY_MS;
use lathe_api::token::{TokenCreated, TokenInfo, TokenKind, TokenRequest};
use lathe_coordinator::coordinator::{Coordinator, Options};
use lathe_coordinator::init::{ADMIN_TOKEN_FILE, InitOptions, STORE_FILE, init};
use lathe_coordinator::network::Cidr;
use lathe_coordinator::pki::CA_FILE;
use lathe_coordinator::provider::registry::{Program, programs};
use lathe_coordinator::records::{CLUSTER, ClusterRecord, load};
use lathe_coordinator::store::StoreError;
use lathe_coordinator::store::redb::RedbStore;
use lathe_coordinator::{check, server, tokens};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The coordinator of a Lathe cluster.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a cluster: its certificate authority, store, an admin token and a join token.
    Init(InitArguments),
    /// Run the coordinator.
    Serve(ServeArguments),
    /// Make, list and revoke tokens; works beside a running coordinator on this machine.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

#[derive(Debug, Args)]
struct InitArguments {
    /// Where the cluster's state is to live; must not hold one.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Where agents and people reach the coordinator; further names and addresses after commas.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', required = true)]
    address: Vec<String>,
    /// Addresses for sandboxes; each node gets a /24 of it.
    #[arg(long, value_name = "CIDR", default_value = "10.42.0.0/16")]
    sandbox_cidr: Cidr,
    /// How long the first tokens are accepted.
    #[arg(long, value_name = "TIME", default_value = "365d", value_parser = duration)]
    token_expires: Duration,
}

#[derive(Debug, Args)]
struct ServeArguments {
    /// Made by `init`.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Where to listen.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:7700")]
    listen: SocketAddr,
    /// After how long without a report a node is lost.
    #[arg(long, value_name = "MS", default_value_t = NODE_EXPIRY_MS, value_parser = clap::value_parser!(u64).range(100..))]
    node_expiry_ms: u64,
    /// Output kept of each sandbox.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    log_limit_mib: u64,
    /// Longest blob.
    #[arg(long, value_name = "MIB", default_value_t = 64 << 10, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    blob_limit_mib: u64,
    /// A program that makes nodes for the pools that name it, and takes them back; again for each more.
    #[arg(long = "provider", value_name = "NAME=PATH")]
    providers: Vec<Program>,
    /// How log events are written, one a line: `text` for people, `json` for programs.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token; prints it, and nothing else, to standard output.
    Create {
        /// Made by `init`.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// What it is good for.
        #[arg(long, value_enum)]
        kind: Kind,
        /// Whose jobs its holder submits and sees.
        #[arg(long, default_value = "default")]
        tenant: String,
        /// How long it is accepted, as 30m, 24h or 90d.
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
        expires: Duration,
    },
    /// List tokens.
    List {
        /// Made by `init`.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
    },
    /// Revoke a token.
    Revoke {
        /// Made by `init`.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Its ID, as `list` shows it: the middle part of the token.
        id: String,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Join,
    User,
    Admin,
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lathe-coordinator: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        match arguments.command {
            Command::Init(arguments) => {
                let made = init(&InitOptions {
                    data_dir: arguments.data_dir,
                    addresses: arguments.address,
                    cidr: arguments.sandbox_cidr,
                    token_expires_seconds: arguments.token_expires.as_secs(),
                })
                .await?;
                println!("{}", serde_json::to_string_pretty(&made)?);
                Ok(())
            }
            Command::Serve(arguments) => serve(arguments).await,
            Command::Token { command } => token(command).await,
        }
    })
}

async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let coordinator = Coordinator::open(Options {
        data_dir: arguments.data_dir,
        node_expiry: Duration::from_millis(arguments.node_expiry_ms),
        log_limit_bytes: arguments.log_limit_mib << 20,
        blob_limit_bytes: arguments.blob_limit_mib << 20,
        providers: programs(arguments.providers).map_err(anyhow::Error::msg)?,
    })
    .await?;
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let address = listener.local_addr()?;
    coordinator.publish_address(address)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let coordinator = Arc::new(coordinator);
    let shutdown = coordinator.shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        shutdown.cancel();
    });
    tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "serving");
    server::serve(coordinator, listener).await?;
    Ok(())
}

async fn token(command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create { data_dir, kind, tenant, expires } => {
            if let Err(reason) = check::check_name(&tenant) {
                bail!("--tenant {reason}");
            }
            let kind = match kind {
                Kind::Join => TokenKind::Join,
                Kind::User => TokenKind::User,
                Kind::Admin => TokenKind::Admin,
            };
            let request = TokenRequest { kind, tenant, expires_seconds: expires.as_secs() };
            let created = match access(&data_dir).await? {
                Access::Store(store) => tokens::create(&*store, &request).await?,
                Access::Running(client) => client.create_token(&request).await?,
            };
            let TokenCreated { token, info } = created;
            eprintln!("token {} is accepted for {} s", info.id, expires.as_secs());
            println!("{token}");
        }
        TokenCommand::List { data_dir } => {
            let infos: Vec<TokenInfo> = match access(&data_dir).await? {
                Access::Store(store) => tokens::list(&*store).await?,
                Access::Running(client) => client.tokens().await?,
            };
            println!("{}", serde_json::to_string_pretty(&infos)?);
        }
        TokenCommand::Revoke { data_dir, id } => match access(&data_dir).await? {
            Access::Store(store) if tokens::revoke(&*store, &id).await? => {}
            Access::Store(_) => bail!("there is no token {id:?}"),
            Access::Running(client) => client.revoke_token(&id).await?,
        },
    }
    Ok(())
}

/// How tokens are reached: the store itself, or the coordinator that has it open.
enum Access {
    Store(Box<RedbStore>),
    Running(Box<Client>),
}

async fn access(data_dir: &Path) -> anyhow::Result<Access> {
    let path = data_dir.join(STORE_FILE);
    if !path.exists() {
        bail!("{} holds no cluster: make one with `lathe-coordinator init`", data_dir.display());
    }
    match RedbStore::open(&path) {
        Ok(store) => {
            load::<ClusterRecord>(&store, CLUSTER).await?.context("the store holds no cluster")?;
            Ok(Access::Store(Box::new(store)))
        }
        Err(StoreError::InUse { .. }) => running(data_dir).map(Box::new).map(Access::Running),
        Err(error) => Err(error.into()),
    }
}

fn running(data_dir: &Path) -> anyhow::Result<Client> {
    let read = |name: &str| {
        let path = data_dir.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let options = ClientOptions {
        address: read(lathe_coordinator::coordinator::ADDRESS_FILE)?.trim().to_owned(),
        ca_pem: read(CA_FILE)?,
        identity: None,
        token: Some(read(ADMIN_TOKEN_FILE)?),
    };
    Ok(Client::new(&options)?)
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?}: write a number and s, m, h or d, as 24h");
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let total = number.checked_mul(seconds).filter(|total| (1..=tokens::MAX_EXPIRES_SECONDS).contains(total));
    total.map(Duration::from_secs).ok_or_else(|| format!("{text:?}: 1s to 3650d are possible"))
}
