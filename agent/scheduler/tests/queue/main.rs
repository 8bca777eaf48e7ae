//! The planner over time: policies, backfill, shares, preemption, and what waiting gangs are told.

mod policies;
mod world;
