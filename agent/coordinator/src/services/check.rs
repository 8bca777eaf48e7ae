//! The `[service]` table of what people write, checked by itself. One clear line for each mistake.

use lathe_api::TimeSpan;
use lathe_api::job::JobSpec;
use lathe_api::service::LISTEN_PORTS;

use crate::api::error::ApiError;
use crate::check::range;

/// As many as a gang may have tasks.
const MAX_REPLICAS: u32 = 1024;
const MAX_TARGET: u32 = 100_000;
const MAX_WAITING: u32 = 4096;
const MAX_SPAN: TimeSpan = TimeSpan::from_seconds(3600);

/// Checks a job's `service`, if it has one, and that the rest goes with it.
///
/// # Errors
/// Names the field, its value, and what is possible.
pub fn service(spec: &JobSpec) -> Result<(), ApiError> {
    let Some(service) = &spec.service else { return Ok(()) };
    if spec.tasks != 1 || spec.tasks_min.is_some() {
        let detail =
            format!("{}: a replica of a service is one task; set service.min and service.max", spec.tasks);
        return Err(ApiError::field("tasks", detail));
    }
    if let Some(estimate) = spec.estimate {
        return Err(ApiError::field("estimate", format!("{estimate}: a service does not end; leave it out")));
    }
    if service.port == 0 {
        return Err(ApiError::field("service.port", "0: 1 to 65535 are possible"));
    }
    if let Some(listen) = service.listen.filter(|port| !LISTEN_PORTS.contains(port)) {
        let (first, last) = (LISTEN_PORTS.start(), LISTEN_PORTS.end());
        return Err(ApiError::field("service.listen", format!("{listen}: {first} to {last} are possible")));
    }
    range("service.max", service.max, 1, MAX_REPLICAS)?;
    if service.min > service.max {
        let detail = format!("{}: 0 to {} are possible, which is max", service.min, service.max);
        return Err(ApiError::field("service.min", detail));
    }
    range("service.target_in_flight", service.target_in_flight, 1, MAX_TARGET)?;
    range("service.max_waiting", service.max_waiting, 1, MAX_WAITING)?;
    let second = TimeSpan::from_seconds(1);
    span("service.scale_down_after", service.scale_down_after, second)?;
    span("service.max_wait", service.max_wait, second)?;
    span("service.drain", service.drain, TimeSpan::default())
}

fn span(field: &str, value: TimeSpan, least: TimeSpan) -> Result<(), ApiError> {
    if (least..=MAX_SPAN).contains(&value) {
        return Ok(());
    }
    Err(ApiError::field(field, format!("{value}: {least} to {MAX_SPAN} are possible")))
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body_util::BodyExt;

    use super::*;

    async fn refusal(fields: &str) -> (String, String) {
        let json = format!(r#"{{"name":"a","class":"container","image":"i",{fields}}}"#);
        let spec: JobSpec = serde_json::from_str(&json).expect(fields);
        let body = service(&spec).expect_err(fields).into_response().into_body();
        let bytes = body.collect().await.expect("a body").to_bytes();
        let problem: lathe_api::problem::Problem = serde_json::from_slice(&bytes).expect("a problem");
        (problem.field.expect("a field"), problem.detail.expect("a detail"))
    }

    #[tokio::test]
    async fn each_mistake_is_one_line_that_names_the_field_the_value_and_the_fix() {
        for (fields, field, words) in [
            (r#""tasks":2,"service":{"port":80,"max":4}"#, "tasks", "2: a replica of a service is one task"),
            (r#""tasks_min":1,"service":{"port":80,"max":4}"#, "tasks", "service.min"),
            (r#""estimate":"1h","service":{"port":80,"max":4}"#, "estimate", "1h: a service does not end"),
            (r#""service":{"port":0,"max":4}"#, "service.port", "0: 1 to 65535"),
            (r#""service":{"port":80,"max":4,"listen":80}"#, "service.listen", "80: 30000 to 32767"),
            (r#""service":{"port":80,"max":0,"min":0}"#, "service.max", "0: 1 to 1024"),
            (r#""service":{"port":80,"max":4,"min":5}"#, "service.min", "5: 0 to 4"),
            (r#""service":{"port":80,"max":4,"target_in_flight":0}"#, "service.target_in_flight", "0: 1 to"),
            (r#""service":{"port":80,"max":4,"max_waiting":5000}"#, "service.max_waiting", "5000: 1 to 4096"),
            (
                r#""service":{"port":80,"max":4,"scale_down_after":"0s"}"#,
                "service.scale_down_after",
                "0s: 1s to 1h",
            ),
            (r#""service":{"port":80,"max":4,"max_wait":"2h"}"#, "service.max_wait", "2h: 1s to 1h"),
            (r#""service":{"port":80,"max":4,"drain":"1d"}"#, "service.drain", "1d: 0s to 1h"),
        ] {
            let (at, detail) = refusal(fields).await;
            assert!(at == field && detail.contains(words), "{fields}: {at}: {detail}");
            assert!(!detail.contains('\n') && detail.len() < 200, "{detail}");
        }
    }

    #[test]
    fn what_is_possible_is_accepted() {
        for fields in [
            r#""port":1,"max":1"#,
            r#""port":65535,"min":0,"max":1024,"listen":32767,"protocol":"tcp","expose":"loopback","drain":"0s""#,
        ] {
            let json = format!(r#"{{"name":"a","class":"container","image":"i","service":{{{fields}}}}}"#);
            service(&serde_json::from_str(&json).expect("a service")).expect("accepted");
        }
    }
}
