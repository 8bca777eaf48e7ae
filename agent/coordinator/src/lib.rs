//! The cluster coordinator: one process that knows what should run, is told what does, and brings
//! the two together.
//!
//! - [`api`]: the HTTP API, over [`server`]'s mutual TLS ([`pki`]) and [`tokens`].
//! - [`store`]: durable keys with compare-and-swap; [`records`]: what is in it; [`state`]: the same,
//!   decoded and in memory. [`sequence`]: numbers of jobs.
//! - [`submit`]: jobs come in. [`observe`]: nodes join and report. [`suspicion`]: nodes that refuse.
//! - [`reconcile`]: the loop between the two, which plans with `lathe-scheduler`. [`explain`]: why
//!   jobs wait.
//! - [`desired`]: what a node is told. [`network`]: addresses.
//! - [`blobs`] and [`logs`]: content and output, in files beside the store.
//! - [`init`]: makes a cluster.
//!
//! Everything a restart must not forget goes through the store before it is acknowledged. What is
//! kept in memory ([`coordinator::Live`]) comes back with the next reports.

#![forbid(unsafe_code)]

pub mod api;
pub mod blobs;
pub mod clock;
pub mod coordinator;
pub mod desired;
pub mod explain;
pub mod init;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod observe;
pub mod pki;
pub mod reconcile;
pub mod records;
pub mod sequence;
pub mod server;
pub mod state;
pub mod store;
pub mod submit;
pub mod suspicion;
pub mod tokens;
