//! Errors on the wire: problem documents (RFC 9457).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every response with a 4xx or 5xx status; content type `application/problem+json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{title}{}{}", prefixed(" ", field), prefixed(": ", detail))]
pub struct Problem {
    /// What kind of problem, the same words every time.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// This occurrence: which field, which value, what to do. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The field at fault, as a dotted path into the request's body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// The text behind `separator`, if there is one.
fn prefixed(separator: &str, text: &Option<String>) -> String {
    text.as_deref().map(|text| format!("{separator}{text}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_field_and_value_on_one_line() {
        let problem = Problem {
            title: "invalid field".into(),
            status: 422,
            detail: Some("0: 1 to 1024 are possible".into()),
            field: Some("tasks".into()),
        };
        assert_eq!(problem.to_string(), "invalid field tasks: 0: 1 to 1024 are possible");
        let bare = Problem { title: "not found".into(), status: 404, detail: None, field: None };
        assert_eq!(bare.to_string(), "not found");
    }
}
