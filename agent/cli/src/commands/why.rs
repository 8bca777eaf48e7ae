//! `lathe job why` and `lathe job run --plan`: what was decided about a job, and what would be.

use std::collections::BTreeMap;
use std::fmt::Write;

use lathe_api::client::Client;
use lathe_api::job::JobSpec;
use lathe_api::scheduling::{DecidedBy, Decision, DecisionKind, Planned, Why};

use super::job::state_name;
use crate::exit::Exit;
use crate::output::{self, Format};

/// Prints why a job is as it is.
///
/// # Errors
/// What the coordinator said.
pub async fn show(client: &Client, id: &str, format: Format) -> anyhow::Result<Exit> {
    let why = client.job_why(id).await?;
    match format {
        Format::Json => output::json(&why)?,
        Format::Table => print!("{}", explain(&why, output::now_ms())),
    }
    Ok(Exit::Success)
}

/// Prints what would become of a job.
///
/// # Errors
/// What the coordinator said.
pub async fn plan(client: &Client, spec: &JobSpec, format: Format) -> anyhow::Result<Exit> {
    let planned = client.plan_job(spec).await?;
    match format {
        Format::Json => output::json(&planned)?,
        Format::Table => print!("{}", foretell(&planned, output::now_ms())),
    }
    Ok(Exit::Success)
}

fn explain(why: &Why, now_ms: u64) -> String {
    let mut text = String::new();
    let reason = why.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    line(&mut text, "state", &format!("{}{reason}", state_name(why.state)));
    if let Some(remedy) = &why.remedy {
        line(&mut text, "starts if", remedy);
    }
    if let Some(provider) = &why.provider {
        line(&mut text, "provider", provider);
    }
    if let Some(start) = why.expected_start_ms {
        let after = why.after.as_ref().map(|after| format!(", when job {after} ends")).unwrap_or_default();
        line(&mut text, "expected", &format!("{}{after}", output::ahead_of(start, now_ms)));
    }
    if let (Some(position), Some(waiting)) = (why.position, why.waiting) {
        line(&mut text, "queue", &format!("{position} of {waiting} that wait in its pool"));
    }
    if let Some(placed) = &why.placed {
        line(&mut text, "placed", placed);
    }
    for decision in &why.decisions {
        let attempt = format!(", attempt {}", decision.attempt);
        line(&mut text, "decided", &told(decision, &attempt, now_ms));
    }
    text
}

/// A decision about a service, on one line.
pub(super) fn decided(decision: &Decision, now_ms: u64) -> String {
    format!("{:<10} {}", "decided", told(decision, "", now_ms))
}

fn told(decision: &Decision, attempt: &str, now_ms: u64) -> String {
    let ago = output::duration(now_ms.saturating_sub(decision.time_ms));
    let (kind, by) = (kind(decision.kind), by(decision.by));
    let why = if decision.why.is_empty() { String::new() } else { format!(": {}", decision.why) };
    format!("{ago} ago{attempt}: {kind} by {by}{why}")
}

fn foretell(planned: &Planned, now_ms: u64) -> String {
    let mut text = String::new();
    if planned.starts {
        let why = planned.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        line(&mut text, "starts", &format!("now{why}"));
        let mut nodes: BTreeMap<&str, (u32, Vec<&str>)> = BTreeMap::new();
        for task in &planned.tasks {
            let (tasks, gpus) = nodes.entry(&task.node).or_default();
            *tasks += 1;
            gpus.extend(task.gpus.iter().map(String::as_str));
        }
        for (node, (tasks, gpus)) in nodes {
            let gpus = if gpus.is_empty() { String::new() } else { format!(", GPUs {}", gpus.join(" ")) };
            line(&mut text, "node", &format!("{node}: {tasks} tasks{gpus}"));
        }
    } else {
        let reason = planned.reason.as_deref().unwrap_or("the planner gave no reason");
        line(&mut text, "waits", reason);
        if let Some(start) = planned.expected_start_ms {
            let after =
                planned.after.as_ref().map(|after| format!(", when job {after} ends")).unwrap_or_default();
            line(&mut text, "expected", &format!("{}{after}", output::ahead_of(start, now_ms)));
        }
    }
    if planned.preemptions > 0 {
        line(&mut text, "stops", &format!("{} running jobs, which wait again", planned.preemptions));
    }
    text
}

fn line(text: &mut String, name: &str, value: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{name:<10} {value}");
}

fn kind(kind: DecisionKind) -> &'static str {
    match kind {
        DecisionKind::Placed => "placed",
        DecisionKind::Preempted => "stopped to make room",
        DecisionKind::Resized => "given another size",
        DecisionKind::Refused => "refused",
        DecisionKind::Restarted => "started again",
        DecisionKind::Cancelled => "cancelled",
        DecisionKind::Scaled => "scaled",
    }
}

fn by(by: DecidedBy) -> &'static str {
    match by {
        DecidedBy::Policy => "the policy",
        DecidedBy::Operator => "an operator",
        DecidedBy::Owner => "its owner",
        DecidedBy::Failure => "a failure",
        DecidedBy::Service => "its service",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_waits_says_for_what_until_when_and_what_happened_before() {
        let json = r#"{"job": "a-ab12cd", "state": "pending", "reason": "needs 8 GPUs", "remedy": "jobs end",
            "provider": "pool a's provider was asked for 2 nodes 30s ago",
            "expected_start_ms": 7260000, "after": "b-ab12cd", "position": 2, "waiting": 5, "decisions": [
            {"time_ms": 0, "attempt": 1, "kind": "placed", "by": "policy", "why": "fits best on n1"},
            {"time_ms": 30000, "attempt": 1, "kind": "preempted", "by": "operator", "why": ""}]}"#;
        assert_eq!(
            explain(&serde_json::from_str(json).unwrap(), 60_000),
            "state      pending: needs 8 GPUs\n\
             starts if  jobs end\n\
             provider   pool a's provider was asked for 2 nodes 30s ago\n\
             expected   in 2 h 0 min, when job b-ab12cd ends\n\
             queue      2 of 5 that wait in its pool\n\
             decided    60.0 s ago, attempt 1: placed by the policy: fits best on n1\n\
             decided    30.0 s ago, attempt 1: stopped to make room by an operator\n"
        );
    }

    #[test]
    fn a_plan_says_where_the_tasks_would_go_or_why_not() {
        let json = r#"{"starts": true, "why": "fits best", "preemptions": 1, "tasks": [
            {"rank": 0, "node": "n1", "gpus": ["0000:65:00.0"]}, {"rank": 1, "node": "n1",
            "gpus": ["0000:66:00.0"]}, {"rank": 2, "node": "n2"}]}"#;
        assert_eq!(
            foretell(&serde_json::from_str(json).unwrap(), 0),
            "starts     now: fits best\n\
             node       n1: 2 tasks, GPUs 0000:65:00.0 0000:66:00.0\n\
             node       n2: 1 tasks\n\
             stops      1 running jobs, which wait again\n"
        );
        let json = r#"{"starts": false, "reason": "needs 8 GPUs", "expected_start_ms": 500}"#;
        assert_eq!(
            foretell(&serde_json::from_str(json).unwrap(), 1000),
            "waits      needs 8 GPUs\nexpected   any moment\n"
        );
    }
}
