//! One target under libFuzzer; the environment names it. `scripts/fuzz` builds and starts this.

#![no_main]

use std::sync::OnceLock;

use lathe_fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

fn target() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var("LATHE_FUZZ_TARGET").unwrap_or_default();
        TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            eprintln!("fuzz: no target {name:?}; there are {}", names.join(", "));
            std::process::exit(2);
        })
    })
}

fuzz_target!(|data: &[u8]| {
    (target().run)(data);
});
