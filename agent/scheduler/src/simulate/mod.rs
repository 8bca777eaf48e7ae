//! The planner in virtual time, over traces of real clusters.
//!
//! - [`arrivals`]: the published procedure for openb: tasks arrive and never leave.

pub mod arrivals;
