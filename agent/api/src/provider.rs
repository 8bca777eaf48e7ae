//! Providers: programs of the operator's that make nodes for a pool, and take them back.
//!
//! A pool names one and says how many nodes it may have of it and what they are; which program that is,
//! the coordinator was told when it was started. What is here is what people set and see; what the
//! program is told and answers is with the coordinator.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::IsolationClass;
use crate::scheduling::Taint;
use crate::{MemorySize, TimeSpan};

/// Label of a node that a provider made: the pool that it was made for.
pub const PROVIDED_LABEL: &str = "lathe.provided";

/// Where a pool gets more nodes, and how many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolProvider {
    /// One of those that the coordinator was started with (`--provider NAME=PATH`).
    pub name: String,
    /// Nodes of the provider's that the pool has although nobody needs them.
    #[serde(default)]
    pub min_nodes: u32,
    /// The most nodes of the provider's that it has, those that are being made included.
    pub max_nodes: u32,
    /// After nodes were asked for or chosen to be given back: how long until either is done again.
    #[serde(default = "a_minute")]
    pub cooldown: TimeSpan,
    /// How long a node is empty before it is given back.
    #[serde(default = "ten_minutes")]
    pub idle: TimeSpan,
    /// How long the program may take for one answer before it is killed.
    #[serde(default = "two_minutes")]
    pub timeout: TimeSpan,
    /// How long a node may take to join after the provider named it, and how long one may stay away that
    /// has stopped reporting: after that it is given back.
    #[serde(default = "a_quarter")]
    pub join: TimeSpan,
    /// What each node is.
    pub shape: NodeShape,
}

const fn a_minute() -> TimeSpan {
    TimeSpan::from_seconds(60)
}

const fn two_minutes() -> TimeSpan {
    TimeSpan::from_seconds(120)
}

const fn ten_minutes() -> TimeSpan {
    TimeSpan::from_seconds(600)
}

const fn a_quarter() -> TimeSpan {
    TimeSpan::from_seconds(900)
}

/// What a node of a provider's is, so that nodes are asked for only if jobs fit on them. Once one has
/// joined, what its agent reports goes before this.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeShape {
    /// Logical CPUs.
    pub cpus: u32,
    /// The host's memory, of which a part stays with the host as on every node.
    pub memory: MemorySize,
    /// GPUs that can be given to tasks.
    #[serde(default)]
    pub gpus: u32,
    /// Their model, as NVML names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_model: Option<String>,
    /// Memory of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<MemorySize>,
    /// Classes that can run there.
    #[serde(default = "all_classes")]
    pub classes: Vec<IsolationClass>,
    /// Labels that the coordinator gives each node, before it joins: what the pool's selector asks for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Taints that it gives each node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Taint>,
}

fn all_classes() -> Vec<IsolationClass> {
    vec![IsolationClass::Microvm, IsolationClass::Container]
}

/// How a pool stands with its provider, as the API shows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProviderStatus {
    /// Nodes that it made and has not taken back, by name.
    pub nodes: Vec<ProvidedNode>,
    /// What it was asked for and has not answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<ProviderAsked>,
    /// Why its last answer was none; absent if that was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<ProviderFailure>,
    /// Until then nothing more is asked for or chosen to be given back, milliseconds since the Unix epoch;
    /// absent if it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown_until_ms: Option<u64>,
    /// What keeps it from being asked at all, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A node that a provider made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProvidedNode {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: ProvidedState,
    /// Since when it is so, milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// The request that it was made for.
    pub request: String,
}

/// How far a node of a provider's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProvidedState {
    /// The provider named it; it has not joined yet.
    Coming,
    /// It has joined.
    Joined,
    /// It takes no more work and will be given back.
    Closing,
    /// The provider was told to take it back.
    Releasing,
}

/// What a provider was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProviderAsked {
    /// Names the request: the same one is asked again until it is answered.
    pub request: String,
    /// Nodes.
    pub count: u32,
    /// What for, one line.
    pub why: String,
    /// When it was first asked, milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A provider that gave no answer, or less than it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProviderFailure {
    /// What happened, one line; left out for those who are not admins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often in a row.
    pub times: u32,
    /// When it happened last, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// When it is asked again, milliseconds since the Unix epoch.
    pub again_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_leaves_out_has_a_sensible_value_and_what_it_misspells_is_refused() {
        let json = r#"{"name": "cloud", "max_nodes": 4, "shape": {"cpus": 8, "memory": "32 GiB"}}"#;
        let provider: PoolProvider = serde_json::from_str(json).unwrap();
        assert_eq!((provider.min_nodes, provider.cooldown.seconds(), provider.idle.seconds()), (0, 60, 600));
        assert_eq!((provider.timeout.seconds(), provider.join.seconds()), (120, 900));
        assert_eq!(provider.shape.classes, [IsolationClass::Microvm, IsolationClass::Container]);
        let error = serde_json::from_str::<PoolProvider>(&json.replace("max_nodes", "max")).unwrap_err();
        assert!(error.to_string().contains("max"), "{error}");
    }

    #[test]
    fn a_program_is_nowhere_in_what_a_caller_may_set() {
        for field in ["command", "path", "program", "env"] {
            let json = format!(
                r#"{{"name": "cloud", "max_nodes": 4, "shape": {{"cpus": 8, "memory": "1 GiB"}},
                    "{field}": "/bin/sh"}}"#
            );
            assert!(serde_json::from_str::<PoolProvider>(&json).is_err(), "{field}");
        }
    }
}
