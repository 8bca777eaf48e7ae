//! What is stored of services.

use lathe_api::artefact::{Dataset, Image};
use lathe_api::job::{Job, JobSpec, JobState};
use lathe_api::scheduling::{DecidedBy, Decision, DecisionKind};
use lathe_api::service::{ServiceSpec, ServiceState};
use serde::{Deserialize, Serialize};

use super::autoscale::Policy;
use crate::reconcile::fresh_tasks;
use crate::records::{JobRecord, ReplicaRecord, remember};

/// A service. Its replicas are jobs of their own, which name it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// Unique.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// As submitted.
    pub spec: JobSpec,
    /// Order of submission, among jobs too.
    pub sequence: u64,
    /// Resolved at submission.
    pub image: Image,
    /// Resolved at submission, in the order of the mounts.
    pub datasets: Vec<Dataset>,
    /// Port of the nodes.
    pub listen: u16,
    /// Now.
    pub state: ServiceState,
    /// How many replicas there should be.
    pub wanted: u32,
    /// Why so many.
    pub why: Option<String>,
    /// What was decided about it, oldest first.
    pub decisions: Vec<Decision>,
    /// When it was submitted.
    pub submitted_ms: u64,
    /// When its last replica was gone.
    pub finished_ms: Option<u64>,
}

impl ServiceRecord {
    /// The `[service]` table. What has none is not stored as a service.
    pub fn service(&self) -> Option<&ServiceSpec> {
        self.spec.service.as_ref()
    }

    /// What its replicas' number follows from.
    pub fn policy(&self) -> Option<Policy> {
        let service = self.service()?;
        Some(Policy {
            min: service.min,
            max: service.max,
            target_milli: u64::from(service.target_in_flight) * 1000,
            down_after_ms: service.scale_down_after.milliseconds(),
        })
    }

    /// Adds to its history.
    pub fn decide(&mut self, kind: DecisionKind, by: DecidedBy, why: impl Into<String>, now_ms: u64) {
        remember(&mut self.decisions, Decision { time_ms: now_ms, attempt: 0, kind, by, why: why.into() });
    }

    /// A new replica, as a job that has no number yet.
    pub fn replica(&self, id: String, now_ms: u64) -> JobRecord {
        JobRecord {
            replica: Some(ReplicaRecord::default()),
            ..job_record(
                Job {
                    id,
                    service: Some(self.id.clone()),
                    ..job(&self.tenant, self.spec.clone(), &self.image, now_ms)
                },
                self.image.clone(),
                self.datasets.clone(),
            )
        }
    }
}

/// A job that waits, without an ID.
pub fn job(tenant: &str, spec: JobSpec, image: &Image, now_ms: u64) -> Job {
    Job {
        id: String::new(),
        tenant: tenant.to_owned(),
        service: None,
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
        submitted_ms: now_ms,
        finished_ms: None,
        spec,
    }
}

/// The record of a job that has not been placed yet, without a number.
pub fn job_record(job: Job, image: Image, datasets: Vec<Dataset>) -> JobRecord {
    JobRecord {
        job,
        sequence: 0,
        image,
        datasets,
        failures: 0,
        losses: 0,
        restart_reason: None,
        cancelled: false,
        stopping: None,
        placed_ms: None,
        decisions: Vec::new(),
        replica: None,
    }
}
