//! A coordinator, its store included, with a thousand agents that run nothing: how quickly nodes join,
//! how long a submitted job takes to its start, how many tasks a second go through, and what memory that
//! takes. Everything over the real API: mutual TLS, one process for the coordinator, one for the agents.
//!
//! Unlike the other benchmarks this one measures this machine's own time: agents and coordinator share
//! its processors, so the figures are a floor.

mod agent;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, stream};
use lathe_api::artefact::{Digest, Image};
use lathe_api::client::{Client, ClientOptions};
use lathe_api::job::{JobSpec, JobState};
use lathe_api::node::NodeState;
use lathe_e2e::artefacts;

use agent::Seen;

use crate::record::Record;

/// Nodes and tasks, unless `LATHE_BENCH_NODES` and `LATHE_BENCH_TASKS` say otherwise.
const NODES: usize = 1_000;
const TASKS: usize = 100_000;
/// Jobs that are submitted one after the other while nothing else happens.
const ALONE: usize = 200;
/// Requests under way at once.
const JOINS: usize = 32;
const SUBMISSIONS: usize = 64;
/// How long each task runs: shorter than any real one, so that the coordinator is what is measured.
const RUN: Duration = Duration::from_millis(500);
/// Gang sizes, in turn: most are small.
const SIZES: [u32; 10] = [1, 1, 1, 1, 2, 1, 4, 1, 8, 1];

/// Runs it; one record a figure.
pub fn run() -> anyhow::Result<Vec<Record>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure())
}

fn from_environment(name: &str, otherwise: usize) -> anyhow::Result<usize> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text:?} is no number")),
        Err(_) => Ok(otherwise),
    }
}

async fn measure() -> anyhow::Result<Vec<Record>> {
    let nodes = from_environment("LATHE_BENCH_NODES", NODES)?;
    let tasks = from_environment("LATHE_BENCH_TASKS", TASKS)?;
    let dir = tempfile::tempdir()?;
    let coordinator = Coordinator::start(dir.path())?;
    let seen: &'static Seen = Box::leak(Box::default());
    let subject = format!("{nodes} nodes");
    let mut records = Vec::new();
    let mut add = |metric: &str, unit, value| records.push(Record::of(metric, &subject, unit, vec![value]));

    let admin = coordinator.admin().await?;
    let begun = Instant::now();
    let joined: Vec<anyhow::Result<()>> = stream::iter(0..nodes)
        .map(|number| {
            let coordinator = &coordinator;
            async move {
                let name = format!("n{number:04}");
                let client =
                    agent::join(&coordinator.address, &coordinator.ca, &coordinator.join_token, &name)
                        .await?;
                let report = agent::report(&name);
                client.report(&report).await?;
                tokio::spawn(agent::live(client, report, RUN, seen));
                Ok(())
            }
        })
        .buffer_unordered(JOINS)
        .collect()
        .await;
    joined.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
    add("registrations", "1/s", nodes as f64 / begun.elapsed().as_secs_f64());
    let ready = admin.nodes().await?.iter().filter(|node| node.state == NodeState::Ready).count();
    ensure!(ready == nodes, "{ready} of {nodes} nodes are ready");
    tokio::time::sleep(Duration::from_secs(5)).await;
    add("memory, nodes idle", "MiB", coordinator.memory_mib("VmRSS:")?);
    let cpu = coordinator.cpu_seconds()?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    add("processor, nodes idle", "%", (coordinator.cpu_seconds()? - cpu) * 10.0);

    add_image(&admin).await?;
    let mut alone = Vec::new();
    for _ in 0..ALONE {
        let submitted = Instant::now();
        let id = admin.submit_job(&spec(1)?).await?.id;
        alone.push(started(seen, &id).await?.duration_since(submitted).as_secs_f64() * 1000.0);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    alone.sort_by(f64::total_cmp);
    add("submit to start, 50th percentile", "ms", alone[alone.len() / 2]);
    add("submit to start, 99th percentile", "ms", alone[alone.len() * 99 / 100]);

    push(&coordinator, seen, tasks, &mut add).await?;
    ensure!(seen.overcommitted.load(Ordering::Relaxed) == 0, "a node was given more than it has");
    add("reports that failed", "count", seen.failed_reports.load(Ordering::Relaxed) as f64);
    add("memory, highest", "MiB", coordinator.memory_mib("VmHWM:")?);
    Ok(records)
}

/// All tasks at once, until the last job has ended.
async fn push(
    coordinator: &Coordinator,
    seen: &'static Seen,
    tasks: usize,
    add: &mut impl FnMut(&str, &'static str, f64),
) -> anyhow::Result<()> {
    let before = seen.ended.load(Ordering::Relaxed);
    let mut specs = Vec::new();
    let mut left = tasks;
    for size in SIZES.into_iter().cycle() {
        if left == 0 {
            break;
        }
        let size = size.min(u32::try_from(left)?);
        left -= size as usize;
        specs.push(spec(size)?);
    }
    let jobs = specs.len();
    let clients: Vec<Client> =
        futures_util::future::try_join_all((0..8).map(|_| coordinator.admin())).await?;
    let begun = Instant::now();
    let cpu = coordinator.cpu_seconds()?;
    let submitted = Arc::new(AtomicUsize::new(0));
    let submitting = {
        let submitted = Arc::clone(&submitted);
        async move {
            let results: Vec<anyhow::Result<(String, Instant)>> = stream::iter(specs.into_iter().enumerate())
                .map(|(number, spec)| {
                    let (client, submitted) = (&clients[number % clients.len()], Arc::clone(&submitted));
                    async move {
                        let at = Instant::now();
                        let id = client.submit_job(&spec).await?.id;
                        submitted.fetch_add(1, Ordering::Relaxed);
                        Ok((id, at))
                    }
                })
                .buffer_unordered(SUBMISSIONS)
                .collect()
                .await;
            let took = begun.elapsed();
            results.into_iter().collect::<anyhow::Result<Vec<_>>>().map(|all| (all, took))
        }
    };
    let ended = async {
        let mut said = Instant::now();
        loop {
            let ended = usize::try_from(seen.ended.load(Ordering::Relaxed) - before)?;
            if ended >= tasks {
                return Ok::<_, anyhow::Error>(begun.elapsed());
            }
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                let so_far = submitted.load(Ordering::Relaxed);
                eprintln!("{so_far} of {jobs} jobs submitted, {ended} of {tasks} tasks ended");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ((all, submission), took) = tokio::try_join!(submitting, ended)?;
    add("submissions", "jobs/s", jobs as f64 / submission.as_secs_f64());
    add("tasks through", "tasks/s", tasks as f64 / took.as_secs_f64());
    add("placements", "jobs/s", jobs as f64 / took.as_secs_f64());
    add("coordinator's processor a task", "us", (coordinator.cpu_seconds()? - cpu) * 1e6 / tasks as f64);
    let mut waits = Vec::with_capacity(all.len());
    for (id, at) in &all {
        waits.push(started(seen, id).await?.duration_since(*at).as_secs_f64() * 1000.0);
    }
    waits.sort_by(f64::total_cmp);
    add("submit to start under load, 50th percentile", "ms", waits[waits.len() / 2]);
    add("submit to start under load, 99th percentile", "ms", waits[waits.len() * 99 / 100]);
    let admin = coordinator.admin().await?;
    let end = Instant::now();
    for (id, _) in all.iter().rev() {
        while admin.job(id).await?.state != JobState::Succeeded {
            ensure!(end.elapsed() < Duration::from_secs(60), "job {id} does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if end.elapsed() > Duration::from_secs(20) {
            break;
        }
    }
    Ok(())
}

/// When the first task of the job was told to run.
async fn started(seen: &Seen, job: &str) -> anyhow::Result<Instant> {
    let begun = Instant::now();
    loop {
        let found = seen.started.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(job).copied();
        match found {
            Some(at) => return Ok(at),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "job {job} does not start");
    }
}

fn spec(tasks: u32) -> anyhow::Result<JobSpec> {
    let text = format!(
        r#"{{"name": "bench", "class": "container", "image": "bench", "tasks": {tasks}, "estimate": "1s",
            "resources": {{"cpus": 1, "memory": "64 MiB"}}}}"#
    );
    Ok(serde_json::from_str(&text)?)
}

async fn add_image(client: &Client) -> anyhow::Result<()> {
    let (config, layer) = (b"{}".to_vec(), b"layer".to_vec());
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{}"}},"layers":[{{"digest":"{}"}}]}}"#,
        Digest::of(&config),
        Digest::of(&layer)
    );
    let digest = Digest::of(manifest.as_bytes());
    for blob in [config, layer, manifest.into_bytes()] {
        client.put_small_blob(&Digest::of(&blob), blob.into()).await?;
    }
    client.add_image(&Image { name: "bench".to_owned(), digest, size_bytes: 5 }).await?;
    Ok(())
}

/// The process that is measured.
struct Coordinator {
    child: Child,
    data: PathBuf,
    address: String,
    ca: String,
    join_token: String,
}

impl Coordinator {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let data = dir.join("data");
        let program = artefacts::binary("lathe-coordinator")?;
        let init = Command::new(&program)
            .args(["init", "--address", "127.0.0.1:7700", "--sandbox-cidr", "10.0.0.0/8", "--data-dir"])
            .arg(&data)
            .stdout(Stdio::null())
            .status()?;
        ensure!(init.success(), "lathe-coordinator init failed");
        let child = Command::new(&program)
            .args(["serve", "--listen", "127.0.0.1:0", "--node-expiry-ms", "60000", "--data-dir"])
            .arg(&data)
            .env("RUST_LOG", "warn")
            .spawn()?;
        let read = |name: &str| std::fs::read_to_string(data.join(name));
        let begun = Instant::now();
        let address = loop {
            match read("address") {
                Ok(address) if address.ends_with('\n') => break address.trim().to_owned(),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
            ensure!(begun.elapsed() < Duration::from_secs(30), "the coordinator does not listen");
        };
        Ok(Self { child, address, ca: read("ca.pem")?, join_token: read("join.token")?, data })
    }

    /// A client with connections of its own.
    async fn admin(&self) -> anyhow::Result<Client> {
        let token = std::fs::read_to_string(self.data.join("admin.token"))?;
        let options = ClientOptions {
            address: self.address.clone(),
            ca_pem: self.ca.clone(),
            identity: None,
            token: Some(token),
        };
        let client = Client::new(&options)?;
        client.health().await?;
        Ok(client)
    }

    fn memory_mib(&self, line: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let found = status.lines().find_map(|text| text.strip_prefix(line));
        let kib = found.and_then(|text| text.split_whitespace().next()).context("no such line")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    /// User and system time so far.
    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Fields 14 and 15, in hundredths of a second; the second is the name, which may have spaces.
        let rest = stat.rsplit_once(')').context("no name")?.1;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.collect::<Result<Vec<_>, _>>()?.iter().sum::<f64>() / 100.0)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing else to do about it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
