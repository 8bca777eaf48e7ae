//! The planner in virtual time, over traces of real clusters.
//!
//! - [`trace`]: lists of nodes, pods and jobs.

pub mod trace;
