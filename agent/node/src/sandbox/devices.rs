//! A sandbox's GPUs: taken before anything else is made for it, given back after all of that is gone.

use std::time::{Duration, Instant};

use lathe_api::HostPciAddress;
use lathe_api::sandbox::SandboxSpec;

use super::prepare::{Host, PrepareError};
use crate::gpus::{GpuError, Owner};
use crate::journal::{Journal, Step};

/// How long to wait for devices that are still being scrubbed after their last user. The coordinator
/// counts a sandbox's devices as free once it has ended; proving 80 GiB clean takes minutes.
const SCRUB_PATIENCE: Duration = Duration::from_secs(1800);

/// How often to look whether they are.
const SCRUB_PAUSE: Duration = Duration::from_millis(500);

/// Takes the devices of `spec`: those it names, or as many as it wants; in the journal, proven clean, bound
/// to `vfio-pci`. Returns the functions to pass to the guest.
///
/// # Errors
/// When one that it names is not free, or the host has not so many that can be taken.
pub async fn take(
    host: &Host,
    journal: &mut Journal,
    spec: &SandboxSpec,
) -> Result<Vec<HostPciAddress>, PrepareError> {
    let count = usize::try_from(spec.resources.gpus).unwrap_or(usize::MAX);
    if count == 0 {
        return Ok(Vec::new());
    }
    let owner = Owner::Sandbox(spec.id.clone());
    let end = Instant::now() + SCRUB_PATIENCE;
    let addresses = loop {
        // The preflight looks at all processes of the host.
        let reserved = tokio::task::block_in_place(|| {
            let journal = |addresses: &[HostPciAddress]| {
                journal.begin(Step::Gpus { addresses: addresses.to_vec() }).map_err(PrepareError::from)
            };
            if spec.gpus.is_empty() {
                host.gpus.reserve(count, &owner, journal)
            } else {
                host.gpus.reserve_named(&spec.gpus, &owner, journal)
            }
        });
        match reserved {
            Err(PrepareError::Gpu(GpuError::TooFew { wanted, free, soon, .. }))
                if free + soon >= wanted && Instant::now() < end =>
            {
                tokio::time::sleep(SCRUB_PAUSE).await;
            }
            other => break other?,
        }
    };
    let gpus = host.gpus.clone();
    let work = move || {
        let mut functions = Vec::new();
        for address in addresses {
            functions.extend(gpus.take(address, &owner)?);
        }
        Ok::<_, GpuError>(functions)
    };
    // Goes on if this future is dropped; giving the devices back then waits for it.
    tokio::task::spawn_blocking(work).await.map_err(|_| PrepareError::Worker)?.map_err(PrepareError::from)
}
