//! `lathe image`: images that tasks run.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use lathe_api::artefact::Image;
use lathe_api::client::Client;

use super::upload;
use crate::exit::Exit;
use crate::oci::{LocalImage, registry};
use crate::output::{self, Format};

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring an image into the cluster: an OCI layout (folder or tar archive), or a registry reference.
    Add {
        /// The name tasks use.
        name: String,
        /// A folder, an archive, or a reference like registry.example/team/image:tag.
        source: String,
        /// Speak HTTP without TLS to the registry.
        #[arg(long)]
        plain_http: bool,
        /// User name at the registry.
        #[arg(long, env = "LATHE_REGISTRY_USERNAME")]
        username: Option<String>,
        /// Password at the registry; better given in the environment.
        #[arg(long, env = "LATHE_REGISTRY_PASSWORD", hide_env_values = true)]
        password: Option<String>,
    },
    /// List the images.
    List,
}

/// Runs a subcommand.
///
/// # Errors
/// When the image is none, is damaged, or what the registry or the coordinator said.
pub async fn run(command: Command, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Add { name, source, plain_http, username, password } => {
            let credentials = registry::Credentials { username, password };
            let image = add(client, &name, &source, plain_http, &credentials).await?;
            match format {
                Format::Json => output::json(&image)?,
                Format::Table => println!("{} {}", image.name, image.digest),
            }
        }
        Command::List => {
            let images = client.images().await?;
            match format {
                Format::Json => output::json(&images)?,
                Format::Table => {
                    let mut table = output::table(&["NAME", "SIZE", "DIGEST"]);
                    for image in &images {
                        let size = format!("{:.1} MiB", image.size_bytes as f64 / 1_048_576.0);
                        table.add_row([image.name.clone(), size, image.digest.to_string()]);
                    }
                    println!("{table}");
                }
            }
        }
    }
    Ok(Exit::Success)
}

async fn add(
    client: &Client,
    name: &str,
    source: &str,
    plain_http: bool,
    credentials: &registry::Credentials,
) -> anyhow::Result<Image> {
    let pulled;
    let path: PathBuf = if Path::new(source).exists() {
        source.into()
    } else {
        pulled = tempfile::tempdir().context("cannot make a temporary folder")?;
        let bar = upload::spinner(format!("pulling {source}"));
        registry::pull(source, pulled.path(), plain_http, credentials, |bytes| bar.inc(bytes)).await?;
        bar.finish_and_clear();
        pulled.path().to_owned()
    };
    // Hashing gigabytes takes a while: keep it off the only thread.
    let local = tokio::task::spawn_blocking(move || LocalImage::open(&path)).await??;
    let total = local.blobs.iter().map(|blob| blob.size).sum();
    let bar = upload::bar(total, format!("image {name}"));
    for blob in &local.blobs {
        upload::blob(client, &blob.digest, blob.size, &blob.path, &bar).await?;
    }
    bar.finish_and_clear();
    let image = Image { name: name.to_owned(), digest: local.manifest, size_bytes: local.layers_bytes };
    client.add_image(&image).await?;
    Ok(image)
}
