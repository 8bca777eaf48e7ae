//! The task's cgroup (v2): limits, accounting, and whether the OOM killer struck.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lathe_guest_protocol::{Limits, Resources};

const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the task's limits: {path}: {source}")]
pub struct CgroupError {
    path: String,
    #[source]
    source: io::Error,
}

/// The task's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup `task` with these limits.
    pub fn create(limits: &Limits) -> Result<Self, CgroupError> {
        Self::create_under(Path::new(ROOT), limits)
    }

    fn create_under(root: &Path, limits: &Limits) -> Result<Self, CgroupError> {
        let dir = root.join("task");
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |source| CgroupError { path, source }
        };
        let control = root.join("cgroup.subtree_control");
        fs::write(&control, "+memory +pids").map_err(at(&control))?;
        fs::create_dir(&dir).map_err(at(&dir))?;
        let set = |file: &str, value: String| {
            let path = dir.join(file);
            fs::write(&path, value).map_err(at(&path))
        };
        // A task that has lost one of its processes rarely notices: all or none, as in Kubernetes.
        set("memory.oom.group", "1".to_owned())?;
        if limits.memory > 0 {
            set("memory.max", limits.memory.to_string())?;
        }
        if limits.pids > 0 {
            // The shepherd is counted too.
            set("pids.max", (u64::from(limits.pids) + 1).to_string())?;
        }
        Ok(Self { dir })
    }

    /// Moves the calling process into the cgroup.
    pub fn enter(&self) -> io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), "0")
    }

    /// What its processes used so far. A file that is not there counts as zero.
    pub fn usage(&self) -> Resources {
        Resources {
            cpu_us: self.keyed("cpu.stat", "usage_usec"),
            memory: self.number("memory.current"),
            memory_peak: self.number("memory.peak"),
            output_dropped: 0,
        }
    }

    /// Whether the OOM killer ended a process of the cgroup.
    pub fn out_of_memory(&self) -> bool {
        self.keyed("memory.events", "oom_kill") > 0
    }

    fn number(&self, file: &str) -> u64 {
        fs::read_to_string(self.dir.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    fn keyed(&self, file: &str, key: &str) -> u64 {
        fs::read_to_string(self.dir.join(file)).map(|text| keyed_value(&text, key)).unwrap_or(0)
    }
}

/// The value of `key` in a flat keyed file.
fn keyed_value(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(found, _)| *found == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_limits_are_not_written() {
        let root = tempfile::tempdir().unwrap();
        let cgroup =
            Cgroup::create_under(root.path(), &Limits { memory: 0, pids: 7, open_files: 0 }).unwrap();
        assert!(!cgroup.dir.join("memory.max").exists());
        assert_eq!(fs::read_to_string(cgroup.dir.join("pids.max")).unwrap(), "8");
    }

    #[test]
    fn keyed_files_are_read_by_whole_key() {
        let events = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(keyed_value(events, "oom_kill"), 3);
        assert_eq!(keyed_value(events, "oom"), 1);
        assert_eq!(keyed_value(events, "nothing"), 0);
    }
}
