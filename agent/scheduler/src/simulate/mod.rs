//! The planner in virtual time, over traces of real clusters.
//!
//! - [`trace`]: lists of nodes, pods and jobs.
//! - [`scenario`]: jobs and nodes made ready for a run: loads, estimates, tenants.
//! - [`arrivals`]: the published procedure for openb: tasks arrive and never leave.
//! - [`compare`]: several ways to schedule the same jobs; [`names`]: what people call them.
//! - [`events`]: discrete events over the real planner and cluster.
//! - [`arrivals`]: the published procedure for openb: tasks arrive and never leave.
//! - [`outcome`]: what came out, and its figures; [`metrics`]: what they mean.

pub mod arrivals;
pub mod compare;
pub mod events;
pub mod metrics;
pub mod names;
pub mod outcome;
pub mod scenario;
pub mod trace;

pub use events::{Failures, Job, Options, simulate};
pub use outcome::{Figures, Outcome};
