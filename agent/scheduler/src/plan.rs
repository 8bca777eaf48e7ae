//! What the planner decides, and why it leaves the rest waiting.

use std::fmt;
use std::sync::Arc;

use crate::model::{Gang, TaskPlace};
pub use crate::placement::Shortage;

/// See the module. Every pending gang of the input is either in `starts` or in `waiting`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Gangs to start.
    pub starts: Vec<Start>,
    /// Running gangs to stop and put back into the queue.
    pub preemptions: Vec<Preemption>,
    /// Running elastic gangs to give other sizes.
    pub resizes: Vec<Resize>,
    /// Gangs that wait.
    pub waiting: Vec<Waiting>,
}

/// A gang to start.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// The gang.
    pub gang: Arc<Gang>,
    /// Where each task goes, by rank. Ranks of one node are consecutive.
    pub tasks: Vec<TaskPlace>,
    /// Why there and why now, one line.
    pub why: String,
}

/// A running gang to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preemption {
    /// Which.
    pub gang: String,
    /// The gang that gets its room; none when its node is drained.
    pub for_gang: Option<String>,
    /// Why, one line.
    pub why: String,
}

/// A running gang to give another size.
#[derive(Clone, Debug, PartialEq)]
pub struct Resize {
    /// Which.
    pub gang: String,
    /// Ranks that go.
    pub remove: Vec<u32>,
    /// Where tasks that come go.
    pub add: Vec<TaskPlace>,
    /// Why, one line.
    pub why: String,
}

/// A gang that waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    /// The gang.
    pub gang: String,
    /// The dominant reason.
    pub reason: Reason,
}

/// Why a gang waits; displayed as one line.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// There is no room for it now, or never.
    Shortage(Shortage),
    /// An earlier gang waits, and this one would delay it.
    Behind {
        /// That gang.
        gang: String,
    },
    /// Its pool is not one of the cluster's.
    NoPool {
        /// The name.
        pool: String,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shortage(shortage) => shortage.fmt(f),
            Self::Behind { gang } => write!(f, "behind job {gang}, which came first"),
            Self::NoPool { pool } => write!(f, "there is no pool {pool:?}: see `lathe pool list`"),
        }
    }
}
