//! One module a noun of the command line.

pub mod audit;
pub mod cluster;
pub mod dataset;
pub mod doctor;
pub mod file;
pub mod gpu;
pub mod image;
pub mod job;
pub mod node;
pub mod operate;
pub mod pool;
pub mod service;
pub mod simulate;
pub mod token;
pub mod upload;
pub mod vm;
pub mod vm_control;
pub mod vm_device;
pub mod why;
