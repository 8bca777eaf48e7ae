//! The coordinator as its users meet it: over real TLS on loopback, with its real store.

mod access;
mod data;
mod gangs;
mod gpus;
mod harness;
mod operators;
mod providers;
mod scale;
mod scheduling;
mod services;
