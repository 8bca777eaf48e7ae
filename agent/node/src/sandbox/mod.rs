//! From what the coordinator wants to what a supervisor starts.
//!
//! | module | what it does |
//! | --- | --- |
//! | this one | the task, the same for every class |
//! | [`machine`] | the microVM around it (`vm.json`) |
//! | [`numa`] | its memory near its GPUs |
//! | [`prepare`] | makes on the host what a sandbox needs, step by step, and starts its supervisor |
//! | [`devices`] | the GPUs among that |
//! | [`cleanup`] | takes all of it away again |
//! | [`observe`] | what is there, read from files and locks alone |

pub mod cleanup;
pub mod devices;
pub mod machine;
mod numa;
pub mod observe;
pub mod prepare;

use std::net::Ipv4Addr;

use lathe_api::job::IsolationClass;
use lathe_api::sandbox::SandboxSpec;
use lathe_guest_protocol::{Address, Limits, Mount, MountSource, Network, TaskSpec, UserSpec};

use crate::images::manifest::RunConfig;
use crate::network::address::Subnet;
use crate::supervisor::microvm::fits_frame;

/// Programs are looked up here when the image says nothing.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How many GPUs a task has. Where they are on the guest's bus its kernel tells; the host's addresses mean
/// nothing there. Device nodes and libraries of a GPU's driver are the image's affair.
const GPU_COUNT: &str = "LATHE_GPU_COUNT";

/// Processes and threads of one task: a fork bomb stops here.
pub const MAX_PIDS: u32 = 4096;

/// What a sandbox's specification cannot be turned into a task for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Nothing to run.
    #[error("the image {0} has neither an entrypoint nor a command: give the job an entrypoint or args")]
    NothingToRun(String),
    /// Not an address a sandbox here can have.
    #[error("{address:?} is not an address in this node's subnet {subnet}")]
    Address {
        /// As given.
        address: String,
        /// This node's.
        subnet: Subnet,
    },
    /// A line of /etc/hosts.
    #[error("{0:?} is not a valid host name or address for /etc/hosts")]
    Host(String),
    /// A mount point.
    #[error("{0:?} is not a path a dataset can be mounted at: write an absolute path without \"..\"")]
    MountPath(String),
    /// A variable.
    #[error("{0:?} is not a valid environment variable")]
    Env(String),
    /// Not here.
    #[error("the isolation class {0:?} is not available yet: use microvm or container")]
    Class(IsolationClass),
    /// Passthrough.
    #[error("resources.gpus: GPUs go to microVMs alone, not to the isolation class {0:?}: use microvm")]
    Gpus(IsolationClass),
    /// More than a frame.
    #[error("arguments, environment and hosts of the task are together too long (at most 256 KiB)")]
    TooLong,
}

/// The task of `spec`, for an image with `config`, on a node with `subnet`.
///
/// # Errors
/// When the specification makes no sense here; nothing was made yet.
pub fn task(spec: &SandboxSpec, config: &RunConfig, subnet: Subnet) -> Result<TaskSpec, SpecError> {
    if spec.class == IsolationClass::Unikernel {
        return Err(SpecError::Class(spec.class));
    }
    if spec.resources.gpus > 0 && spec.class != IsolationClass::Microvm {
        return Err(SpecError::Gpus(spec.class));
    }
    let address = address(spec, subnet)?;
    let task = TaskSpec {
        argv: argv(spec, config)?,
        env: environment(spec, config)?,
        cwd: if config.cwd.is_empty() { "/".to_owned() } else { config.cwd.clone() },
        user: UserSpec { user: config.user.clone() },
        hostname: hostname(spec),
        root: disk("root", "erofs"),
        overlay: spec.resources.disk.map(|_| disk("overlay", "ext4")),
        mounts: mounts(spec)?,
        network: Some(Network {
            address: Address { octets: address.octets(), prefix: subnet.prefix() },
            gateway: Some(subnet.gateway().octets()),
            mtu: 1500,
            nameservers: Vec::new(),
        }),
        hosts: hosts(spec)?,
        rank: spec.rank,
        limits: Limits { memory: 0, pids: MAX_PIDS, open_files: 65_536 },
        grace_seconds: spec.grace_seconds,
        drives_devices: spec.resources.gpus > 0,
    };
    if fits_frame(&task) { Ok(task) } else { Err(SpecError::TooLong) }
}

/// A sandbox's address, checked against the node's subnet.
///
/// # Errors
/// When it is none of it.
pub fn address(spec: &SandboxSpec, subnet: Subnet) -> Result<Ipv4Addr, SpecError> {
    let address = spec.address.parse().ok().filter(|address| subnet.is_host(*address));
    address.ok_or_else(|| SpecError::Address { address: spec.address.clone(), subnet })
}

fn disk(serial: &str, fs: &str) -> MountSource {
    MountSource::Disk { serial: serial.to_owned(), fs: fs.to_owned() }
}

/// As OCI images are run: an entrypoint of the job replaces the image's, and its command with it.
fn argv(spec: &SandboxSpec, config: &RunConfig) -> Result<Vec<String>, SpecError> {
    let mut argv = spec.entrypoint.clone().unwrap_or_else(|| config.entrypoint.clone());
    if !spec.args.is_empty() {
        argv.extend_from_slice(&spec.args);
    } else if spec.entrypoint.is_none() {
        argv.extend_from_slice(&config.cmd);
    }
    match argv.first() {
        Some(program) if !program.is_empty() => Ok(argv),
        _ => Err(SpecError::NothingToRun(spec.image.name.clone())),
    }
}

fn environment(spec: &SandboxSpec, config: &RunConfig) -> Result<Vec<(String, String)>, SpecError> {
    let mut all: Vec<(String, String)> = Vec::new();
    let image = config.env.iter().map(|line| match line.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (line.clone(), String::new()),
    });
    let path = DEFAULT_PATH.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned()));
    let gpus = (spec.resources.gpus > 0).then(|| (GPU_COUNT.to_owned(), spec.resources.gpus.to_string()));
    for (name, value) in path.into_iter().chain(image).chain(gpus).chain(spec.env.iter().cloned()) {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(SpecError::Env(name.chars().take(80).collect()));
        }
        match all.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => all.push((name, value)),
        }
    }
    Ok(all)
}

fn mounts(spec: &SandboxSpec) -> Result<Vec<Mount>, SpecError> {
    let mounts = spec.datasets.iter().enumerate().map(|(index, dataset)| {
        let target = dataset.mount.as_str();
        let plain = target.starts_with('/')
            && target.len() > 1
            && !target.split('/').any(|part| part == ".." || part == ".")
            && !target.contains('\0');
        if !plain {
            return Err(SpecError::MountPath(target.to_owned()));
        }
        Ok(Mount {
            source: disk(&dataset_serial(index), "erofs"),
            target: target.to_owned(),
            read_only: true,
        })
    });
    mounts.collect()
}

/// The serial of the disk of the dataset at `index`.
pub fn dataset_serial(index: usize) -> String {
    format!("data{index}")
}

/// Names end up in a file of lines: one with a blank or a newline would add lines of its own.
fn hosts(spec: &SandboxSpec) -> Result<Vec<(String, String)>, SpecError> {
    for (address, name) in &spec.hosts {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if !plain || name.is_empty() || name.len() > 253 || address.parse::<std::net::IpAddr>().is_err() {
            return Err(SpecError::Host(format!("{address} {name}").chars().take(80).collect()));
        }
    }
    Ok(spec.hosts.clone())
}

/// The gang's name for this member, which the others resolve too; else the sandbox's ID.
fn hostname(spec: &SandboxSpec) -> String {
    let gang = spec.hosts.iter().find(|(address, name)| *address == spec.address && name.len() <= 63);
    let name = gang.map_or(spec.id.as_str(), |(_, name)| name);
    // Linux takes 64 bytes, DNS labels 63; a name must not end with a dash where it is cut.
    name[..name.len().min(63)].trim_end_matches('-').to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use lathe_api::artefact::{Dataset, DatasetFile, Digest, Image};
    use lathe_api::job::Resources;
    use lathe_api::sandbox::{Desired, SandboxDataset};

    pub(crate) fn spec(id: &str) -> SandboxSpec {
        let files =
            vec![DatasetFile { path: "longley.csv".into(), digest: Digest::of(b"csv"), size_bytes: 3 }];
        let dataset = Dataset { name: "longley".into(), digest: Dataset::digest_of(&files), files };
        SandboxSpec {
            id: id.into(),
            tenant: "default".into(),
            job: "a".into(),
            rank: 0,
            desired: Desired::Running,
            class: IsolationClass::Microvm,
            image: Image { name: "least-squares".into(), digest: Digest::of(b"image"), size_bytes: 1 },
            entrypoint: None,
            args: vec!["--data".into(), "/data/longley.csv".into()],
            env: vec![("RANK".into(), "0".into()), ("PATH".into(), "/bin".into())],
            resources: Resources { cpus: 2, ..Resources::default() },
            datasets: vec![SandboxDataset { dataset, mount: "/data".into() }],
            address: "10.42.1.2".into(),
            port: None,
            hosts: vec![("10.42.1.2".into(), "a-0".into()), ("10.42.2.2".into(), "a-1".into())],
            gpus: Vec::new(),
            numa_node: None,
            grace_seconds: 10,
        }
    }

    pub(crate) fn subnet() -> Subnet {
        "10.42.1.0/24".parse().unwrap()
    }

    fn config() -> RunConfig {
        RunConfig {
            entrypoint: vec!["/worker".into()],
            cmd: vec!["--help".into()],
            env: vec!["LANG=C".into()],
            ..RunConfig::default()
        }
    }

    #[test]
    fn arguments_replace_as_in_oci() {
        let mut spec = spec("a-0-1");
        let run = |spec: &SandboxSpec| task(spec, &config(), subnet()).map(|t| t.argv.join(" "));
        assert_eq!(run(&spec).unwrap(), "/worker --data /data/longley.csv");
        spec.args.clear();
        assert_eq!(run(&spec).unwrap(), "/worker --help");
        spec.entrypoint = Some(vec!["/other".into()]);
        assert_eq!(run(&spec).unwrap(), "/other");
        spec.entrypoint = Some(vec![]);
        assert_eq!(run(&spec), Err(SpecError::NothingToRun("least-squares".into())));
    }

    #[test]
    fn the_job_s_environment_wins_and_the_host_is_known_by_its_gang_name() {
        let task = task(&spec("a-0-1"), &config(), subnet()).unwrap();
        let env: Vec<_> = task.env.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(env, ["PATH=/bin", "LANG=C", "RANK=0"]);
        assert_eq!(task.hostname, "a-0");
    }

    #[test]
    fn a_task_is_told_how_many_gpus_it_has() {
        let mut spec = spec("a-0-1");
        spec.resources.gpus = 2;
        let task = task(&spec, &config(), subnet()).unwrap();
        assert!(task.env.contains(&("LATHE_GPU_COUNT".into(), "2".into())), "{:?}", task.env);
    }

    #[test]
    fn what_would_break_out_of_its_file_is_refused() {
        let refused = |change: fn(&mut SandboxSpec)| {
            let mut spec = spec("a-0-1");
            change(&mut spec);
            task(&spec, &config(), subnet()).unwrap_err()
        };
        assert!(matches!(refused(|s| s.hosts[0].1 = "a\n6.6.6.6 bank".into()), SpecError::Host(_)));
        assert!(matches!(refused(|s| s.datasets[0].mount = "/a/../../etc".into()), SpecError::MountPath(_)));
        assert!(matches!(refused(|s| s.address = "10.42.1.1".into()), SpecError::Address { .. }));
        assert!(matches!(refused(|s| s.address = "192.168.0.9".into()), SpecError::Address { .. }));
        assert!(matches!(refused(|s| s.env[0].0 = "A=B".into()), SpecError::Env(_)));
        assert!(matches!(refused(|s| s.class = IsolationClass::Unikernel), SpecError::Class(_)));
        let gpus_in_a_container = |s: &mut SandboxSpec| {
            s.resources.gpus = 1;
            s.class = IsolationClass::Container;
        };
        assert!(matches!(refused(gpus_in_a_container), SpecError::Gpus(_)));
        assert_eq!(refused(|s| s.args = vec!["x".repeat(300 << 10)]), SpecError::TooLong);
    }
}
