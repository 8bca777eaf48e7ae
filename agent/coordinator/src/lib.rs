//! The cluster coordinator: one process that knows what should run, is told what does, and brings
//! the two together.
//!
//! - [`api`]: the HTTP API, over [`server`]'s mutual TLS ([`pki`]) and [`tokens`].
//! - [`store`]: durable keys with compare-and-swap; [`records`]: what is in it; [`state`]: the same,
//!   decoded and in memory. [`sequence`]: numbers of jobs.
//! - [`submit`]: jobs come in, after [`check`]. [`observe`]: nodes join and report. [`suspicion`]: nodes
//!   that refuse.
//! - [`policy`]: pools and tenants that were set; [`quotas`]: whether they fit together.
//! - [`provider`]: nodes on demand, from programs of the operator's.
//! - [`operate`]: what operators do; [`audit`]: what they did.
//! - [`services`]: work that stays up, and how many replicas it needs.
//! - [`reconcile`]: the loop between the two, which plans with `lathe-scheduler`. [`explain`]: why
//!   jobs wait; [`remedy`]: what would help; [`dry_run`]: what would become of a job.
//! - [`usage`]: what tenants had, kept over restarts.
//! - [`desired`]: what a node is told. [`network`]: addresses.
//! - [`blobs`] and [`logs`]: content and output, in files beside the store.
//! - [`init`]: makes a cluster.
//!
//! Everything a restart must not forget goes through the store before it is acknowledged. What is
//! kept in memory ([`coordinator::Live`]) comes back with the next reports.

#![forbid(unsafe_code)]

pub mod api;
pub mod audit;
pub mod blobs;
pub mod check;
pub mod clock;
pub mod coordinator;
pub mod desired;
pub mod dry_run;
pub mod explain;
pub mod init;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod observe;
pub mod operate;
pub mod pki;
pub mod policy;
pub mod provider;
pub mod quotas;
pub mod reconcile;
pub mod records;
pub mod remedy;
pub mod sequence;
pub mod server;
pub mod services;
pub mod state;
pub mod store;
pub mod submit;
pub mod suspicion;
pub mod tokens;
pub mod usage;
