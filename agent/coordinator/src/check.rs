//! What people write, checked by itself: jobs, names, labels. One clear line for each mistake: the
//! field, its value, what is possible.

use lathe_api::MemorySize;
use lathe_api::job::{DatasetMount, IsolationClass, JobSpec, Resources};
use lathe_api::scheduling::{Constraint, Isolation, Operator, Topology};

use crate::api::error::ApiError;
use crate::services;

const MAX_TASKS: u32 = 1024;
const MAX_CPUS: u32 = 64;
/// No host has more that a guest could take.
const MAX_GPUS: u32 = 64;
/// Below this Linux and its initramfs do not start.
const MIN_MICROVM_MEMORY: MemorySize = MemorySize::from_mib(64);
/// Below this a cgroup kills whatever is started in it.
const MIN_CONTAINER_MEMORY: MemorySize = MemorySize::from_mib(8);
/// 1 PiB: no machine has it, and sums of a gang's memory stay far from overflow.
const MAX_MEMORY: MemorySize = MemorySize::from_mib(1 << 30);
const MAX_GRACE_SECONDS: u32 = 3600;
const MAX_RESTARTS: u32 = 1000;
/// Bounds on lists: they travel to every node with every change.
const MAX_ARGS: usize = 1024;
const MAX_ENV: usize = 1024;
const MAX_DATASETS: usize = 64;
const MAX_PRIORITY: i32 = 1000;
/// Bounds on what the planner looks at for every node.
const MAX_CONSTRAINTS: usize = 64;
const MAX_VALUES: usize = 64;
const MAX_PREFERENCE: i32 = 100;
const MAX_MODELS: usize = 16;
const MAX_MODEL_CHARS: usize = 128;
/// As long as names: labels are columns in tables.
const MAX_LABEL_CHARS: usize = 63;
/// Longest reason an operator gives, characters.
const MAX_REASON_CHARS: usize = 200;

/// Checks a name of a job, node or tenant.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-') {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(format!("{shown:?}: 1 to 63 characters of a-z, 0-9 and -, not beginning with -"))
}

/// Checks all of a job that can be checked without knowing the cluster.
///
/// # Errors
/// Names the field, its value, and what is possible.
pub fn job(spec: &JobSpec) -> Result<(), ApiError> {
    check_name(&spec.name).map_err(|reason| ApiError::field("name", reason))?;
    if spec.class == IsolationClass::Unikernel {
        let detail = "class unikernel is not available yet; use microvm or container";
        return Err(ApiError::field("class", detail));
    }
    range("tasks", spec.tasks, 1, MAX_TASKS)?;
    if let Some(least) = spec.tasks_min
        && !(1..=spec.tasks).contains(&least)
    {
        let detail = format!("{least}: 1 to {} are possible, which is tasks", spec.tasks);
        return Err(ApiError::field("tasks_min", detail));
    }
    range("grace_seconds", spec.grace_seconds, 0, MAX_GRACE_SECONDS)?;
    range("restart.on_failure", spec.restart.on_failure, 0, MAX_RESTARTS)?;
    range("restart.on_loss", spec.restart.on_loss, 0, MAX_RESTARTS)?;
    check_resources(spec)?;
    check_command(spec)?;
    check_mounts(&spec.datasets)?;
    check_scheduling(spec)?;
    services::check::service(spec)
}

fn check_resources(spec: &JobSpec) -> Result<(), ApiError> {
    let resources = &spec.resources;
    range("resources.cpus", resources.cpus, 1, MAX_CPUS)?;
    range("resources.gpus", resources.gpus, 0, MAX_GPUS)?;
    if resources.gpus != 0 && spec.class != IsolationClass::Microvm {
        let detail = format!("{}: only tasks of class microvm can have GPUs", resources.gpus);
        return Err(ApiError::field("resources.gpus", detail));
    }
    check_gpus(resources)?;
    let minimum = match spec.class {
        IsolationClass::Container => MIN_CONTAINER_MEMORY,
        _ => MIN_MICROVM_MEMORY,
    };
    if resources.memory < minimum || resources.memory > MAX_MEMORY {
        let detail = format!("{}: a task of this class needs {minimum} to {MAX_MEMORY}", resources.memory);
        return Err(ApiError::field("resources.memory", detail));
    }
    if let Some(disk) = resources.disk
        && (disk.bytes() < 1 << 20 || disk > MAX_MEMORY)
    {
        return Err(ApiError::field("resources.disk", format!("{disk}: 1 MiB to {MAX_MEMORY}")));
    }
    Ok(())
}

fn check_command(spec: &JobSpec) -> Result<(), ApiError> {
    let nul = |text: &str| text.contains('\0');
    if spec.args.len() > MAX_ARGS || spec.args.iter().any(|arg| nul(arg)) {
        return Err(ApiError::field("args", format!("at most {MAX_ARGS}, without NUL characters")));
    }
    if let Some(entrypoint) = &spec.entrypoint
        && (entrypoint.is_empty() || entrypoint.len() > MAX_ARGS || entrypoint.iter().any(|arg| nul(arg)))
    {
        let detail =
            format!("1 to {MAX_ARGS} words without NUL characters; leave it out for the image's own");
        return Err(ApiError::field("entrypoint", detail));
    }
    if spec.env.len() > MAX_ENV {
        return Err(ApiError::field("env", format!("at most {MAX_ENV} variables")));
    }
    for (name, value) in &spec.env {
        if name.is_empty() || name.contains('=') || nul(name) || nul(value) {
            let detail = format!("{name:?}: a name without = and NUL, and a value without NUL");
            return Err(ApiError::field("env", detail));
        }
    }
    Ok(())
}

fn check_mounts(mounts: &[DatasetMount]) -> Result<(), ApiError> {
    if mounts.len() > MAX_DATASETS {
        return Err(ApiError::field("datasets", format!("at most {MAX_DATASETS}")));
    }
    for (index, mount) in mounts.iter().enumerate() {
        let path = &mount.mount;
        let plain = path.strip_prefix('/').is_some_and(|rest| {
            let mut parts = rest.split('/');
            !rest.is_empty() && !path.contains('\0') && parts.all(|part| !matches!(part, "" | "." | ".."))
        });
        let field = || format!("datasets.{index}.mount");
        if !plain || path.len() > 1024 {
            let detail = format!("{path:?}: an absolute path without empty, . and .. parts");
            return Err(ApiError::field(field(), detail));
        }
        let inside = |other: &str| format!("{path}/").starts_with(&format!("{other}/"));
        if mounts.iter().enumerate().any(|(other, m)| other != index && inside(&m.mount)) {
            return Err(ApiError::field(field(), format!("{path:?} is inside another dataset's folder")));
        }
    }
    Ok(())
}

/// Whether a number is within its bounds.
///
/// # Errors
/// Names the field, the value and the bounds.
pub fn range(field: &str, value: u32, least: u32, most: u32) -> Result<(), ApiError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ApiError::field(field, format!("{value}: {least} to {most} are possible")))
}

fn check_gpus(resources: &Resources) -> Result<(), ApiError> {
    let refuse = |field: &str, detail: String| Err(ApiError::field(format!("resources.{field}"), detail));
    if let Some(profile) = &resources.gpu_profile {
        let profile = shown(profile);
        let detail = "nodes do not make MIG instances yet; leave it out, and ask for whole GPUs";
        return refuse("gpu_profile", format!("{profile}: {detail}"));
    }
    if resources.gpus == 0 {
        let without = "needs resources.gpus of at least 1";
        if !resources.gpu_models.is_empty() {
            return refuse("gpu_models", without.to_owned());
        }
        if let Some(memory) = resources.gpu_memory {
            return refuse("gpu_memory", format!("{memory}: {without}"));
        }
    }
    if resources.gpu_models.len() > MAX_MODELS {
        return refuse("gpu_models", format!("at most {MAX_MODELS}"));
    }
    for (index, model) in resources.gpu_models.iter().enumerate() {
        if !(1..=MAX_MODEL_CHARS).contains(&model.chars().count()) || model.chars().any(char::is_control) {
            let detail = format!("{}: a model as `lathe gpu list` shows it", shown(model));
            return refuse(&format!("gpu_models.{index}"), detail);
        }
    }
    Ok(())
}

fn check_scheduling(spec: &JobSpec) -> Result<(), ApiError> {
    if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&spec.priority) {
        let detail = format!("{}: -{MAX_PRIORITY} to {MAX_PRIORITY} are possible", spec.priority);
        return Err(ApiError::field("priority", detail));
    }
    if spec.estimate.is_some_and(|estimate| estimate.seconds() == 0) {
        return Err(ApiError::field("estimate", "0s: at least 1s; leave it out if nobody can tell"));
    }
    let no_gpus = |value: &str| {
        format!("{value}: only tasks with GPUs hang below PCIe switches; ask for resources.gpus, or node")
    };
    if spec.topology == Topology::Switch && spec.resources.gpus == 0 {
        return Err(ApiError::field("topology", no_gpus("switch")));
    }
    if spec.isolation == Isolation::Switch && spec.resources.gpus == 0 {
        return Err(ApiError::field("isolation", no_gpus("switch")));
    }
    for (field, length) in [
        ("constraints", spec.constraints.len()),
        ("preferences", spec.preferences.len()),
        ("tolerations", spec.tolerations.len()),
    ] {
        if length > MAX_CONSTRAINTS {
            return Err(ApiError::field(field, format!("at most {MAX_CONSTRAINTS}")));
        }
    }
    let refuse = |(field, detail): (String, String)| ApiError::field(field, detail);
    for (index, one) in spec.constraints.iter().enumerate() {
        constraint(&format!("constraints.{index}"), one).map_err(refuse)?;
    }
    for (index, one) in spec.preferences.iter().enumerate() {
        let at = format!("preferences.{index}");
        condition(&at, &one.label, one.operator, &one.values).map_err(refuse)?;
        if one.weight == 0 || !(-MAX_PREFERENCE..=MAX_PREFERENCE).contains(&one.weight) {
            let detail = format!("{}: 1 to {MAX_PREFERENCE}, or -{MAX_PREFERENCE} to -1", one.weight);
            return Err(ApiError::field(format!("{at}.weight"), detail));
        }
    }
    for (index, one) in spec.tolerations.iter().enumerate() {
        let at = format!("tolerations.{index}");
        label(&one.key).map_err(|detail| ApiError::field(format!("{at}.key"), detail))?;
        let value = one.value.as_deref().unwrap_or_default();
        label_value(value).map_err(|detail| ApiError::field(format!("{at}.value"), detail))?;
    }
    Ok(())
}

/// Checks a condition on labels that is at `at` in a body.
///
/// # Errors
/// The field, and what is wrong with it.
pub fn constraint(at: &str, constraint: &Constraint) -> Result<(), (String, String)> {
    condition(at, &constraint.label, constraint.operator, &constraint.values)
}

fn condition(
    at: &str,
    label_name: &str,
    operator: Operator,
    values: &[String],
) -> Result<(), (String, String)> {
    label(label_name).map_err(|detail| (format!("{at}.label"), detail))?;
    let values_at = || format!("{at}.values");
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => {
            Err((values_at(), "in and not_in need at least one value".to_owned()))
        }
        Operator::Exists | Operator::Absent if !values.is_empty() => {
            Err((values_at(), "exists and absent take no values; use in or not_in".to_owned()))
        }
        _ if values.len() > MAX_VALUES => Err((values_at(), format!("at most {MAX_VALUES}"))),
        _ => values.iter().enumerate().try_for_each(|(index, value)| {
            label_value(value).map_err(|detail| (format!("{at}.values.{index}"), detail))
        }),
    }
}

/// Checks a label's name or a taint's key.
///
/// # Errors
/// What is wrong with it.
pub fn label(name: &str) -> Result<(), String> {
    if (1..=MAX_LABEL_CHARS).contains(&name.len()) && name.bytes().all(is_label) {
        return Ok(());
    }
    Err(format!("{}: 1 to {MAX_LABEL_CHARS} characters of a-z, A-Z, 0-9, ., _, / and -", shown(name)))
}

/// Checks a label's or a taint's value.
///
/// # Errors
/// What is wrong with it.
pub fn label_value(value: &str) -> Result<(), String> {
    if value.len() <= MAX_LABEL_CHARS && value.bytes().all(is_label) {
        return Ok(());
    }
    Err(format!("{}: at most {MAX_LABEL_CHARS} characters of a-z, A-Z, 0-9, ., _, / and -", shown(value)))
}

fn is_label(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'/' | b'-')
}

/// Checks the reason that an operator gives: it is shown to everybody, on one line.
///
/// # Errors
/// What is wrong with it.
pub fn reason(text: &str) -> Result<(), String> {
    let length = text.chars().count();
    if !text.trim().is_empty() && length <= MAX_REASON_CHARS && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(format!("{}: one line of 1 to {MAX_REASON_CHARS} characters", shown(text)))
}

/// A value as messages show it: quoted, and no longer than people read.
fn shown(value: &str) -> String {
    format!("{:?}", value.chars().take(80).collect::<String>())
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body_util::BodyExt;

    use super::*;

    async fn refusal(fields: &str) -> (String, String) {
        let json = format!(r#"{{"name":"a","class":"microvm","image":"i",{fields}}}"#);
        let spec: JobSpec = serde_json::from_str(&json).expect(fields);
        let body = job(&spec).expect_err(fields).into_response().into_body();
        let bytes = body.collect().await.expect("a body").to_bytes();
        let problem: lathe_api::problem::Problem = serde_json::from_slice(&bytes).expect("a problem");
        (problem.field.expect("a field"), problem.detail.expect("a detail"))
    }

    #[tokio::test]
    async fn each_mistake_is_one_line_that_names_the_field_the_value_and_the_fix() {
        let long = "x".repeat(64);
        let many = vec![r#"{"key":"k"}"#; 65].join(",");
        for (fields, field, words) in [
            (r#""tasks":4,"tasks_min":5"#, "tasks_min", "5: 1 to 4"),
            (r#""tasks":4,"tasks_min":0"#, "tasks_min", "0: 1 to 4"),
            (r#""priority":1001"#, "priority", "1001: -1000 to 1000"),
            (r#""priority":-1001"#, "priority", "-1001: -1000 to 1000"),
            (r#""estimate":"0s""#, "estimate", "at least 1s"),
            (r#""topology":"switch""#, "topology", "resources.gpus"),
            (r#""isolation":"switch""#, "isolation", "resources.gpus"),
            (r#""constraints":[{"label":"","operator":"exists"}]"#, "constraints.0.label", "1 to 63"),
            (r#""constraints":[{"label":"a","operator":"in"}]"#, "constraints.0.values", "at least one"),
            (
                r#""constraints":[{"label":"a","operator":"absent","values":["b"]}]"#,
                "constraints.0.values",
                "take no values",
            ),
            (
                &format!(r#""constraints":[{{"label":"a","operator":"in","values":["b","{long}"]}}]"#),
                "constraints.0.values.1",
                "at most 63",
            ),
            (
                r#""preferences":[{"label":"a","operator":"exists","weight":0}]"#,
                "preferences.0.weight",
                "0: 1 to 100",
            ),
            (
                r#""preferences":[{"label":"a","operator":"exists","weight":-101}]"#,
                "preferences.0.weight",
                "-101",
            ),
            (r#""tolerations":[{"key":"a b"}]"#, "tolerations.0.key", "\"a b\""),
            (r#""tolerations":[{"key":"a","value":"é"}]"#, "tolerations.0.value", "at most 63"),
            (&format!(r#""tolerations":[{many}]"#), "tolerations", "at most 64"),
            (r#""resources":{"gpu_models":["H100"]}"#, "resources.gpu_models", "resources.gpus"),
            (r#""resources":{"gpu_memory":"80 GiB"}"#, "resources.gpu_memory", "80 GiB: needs"),
            (r#""resources":{"gpus":1,"gpu_models":[""]}"#, "resources.gpu_models.0", "lathe gpu list"),
            (
                r#""resources":{"gpus":1,"gpu_profile":"1g.10gb"}"#,
                "resources.gpu_profile",
                "do not make MIG instances yet",
            ),
        ] {
            let (at, detail) = refusal(fields).await;
            assert!(at == field && detail.contains(words), "{fields}: {at}: {detail}");
            assert!(!detail.contains('\n') && detail.len() < 200, "{detail}");
        }
    }

    #[test]
    fn what_is_possible_is_accepted() {
        let spec = r#"{"name":"a","class":"microvm","image":"i","tasks":4,"tasks_min":1,"priority":-1000,
            "estimate":"1s","topology":"switch","isolation":"switch",
            "constraints":[{"label":"example.com/zone","operator":"not_in","values":["", "b"]}],
            "preferences":[{"label":"a","operator":"exists","weight":-100}],
            "tolerations":[{"key":"a"},{"key":"a","value":""}],
            "resources":{"gpus":1,"gpu_models":["NVIDIA H100 80GB HBM3"],"gpu_memory":"80 GiB"}}"#;
        job(&serde_json::from_str(spec).expect("a job")).expect("accepted");
    }

    #[test]
    fn reasons_and_labels_cannot_break_lines_or_tables() {
        assert_eq!(reason("DIMM replaced; ticket 4711"), Ok(()));
        for bad in ["", "  ", "a\nb", "\u{1b}[31m", &"x".repeat(201)] {
            assert!(reason(bad).is_err(), "{bad:?}");
        }
        assert!(label("lathe.leaf").is_ok() && label("a=b").is_err() && label_value("").is_ok());
    }
}
