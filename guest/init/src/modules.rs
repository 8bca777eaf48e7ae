//! Kernel modules, for kernels that do not have everything built in.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Kernel modules of the initramfs in load order, one path a line; absent when the kernel has
/// everything built in.
const MODULE_LIST: &str = "/lib/modules/load";

/// Loads the modules that the initramfs brings, then frees the memory they took as files.
///
/// A module that does not load is reported on the console and left out: which one mattered shows
/// when its device is missing.
pub fn load_all() {
    let Ok(list) = fs::read_to_string(MODULE_LIST) else { return };
    for path in list.lines().filter(|line| !line.is_empty()) {
        if let Err(error) = load_module(Path::new(path)) {
            eprintln!("lathe-init: cannot load {path}: {error}");
        }
    }
    let _ = fs::remove_dir_all("/lib/modules");
}

fn load_module(path: &Path) -> std::io::Result<()> {
    let file = fs::File::open(path)?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        // Built in or loaded already, or for hardware that this machine does not have.
        Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
