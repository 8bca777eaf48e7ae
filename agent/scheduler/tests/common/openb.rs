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
    let file = folder().expect("as published").join("openb_node_list_gpu_node.csv");
    let text = std::fs::read_to_string(file).expect("as published");
    let lines = text.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let node = |line: Vec<&str>| TraceNode {
        name: line[0].to_owned(),
        cpu_milli: line[1].parse().expect("as published"),
        memory_mib: line[2].parse().expect("as published"),
        gpus: line[3].parse().expect("as published"),
        model: line[4].to_owned(),
    };
    lines.map(node).collect()
}

/// Tasks of one variation.
pub fn tasks(variation: &str) -> Vec<TraceTask> {
    let file = folder().expect("as published").join(format!("openb_pod_list_{variation}.csv"));
    let text = std::fs::read_to_string(file).expect("as published");
    let lines = text.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let task = |line: Vec<&str>| {
        let models = line.get(5).copied().unwrap_or_default().split('|');
        TraceTask {
            cpu_milli: line[1].parse().expect("as published"),
            memory_mib: line[2].parse().expect("as published"),
            gpus: line[3].parse().expect("as published"),
            gpu_milli: if line[3] == "0" { 0 } else { line[4].parse().expect("as published") },
            models: models.filter(|model| !model.is_empty()).map(str::to_owned).collect(),
        }
    };
    lines.map(task).collect()
}

/// Published mean at 100 % arrived.
pub fn published(variation: &str, policy: &str) -> f64 {
    let text = std::fs::read_to_string(folder().expect("as published").join("expected_gpu_allocated.csv"))
        .expect("as published");
    let line = text.lines().find(|line| {
        line.starts_with(&format!("openb_pod_list_{variation},")) && line.contains(&format!("-{policy},"))
    });
    line.expect("as published").split(',').nth(4).expect("as published").parse().expect("as published")
}
