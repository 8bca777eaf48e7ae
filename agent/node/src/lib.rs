//! The host agent: carves a host into sandboxes, as the coordinator wants them. A library so that
//! the fuzz targets reach its parsers; the program is `main.rs`.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`agent`] | the running agent: its tasks, and what passes between them |
//! | `reconcile` | from desired and observed to the one next thing to do |
//! | `sandbox` | one sandbox: its task and machine, making it, taking it away, observing it |
//! | [`supervisor`] | the process that each sandbox has of its own; survives the agent |
//! | `journal` | what was begun on the host, written before it is |
//! | [`images`] | OCI images and datasets as EROFS files |
//! | `network` | bridge, interfaces, routes, filter |
//! | `balancer` | takes requests for services and hands them to replicas |
//! | [`gpus`] | takes GPUs from the host's drivers for sandboxes, and gives them back clean |
//! | `cgroup` | limits, and the end of everything in a sandbox |
//! | `inventory` | what the host has, and what it can run |
//! | `pci` | what the kernel's files say of PCI functions |
//! | [`identity`] | the node's key and certificate |
//! | `shipping`, `metrics` | output and figures on their way out |
//! | [`manual`] | one sandbox by hand, without a cluster |
//! | [`reset`] | a host as it was before its first agent |

pub mod agent;
mod balancer;
mod beneath;
mod cgroup;
mod files;
pub mod gpus;
pub mod identity;
pub mod images;
mod inventory;
mod journal;
mod loopback;
pub mod manual;
mod metrics;
mod network;
pub mod paths;
mod pci;
mod reconcile;
pub mod reset;
mod sandbox;
mod shipping;
pub mod supervisor;
