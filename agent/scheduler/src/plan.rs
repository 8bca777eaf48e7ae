//! What the planner decides, and why it leaves the rest waiting.

use std::fmt;
use std::sync::Arc;

use lathe_api::MemorySize;

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

/// A running gang to stop: the caller marks it as stopping, or it may be another one in the next
/// cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preemption {
    /// Which.
    pub gang: String,
    /// The gang that gets its room; none when its node is drained.
    pub for_gang: Option<String>,
    /// Why, one line.
    pub why: String,
}

/// A running gang to give another size. What comes is taken on the cluster already, as with starts;
/// what goes is there until the caller takes it away, and is said in each cycle until then.
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
    /// The dominant reason. Its text does not change while only time passes.
    pub reason: Reason,
    /// When it will start, if what runs ends when it should. Known for the gangs that room is held
    /// for, which are the next ones.
    pub expected_ms: Option<u64>,
    /// The gang whose end makes that room, if one's.
    pub after: Option<String>,
}

/// Why a gang waits; displayed as one line.
///
/// Behind an [`Arc`] where it is long: of ten thousand gangs that wait, most wait for the same.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// There is no room for it now, or never.
    Shortage(Arc<Shortage>),
    /// There would be room, but it is held for an earlier gang, which this one would delay.
    Behind {
        /// That gang.
        gang: String,
    },
    /// A limit is used up.
    Limit(Arc<LimitReached>),
    /// Other gangs are being stopped or made smaller for it, and will make room.
    MakingRoom {
        /// They; the first few.
        gangs: Vec<String>,
    },
    /// Its pool is not one of the cluster's.
    NoPool {
        /// The name.
        pool: String,
    },
    /// Its turn did not come: too many different gangs before it found no room.
    Unseen,
    /// It runs already: it can start again only when that is gone.
    RunsStill,
}

/// A limit that leaves too little for a gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitReached {
    /// The tenant whose limit it is; the pool's own otherwise.
    pub tenant: Option<String>,
    /// The pool that it holds in.
    pub pool: String,
    /// Of what.
    pub resource: Resource,
    /// The limit.
    pub limit: u64,
    /// What is in use.
    pub used: u64,
    /// What the gang needs.
    pub needed: u64,
}

/// What a share is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// GPUs, in thousandths.
    Gpus,
    /// CPUs, in thousandths.
    Cpus,
    /// Memory, bytes.
    Memory,
    /// Memory in hugepages, bytes.
    Hugepages,
    /// Sandboxes.
    Sandboxes,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shortage(shortage) => shortage.fmt(f),
            Self::Behind { gang } => write!(f, "behind job {gang}, for which the room is held"),
            Self::Limit(limit) => limit.fmt(f),
            Self::MakingRoom { gangs } => {
                let s = if gangs.len() == 1 { "" } else { "s" };
                write!(f, "gets the room of job{s} {}, told to make it", gangs.join(", "))
            }
            Self::NoPool { pool } => write!(f, "there is no pool {pool:?}: see `lathe pool list`"),
            Self::Unseen => {
                f.write_str("its turn has not come: many different jobs before it wait for room, too")
            }
            Self::RunsStill => {
                f.write_str("its tasks from before run still: it starts again when they are gone")
            }
        }
    }
}

impl fmt::Display for LimitReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tenant {
            Some(tenant) => write!(f, "tenant {tenant}'s limit of ")?,
            None => f.write_str("the limit of ")?,
        }
        let amount = |value| Quantity(self.resource, value);
        write!(f, "{} in pool {} ", amount(self.limit), self.pool)?;
        if self.needed > self.limit {
            write!(f, "is less than the {} it needs: raise the limit, or ask for less", amount(self.needed))
        } else if self.used >= self.limit {
            write!(f, "is used up: {} in use", Number(self.resource, self.used))
        } else {
            write!(
                f,
                "leaves too little: {} in use, {} needed",
                Number(self.resource, self.used),
                Number(self.resource, self.needed)
            )
        }
    }
}

struct Number(Resource, u64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Resource::Gpus | Resource::Cpus => write!(f, "{}", self.1 as f64 / 1000.0),
            Resource::Memory | Resource::Hugepages => MemorySize::from_bytes(self.1).fmt(f),
            Resource::Sandboxes => self.1.fmt(f),
        }
    }
}

struct Quantity(Resource, u64);

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (one, many) = match self.0 {
            Resource::Gpus => (" GPU", " GPUs"),
            Resource::Cpus => (" CPU", " CPUs"),
            Resource::Memory => (" of memory", " of memory"),
            Resource::Hugepages => (" of hugepages", " of hugepages"),
            Resource::Sandboxes => (" task", " tasks"),
        };
        let single = match self.0 {
            Resource::Gpus | Resource::Cpus => self.1 == 1000,
            _ => self.1 == 1,
        };
        write!(f, "{}{}", Number(self.0, self.1), if single { one } else { many })
    }
}
