//! Whole clusters on emulated hosts, for end-to-end tests, the demo and the benchmarks.
//!
//! - [`artefacts`]: the binaries and images that go into hosts, built by what builds them for users.
//! - [`cluster`]: a coordinator and an agent on each of several emulated hosts, and the `lathe` command.
//! - [`leftovers`]: what a host holds (processes, taps, cgroups, mounts, ...), to be counted before
//!   and after.
//! - [`report`] and [`nist`]: what jobs print, and what they should.
//! - [`passthrough`]: machines with passed-through devices, without a cluster.
//! - [`this_machine`]: what the demo does where nothing has to be emulated.
//! - [`tiny_guest`]: a guest of a few bytes.
//!
//! Tests are in `tests/`; `demo` and `bench` are programs of this crate that scripts/ calls.

#![forbid(unsafe_code)]

pub mod artefacts;
pub mod cluster;
pub mod leftovers;
pub mod nist;
pub mod passthrough;
pub mod report;
pub mod this_machine;
pub mod tiny_guest;
pub mod wait;

pub use cluster::Cluster;
