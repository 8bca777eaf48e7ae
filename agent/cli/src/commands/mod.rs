//! One module a noun of the command line.

pub mod cluster;
pub mod dataset;
pub mod doctor;
pub mod gpu;
pub mod image;
pub mod job;
pub mod node;
pub mod simulate;
pub mod token;
pub mod upload;
pub mod vm;
pub mod vm_control;
pub mod vm_device;
