//! The shared openb lists.

use std::path::PathBuf;

use lathe_scheduler::simulate::arrivals::{TraceNode, TraceTask};

/// Where the shared data are: `LATHE_SHARED_DATA`, or beside the repository.
pub fn folder() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let folder = std::env::var_os("LATHE_SHARED_DATA").map_or_else(beside, PathBuf::from).join("openb");
    folder.is_dir().then_some(folder)
}

/// Nodes with GPUs.
pub fn nodes() -> Vec<TraceNode> {
    let file = folder().unwrap().join("openb_node_list_gpu_node.csv");
    let text = std::fs::read_to_string(file).unwrap();
    let lines = text.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let node = |line: Vec<&str>| TraceNode {
        name: line[0].to_owned(),
        cpu_milli: line[1].parse().unwrap(),
        memory_mib: line[2].parse().unwrap(),
        gpus: line[3].parse().unwrap(),
        model: line[4].to_owned(),
    };
    lines.map(node).collect()
}

/// Tasks of one variation.
pub fn tasks(variation: &str) -> Vec<TraceTask> {
    let file = folder().unwrap().join(format!("openb_pod_list_{variation}.csv"));
    let text = std::fs::read_to_string(file).unwrap();
    let lines = text.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let task = |line: Vec<&str>| {
        let models = line.get(5).copied().unwrap_or_default().split('|');
        TraceTask {
            cpu_milli: line[1].parse().unwrap(),
            memory_mib: line[2].parse().unwrap(),
            gpus: line[3].parse().unwrap(),
            gpu_milli: if line[3] == "0" { 0 } else { line[4].parse().unwrap() },
            models: models.filter(|model| !model.is_empty()).map(str::to_owned).collect(),
        }
    };
    lines.map(task).collect()
}

/// Published mean at 100 % arrived.
pub fn published(variation: &str, policy: &str) -> f64 {
    let text = std::fs::read_to_string(folder().unwrap().join("expected_gpu_allocated.csv")).unwrap();
    let line = text.lines().find(|line| {
        line.starts_with(&format!("openb_pod_list_{variation},")) && line.contains(&format!("-{policy},"))
    });
    line.unwrap().split(',').nth(4).unwrap().parse().unwrap()
}
