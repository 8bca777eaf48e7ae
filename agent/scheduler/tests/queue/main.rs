//! The planner over time: policies, backfill, shares, preemption, and what waiting gangs are told.

mod making_room;
mod policies;
mod properties;
mod world;
