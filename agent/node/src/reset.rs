//! `lathe-agent reset`: a host as it was before its first agent.
//!
//! Sandboxes, devices lent to them, the bridge, the filter, cgroups and runtime files go. The state directory stays unless asked
//! for: it has the node's identity and the caches, which an agent that comes back wants.

use std::path::PathBuf;

use anyhow::ensure;

use crate::agent::{lock_host, open_host};
use crate::cgroup;
use crate::files;
use crate::gpus::Policy;
use crate::images::blobs::BlobSource;
use crate::journal::Journal;
use crate::paths::Paths;
use crate::sandbox::cleanup::cleanup;
use crate::sandbox::observe::observe;

/// Takes away what agents made here; with `state`, what they know too. May be repeated.
///
/// # Errors
/// When an agent or, without `force`, a sandbox runs here, or something cannot be taken away.
pub async fn run(paths: Paths, state: bool, force: bool) -> anyhow::Result<()> {
    let _lock = lock_host()?;
    // Nothing is fetched.
    let host = open_host(paths, BlobSource::Folder(PathBuf::new()), Policy::Off)?;
    let (found, _) = observe(&host.paths)?;
    let running: Vec<&str> = found.iter().filter(|o| o.supervised).map(|o| o.id()).collect();
    ensure!(
        force || running.is_empty(),
        "sandboxes run on this host: {}; cancel their jobs first, or end them with --force",
        running.join(", ")
    );
    for observed in &found {
        let dir = host.paths.sandbox(observed.id());
        let mut journal = Journal::open(&dir)?;
        if journal.record().end.is_none() {
            journal.end(observed.verdict(&host.boot_id))?;
        }
        if !journal.record().cleaned {
            cleanup(&host, &mut journal).await?;
        }
        files::remove(&dir)?;
    }
    let gpus = host.gpus.clone();
    tokio::task::spawn_blocking(move || gpus.give_all_back()).await??;
    host.network.sweep(&[]).await?;
    host.network.remove_all().await?;
    cgroup::remove(&host.cgroups.sandboxes()).await?;
    files::remove(&host.paths.run)?;
    if state {
        files::remove(&host.paths.state)?;
    }
    Ok(())
}
