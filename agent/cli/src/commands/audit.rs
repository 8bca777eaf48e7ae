//! `lathe audit`: what operators did.

use clap::Args;
use lathe_api::client::Client;

use crate::exit::Exit;
use crate::output::{self, Format};

/// Arguments of `lathe audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Only the latest so many.
    #[arg(long, default_value_t = 50)]
    last: usize,
}

/// Prints what operators did, oldest first.
///
/// # Errors
/// What the coordinator said.
pub async fn run(args: &AuditArgs, client: &Client, format: Format) -> anyhow::Result<Exit> {
    let mut entries = client.audit().await?;
    entries.drain(..entries.len().saturating_sub(args.last));
    match format {
        Format::Json => output::json(&entries)?,
        Format::Table => {
            let mut table = output::table(&["#", "WHEN", "WHO", "ACTION", "SUBJECT", "DETAIL"]);
            for entry in &entries {
                table.add_row([
                    entry.sequence.to_string(),
                    format!("{} ago", output::age(entry.time_ms)),
                    entry.who.clone(),
                    entry.action.clone(),
                    entry.subject.clone(),
                    entry.detail.clone(),
                ]);
            }
            println!("{table}");
        }
    }
    Ok(Exit::Success)
}
