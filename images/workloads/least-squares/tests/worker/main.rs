//! The worker as its users meet it: processes, files, ports.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes the helpers beside the test functions for shipped code"
)]

mod bad_data;
mod failures;
mod fits;
mod support;
