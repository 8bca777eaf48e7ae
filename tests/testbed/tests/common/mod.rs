//! What the tests on hosts share.

use std::fs;
use std::path::Path;

use lathe_testbed::bed::state_directory;

/// Everything of a bed that could be left on this machine: namespace, directories, processes.
pub fn leftovers(bed: &str, namespace: &str) -> Vec<String> {
    let mut found = Vec::new();
    for path in [Path::new("/run/netns").join(namespace), state_directory().join(bed)] {
        if path.exists() {
            found.push(path.display().to_string());
        }
    }
    // Its QEMUs name its directories on their command lines.
    let mark = format!("lathe-testbed/{bed}/");
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&mark) {
            found.push(format!("process {}", entry.file_name().display()));
        }
    }
    for directory in ["/var/tmp/lathe-testbed", "/tmp/lathe-testbed"] {
        if Path::new(directory).join(bed).exists() {
            found.push(format!("{directory}/{bed}"));
        }
    }
    found
}
