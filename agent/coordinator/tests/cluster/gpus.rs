//! GPUs of nodes, promised to tasks and taken back.

use lathe_api::gpu::{Gpu, GpuHealth, GpuState};
use lathe_api::job::{JobSpec, JobState, TaskExit};

use crate::harness::{Cluster, eventually, spec};

fn gpu(slot: u8, more: &str) -> Gpu {
    let text = format!(
        r#"{{"address": "0000:{slot:02x}:00.0", "vendor": 4318, "device": 9008, "class": 197120,
            "model": "10de:2330", "memory_bytes": 1, "health": {{"is": "healthy"}}, "state": "free"{more}}}"#
    );
    serde_json::from_str(&text).expect("a GPU")
}

fn with_gpus(gpus: u32) -> JobSpec {
    let mut spec = spec(1);
    spec.resources.gpus = gpus;
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn gpus_that_cannot_be_used_are_the_reason_why_a_job_waits() {
    let cluster = Cluster::start().await;
    let agent = cluster.node("n1", 8).await;
    let problem = r#", "problems": [{"severity": "blocks", "what": "the IOMMU is off", "fix": "x"}]"#;
    let broken = Gpu { health: GpuHealth::Failed("Xid 79".to_owned()), ..gpu(2, "") };
    agent.set_gpus(vec![gpu(1, ""), broken, gpu(3, problem)]);
    cluster.image().await;
    let job = cluster.admin().submit_job(&with_gpus(2)).await.expect("accepted");
    let wanted = "needs 2 GPUs, the most that a ready node can give is 1: n1: 0000:02:00.0: Xid 79; \
                  n1: 0000:03:00.0: the IOMMU is off";
    cluster.job_when(&job.id, |job| job.reason.as_deref() == Some(wanted)).await;
    // It recovers, and the job starts.
    agent.set_gpus(vec![gpu(1, ""), gpu(2, ""), gpu(3, problem)]);
    agent.running_when(1).await;
    let nodes = cluster.admin().nodes().await.expect("listed");
    assert_eq!((nodes[0].allocated_gpus, agent.seen()[0].resources.gpus), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_is_promised_again_only_when_it_is_free_again() {
    let cluster = Cluster::start().await;
    let agent = cluster.node("n1", 8).await;
    agent.set_gpus(vec![gpu(1, "")]);
    cluster.image().await;
    let first = cluster.admin().submit_job(&with_gpus(1)).await.expect("accepted");
    let sandbox = agent.running_when(1).await.remove(0);
    let second = cluster.admin().submit_job(&with_gpus(1)).await.expect("accepted");
    let waits = "needs 1 GPU, the largest number free on one node is 0";
    cluster.job_when(&second.id, |job| job.reason.as_ref().is_some_and(|text| text.starts_with(waits))).await;

    let in_state = |state| Gpu { state, task: Some(sandbox.clone()), ..gpu(1, "") };
    agent.set_gpus(vec![in_state(GpuState::InUse)]);
    agent.set_gpus(vec![in_state(GpuState::Scrubbing)]);
    agent.exit(&sandbox, TaskExit::Code(0));
    cluster.job_when(&first.id, |job| job.state == JobState::Succeeded).await;
    eventually("the promise to end", || async {
        let nodes = cluster.admin().nodes().await.ok()?;
        (nodes[0].allocated_gpus == 0).then_some(())
    })
    .await;
    // Another gang, which needs none, starts in a later round: by then the second was planned again, too.
    let third = cluster.admin().submit_job(&spec(1)).await.expect("accepted");
    cluster.job_when(&third.id, |job| job.state == JobState::Running).await;
    assert_eq!(cluster.job(&second.id).await.state, JobState::Pending, "it is still being scrubbed");

    agent.set_gpus(vec![gpu(1, "")]);
    cluster.job_when(&second.id, |job| job.state == JobState::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_told_which_gpus_they_get_and_no_two_get_the_same() {
    let cluster = Cluster::start().await;
    let agent = cluster.node("n1", 8).await;
    let below = |switch: u8| {
        format!(r#", "path": ["0000:00:01.0", "0000:{switch:02x}:00.0", "0000:{switch:02x}:01.0"]"#)
    };
    // Two switches with two each, in an order that does not show it.
    agent.set_gpus(vec![
        gpu(0x11, &below(8)),
        gpu(0x12, &below(9)),
        gpu(0x13, &below(8)),
        gpu(0x14, &below(9)),
    ]);
    cluster.image().await;
    let mut given = Vec::new();
    for count in [2, 2] {
        let job = cluster.admin().submit_job(&with_gpus(count)).await.expect("accepted");
        cluster.job_when(&job.id, |job| job.state == JobState::Running).await;
        let spec =
            eventually("its task", || async { agent.seen().into_iter().find(|spec| spec.job == job.id) })
                .await;
        let mut pair: Vec<_> = spec.gpus.iter().map(ToString::to_string).collect();
        pair.sort_unstable();
        given.push(pair);
    }
    given.sort_unstable();
    let pair = |one: u8, other: u8| vec![format!("0000:{one:02x}:00.0"), format!("0000:{other:02x}:00.0")];
    assert_eq!(given, [pair(0x11, 0x13), pair(0x12, 0x14)], "each pair below one switch");
}
