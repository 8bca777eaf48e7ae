//! What is planned with: amounts, nodes, gangs, and the state of a cluster between the two.
//!
//! - [`Amount`]: what adds up: CPUs, memory, hugepages, sandboxes.
//! - [`Gpu`], [`GpuRequest`], [`GpuPlace`]: devices, which do not add up, whole or in slices.
//! - [`Node`]: what a node has, where it stands, and whether it takes work.
//! - [`Gang`]: what a job asks for.
//! - [`Cluster`]: nodes, what is free of each, and the gangs that run.
//!
//! Times are milliseconds since an epoch that the caller chooses; durations are milliseconds.

mod amount;
mod cluster;
mod fingerprint;
mod free;
mod gang;
mod gpu;
mod node;

pub use amount::Amount;
pub use cluster::{Cluster, Running, TakeError, TaskPlace};
pub(crate) use fingerprint::{Fold, Printed, Quick};
pub use free::{Free, SwitchUse};
pub use gang::{
    Communication, Constraint, Gang, Input, Isolation, Operator, Preference, Scope, Size, TaskRequest,
};
pub use gpu::{Gpu, GpuFree, GpuPlace, GpuRequest, Profile, Share, Sharing, WHOLE};
pub use node::{Node, NumaNode, Offer, Taint, Window};
