//! Pure planning: a cluster as it is, the gangs that wait and the policies of its pools go in; a
//! plan comes out, with a place for whole gangs and one reason for each gang that waits.
//!
//! - [`model`]: amounts, GPUs, nodes, gangs, and the state of a cluster.
//! - [`policy`]: pools and tenants, and what is chosen for each.
//! - [`placement`]: where one gang goes: filters, then a score.
//! - [`queue`]: the order of gangs: policies, shares, estimates.
//! - [`planner`]: which gang goes next, what is held back for it, what is stopped for it.
//! - [`plan`]: what comes out, reasons included.
//! - [`simulate`]: the same in virtual time, over traces of real clusters.
//!
//! No I/O, no clock, no randomness but what a seed gives: the same input gives the same plan, so the
//! coordinator, tests and simulations all mean the same thing by it. The plan is optimistic: whoever
//! commits it checks each node again, because the cluster may have changed.

#![forbid(unsafe_code)]

pub mod model;
pub mod placement;
pub mod plan;
pub mod planner;
pub mod policy;
pub mod queue;
pub mod simulate;

pub use model::{Amount, Cluster, Gang, Node};
pub use plan::{Plan, Reason};
pub use planner::Planner;
