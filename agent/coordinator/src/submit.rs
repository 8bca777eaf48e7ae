//! Jobs as they are submitted: checked, resolved to digests, and written down in order.

use lathe_api::artefact::{Dataset, Digest, Image};
use lathe_api::job::{DatasetMount, Job, JobSpec, JobState};
use lathe_api::pool::DEFAULT_POOL;
use lathe_api::scheduling::{DecidedBy, DecisionKind};

use crate::api::error::ApiError;
use crate::check;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::records::{ACTIVE_JOBS, DATASETS, ENDED_JOBS, IMAGES, JobRecord, Owned, Versioned, load, put};
use crate::services::record;
use crate::store::{Outcome, StoreError, Transaction};
use crate::tokens;

/// How often a submission is tried again when others submit too.
const ATTEMPTS: usize = 64;

/// Job, rank and attempt of a sandbox's ID.
pub fn parse_sandbox_id(id: &str) -> Option<(&str, u32, u32)> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if id.len() > 96 || !id.bytes().all(plain) {
        return None;
    }
    let (rest, attempt) = id.rsplit_once('-')?;
    let (job, rank) = rest.rsplit_once('-')?;
    (!job.is_empty()).then_some((job, rank.parse().ok()?, attempt.parse().ok()?))
}

/// A job, whether it has ended or not.
///
/// # Errors
/// When the store fails.
pub async fn find_job(
    coordinator: &Coordinator,
    id: &str,
) -> Result<Option<Versioned<JobRecord>>, StoreError> {
    let store = &*coordinator.store;
    // Ended after active: a job that ends in between is found.
    match load(store, &format!("{ACTIVE_JOBS}{id}")).await? {
        Some(record) => Ok(Some(record)),
        None => load(store, &format!("{ENDED_JOBS}{id}")).await,
    }
}

/// Accepts a job, or says which field is wrong and changes nothing.
///
/// # Errors
/// See there.
pub async fn submit(coordinator: &Coordinator, tenant: &str, spec: JobSpec) -> Result<Job, ApiError> {
    if spec.service.is_some() {
        let detail = "this is a service; submit it as one (`lathe service run`), or leave the table out";
        return Err(ApiError::field("service", detail));
    }
    let mut record = prepare(coordinator, tenant, spec).await?;
    let store = &*coordinator.store;
    for _ in 0..ATTEMPTS {
        let id = format!("{}-{}", record.job.spec.name, tokens::random_hex(3)?);
        record.sequence = coordinator.sequence.next(store).await?;
        record.job.id.clone_from(&id);
        let key = format!("{ACTIVE_JOBS}{id}");
        let transaction = Transaction {
            expect: vec![(key.clone(), None), (format!("{ENDED_JOBS}{id}"), None)],
            writes: vec![put(key, &record)?],
        };
        if let Outcome::Committed(_) = store.commit(transaction).await? {
            tracing::info!(job = id, tenant, tasks = record.job.spec.tasks, "job submitted");
            return Ok(record.job);
        }
    }
    Err(StoreError::Contended(ACTIVE_JOBS.to_owned()).into())
}

/// Checks a job and resolves its names. It has no ID and no number yet, and nothing is stored.
///
/// # Errors
/// Which field is wrong.
pub async fn prepare(coordinator: &Coordinator, tenant: &str, spec: JobSpec) -> Result<JobRecord, ApiError> {
    check::job(&spec)?;
    check_pool(coordinator, tenant, &spec.pool)?;
    let image = resolve_image(coordinator, &spec.image).await?;
    let mut datasets = Vec::new();
    for (index, mount) in spec.datasets.iter().enumerate() {
        datasets.push(resolve_dataset(coordinator, index, mount).await?);
    }
    let job = record::job(tenant, spec, &image, now_ms());
    Ok(record::job_record(job, image, datasets))
}

/// Asks for a job to be cancelled. One that has ended stays as it is.
///
/// # Errors
/// When the store fails.
pub async fn cancel(coordinator: &Coordinator, id: &str) -> Result<Option<Job>, ApiError> {
    for _ in 0..ATTEMPTS {
        let Some(record) = find_job(coordinator, id).await? else { return Ok(None) };
        if record.value.cancelled || record.value.job.state.is_terminal() {
            return Ok(Some(record.value.job));
        }
        let mut next = record.value;
        next.cancelled = true;
        next.job.state = JobState::Cancelling;
        next.job.reason = None;
        next.decide(DecisionKind::Cancelled, DecidedBy::Owner, "asked for", now_ms());
        let key = format!("{ACTIVE_JOBS}{id}");
        let transaction = Transaction {
            expect: vec![(key.clone(), Some(record.revision))],
            writes: vec![put(key, &next)?],
        };
        if let Outcome::Committed(_) = coordinator.store.commit(transaction).await? {
            tracing::info!(job = id, "cancel requested");
            return Ok(Some(next.job));
        }
    }
    Err(StoreError::Contended(format!("{ACTIVE_JOBS}{id}")).into())
}

/// Whether the job's pool is one that takes this tenant's jobs. A pool that others have for themselves
/// looks as if it did not exist.
///
/// Somebody may remove the pool at the same moment: the job then waits, and that is its reason.
fn check_pool(coordinator: &Coordinator, tenant: &str, name: &str) -> Result<(), ApiError> {
    let admits = coordinator.view.read(|contents| match contents.pools.get(name) {
        Some(pool) => pool.value.admits(tenant),
        None => name == DEFAULT_POOL,
    });
    if admits {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    let detail = format!("there is no pool {shown:?} for tenant {tenant}; see `lathe pool list`");
    Err(ApiError::field("pool", detail))
}

async fn resolve_image(coordinator: &Coordinator, reference: &str) -> Result<Image, ApiError> {
    let (name, digest) = split_reference(reference).map_err(|reason| ApiError::field("image", reason))?;
    let record = load::<Owned<Image>>(&*coordinator.store, &format!("{IMAGES}{name}")).await?;
    let image = record.ok_or_else(|| {
        let detail = format!("there is no image {name:?}; add it with `lathe image add`");
        ApiError::field("image", detail)
    })?;
    let image = image.value.artefact;
    check_digest(digest, image.digest).map_err(|reason| ApiError::field("image", reason))?;
    Ok(image)
}

async fn resolve_dataset(
    coordinator: &Coordinator,
    index: usize,
    mount: &DatasetMount,
) -> Result<Dataset, ApiError> {
    let field = |reason: String| ApiError::field(format!("datasets.{index}.name"), reason);
    let (name, digest) = split_reference(&mount.name).map_err(field)?;
    let key = format!("{DATASETS}{name}");
    let record = load::<Owned<Dataset>>(&*coordinator.store, &key).await?;
    let dataset = record
        .ok_or_else(|| field(format!("there is no dataset {name:?}; add it with `lathe dataset add`")))?
        .value
        .artefact;
    check_digest(digest, dataset.digest).map_err(field)?;
    Ok(dataset)
}

/// `name` or `name@sha256:...`.
fn split_reference(reference: &str) -> Result<(&str, Option<Digest>), String> {
    match reference.split_once('@') {
        None => Ok((reference, None)),
        Some((name, digest)) => {
            digest.parse().map(|digest| (name, Some(digest))).map_err(|error| format!("{error}"))
        }
    }
}

fn check_digest(wanted: Option<Digest>, found: Digest) -> Result<(), String> {
    match wanted {
        Some(wanted) if wanted != found => Err(format!("the name now means {found}, not {wanted}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_names_give_their_job_back() {
        assert_eq!(parse_sandbox_id("my-job-ab12cd-3-2"), Some(("my-job-ab12cd", 3, 2)));
        for bad in ["", "a-1", "a--1-", "../a-1-1", "a-x-1", "A-1-1", "-1-1", &"a".repeat(97)] {
            assert_eq!(parse_sandbox_id(bad), None, "{bad}");
        }
    }
}
