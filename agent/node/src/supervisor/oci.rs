//! A container's `config.json`, and who runs it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lathe_guest_protocol::TaskSpec;
use serde_json::{Value, json};

use crate::beneath;

/// Capabilities of a task that runs as root. Without `MKNOD` and `NET_RAW`, which other runtimes
/// give: the first would reach the host's disks, the second only forges packets.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Parts of /proc and /sys that say or change too much of the host, as other runtimes hide them.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A user of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

/// Somebody whom the image does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the image's user {0:?} is not in its /etc/passwd or /etc/group: use a number, or a name that is there"
)]
pub struct UnknownUser(String);

impl User {
    /// Finds `user[:group]`, by number or name, in the image's own files below `root`.
    ///
    /// # Errors
    /// When a name is not there.
    pub fn find(root: &OwnedFd, wanted: &str) -> Result<Self, UnknownUser> {
        // One megabyte of users is more than any honest image has.
        let read = |path: &str| {
            let bytes = beneath::read_file(root, Path::new(path), 1 << 20).ok().flatten().unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self::parse(wanted, &read("/etc/passwd"), &read("/etc/group"))
    }

    fn parse(wanted: &str, passwd: &str, group: &str) -> Result<Self, UnknownUser> {
        let unknown = || UnknownUser(wanted.chars().take(80).collect());
        let (user, wanted_group) = match wanted.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (wanted, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let number: Option<u32> = user.parse().ok();
        let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
        let entry = passwd.lines().map(fields).find(|f| {
            let id = f.get(2).and_then(|id| id.parse().ok());
            f.len() >= 6 && (f[0] == user || (number.is_some() && id == number))
        });
        let uid = match (&entry, number) {
            (_, Some(number)) => number,
            (Some(entry), None) => entry[2].parse().map_err(|_| unknown())?,
            (None, None) => return Err(unknown()),
        };
        let own_group = entry.as_ref().and_then(|e| e[3].parse().ok()).unwrap_or(0);
        let name = entry.as_ref().map_or(user, |e| e[0].as_str());
        let groups: Vec<Vec<String>> = group.lines().map(fields).filter(|f| f.len() >= 3).collect();
        let gid = match wanted_group.filter(|g| !g.is_empty()) {
            None => own_group,
            Some(wanted) => match wanted.parse() {
                Ok(number) => number,
                Err(_) => {
                    let found = groups.iter().find(|g| g[0] == wanted).and_then(|g| g[2].parse().ok());
                    found.ok_or_else(unknown)?
                }
            },
        };
        let member = |g: &&Vec<String>| g.get(3).is_some_and(|m| m.split(',').any(|m| m == name));
        let groups = if wanted_group.is_some() {
            Vec::new()
        } else {
            groups.iter().filter(member).filter_map(|g| g[2].parse().ok()).filter(|g| *g != gid).collect()
        };
        let home = entry.map_or_else(|| "/".to_owned(), |e| e[5].clone());
        Ok(Self { uid, gid, groups, home })
    }
}

/// Where the container's files are on the host.
#[derive(Debug)]
pub struct Bundle<'a> {
    /// The mounted root.
    pub root: &'a Path,
    /// A folder with `hosts`, `hostname` and `resolv.conf`.
    pub etc: &'a Path,
    /// Mounted datasets and their places in the container.
    pub datasets: &'a [(PathBuf, String)],
    /// The cgroup's path below the cgroup filesystem.
    pub cgroup: &'a Path,
}

/// The OCI configuration of `task`, run by `user`.
pub fn config(task: &TaskSpec, user: &User, bundle: &Bundle<'_>) -> Value {
    let mut env: Vec<String> = task.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if !task.env.iter().any(|(name, _)| name == "HOME") {
        env.push(format!("HOME={}", user.home));
    }
    // Only root has privileges at all; any other user of the image starts without.
    let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": bundle.root, "readonly": false },
        "hostname": task.hostname,
        "process": {
            "terminal": false,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
            "args": task.argv,
            "env": env,
            "cwd": task.cwd,
            "capabilities": {
                "bounding": CAPABILITIES, "effective": held, "permitted": held,
                "inheritable": [], "ambient": []
            },
            "rlimits": [{
                "type": "RLIMIT_NOFILE", "soft": task.limits.open_files, "hard": task.limits.open_files
            }],
            "noNewPrivileges": true
        },
        "mounts": mounts(bundle),
        "linux": {
            "cgroupsPath": bundle.cgroup,
            // Limits are on the cgroup already.
            "resources": {},
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" },
                { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }
            ],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY
        }
    })
}

fn mounts(bundle: &Bundle<'_>) -> Vec<Value> {
    let mount = |kind: &str, source: &str, target: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("proc", "proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=64k"]),
        mount(
            "devpts",
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        ),
        mount("tmpfs", "shm", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]),
        mount("mqueue", "mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount("sysfs", "sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mount("cgroup", "cgroup", "/sys/fs/cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    for file in ["hosts", "hostname", "resolv.conf"] {
        let source = bundle.etc.join(file).display().to_string();
        mounts.push(mount(
            "bind",
            &source,
            &format!("/etc/{file}"),
            &["bind", "nosuid", "noexec", "nodev", "ro"],
        ));
    }
    for (source, target) in bundle.datasets {
        let source = source.display().to_string();
        mounts.push(mount("bind", &source, target, &["bind", "nosuid", "noexec", "nodev", "ro"]));
    }
    mounts
}

/// The content of /etc/hosts.
pub fn hosts_file(task: &TaskSpec) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for (address, name) in &task.hosts {
        text.push_str(&format!("{address} {name}\n"));
    }
    if !task.hosts.iter().any(|(_, name)| *name == task.hostname) {
        text.push_str(&format!("127.0.1.1 {}\n", task.hostname));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada:/home/ada:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\ngpu:x:44:bob,ada\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let find =
            |wanted: &str| User::parse(wanted, PASSWD, GROUP).map(|u| (u.uid, u.gid, u.groups, u.home));
        assert_eq!(find(""), Ok((0, 0, vec![], "/root".into())));
        assert_eq!(find("ada"), Ok((1000, 100, vec![44], "/home/ada".into())));
        assert_eq!(find("ada:gpu"), Ok((1000, 44, vec![], "/home/ada".into())));
        assert_eq!(find("4242:7"), Ok((4242, 7, vec![], "/".into())));
        assert!(find("eve").is_err() && find("ada:wheel").is_err());
    }

    #[test]
    fn the_configuration_reads_as_intended() {
        let task = TaskSpec {
            argv: vec!["/worker".into()],
            env: vec![("RANK".into(), "1".into())],
            cwd: "/work".into(),
            hostname: "a-1".into(),
            hosts: vec![("10.42.1.2".into(), "a-1".into())],
            limits: lathe_guest_protocol::Limits { open_files: 1024, ..Default::default() },
            ..TaskSpec::default()
        };
        let user = User::parse("ada", PASSWD, GROUP).unwrap();
        let datasets = [(PathBuf::from("/run/lathe/s/k/data0"), "/data".to_owned())];
        let bundle = Bundle {
            root: Path::new("/run/lathe/s/k/root"),
            etc: Path::new("/run/lathe/s/k/etc"),
            datasets: &datasets,
            cgroup: Path::new("/lathe/k/task"),
        };
        insta::assert_snapshot!(serde_json::to_string_pretty(&config(&task, &user, &bundle)).unwrap());
        assert!(hosts_file(&task).ends_with("10.42.1.2 a-1\n"));
    }
}
