//! What callers write.

use std::collections::HashSet;

use lathe_api::job::JobSpec;
use lathe_coordinator::check::check_name;
use lathe_coordinator::provider::contract;
use lathe_scheduler::simulate::trace::{self, Work};
use lathe_vmm::config::VmConfig;

/// A machine's description: what is accepted can be written down and is accepted again.
pub fn vm_json(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = VmConfig::from_json(text) else { return };
    let written = serde_json::to_string(&config).expect("a description can be written");
    let again = VmConfig::from_json(&written).expect("what was written can be read");
    assert_eq!(again, config);
    assert_eq!(again.check().is_ok(), config.check().is_ok());
}

/// A job's description, in both of its formats.
pub fn job_spec(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let specs = [toml::from_str::<JobSpec>(text).ok(), serde_json::from_str::<JobSpec>(text).ok()];
    for spec in specs.into_iter().flatten() {
        let written = serde_json::to_string(&spec).expect("a job can be written");
        let again: JobSpec = serde_json::from_str(&written).expect("what was written can be read");
        assert_eq!(serde_json::to_string(&again).expect("a job can be written"), written);
    }
}

/// What a provider's program answers: refused in one line, or nodes that can be nodes, each once.
pub fn provider_answer(bytes: &[u8]) {
    match contract::parse(bytes) {
        Err(error) => {
            let error = error.to_string();
            assert!(!error.chars().any(char::is_control) && error.len() < 2000, "{error}");
        }
        Ok(answer) => {
            assert!(answer.nodes.iter().all(|node| check_name(&node.name).is_ok()));
            let names: HashSet<&str> = answer.nodes.iter().map(|node| node.name.as_str()).collect();
            assert_eq!(names.len(), answer.nodes.len());
            let shown = answer.nodes.iter().filter_map(|node| node.request.as_ref()).chain(&answer.error);
            assert!(shown.flat_map(|text| text.chars()).all(|c| !c.is_control()));
        }
    }
}

/// Lists of nodes, pods and jobs for the simulator: refused in one line, or within the planner's bounds.
pub fn cluster_trace(bytes: &[u8]) {
    match trace::nodes("file", bytes) {
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        Ok(nodes) => {
            let names: HashSet<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
            assert_eq!(names.len(), nodes.len());
            assert!(nodes.iter().all(|node| node.gpus.len() <= 64));
        }
    }
    match trace::work("file", bytes) {
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        Ok(Work::Pods(pods)) => {
            for pod in pods {
                assert!((0.0..=64.0).contains(&pod.gpus()));
                assert!(pod.lifetime_ms.is_none_or(|(_, duration)| duration > 0));
            }
        }
        Ok(Work::Jobs(jobs)) => {
            for job in jobs {
                for per_node in [1, 8, 64] {
                    let gang = job.gang(per_node);
                    assert_eq!(gang.tasks.max * gang.task.gpu_count(), job.gpus);
                    assert_eq!(gang.tasks.min * gang.task.gpu_count(), job.min_gpus);
                    assert!(gang.tasks.min >= 1 && gang.task.gpu_count() <= per_node);
                }
            }
        }
    }
}
