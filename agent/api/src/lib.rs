//! Types of Lathe's HTTP APIs, shared by coordinator, agents and the command line, and the client.
//!
//! - [`job`]: what users submit and see: jobs, tasks, their states and reasons.
//! - [`service`]: work that stays up: its replicas, and what is in flight at them.
//! - [`scheduling`]: what jobs ask of where they run, and what is decided about them.
//! - [`pool`]: pools and tenants, their quotas and policies.
//! - [`provider`]: where pools get more nodes.
//! - [`node`]: what agents report: inventory, observed sandboxes; what operators do to nodes.
//! - [`gpu`]: the GPUs among it, their states and problems.
//! - [`sandbox`]: what the coordinator wants of a node: desired sandboxes and its network.
//! - [`artefact`]: images and datasets, by digest.
//! - [`token`]: what people and joining nodes show the coordinator.
//! - [`problem`]: errors on the wire (RFC 9457).
//! - [`client`]: the client of all of it.
//!
//! Both directions are level-triggered: the coordinator states what should be, the agent what is.

#![forbid(unsafe_code)]

pub mod artefact;
pub mod client;
pub mod gpu;
pub mod job;
pub mod node;
pub mod pool;
pub mod problem;
pub mod provider;
pub mod sandbox;
pub mod scheduling;
pub mod service;
mod time_span;
pub mod token;

pub use lathe_vmm::config::{HostPciAddress, MemorySize};
pub use time_span::{ParseTimeSpanError, TimeSpan};
