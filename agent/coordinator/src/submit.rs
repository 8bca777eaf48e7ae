//! Jobs as they are submitted: checked, resolved to digests, and written down in order.

use lathe_api::MemorySize;
use lathe_api::artefact::{Dataset, Digest, Image};
use lathe_api::job::{DatasetMount, IsolationClass, Job, JobSpec, JobState};

use crate::api::error::ApiError;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::reconcile::fresh_tasks;
use crate::records::{
    ACTIVE_JOBS, DATASETS, ENDED_JOBS, IMAGES, JobRecord, Owned, Versioned, load, put,
};
use crate::store::{Outcome, StoreError, Transaction};
use crate::tokens;

const MAX_TASKS: u32 = 1024;
const MAX_CPUS: u32 = 64;
/// No host has more that a guest could take.
const MAX_GPUS: u32 = 64;
/// Below this Linux and its initramfs do not start.
const MIN_MICROVM_MEMORY: MemorySize = MemorySize::from_mib(64);
/// Below this a cgroup kills whatever is started in it.
const MIN_CONTAINER_MEMORY: MemorySize = MemorySize::from_mib(8);
/// 1 PiB: no machine has it, and sums of a gang's memory stay far from overflow.
const MAX_MEMORY: MemorySize = MemorySize::from_mib(1 << 30);
const MAX_GRACE_SECONDS: u32 = 3600;
const MAX_RESTARTS: u32 = 1000;
/// Bounds on lists: they travel to every node with every change.
const MAX_ARGS: usize = 1024;
const MAX_ENV: usize = 1024;
const MAX_DATASETS: usize = 64;
/// How often a submission is tried again when others submit too.
const ATTEMPTS: usize = 64;

/// Checks a name of a job, node or tenant.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-') {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(format!("{shown:?}: 1 to 63 characters of a-z, 0-9 and -, not beginning with -"))
}

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
    check(&spec)?;
    let image = resolve_image(coordinator, &spec.image).await?;
    let mut datasets = Vec::new();
    for (index, mount) in spec.datasets.iter().enumerate() {
        datasets.push(resolve_dataset(coordinator, index, mount).await?);
    }
    let store = &*coordinator.store;
    for _ in 0..ATTEMPTS {
        let id = format!("{}-{}", spec.name, tokens::random_hex(3)?);
        let next = coordinator.sequence.next(store).await?;
        let job = Job {
            id: id.clone(),
            tenant: tenant.to_owned(),
            image_digest: image.digest,
            state: JobState::Pending,
            reason: None,
            expected_start_ms: None,
            after: None,
            why: None,
            size: None,
            preemptions: 0,
            attempt: 0,
            tasks: fresh_tasks(spec.tasks),
            submitted_ms: now_ms(),
            finished_ms: None,
            spec: spec.clone(),
        };
        let record = JobRecord {
            job: job.clone(),
            sequence: next,
            image: image.clone(),
            datasets: datasets.clone(),
            failures: 0,
            losses: 0,
            restart_reason: None,
            cancelled: false,
            stopping: None,
            placed_ms: None,
            decisions: Vec::new(),
        };
        let key = format!("{ACTIVE_JOBS}{id}");
        let transaction = Transaction {
            expect: vec![(key.clone(), None), (format!("{ENDED_JOBS}{id}"), None)],
            writes: vec![put(key, &record)?],
        };
        if let Outcome::Committed(_) = store.commit(transaction).await? {
            tracing::info!(job = id, tenant, tasks = spec.tasks, "job submitted");
            return Ok(job);
        }
    }
    Err(StoreError::Contended(ACTIVE_JOBS.to_owned()).into())
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

fn check(spec: &JobSpec) -> Result<(), ApiError> {
    check_name(&spec.name).map_err(|reason| ApiError::field("name", reason))?;
    if spec.class == IsolationClass::Unikernel {
        let detail = "class unikernel is not available yet; use microvm or container";
        return Err(ApiError::field("class", detail));
    }
    range("tasks", spec.tasks, 1, MAX_TASKS)?;
    range("grace_seconds", spec.grace_seconds, 0, MAX_GRACE_SECONDS)?;
    range("restart.on_failure", spec.restart.on_failure, 0, MAX_RESTARTS)?;
    range("restart.on_loss", spec.restart.on_loss, 0, MAX_RESTARTS)?;
    check_resources(spec)?;
    check_command(spec)?;
    check_mounts(&spec.datasets)
}

fn check_resources(spec: &JobSpec) -> Result<(), ApiError> {
    let resources = &spec.resources;
    range("resources.cpus", resources.cpus, 1, MAX_CPUS)?;
    range("resources.gpus", resources.gpus, 0, MAX_GPUS)?;
    if resources.gpus != 0 && spec.class != IsolationClass::Microvm {
        let detail = format!("{}: only tasks of class microvm can have GPUs", resources.gpus);
        return Err(ApiError::field("resources.gpus", detail));
    }
    let minimum = match spec.class {
        IsolationClass::Container => MIN_CONTAINER_MEMORY,
        _ => MIN_MICROVM_MEMORY,
    };
    if resources.memory < minimum || resources.memory > MAX_MEMORY {
        let detail = format!("{}: a task of this class needs {minimum} to {MAX_MEMORY}", resources.memory);
        return Err(ApiError::field("resources.memory", detail));
    }
    if let Some(disk) = resources.disk
        && (disk.bytes() < 1 << 20 || disk > MAX_MEMORY)
    {
        return Err(ApiError::field("resources.disk", format!("{disk}: 1 MiB to {MAX_MEMORY}")));
    }
    Ok(())
}

fn check_command(spec: &JobSpec) -> Result<(), ApiError> {
    let nul = |text: &str| text.contains('\0');
    if spec.args.len() > MAX_ARGS || spec.args.iter().any(|arg| nul(arg)) {
        return Err(ApiError::field("args", format!("at most {MAX_ARGS}, without NUL characters")));
    }
    if let Some(entrypoint) = &spec.entrypoint
        && (entrypoint.is_empty() || entrypoint.len() > MAX_ARGS || entrypoint.iter().any(|arg| nul(arg)))
    {
        let detail =
            format!("1 to {MAX_ARGS} words without NUL characters; leave it out for the image's own");
        return Err(ApiError::field("entrypoint", detail));
    }
    if spec.env.len() > MAX_ENV {
        return Err(ApiError::field("env", format!("at most {MAX_ENV} variables")));
    }
    for (name, value) in &spec.env {
        if name.is_empty() || name.contains('=') || nul(name) || nul(value) {
            let detail = format!("{name:?}: a name without = and NUL, and a value without NUL");
            return Err(ApiError::field("env", detail));
        }
    }
    Ok(())
}

fn check_mounts(mounts: &[DatasetMount]) -> Result<(), ApiError> {
    if mounts.len() > MAX_DATASETS {
        return Err(ApiError::field("datasets", format!("at most {MAX_DATASETS}")));
    }
    for (index, mount) in mounts.iter().enumerate() {
        let path = &mount.mount;
        let plain = path.strip_prefix('/').is_some_and(|rest| {
            let mut parts = rest.split('/');
            !rest.is_empty() && !path.contains('\0') && parts.all(|part| !matches!(part, "" | "." | ".."))
        });
        let field = || format!("datasets.{index}.mount");
        if !plain || path.len() > 1024 {
            let detail = format!("{path:?}: an absolute path without empty, . and .. parts");
            return Err(ApiError::field(field(), detail));
        }
        let inside = |other: &str| format!("{path}/").starts_with(&format!("{other}/"));
        if mounts.iter().enumerate().any(|(other, m)| other != index && inside(&m.mount)) {
            return Err(ApiError::field(field(), format!("{path:?} is inside another dataset's folder")));
        }
    }
    Ok(())
}

fn range(field: &str, value: u32, least: u32, most: u32) -> Result<(), ApiError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ApiError::field(field, format!("{value}: {least} to {most} are possible")))
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
