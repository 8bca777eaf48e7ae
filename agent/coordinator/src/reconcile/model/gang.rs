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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lathe_api::artefact::{Dataset, DatasetFile, Digest};

    use super::*;

    fn gang_of(spec: &str) -> Gang {
        let spec: serde_json::Value = serde_json::from_str(spec).expect("JSON");
        let digest = Digest::of(b"image");
        let files = vec![DatasetFile { path: "a".to_owned(), digest: Digest::of(b"a"), size_bytes: 7 }];
        let dataset = Dataset { name: "d".to_owned(), digest: Dataset::digest_of(&files), files };
        // As a coordinator of before there were pools stored it.
        let record = serde_json::json!({
            "job": {"id": "fit-ab12cd", "tenant": "red", "spec": spec, "image_digest": digest,
                    "state": "pending", "attempt": 0, "tasks": [], "submitted_ms": 9},
            "sequence": 1, "image": {"name": "i", "digest": digest, "size_bytes": 5},
            "datasets": [dataset], "failures": 0, "losses": 0, "cancelled": false, "stopping": null
        });
        gang(&serde_json::from_value(record).expect("an old record decodes"))
    }

    #[test]
    fn an_old_job_asks_for_what_it_always_did() {
        let gang = gang_of(r#"{"name":"fit","class":"container","image":"i","tasks":2}"#);
        let amount = Amount { cpu_milli: 1000, memory_bytes: 256 << 20, hugepage_bytes: 0, sandboxes: 1 };
        let expected = Gang {
            id: "fit-ab12cd".to_owned(),
            tenant: "red".to_owned(),
            pool: "default".to_owned(),
            tasks: Size::exactly(2),
            task: TaskRequest { amount, gpus: None },
            grace_ms: 10_000,
            submitted_ms: 9,
            kind: "red/fit".to_owned(),
            inputs: gang.inputs.clone(),
            ..Gang::default()
        };
        assert_eq!(gang, expected);
        assert_eq!(gang.inputs.iter().map(|input| input.bytes).collect::<Vec<_>>(), [5, 7]);
    }

    #[test]
    fn all_that_a_job_asks_for_reaches_the_planner() {
        let gang = gang_of(
            r#"{"name":"fit","class":"microvm","image":"i","tasks":8,"tasks_min":4,"pool":"train",
                "priority":-3,"preemptible":true,"estimate":"90m","topology":"leaf","isolation":"switch",
                "communication":"all_to_all","grace_seconds":60,
                "resources":{"gpus":2,"gpu_models":["H100"],"gpu_memory":"80 GiB"},
                "constraints":[{"label":"zone","operator":"in","values":["a","b"]},
                               {"label":"old","operator":"absent"}],
                "preferences":[{"label":"ssd","operator":"exists","weight":-5}],
                "tolerations":[{"key":"gpu"},{"key":"team","value":"red"}]}"#,
        );
        assert_eq!((gang.tasks, gang.priority, gang.preemptible), (Size { min: 4, max: 8 }, -3, true));
        assert_eq!((gang.estimate_ms, gang.grace_ms), (Some(5_400_000), 60_000));
        assert_eq!((gang.scope, gang.isolation), (Scope::Leaf, Isolation::Switch));
        assert_eq!((gang.communication, gang.pool.as_str()), (Communication::AllToAll, "train"));
        let gpus = gang.task.gpus.as_ref().expect("GPUs");
        assert_eq!((gpus.count, gpus.memory_bytes), (2, 80 << 30));
        assert_eq!(gpus.models, ["H100"]);
        let holds = |pairs: &[(&str, &str)]| {
            let labels: BTreeMap<_, _> =
                pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            gang.constraints.iter().all(|one| one.holds("n1", &labels))
        };
        assert!(holds(&[("zone", "b")]) && !holds(&[("zone", "c")]) && !holds(&[("zone", "a"), ("old", "")]));
        assert_eq!(gang.preferences[0].weight, -5);
        assert_eq!(gang.tolerations[1], ("team".to_owned(), Some("red".to_owned())));
    }
}
