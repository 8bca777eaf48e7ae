//! Sending blobs, with a bar for people.

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use lathe_api::artefact::Digest;
use lathe_api::client::{Client, ClientError};

/// A bar of `total` bytes. Hidden where stderr is no terminal.
pub fn bar(total: u64, what: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
    ProgressBar::new(total)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what)
}

/// A spinner for work of unknown length.
pub fn spinner(what: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {bytes}");
    let bar = ProgressBar::new_spinner()
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        .with_message(what);
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

/// Sends one blob unless the coordinator has it.
///
/// # Errors
/// When the file cannot be read, or what the coordinator said.
pub async fn blob(
    client: &Client,
    digest: &Digest,
    size: u64,
    path: &Path,
    bar: &ProgressBar,
) -> Result<(), ClientError> {
    if client.blob_size(digest).await?.is_some() {
        bar.inc(size);
        return Ok(());
    }
    let progress = bar.clone();
    client.put_blob(digest, path, move |bytes| progress.inc(bytes)).await
}
