//! Cgroups of sandboxes: who belongs to a sandbox, what it may use, and its end.
//!
//! Every sandbox has one cgroup with two children, `supervisor` and `task`. Killing it by
//! `cgroup.kill` takes every process of the sandbox, whatever it forked, without ever naming a
//! process ID that might have been reused.
//!
//! Limits need the pure cgroup v2 layout. On a hybrid host the v2 tree has no controllers; it
//! still groups and kills, which is enough for microVMs, whose size the VMM fixes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::files::{self, FileError};

/// The host's cgroup v2 tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupTree {
    root: PathBuf,
    /// Whether limits can be set: pure v2 with cpu, memory and pids.
    limits: bool,
}

/// Why containers cannot have limits here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CgroupProblem {
    /// v1 controllers beside an empty v2 tree.
    #[error(
        "the cgroup tree is hybrid (v1 controllers beside an empty v2 tree): boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all, or mount cgroup2 alone at /sys/fs/cgroup"
    )]
    Hybrid,
    /// No v2 anywhere.
    #[error("no cgroup v2 filesystem is mounted: mount -t cgroup2 none /sys/fs/cgroup")]
    Missing,
    /// Some controller is not there.
    #[error("cgroup v2 has no {0} controller: enable it in the kernel's configuration or its command line")]
    NoController(&'static str),
}

/// What a sandbox's task may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: u64,
    /// CPUs.
    pub cpus: u32,
    /// Processes and threads.
    pub pids: u32,
}

impl CgroupTree {
    /// Finds the v2 tree below `root` (`/` but in tests), and whether limits can be set in it.
    pub fn find(root: &Path) -> (Option<Self>, Option<CgroupProblem>) {
        let base = root.join("sys/fs/cgroup");
        let unified = base.join("unified");
        let (tree, hybrid) = if base.join("cgroup.controllers").exists() {
            (base, false)
        } else if unified.join("cgroup.controllers").exists() {
            (unified, true)
        } else {
            return (None, Some(CgroupProblem::Missing));
        };
        let controllers = fs::read_to_string(tree.join("cgroup.controllers")).unwrap_or_default();
        let missing = ["cpu", "memory", "pids"]
            .into_iter()
            .find(|wanted| !controllers.split_whitespace().any(|c| c == *wanted));
        let problem = match missing {
            Some(_) if hybrid => Some(CgroupProblem::Hybrid),
            Some(controller) => Some(CgroupProblem::NoController(controller)),
            None => None,
        };
        (Some(Self { root: tree, limits: problem.is_none() }), problem)
    }

    /// Where the cgroup of a sandbox is.
    pub fn sandbox(&self, key: &str) -> PathBuf {
        self.root.join("lathe").join(key)
    }

    /// Where all sandboxes' cgroups are.
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("lathe")
    }

    /// Keeps a sandbox's task on the CPUs of a NUMA node, and so, by first touch, its memory. Where the
    /// kernel cannot do that, the task runs anywhere: it is slower and not wrong. Memory itself is not
    /// bound: what the node lacks comes from the others rather than from nowhere.
    pub fn prefer_numa(&self, root: &Path, cgroup: &Path, node: u32) {
        let list = root.join(format!("sys/devices/system/node/node{node}/cpulist"));
        let Ok(cpus) = fs::read_to_string(&list) else {
            tracing::warn!(node, "there is no such NUMA node; the task runs anywhere");
            return;
        };
        let steps = [&self.root, &self.sandboxes(), &cgroup.to_owned()]
            .map(|dir| set(dir, "cgroup.subtree_control", "+cpuset"))
            .into_iter()
            .collect::<Result<(), _>>()
            .and_then(|()| set(&task_of(cgroup), "cpuset.cpus", cpus.trim()));
        if let Err(error) = steps {
            tracing::warn!(%error, node, "the task cannot be kept on its NUMA node and runs anywhere");
        }
    }

    /// Makes a sandbox's cgroup and the children for its supervisor and its task.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn make(&self, key: &str, limits: Limits) -> Result<PathBuf, FileError> {
        let cgroup = self.sandbox(key);
        for dir in [supervisor_of(&cgroup), task_of(&cgroup)] {
            fs::create_dir_all(&dir).map_err(FileError::io("make the cgroup", &dir))?;
        }
        if self.limits {
            for dir in [&self.root, &self.sandboxes(), &cgroup] {
                set(dir, "cgroup.subtree_control", "+cpu +memory +pids")?;
            }
            let task = task_of(&cgroup);
            set(&task, "memory.max", &limits.memory.to_string())?;
            set(&task, "pids.max", &limits.pids.to_string())?;
            set(&task, "cpu.max", &format!("{} 100000", u64::from(limits.cpus) * 100_000))?;
            // A task that lost one process to the OOM killer is not the task that was asked for.
            set(&task, "memory.oom.group", "1")?;
            // Kernels without swap accounting have no such file.
            let _ = set(&task, "memory.swap.max", "0");
            // Pumping a guest's output must not cost the other tenants more than this.
            set(&supervisor_of(&cgroup), "cpu.max", "100000 100000")?;
        }
        Ok(cgroup)
    }
}

fn set(dir: &Path, file: &str, value: &str) -> Result<(), FileError> {
    let path = dir.join(file);
    fs::write(&path, value).map_err(FileError::io("write", &path))
}

/// The child for the supervisor.
pub fn supervisor_of(cgroup: &Path) -> PathBuf {
    cgroup.join("supervisor")
}

/// The child for the VMM or the container.
pub fn task_of(cgroup: &Path) -> PathBuf {
    cgroup.join("task")
}

/// Moves this process into `cgroup`.
///
/// # Errors
/// When the cgroup is gone.
pub fn enter(cgroup: &Path) -> Result<(), FileError> {
    set(cgroup, "cgroup.procs", "0")
}

/// Kills everything in `cgroup` and below; that it is gone is success.
///
/// # Errors
/// When the kernel refuses.
pub fn kill(cgroup: &Path) -> Result<(), FileError> {
    match set(cgroup, "cgroup.kill", "1") {
        Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Kills everything in `cgroup`, waits until it is empty, and removes it and its children.
///
/// # Errors
/// When processes of it do not die (stuck in the kernel) within ten seconds.
pub async fn remove(cgroup: &Path) -> Result<(), FileError> {
    kill(cgroup)?;
    let mut result = Ok(());
    for _ in 0..200 {
        result = remove_empty(cgroup);
        if result.is_ok() {
            break;
        }
        // Dead processes leave their cgroup a moment after they were killed.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    result
}

/// Removes a cgroup without processes, children first: containers may have made some.
fn remove_empty(cgroup: &Path) -> Result<(), FileError> {
    let entries = match fs::read_dir(cgroup) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FileError::io("list the cgroup", cgroup)(error)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_empty(&entry.path())?;
        }
    }
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::io("remove the cgroup", cgroup)(error))
        }
        _ => Ok(()),
    }
}

/// What a cgroup's processes used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// CPU time, microseconds.
    pub cpu_us: u64,
    /// Peak memory, bytes; zero where the kernel does not keep it.
    pub memory_peak: u64,
    /// Processes that the OOM killer ended.
    pub oom_kills: u64,
}

/// Reads what a cgroup's processes used; zeros where a file is missing.
pub fn used(cgroup: &Path) -> Used {
    let read = |file: &str| {
        files::read_bounded(&cgroup.join(file), 64 << 10)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    };
    let field = |text: &str, name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
            .unwrap_or(0)
    };
    Used {
        cpu_us: field(&read("cpu.stat"), "usage_usec"),
        memory_peak: read("memory.peak").trim().parse().unwrap_or(0),
        oom_kills: field(&read("memory.events"), "oom_kill"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn each_layout_is_told_apart_and_says_what_to_do() {
        let pure = host(&[("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")]);
        assert_eq!(CgroupTree::find(pure.path()).1, None);
        let hybrid = host(&[("sys/fs/cgroup/unified/cgroup.controllers", "hugetlb\n")]);
        let (tree, problem) = CgroupTree::find(hybrid.path());
        assert!(tree.is_some_and(|t| !t.limits));
        assert!(problem.unwrap().to_string().contains("hybrid"));
        let poor = host(&[("sys/fs/cgroup/cgroup.controllers", "cpu pids\n")]);
        assert_eq!(CgroupTree::find(poor.path()).1, Some(CgroupProblem::NoController("memory")));
        assert_eq!(CgroupTree::find(host(&[]).path()), (None, Some(CgroupProblem::Missing)));
    }

    #[test]
    fn use_is_read_from_the_kernel_s_files() {
        let cgroup = host(&[
            ("cpu.stat", "usage_usec 1234\nuser_usec 1000\n"),
            ("memory.peak", "4096\n"),
            ("memory.events", "low 0\noom 1\noom_kill 2\noom_group_kill 1\n"),
        ]);
        assert_eq!(used(cgroup.path()), Used { cpu_us: 1234, memory_peak: 4096, oom_kills: 2 });
        assert_eq!(used(Path::new("/nonexistent")), Used::default());
    }
}
