//! What a job's tasks reported: their `RESULT` line, and the stages its sandboxes went through.

use anyhow::Context;
use lathe_api::job::Job;
use serde::{Deserialize, Serialize};

/// One job of the demo, as `target/demo/report.json` holds it.
#[derive(Clone, Debug, Serialize)]
pub struct JobReport {
    /// The job's name.
    pub job: String,
    /// Isolation class.
    pub class: String,
    /// Size of the gang.
    pub ranks: u32,
    /// Node of each rank.
    pub nodes: Vec<String>,
    /// Dataset, if it has one.
    pub dataset: Option<String>,
    /// Fitted coefficients with their names, the intercept first.
    pub coefficients: Vec<Coefficient>,
    /// Coefficient of determination.
    pub r_squared: Option<f64>,
    /// Seconds by stage: from submission to the end, and the slowest rank of each stage.
    pub seconds: Seconds,
}

/// A coefficient and its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Coefficient {
    /// The column, or `intercept`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// Seconds of each stage; the slowest rank's, because the gang waits for it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Seconds {
    /// From submission to the end.
    pub total: f64,
    /// Fetching and converting the image.
    pub image: f64,
    /// Fetching datasets.
    pub datasets: f64,
    /// Disks, network, cgroup.
    pub prepare: f64,
    /// From starting the sandbox to the task's process.
    pub start: f64,
    /// The task's process.
    pub run: f64,
    /// Taking the sandbox down.
    pub cleanup: f64,
}

/// What a workload printed after `RESULT `.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadResult {
    /// Name and value of each coefficient, the intercept first.
    pub coefficients: Vec<Coefficient>,
    /// Coefficient of determination.
    pub r_squared: f64,
}

/// The workloads' own formats.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    LeastSquares { names: Vec<String>, coefficients: Vec<f64>, r_squared: f64 },
    Python { sklearn: Fit },
}

#[derive(Deserialize)]
struct Fit {
    slope: f64,
    intercept: f64,
    r_squared: f64,
}

impl From<Line> for WorkloadResult {
    fn from(line: Line) -> Self {
        let named = |(name, value): (String, f64)| Coefficient {
            name: name.trim_matches(['(', ')']).to_owned(),
            value,
        };
        match line {
            Line::LeastSquares { names, coefficients, r_squared } => {
                let coefficients = names.into_iter().zip(coefficients).map(named).collect();
                Self { coefficients, r_squared }
            }
            Line::Python { sklearn: Fit { slope, intercept, r_squared } } => {
                let coefficients = [("intercept".to_owned(), intercept), ("slope".to_owned(), slope)];
                Self { coefficients: coefficients.into_iter().map(named).collect(), r_squared }
            }
        }
    }
}

/// The `RESULT` line in a job's output.
///
/// # Errors
/// When there is none, or it is no result.
pub fn result(logs: &str) -> anyhow::Result<WorkloadResult> {
    let line = logs
        .lines()
        .find_map(|line| line.split_once("RESULT ").map(|(_, json)| json))
        .with_context(|| format!("no RESULT line in the output:\n{logs}"))?;
    let line: Line =
        serde_json::from_str(line).with_context(|| format!("the RESULT line cannot be read: {line}"))?;
    Ok(line.into())
}

/// Puts a finished job and its result together.
///
/// # Errors
/// When the output has no result.
pub fn report(job: &Job, logs: &str) -> anyhow::Result<JobReport> {
    let result = result(logs)?;
    let slowest = |stage: fn(&lathe_api::job::Stages) -> u64| {
        job.tasks.iter().map(|task| stage(&task.stages)).max().unwrap_or(0) as f64 / 1e3
    };
    let end = job.finished_ms.unwrap_or(job.submitted_ms);
    Ok(JobReport {
        job: job.spec.name.clone(),
        class: serde_json::to_value(job.spec.class)?.as_str().unwrap_or_default().to_owned(),
        ranks: job.spec.tasks,
        nodes: job.tasks.iter().map(|task| task.node.clone().unwrap_or_default()).collect(),
        dataset: job.spec.datasets.first().map(|dataset| dataset.name.clone()),
        coefficients: result.coefficients,
        r_squared: Some(result.r_squared),
        seconds: Seconds {
            total: end.saturating_sub(job.submitted_ms) as f64 / 1e3,
            image: slowest(|stages| stages.image_ms),
            datasets: slowest(|stages| stages.datasets_ms),
            prepare: slowest(|stages| stages.prepare_ms),
            start: slowest(|stages| stages.start_ms),
            run: slowest(|stages| stages.run_ms),
            cleanup: slowest(|stages| stages.cleanup_ms),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_workloads_lines_are_read() {
        let fit = result(
            "noise\n[0] RESULT {\"names\":[\"(intercept)\",\"x\"],\"coefficients\":[1,2],\"r_squared\":1}",
        );
        let python =
            result("RESULT {\"sklearn\":{\"slope\":2.0,\"intercept\":1.0,\"r_squared\":1.0},\"rows\":5}");
        let values = |r: &WorkloadResult| r.coefficients.iter().map(|c| c.value).collect::<Vec<_>>();
        let (fit, python) = (fit.unwrap(), python.unwrap());
        assert_eq!(values(&fit), [1.0, 2.0]);
        assert_eq!(values(&python), [1.0, 2.0]);
        assert_eq!(fit.coefficients[0].name, "intercept");
        assert!(result("nothing").is_err());
    }
}
