//! Services: work that stays up, with as many replicas as the requests in flight need.
//!
//! A service is described by a job file with a `[service]` table. Each replica is a job of one task
//! that the coordinator starts and stops; every node of the service's pool takes requests for it and
//! hands them to replicas on all nodes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::TimeSpan;
use crate::artefact::Digest;
use crate::job::{JobSpec, TaskState};
use crate::scheduling::Decision;

/// Ports that nodes listen on for services: above what daemons have, below what Linux gives to outgoing
/// connections.
pub const LISTEN_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// What makes a job file a service's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// TCP port that each replica listens on; it finds it as `PORT` in its environment.
    pub port: u16,
    /// What is counted as in flight.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port of the nodes that take requests, 30000 to 32767; a free one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<u16>,
    /// Which address of the nodes that is.
    #[serde(default)]
    pub expose: Exposure,
    /// Fewest replicas, 0 to 1024. With 0 there is none while nothing is in flight.
    #[serde(default = "one")]
    pub min: u32,
    /// Most replicas, 1 to 1024.
    pub max: u32,
    /// How much should be in flight at each replica: 1 to 100000.
    #[serde(default = "target")]
    pub target_in_flight: u32,
    /// For how long there must be too many replicas before one is stopped: 1 s to 1 h.
    #[serde(default = "minute")]
    pub scale_down_after: TimeSpan,
    /// How long what is in flight at a replica has to end before the replica gets SIGTERM, at most 1 h.
    #[serde(default = "half_minute")]
    pub drain: TimeSpan,
    /// How much may wait for a replica at each node; more is turned away. 1 to 4096.
    #[serde(default = "waiting")]
    pub max_waiting: u32,
    /// How long it may wait for one, 1 s to 1 h.
    #[serde(default = "minute")]
    pub max_wait: TimeSpan,
}

fn one() -> u32 {
    1
}

fn target() -> u32 {
    10
}

fn waiting() -> u32 {
    256
}

fn minute() -> TimeSpan {
    TimeSpan::from_seconds(60)
}

fn half_minute() -> TimeSpan {
    TimeSpan::from_seconds(30)
}

/// What passes between clients and replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1: requests are counted, and each may go to another replica.
    #[default]
    Http,
    /// Anything over TCP: connections are counted, whether something passes on them or not.
    Tcp,
}

/// Who reaches the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Exposure {
    /// Whoever reaches the address that nodes have among each other.
    #[default]
    Node,
    /// Programs on the nodes themselves.
    Loopback,
}

/// Where a service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// It is kept up.
    Active,
    /// A cancel was asked for; replicas are being stopped.
    Cancelling,
    /// Stopped on request.
    Cancelled,
}

/// A service as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// Unique and short: `<name>-<6 characters>`.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// As submitted, defaults filled in.
    pub spec: JobSpec,
    /// The image's digest, resolved at submission.
    pub image_digest: Digest,
    /// Now.
    pub state: ServiceState,
    /// Port of the nodes that take requests.
    pub listen: u16,
    /// How many replicas there should be.
    pub wanted: u32,
    /// Why so many. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Replicas that take requests.
    pub ready: u32,
    /// Requests or connections in flight, those that wait included, as the nodes last said.
    pub in_flight: u64,
    /// Of them those that wait for a replica.
    pub waiting: u64,
    /// How many were turned away, since the agents of the nodes that said so started.
    pub turned_away: u64,
    /// What keeps nodes from taking requests, one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// Replicas that have not ended, the oldest first.
    pub replicas: Vec<ServiceReplica>,
    /// What was decided about it, oldest first; the first and the latest if there were many.
    pub decisions: Vec<Decision>,
    /// Milliseconds since the Unix epoch.
    pub submitted_ms: u64,
    /// When its last replica was gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_ms: Option<u64>,
}

/// A replica as the API shows it. Everything else about it is told of its job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceReplica {
    /// The job that it is.
    pub job: String,
    /// The node it was placed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its address on the nodes' network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Now.
    pub state: TaskState,
    /// Its port accepts connections.
    pub ready: bool,
    /// It gets nothing new, and ends when what it has is done.
    pub draining: bool,
    /// At it, from all nodes.
    pub in_flight: u64,
    /// Its starts so far.
    pub attempt: u32,
    /// What it waits for, or how it ended before. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A service that a node takes requests for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeService {
    /// Its ID.
    pub id: String,
    /// It ends: nothing new is taken.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub closing: bool,
    /// What is counted.
    pub protocol: Protocol,
    /// Port of the node.
    pub listen: u16,
    /// Address of the node.
    pub expose: Exposure,
    /// How much may wait for a replica here.
    pub max_waiting: u32,
    /// How long it may wait, seconds.
    pub max_wait_seconds: u64,
    /// Replicas that run, on all nodes. Connections to one that is not listed any more are closed.
    pub replicas: Vec<Backend>,
}

/// A replica that requests may go to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Backend {
    /// Its sandbox.
    pub sandbox: String,
    /// Its address.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// It takes something new; what it has is left to it in any case.
    pub accepts: bool,
}

/// What a node says of a service that it takes requests for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceLoad {
    /// Its ID.
    pub service: String,
    /// Thousandths of what was in flight, those that waited included, on average since the last report.
    pub mean_in_flight_milli: u64,
    /// Now, those that wait included.
    pub in_flight: u32,
    /// Those that wait for a replica now.
    pub waiting: u32,
    /// How many were turned away since the agent started.
    pub turned_away: u64,
    /// Why it takes no requests, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Every replica that it knows.
    pub replicas: Vec<BackendLoad>,
}

/// What a node has in flight at a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendLoad {
    /// Its sandbox.
    pub sandbox: String,
    /// Now.
    pub in_flight: u32,
    /// The node would send it more.
    pub accepts: bool,
}
