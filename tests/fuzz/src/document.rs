//! What callers write.

use std::collections::HashSet;

use lathe_api::job::JobSpec;
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
