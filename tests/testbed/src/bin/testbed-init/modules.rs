//! Kernel modules: those a host always has are inserted here, in dependency order, because a
//! modprobe process each would take most of the boot time on an emulated CPU. The rest the kernel
//! asks busybox's modprobe for when something uses them.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::utsname::uname;

use crate::log;

/// Inserts modules by name, with what they depend on.
pub struct Loader {
    directory: PathBuf,
    /// Path and dependency paths by module name.
    known: HashMap<String, (String, Vec<String>)>,
    loaded: RefCell<HashSet<String>>,
}

impl Loader {
    /// Reads modules.dep of the running kernel; a kernel without one has everything built in.
    pub fn new() -> io::Result<Self> {
        let release = uname()?.release().to_string_lossy().into_owned();
        let directory = PathBuf::from("/lib/modules").join(release);
        let index = match fs::read_to_string(directory.join("modules.dep")) {
            Ok(index) => index,
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e),
        };
        let known = index.lines().filter_map(parse).collect();
        Ok(Self { directory, known, loaded: RefCell::default() })
    }

    /// Inserts a module if the kernel has it as one. A host without, say, SVM goes on without
    /// kvm_amd: the test that needs it says so better than a boot that stops.
    pub fn load_or_log(&self, name: &str) {
        if let Err(e) = self.load(name) {
            log(&format!("module {name}: {e}"));
        }
    }

    fn load(&self, name: &str) -> io::Result<()> {
        let Some((path, dependencies)) = self.known.get(name) else { return Ok(()) };
        if !self.loaded.borrow_mut().insert(name.to_owned()) {
            return Ok(());
        }
        for dependency in dependencies {
            self.load(&module_name(dependency))?;
        }
        let file = File::open(self.directory.join(path))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Waits until the kernel has refined its first guess of the TSC's frequency, about a second after its start. KVM
/// remembers the frequency when it is loaded; if that changes by more than 250 ppm afterwards, it refuses to set a
/// rate "below the hardware's" and leaves its guests with a scale of zero: their timers fire as late as the host is
/// old.
pub fn wait_for_tsc() {
    const CURRENT: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    // A TSC that will not do is replaced by another clock in this time as well.
    for _ in 0..100 {
        match fs::read_to_string(CURRENT) {
            Ok(name) if name.trim() == "tsc-early" => std::thread::sleep(Duration::from_millis(50)),
            _ => return,
        }
    }
}

/// A line of modules.dep: `path: dependency dependency`.
fn parse(line: &str) -> Option<(String, (String, Vec<String>))> {
    let (path, dependencies) = line.split_once(':')?;
    // Listed nearest first; each is loaded with its own dependencies, so the order does not matter.
    let dependencies = dependencies.split_ascii_whitespace().map(str::to_owned).collect();
    Some((module_name(path), (path.to_owned(), dependencies)))
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The base class of display controllers, as sysfs writes classes.
const DISPLAY: &str = "0x03";

impl Loader {
    /// Loads a driver for every PCI device, as udev's cold plug does; but for displays, whose driver takes the
    /// console along and leaves text in their memory: who wants it asks modprobe for it.
    pub fn coldplug(&self) -> io::Result<()> {
        // All drivers are built in.
        if self.known.is_empty() {
            return Ok(());
        }
        for device in fs::read_dir("/sys/bus/pci/devices")? {
            let path = device?.path();
            let display = fs::read_to_string(path.join("class"))?.starts_with(DISPLAY);
            if display || path.join("driver").exists() {
                continue;
            }
            probe(&fs::read_to_string(path.join("modalias"))?)?;
        }
        Ok(())
    }
}
/// Has modprobe load what an alias needs. Most devices of the platform have no driver here, which is no failure.
fn probe(alias: &str) -> io::Result<()> {
    Command::new("/usr/sbin/modprobe")
        .args(["-q", alias.trim()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map(drop)
}
