//! Jobs, as the planner knows them.

use lathe_api::scheduling;
use lathe_scheduler::model::{
    Communication, GpuRequest, Input, Isolation, Preference, Scope, Share, Size, TaskRequest,
};
use lathe_scheduler::{Amount, Gang};

use super::settings::{constraint, operator};
use crate::records::JobRecord;

/// A job's gang.
pub fn gang(record: &JobRecord) -> Gang {
    let (job, spec) = (&record.job, &record.job.spec);
    let image = std::iter::once((record.image.digest.to_string(), record.image.size_bytes));
    let datasets = record.datasets.iter().map(|dataset| (dataset.digest.to_string(), dataset.size().bytes()));
    Gang {
        id: job.id.clone(),
        tenant: job.tenant.clone(),
        pool: spec.pool.clone(),
        class: spec.class,
        tasks: Size { min: spec.tasks_min.unwrap_or(spec.tasks).clamp(1, spec.tasks), max: spec.tasks },
        task: task(record),
        constraints: spec.constraints.iter().map(constraint).collect(),
        tolerations: spec.tolerations.iter().map(|one| (one.key.clone(), one.value.clone())).collect(),
        preferences: spec.preferences.iter().map(preference).collect(),
        scope: match spec.topology {
            scheduling::Topology::Switch => Scope::Switch,
            scheduling::Topology::Node => Scope::Node,
            scheduling::Topology::Leaf => Scope::Leaf,
            scheduling::Topology::Rack => Scope::Rack,
            scheduling::Topology::Any => Scope::Any,
        },
        isolation: match spec.isolation {
            scheduling::Isolation::Shared => Isolation::Shared,
            scheduling::Isolation::Cores => Isolation::Cores,
            scheduling::Isolation::Switch => Isolation::Switch,
            scheduling::Isolation::Node => Isolation::Node,
        },
        inputs: image.chain(datasets).map(|(digest, bytes)| Input { digest, bytes }).collect(),
        communication: match spec.communication {
            scheduling::Communication::None => Communication::None,
            scheduling::Communication::Ring => Communication::Ring,
            scheduling::Communication::AllToAll => Communication::AllToAll,
        },
        priority: spec.priority,
        preemptible: spec.preemptible,
        grace_ms: u64::from(spec.grace_seconds) * 1000,
        submitted_ms: job.submitted_ms,
        estimate_ms: spec.estimate.map(lathe_api::TimeSpan::milliseconds),
        // The same people run the same things again under the same name.
        kind: format!("{}/{}", job.tenant, spec.name),
    }
}

fn task(record: &JobRecord) -> TaskRequest {
    let resources = &record.job.spec.resources;
    let share = resources.gpu_profile.clone().map_or(Share::Whole, Share::Profile);
    let gpus = (resources.gpus > 0).then(|| GpuRequest {
        count: resources.gpus,
        share,
        models: resources.gpu_models.clone(),
        memory_bytes: resources.gpu_memory.map_or(0, |memory| memory.bytes()),
    });
    let amount = Amount {
        cpu_milli: u64::from(resources.cpus) * 1000,
        memory_bytes: resources.memory.bytes(),
        hugepage_bytes: 0,
        sandboxes: 1,
    };
    TaskRequest { amount, gpus }
}

fn preference(set: &scheduling::Preference) -> Preference {
    Preference {
        constraint: lathe_scheduler::model::Constraint {
            label: set.label.clone(),
            operator: operator(set.operator, &set.values),
        },
        weight: set.weight,
    }
}
