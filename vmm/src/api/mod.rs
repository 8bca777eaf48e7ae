//! The control API: HTTP/JSON on a Unix socket, described by an OpenAPI document made from the types.
//!
//! The socket is bound before anything starts, so that a bad path is an error of the command line; its
//! server (one thread, one tokio runtime) starts when the guest already runs and costs its start nothing.

mod metrics;
mod routes;
mod socket;

pub use routes::{Problem, VmView, openapi_json};
pub use socket::{ApiError, ApiServer, ApiSocket};
