//! What a provider's program is told and what it answers: one JSON document each, of version 1.
//!
//! Requests are ours; answers are bytes from outside, bounded and checked before anything is done with
//! them.

use std::collections::BTreeSet;

use lathe_api::provider::NodeShape;
use serde::{Deserialize, Serialize};

use super::one_line;
use crate::check::check_name;

/// Version of the contract; a program that does not know it must fail.
pub const VERSION: u32 = 1;
/// Longest answer, bytes: more than all that is counted below needs.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Nodes of an answer: as many as a pool may have, and as many again that it does not know of.
pub const MAX_NODES: usize = 8192;
/// A request's name is a pool's (63 characters), a hyphen and 32 hexadecimal digits.
const MAX_REQUEST_CHARS: usize = 128;
const MAX_ERROR_CHARS: usize = 300;

/// What the program is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Make nodes and name them. The same request may be made again: nothing more is made for it then,
    /// and the same nodes are named.
    Grow,
    /// Take the named nodes back, and name those that are gone or were not there.
    Release,
    /// Name all nodes that there are for the pool.
    List,
}

/// What the program reads from its standard input.
#[derive(Clone, Debug, Serialize)]
pub struct Request<'a> {
    /// [`VERSION`].
    pub version: u32,
    /// What to do.
    pub action: Action,
    /// The pool that it is for.
    pub pool: &'a str,
    /// Names the request, for `grow`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<&'a str>,
    /// How many nodes to make, for `grow`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// What for, one line, for `grow`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'a str>,
    /// What each node has to be, for `grow`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<&'a NodeShape>,
    /// The nodes to take back, for `release`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<Named>,
}

/// A node, by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// The name that its agent joins with.
    pub name: String,
    /// The request that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// What the program wrote to its standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Nodes; which ones depends on what it was told to do.
    pub nodes: Vec<Named>,
    /// Why that is not all, one line.
    pub error: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    nodes: Option<Vec<Named>>,
    error: Option<String>,
}

/// An answer that is none. Displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It has no end.
    #[error("it answered more than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
    /// It is not such a document.
    #[error("it did not answer with a document of the contract: {0}")]
    Malformed(String),
    /// It says nothing.
    #[error("it answered with neither \"nodes\" nor \"error\"")]
    Empty,
    /// It names too many.
    #[error("it named {0} nodes, more than {MAX_NODES}")]
    TooMany(usize),
    /// A name that no node can have.
    #[error("nodes.{index}.{field}: {reason}")]
    Name {
        /// Where.
        index: usize,
        /// `name` or `request`.
        field: &'static str,
        /// The value, and what is possible.
        reason: String,
    },
    /// A node twice.
    #[error("nodes.{index}.name: {name:?} is there twice")]
    Twice {
        /// Where.
        index: usize,
        /// The name.
        name: String,
    },
}

/// Reads an answer.
///
/// # Errors
/// When it is not one.
pub fn parse(bytes: &[u8]) -> Result<Answer, AnswerError> {
    if bytes.len() > MAX_ANSWER_BYTES {
        return Err(AnswerError::TooLong);
    }
    let malformed =
        |error: serde_json::Error| AnswerError::Malformed(one_line(&error.to_string(), MAX_ERROR_CHARS));
    let Document { nodes, error } = serde_json::from_slice(bytes).map_err(malformed)?;
    if nodes.is_none() && error.is_none() {
        return Err(AnswerError::Empty);
    }
    let nodes = nodes.unwrap_or_default();
    if nodes.len() > MAX_NODES {
        return Err(AnswerError::TooMany(nodes.len()));
    }
    let mut seen = BTreeSet::new();
    for (index, node) in nodes.iter().enumerate() {
        let wrong = |field| move |reason| AnswerError::Name { index, field, reason };
        check_name(&node.name).map_err(wrong("name"))?;
        node.request.as_deref().map_or(Ok(()), check_request).map_err(wrong("request"))?;
        if !seen.insert(node.name.as_str()) {
            return Err(AnswerError::Twice { index, name: node.name.clone() });
        }
    }
    Ok(Answer { nodes, error: error.map(|error| one_line(&error, MAX_ERROR_CHARS)) })
}

/// Whatever it calls a request: it is compared with ours, and shown.
fn check_request(request: &str) -> Result<(), String> {
    if (1..=MAX_REQUEST_CHARS).contains(&request.len()) && request.bytes().all(|byte| byte.is_ascii_graphic())
    {
        return Ok(());
    }
    let shown: String = request.chars().take(80).collect();
    Err(format!("{shown:?}: 1 to {MAX_REQUEST_CHARS} characters without spaces"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_nodes_or_says_why_not_or_both() {
        let named = |name: &str, request: Option<&str>| Named {
            name: name.to_owned(),
            request: request.map(str::to_owned),
        };
        for (json, nodes, error) in [
            (r#"{"nodes":[]}"#, vec![], None),
            (r#"{"nodes":[{"name":"n1"}]}"#, vec![named("n1", None)], None),
            (r#"{"nodes":[{"name":"n1","request":"a-1"}]}"#, vec![named("n1", Some("a-1"))], None),
            (r#"{"error":"no\ncapacity"}"#, vec![], Some("no capacity")),
            (
                r#" {"nodes":[{"name":"n1"}],"error":"one of two"} "#,
                vec![named("n1", None)],
                Some("one of two"),
            ),
        ] {
            let expected = Answer { nodes, error: error.map(str::to_owned) };
            assert_eq!(parse(json.as_bytes()), Ok(expected), "{json}");
        }
    }

    #[test]
    fn anything_else_is_refused_in_one_line_that_says_what_is_wrong() {
        for (text, words) in [
            ("", "EOF"),
            ("nodes: n1", "a document of the contract: expected"),
            ("[]", "invalid length 0"),
            ("{}", "neither \"nodes\" nor \"error\""),
            ("null", "invalid type"),
            (r#"{"nodes":[]} {"nodes":[]}"#, "trailing"),
            (r#"{"nodes":[{"name":"n1"}],"node":1}"#, "unknown field"),
            ("{\"no\\ndes\":1}", "unknown field"),
            (r#"{"nodes":["n1"]}"#, "invalid type"),
            (r#"{"nodes":[{"name":"N1"}]}"#, "nodes.0.name: \"N1\": 1 to 63"),
            (r#"{"nodes":[{"name":"../n1"}]}"#, "nodes.0.name"),
            (r#"{"nodes":[{"name":"n1"},{"name":""}]}"#, "nodes.1.name"),
            (r#"{"nodes":[{"name":"n1"},{"name":"n1"}]}"#, "nodes.1.name: \"n1\" is there twice"),
            (r#"{"nodes":[{"name":"n1","request":"a b"}]}"#, "nodes.0.request"),
            (r#"{"nodes":[{"name":"n1","request":""}]}"#, "nodes.0.request"),
        ] {
            let error = parse(text.as_bytes()).expect_err(text).to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{text}: {error}");
        }
        let error = parse(&vec![b' '; MAX_ANSWER_BYTES + 1]).expect_err("too long");
        assert_eq!(error, AnswerError::TooLong);
        let many: Vec<String> = (0..=MAX_NODES).map(|n| format!(r#"{{"name":"n{n}"}}"#)).collect();
        let many = format!(r#"{{"nodes":[{}]}}"#, many.join(","));
        assert_eq!(parse(many.as_bytes()), Err(AnswerError::TooMany(MAX_NODES + 1)));
    }

    #[test]
    fn a_request_says_what_is_needed_and_no_more() {
        let shape: NodeShape =
            serde_json::from_str(r#"{"cpus":8,"memory":"32 GiB","gpus":2,"classes":["microvm"]}"#)
                .expect("one");
        let grow = Request {
            version: VERSION,
            action: Action::Grow,
            pool: "train",
            request: Some("train-1"),
            count: Some(2),
            why: Some("job a-ab12cd waits"),
            shape: Some(&shape),
            nodes: vec![],
        };
        assert_eq!(
            serde_json::to_value(&grow).expect("JSON"),
            serde_json::json!({"version": 1, "action": "grow", "pool": "train", "request": "train-1",
                "count": 2, "why": "job a-ab12cd waits",
                "shape": {"cpus": 8, "memory": "32 GiB", "gpus": 2, "classes": ["microvm"]}})
        );
        let nodes = vec![Named { name: "n1".to_owned(), request: Some("train-1".to_owned()) }];
        let release = Request {
            action: Action::Release,
            request: None,
            count: None,
            why: None,
            shape: None,
            nodes,
            ..grow.clone()
        };
        assert_eq!(
            serde_json::to_value(&release).expect("JSON"),
            serde_json::json!({"version": 1, "action": "release", "pool": "train",
                "nodes": [{"name": "n1", "request": "train-1"}]})
        );
        let list = Request { action: Action::List, nodes: vec![], ..release };
        assert_eq!(
            serde_json::to_value(&list).expect("JSON"),
            serde_json::json!({"version": 1, "action": "list", "pool": "train"})
        );
    }
}
