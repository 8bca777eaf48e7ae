//! Services: work that stays up. [`lathe_api::service`] has what users write and see.
//!
//! - [`record`]: what is stored. Each replica is a job of one task, with all that jobs have.
//! - [`submit`]: services come in, after [`check`], and are asked to end.
//! - [`load`]: what is in flight, as nodes report it; [`autoscale`]: how many replicas that needs.
//! - [`steps`]: what a service and its replicas need next. Carried out by [`crate::reconcile`].
//! - [`restart`]: replicas that ended, and when they may start again.
//! - [`show`]: a service as the API shows it.

pub mod autoscale;
pub mod check;
pub mod load;
pub mod record;
pub mod restart;
pub mod show;
pub mod steps;
pub mod submit;

pub use load::Loads;
pub use record::ServiceRecord;
