//! Takes away everything that was made for a sandbox, last thing first.

use lathe_api::HostPciAddress;

use crate::cgroup;
use crate::files::{self, FileError};
use crate::gpus::{GpuError, Owner};
use crate::journal::{Journal, Step};
use crate::network::NetworkError;
use crate::sandbox::prepare::Host;
use crate::supervisor::try_lock;

/// Something of a sandbox that could not be taken away. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// Files and cgroups.
    #[error(transparent)]
    File(#[from] FileError),
    /// Interfaces and the filter.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A device's record.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A panic.
    #[error("giving devices back was cut off")]
    Worker,
    /// It is stuck in the kernel.
    #[error("the supervisor of {0} does not die")]
    Supervisor(String),
}

/// Undoes every step of the journal. May be repeated after a crash or an error.
///
/// # Errors
/// When something resists; it and all before it are still in the journal.
pub async fn cleanup(host: &Host, journal: &mut Journal) -> Result<(), CleanupError> {
    let begun = std::time::Instant::now();
    let id = journal.record().spec.id.clone();
    let dir = host.paths.sandbox(&id);
    // A supervisor that was spawned but has not begun finds nothing to launch.
    files::remove(&dir.join("launch.json"))?;
    // In another boot interfaces, cgroups and processes of these names are not the sandbox's.
    let same_boot = journal.record().boot_id == host.boot_id;
    while let Some(step) = journal.last().cloned() {
        match step {
            Step::Supervisor => {
                let cgroup = host.cgroups.sandbox(&crate::paths::SandboxKey::of(&id).to_string());
                end_supervisor(&id, &dir, &cgroup).await?;
            }
            Step::Cgroup { path } if same_boot => cgroup::remove(&path).await?,
            Step::Interface { name } => host.network.dismiss(&name).await?,
            Step::OverlayDisk { path } | Step::RunDir { path } => files::remove(&path)?,
            Step::Cgroup { .. } => {}
            Step::Gpus { addresses } => give_back(host, &id, addresses).await?,
        }
        journal.undone()?;
    }
    for leftover in ["vm.json", "supervisor.log", "console.log"] {
        files::remove(&dir.join(leftover))?;
    }
    journal.stages().cleanup_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(0);
    journal.cleaned()?;
    Ok(())
}

/// Gives devices back. One that cannot be proven clean is quarantined, which holds up nobody here.
async fn give_back(host: &Host, id: &str, addresses: Vec<HostPciAddress>) -> Result<(), CleanupError> {
    let (gpus, owner) = (host.gpus.clone(), Owner::Sandbox(id.to_owned()));
    let work = move || addresses.iter().try_for_each(|address| gpus.release(*address, &owner));
    tokio::task::spawn_blocking(work).await.map_err(|_| CleanupError::Worker)??;
    Ok(())
}

async fn end_supervisor(
    id: &str,
    dir: &std::path::Path,
    cgroup: &std::path::Path,
) -> Result<(), CleanupError> {
    for attempt in 0..100 {
        if try_lock(dir)?.is_some() {
            return Ok(());
        }
        // One that has said its last word goes by itself in a moment.
        if attempt >= 20 {
            cgroup::kill(cgroup)?;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Err(CleanupError::Supervisor(id.to_owned()))
}
