//! Jobs: submit, list, show, watch, cancel, logs.

#![allow(unused_qualifications, reason = "utoipa's macro qualifies the query's type")]

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use lathe_api::job::{Job, JobSpec, JobState};
use lathe_api::node::LogLine;
use lathe_api::problem::Problem;
use lathe_api::scheduling::{Planned, Why};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::ApiError;
use super::extract::{Json, User};
use super::redact::{self, Hidden};
use super::stream::{Lines, json_lines};
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::logs::LogReader;
use crate::reconcile::model::{gang, waits};
use crate::records::{ACTIVE_JOBS, ENDED_JOBS, JobRecord, of_prefix};
use crate::{provider, remedy, submit};

const SPEC_BYTES: usize = 1 << 20;
/// Lines read from the files at once.
const LOG_LINES: usize = 512;
/// How soon new output is shown to a follower.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Submits a job. One that is larger than the cluster is accepted, and waits with that as its reason.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobSpec,
    responses((status = 201, body = Job), (status = "4XX", body = Problem)))]
pub async fn submit(
    State(coordinator): State<Arc<Coordinator>>,
    User(user): User,
    Json(spec): Json<JobSpec, SPEC_BYTES>,
) -> Result<(StatusCode, axum::Json<Job>), ApiError> {
    let job = submit::submit(&coordinator, &user.tenant, spec).await?;
    Ok((StatusCode::CREATED, axum::Json(job)))
}

/// All jobs of the token's tenant, or of everyone for an admin, in the order of submission.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs",
    responses((status = 200, body = Vec<Job>), (status = "4XX", body = Problem)))]
pub async fn list(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
) -> Result<axum::Json<Vec<Job>>, ApiError> {
    let listing = coordinator.store.list(&[ACTIVE_JOBS, ENDED_JOBS]).await?;
    let active = of_prefix::<JobRecord>(&listing.entries, ACTIVE_JOBS);
    let ended = of_prefix::<JobRecord>(&listing.entries, ENDED_JOBS);
    let mut records: Vec<JobRecord> =
        active.chain(ended).map(|record| record.map(|(_, record)| record.value)).collect::<Result<_, _>>()?;
    records.retain(|record| user.may(&record.job.tenant));
    records.sort_by_key(|record| record.sequence);
    let mut hidden = Hidden::default();
    let mut jobs = Vec::with_capacity(records.len());
    for record in records {
        let mut job = record.job;
        coordinator.explanations.complete(&mut job);
        redact::job(&coordinator, &user, &mut hidden, &mut job).await?;
        jobs.push(job);
    }
    Ok(axum::Json(jobs))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job), (status = "4XX", body = Problem)))]
pub async fn show(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<axum::Json<Job>, ApiError> {
    find(&coordinator, &user, &id).await.map(axum::Json)
}

/// Cancels a job. One that has ended stays as it is.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job), (status = "4XX", body = Problem)))]
pub async fn cancel(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<axum::Json<Job>, ApiError> {
    find(&coordinator, &user, &id).await?;
    let mut job = submit::cancel(&coordinator, &id).await?.ok_or_else(|| ApiError::not_found("job", &id))?;
    redact::job(&coordinator, &user, &mut Hidden::default(), &mut job).await?;
    Ok(axum::Json(job))
}

/// Streams a job as JSON lines: now, and after every change, until it has ended.
#[utoipa::path(get, path = "/v1/jobs/{id}/watch", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job, content_type = "application/jsonl"),
              (status = "4XX", body = Problem)))]
pub async fn watch(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    find(&coordinator, &user, &id).await?;
    let shared = Arc::clone(&coordinator);
    Ok(json_lines(&coordinator, move |lines| async move { watch_job(&shared, &user, &id, &lines).await }))
}

async fn watch_job(coordinator: &Coordinator, user: &User, id: &str, lines: &Lines) {
    let mut told: Option<Job> = None;
    let mut changed = coordinator.view.watch_job(id);
    loop {
        // Before the job is read, so that no change after reading is missed.
        changed.mark_unchanged();
        let Ok(Some(record)) = submit::find_job(coordinator, id).await else { return };
        let mut job = record.value.job;
        coordinator.explanations.complete(&mut job);
        if redact::job(coordinator, user, &mut Hidden::default(), &mut job).await.is_err() {
            return;
        }
        if told.as_ref() != Some(&job) && lines.send(&job).await.is_err() || job.state.is_terminal() {
            return;
        }
        told = Some(job);
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = lines.closed() => return,
        }
    }
}

/// Which output.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    /// Go on until the job has ended.
    #[serde(default)]
    follow: bool,
    /// One task only.
    rank: Option<u32>,
    /// One start of the gang only; absent, the latest, or with `follow` all from the latest on.
    attempt: Option<u32>,
}

/// Streams a job's output as JSON lines, by time.
#[utoipa::path(get, path = "/v1/jobs/{id}/logs", tag = "jobs",
    params(("id" = String, Path), LogsQuery),
    responses((status = 200, body = LogLine, content_type = "application/jsonl"),
              (status = "4XX", body = Problem)))]
pub async fn logs(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    let job = find(&coordinator, &user, &id).await?;
    if let Some(rank) = query.rank
        && rank >= job.spec.tasks
    {
        return Err(ApiError::bad_request(format!(
            "rank {rank}: the job has ranks 0 to {}",
            job.spec.tasks - 1
        )));
    }
    let attempts = match query.attempt {
        Some(attempt) => (attempt, attempt),
        None => (latest_attempt(&job), u32::MAX),
    };
    let shared = Arc::clone(&coordinator);
    Ok(json_lines(&coordinator, move |lines| async move {
        send_logs(shared, job, query, attempts, lines).await;
    }))
}

/// The latest start that has begun: a job that waits to start again shows what its last start said.
fn latest_attempt(job: &Job) -> u32 {
    job.attempt.max(1)
}

async fn send_logs(
    coordinator: Arc<Coordinator>,
    job: Job,
    query: LogsQuery,
    (first, last): (u32, u32),
    lines: Lines,
) {
    let wanted = move |sandbox: &str| {
        submit::parse_sandbox_id(sandbox).is_some_and(|(_, rank, attempt)| {
            (first..=last).contains(&attempt) && query.rank.is_none_or(|wanted| wanted == rank)
        })
    };
    let mut reader = LogReader::default();
    let mut ended = false;
    loop {
        // Before reading: agents send a task's output before its end, so what is stored once the job has
        // ended is all.
        if !ended {
            let Ok(found) = submit::find_job(&coordinator, &job.id).await else { return };
            ended = found.is_none_or(|record| record.value.job.finished_ms.is_some());
        }
        let (shared, id) = (Arc::clone(&coordinator), job.id.clone());
        let read = tokio::task::spawn_blocking(move || {
            reader.add(shared.logs.files(&id, wanted)?);
            reader.read(LOG_LINES).map(|found| (reader, found))
        });
        let found: Vec<LogLine>;
        (reader, found) = match read.await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => {
                tracing::error!(job = job.id, %error, "cannot read logs");
                return;
            }
            Err(_) => return,
        };
        for line in &found {
            if lines.send(line).await.is_err() {
                return;
            }
        }
        if !found.is_empty() {
            continue;
        }
        if !query.follow || ended {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
            () = lines.closed() => return,
        }
    }
}

/// Says why a job waits, is where it is, or ended, and what was decided about it.
#[utoipa::path(get, path = "/v1/jobs/{id}/why", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Why), (status = "4XX", body = Problem)))]
pub async fn why(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Path(id): Path<String>,
) -> Result<axum::Json<Why>, ApiError> {
    let record = find_record(&coordinator, &user, &id).await?;
    let (mut job, mut decisions) = (record.job, record.decisions);
    coordinator.explanations.complete(&mut job);
    let explained = coordinator.explanations.of(&id).filter(|_| job.state == JobState::Pending);
    let (position, waiting) = match &explained {
        Some(explained) => place_in_queue(&coordinator, &job.spec.pool, explained.position),
        None => (None, None),
    };
    let provider = match &explained {
        Some(_) => provider::status::told(&coordinator, &job, now_ms()).await?,
        None => None,
    };
    let mut hidden = Hidden::default();
    redact::job(&coordinator, &user, &mut hidden, &mut job).await?;
    let texts: Vec<&str> = decisions.iter().map(|decision| decision.why.as_str()).collect();
    hidden.of(&coordinator, &user, texts).await?;
    for decision in &mut decisions {
        decision.why = hidden.text(&decision.why);
    }
    Ok(axum::Json(Why {
        job: job.id,
        state: job.state,
        reason: job.reason,
        remedy: explained.map(|explained| remedy::remedy(&explained.waiting.reason).to_owned()),
        provider,
        expected_start_ms: job.expected_start_ms,
        after: job.after,
        position,
        waiting,
        placed: job.why,
        decisions,
    }))
}

/// Of those that wait in a pool: the place, from 1, of the one that has this place among all; and how
/// many they are.
fn place_in_queue(coordinator: &Coordinator, pool: &str, position: usize) -> (Option<u32>, Option<u32>) {
    let in_pool: Vec<String> = coordinator.view.read(|contents| {
        let own = contents
            .jobs
            .iter()
            .filter(|(_, record)| waits(&record.value) && record.value.job.spec.pool == pool);
        own.map(|(id, _)| id.clone()).collect()
    });
    let places = in_pool.iter().filter_map(|id| coordinator.explanations.of(id)).map(|one| one.position);
    let (mut before, mut all) = (0, 0);
    for place in places {
        all += 1;
        before += u32::from(place < position);
    }
    (Some(before + 1), Some(all))
}

/// Says what would become of a job if it were submitted now. Nothing is changed, nothing is promised.
#[utoipa::path(post, path = "/v1/jobs/plan", tag = "jobs", request_body = JobSpec,
    responses((status = 200, body = Planned), (status = "4XX", body = Problem)))]
pub async fn plan(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Json(spec): Json<JobSpec, SPEC_BYTES>,
) -> Result<axum::Json<Planned>, ApiError> {
    let record = submit::prepare(&coordinator, &user.0.tenant, spec).await?;
    let mut planned = coordinator.dry_runs.run(&coordinator.changed, gang::gang(&record)).await?;
    let mut hidden = Hidden::default();
    let texts = [&planned.reason, &planned.why, &planned.after];
    hidden.of(&coordinator, &user, texts.into_iter().flatten().map(String::as_str)).await?;
    for text in [&mut planned.reason, &mut planned.why].into_iter().flatten() {
        *text = hidden.text(text);
    }
    planned.after = hidden.job(planned.after.take());
    Ok(axum::Json(planned))
}

/// The job, if the caller may know of it, with why it waits.
async fn find(coordinator: &Coordinator, user: &User, id: &str) -> Result<Job, ApiError> {
    let mut job = find_record(coordinator, user, id).await?.job;
    coordinator.explanations.complete(&mut job);
    redact::job(coordinator, user, &mut Hidden::default(), &mut job).await?;
    Ok(job)
}

/// The record, if the caller may know of it; others' jobs look as if they did not exist.
async fn find_record(coordinator: &Coordinator, user: &User, id: &str) -> Result<JobRecord, ApiError> {
    match submit::find_job(coordinator, id).await? {
        Some(record) if user.may(&record.value.job.tenant) => Ok(record.value),
        _ => Err(ApiError::not_found("job", id)),
    }
}
