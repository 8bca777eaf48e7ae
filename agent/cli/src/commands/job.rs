//! `lathe job`: work that ends.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use futures_util::StreamExt;
use indicatif::ProgressBar;
use lathe_api::client::{Client, ClientError, LogQuery};
use lathe_api::job::{IsolationClass, Job, JobSpec, JobState, Task, TaskExit, TaskState};
use lathe_api::node::{LogLine, LogStream};

use super::{file, upload, why};
use crate::context::Connection;
use crate::exit::Exit;
use crate::output::{self, Format};

/// How long to wait before a broken watch is taken up again, and how often that is tried.
const RETRY: Duration = Duration::from_secs(1);
const RETRIES: u32 = 30;

/// How long output may trail a job's end.
const LOG_TAIL: Duration = Duration::from_secs(10);

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Submit a job, show its progress and output, and wait for its end.
    Run(RunArgs),
    /// List the jobs, newest first.
    List,
    /// Everything about one job.
    Show {
        /// The job's ID.
        id: String,
    },
    /// Why a job waits and until when, or why it is where it is; and what was decided about it.
    Why {
        /// The job's ID.
        id: String,
    },
    /// The output of a job's tasks.
    Logs {
        /// The job's ID.
        id: String,
        /// Go on until the job ends.
        #[arg(short, long)]
        follow: bool,
        /// Only this rank.
        #[arg(long)]
        rank: Option<u32>,
    },
    /// Stop a job: SIGTERM, its grace period, SIGKILL.
    Cancel {
        /// The job's ID.
        id: String,
    },
}

/// Arguments of `lathe job run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The job, TOML (`.toml`) or JSON.
    file: PathBuf,
    /// Print the ID and return at once.
    #[arg(long)]
    detach: bool,
    /// Submit nothing: say whether it would start now and where, or what it would wait for and until when.
    #[arg(long, conflicts_with = "detach")]
    plan: bool,
    /// Run it in this class instead of the file's.
    #[arg(long)]
    class: Option<Class>,
    /// Run this many tasks instead of the file's.
    #[arg(long)]
    tasks: Option<u32>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Class {
    Microvm,
    Unikernel,
    Container,
}

impl From<Class> for IsolationClass {
    fn from(class: Class) -> Self {
        match class {
            Class::Microvm => Self::Microvm,
            Class::Unikernel => Self::Unikernel,
            Class::Container => Self::Container,
        }
    }
}

/// Runs a subcommand.
///
/// # Errors
/// When the file is wrong, or what the coordinator said.
pub async fn run(command: Command, connection: &Connection, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Run(args) => {
            // The file first: a mistake in it should not need a cluster to be found.
            let spec = read_spec(&args)?;
            let client = connection.client()?;
            match args.plan {
                true => why::plan(&client, &spec, format).await,
                false => submit(&client, &spec, args.detach, format).await,
            }
        }
        Command::List => {
            let mut jobs = connection.client()?.jobs().await?;
            jobs.sort_by_key(|job| std::cmp::Reverse(job.submitted_ms));
            match format {
                Format::Json => output::json(&jobs)?,
                Format::Table => list(&jobs),
            }
            Ok(Exit::Success)
        }
        Command::Show { id } => {
            let job = connection.client()?.job(&id).await?;
            match format {
                Format::Json => output::json(&job)?,
                Format::Table => show(&job),
            }
            Ok(Exit::Success)
        }
        Command::Why { id } => why::show(&connection.client()?, &id, format).await,
        Command::Logs { id, follow, rank } => logs(&connection.client()?, &id, follow, rank, format).await,
        Command::Cancel { id } => {
            let job = connection.client()?.cancel_job(&id).await?;
            match format {
                Format::Json => output::json(&job)?,
                Format::Table => println!("{} {}", job.id, state_name(job.state)),
            }
            Ok(Exit::Success)
        }
    }
}

fn read_spec(args: &RunArgs) -> anyhow::Result<JobSpec> {
    let mut spec: JobSpec = file::read(&args.file)?;
    if let Some(class) = args.class {
        spec.class = class.into();
    }
    if let Some(tasks) = args.tasks {
        spec.tasks = tasks;
    }
    Ok(spec)
}

async fn submit(client: &Client, spec: &JobSpec, detach: bool, format: Format) -> anyhow::Result<Exit> {
    let job = client.submit_job(spec).await?;
    if detach {
        match format {
            Format::Json => output::json(&job)?,
            Format::Table => println!("{}", job.id),
        }
        return Ok(Exit::Success);
    }
    let progress = upload::spinner(describe(&job));
    let output = stream_output(client.clone(), job.id.clone(), spec.tasks > 1, format, progress.clone());
    let job = watch(client, job, &progress).await?;
    if tokio::time::timeout(LOG_TAIL, output).await.is_err() {
        progress.println("lathe: some output may still be on its way; see `lathe job logs`");
    }
    progress.finish_and_clear();
    match format {
        Format::Json => output::json(&job)?,
        Format::Table => summary(&job),
    }
    Ok(match job.state {
        JobState::Succeeded => Exit::Success,
        JobState::Cancelled => Exit::Cancelled,
        _ => Exit::Failed,
    })
}

/// Follows the job to its end, saying each change once. A broken watch is taken up again: the job
/// outlives the coordinator's restart.
async fn watch(client: &Client, mut job: Job, progress: &ProgressBar) -> anyhow::Result<Job> {
    let mut said = String::new();
    let mut failures = 0;
    loop {
        let result = follow(client, &mut job, &mut said, progress).await;
        if job.state.is_terminal() {
            return Ok(job);
        }
        match result {
            Ok(()) => failures = 0,
            Err(error) if error.is_transient() && failures < RETRIES => failures += 1,
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow(
    client: &Client,
    job: &mut Job,
    said: &mut String,
    progress: &ProgressBar,
) -> Result<(), ClientError> {
    let mut changes = client.watch_job(&job.id).await?;
    while let Some(change) = changes.next().await {
        *job = change?;
        let line = describe(job);
        if line != *said {
            progress.set_message(line.clone());
            if progress.is_hidden() {
                eprintln!("{line}");
            }
            *said = line;
        }
    }
    Ok(())
}

/// The job on one line: its state, and how many tasks are where.
fn describe(job: &Job) -> String {
    let mut line = format!("{}: {}", job.id, state_name(job.state));
    if job.attempt > 1 {
        line.push_str(&format!(", attempt {}", job.attempt));
    }
    if let Some(reason) = &job.reason {
        line.push_str(&format!(": {reason}"));
    }
    if job.state == JobState::Running {
        let mut counts: Vec<(TaskState, usize)> = Vec::new();
        for task in &job.tasks {
            match counts.iter_mut().find(|(state, _)| *state == task.state) {
                Some((_, count)) => *count += 1,
                None => counts.push((task.state, 1)),
            }
        }
        let counts = counts.iter().map(|(state, count)| format!("{count} {}", task_state_name(*state)));
        line.push_str(&format!(" ({})", counts.collect::<Vec<_>>().join(", ")));
    }
    line
}

/// Prints output as it comes, in a task of its own. In JSON mode stdout is kept for the one document.
fn stream_output(
    client: Client,
    id: String,
    ranks: bool,
    format: Format,
    progress: ProgressBar,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut stream = match client.job_logs(&id, LogQuery { follow: true, ..LogQuery::default() }).await {
            Ok(stream) => stream,
            Err(error) => {
                progress.suspend(|| eprintln!("lathe: cannot follow the output: {error}"));
                return;
            }
        };
        while let Some(line) = stream.next().await {
            match line {
                Ok(line) => progress.suspend(|| {
                    print_line(&line, ranks.then(|| rank_of(&line.sandbox)), format == Format::Json)
                }),
                Err(error) => {
                    progress.suspend(|| eprintln!("lathe: the output broke off: {error}"));
                    return;
                }
            }
        }
    })
}

/// Prints a line after whose it is, if that is not plain.
pub(super) fn print_line(line: &LogLine, whose: Option<&str>, all_to_stderr: bool) {
    let whose = whose.map(|whose| format!("[{whose}] ")).unwrap_or_default();
    // A closed pipe is the reader's choice, not an error.
    let _ = if line.stream == LogStream::Stdout && !all_to_stderr {
        writeln!(std::io::stdout(), "{whose}{}", line.text)
    } else {
        writeln!(std::io::stderr(), "{whose}{}", line.text)
    };
}

/// The rank in `<job>-<rank>-<attempt>`.
fn rank_of(sandbox: &str) -> &str {
    sandbox.rsplit('-').nth(1).unwrap_or("?")
}

async fn logs(
    client: &Client,
    id: &str,
    follow: bool,
    rank: Option<u32>,
    format: Format,
) -> anyhow::Result<Exit> {
    let ranks = rank.is_none() && client.job(id).await?.spec.tasks > 1;
    let mut stream = client.job_logs(id, LogQuery { rank, follow, attempt: None }).await?;
    while let Some(line) = stream.next().await {
        let line = line?;
        match format {
            Format::Json => println!("{}", serde_json::to_string(&line)?),
            Format::Table => print_line(&line, ranks.then(|| rank_of(&line.sandbox)), false),
        }
    }
    Ok(Exit::Success)
}

/// The class as it is written in files and flags.
pub fn class_name(class: IsolationClass) -> &'static str {
    match class {
        IsolationClass::Microvm => "microvm",
        IsolationClass::Unikernel => "unikernel",
        IsolationClass::Container => "container",
    }
}

pub(super) fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Pending => "pending",
        JobState::Running => "running",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Preempting => "preempting",
        JobState::Cancelling => "cancelling",
        JobState::Cancelled => "cancelled",
    }
}

pub(super) fn task_state_name(state: TaskState) -> &'static str {
    match state {
        TaskState::Pending => "pending",
        TaskState::Preparing => "preparing",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Stopping => "stopping",
        TaskState::Exited => "exited",
        TaskState::Failed => "failed",
        TaskState::Lost => "lost",
    }
}

fn list(jobs: &[Job]) {
    let mut headings = vec!["ID", "STATE", "POOL", "CLASS", "TASKS", "IMAGE", "AGE", "START", "REASON"];
    let replicas = jobs.iter().any(|job| job.service.is_some());
    if replicas {
        headings.insert(1, "SERVICE");
    }
    let mut table = output::table(&headings);
    for job in jobs {
        let mut row = vec![
            job.id.clone(),
            state_name(job.state).to_owned(),
            job.spec.pool.clone(),
            class_name(job.spec.class).to_owned(),
            tasks(job),
            job.spec.image.clone(),
            output::age(job.submitted_ms),
            job.expected_start_ms.map(output::ahead).unwrap_or_default(),
            job.reason.clone().unwrap_or_default(),
        ];
        if replicas {
            row.insert(1, job.service.clone().unwrap_or_default());
        }
        table.add_row(row);
    }
    println!("{table}");
}

/// How many tasks it has; of an elastic gang how many of how many.
fn tasks(job: &Job) -> String {
    match (job.size, job.spec.tasks_min) {
        (Some(size), _) => format!("{size}/{}", job.spec.tasks),
        (None, Some(least)) => format!("{least}-{}", job.spec.tasks),
        (None, None) => job.spec.tasks.to_string(),
    }
}

fn show(job: &Job) {
    println!("id         {}", job.id);
    println!("state      {}{}", state_name(job.state), reason(job));
    println!("tenant     {}", job.tenant);
    if let Some(service) = &job.service {
        println!("replica    of service {service}");
    }
    println!("class      {}, {} tasks, attempt {}", class_name(job.spec.class), tasks(job), job.attempt);
    println!("pool       {}, priority {}, {} preemptions", job.spec.pool, job.spec.priority, job.preemptions);
    if let Some(why) = &job.why {
        println!("placed     {why}");
    }
    if let Some(start) = job.expected_start_ms {
        println!("start      expected {}", output::ahead(start));
    }
    println!("image      {} {}", job.spec.image, job.image_digest);
    let resources = &job.spec.resources;
    let gpus = if resources.gpus == 0 { String::new() } else { format!(", {} GPUs", resources.gpus) };
    println!("each task  {} CPUs, {}{gpus}", resources.cpus, resources.memory);
    for dataset in &job.spec.datasets {
        println!("dataset    {} at {}", dataset.name, dataset.mount);
    }
    println!("submitted  {} ago", output::age(job.submitted_ms));
    println!("{}", task_table(&job.tasks));
}

fn summary(job: &Job) {
    let took = job.finished_ms.map_or(0, |end| end.saturating_sub(job.submitted_ms));
    eprintln!("{}: {}{} after {}", job.id, state_name(job.state), reason(job), output::duration(took));
    eprintln!("{}", task_table(&job.tasks));
}

fn reason(job: &Job) -> String {
    job.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default()
}

fn task_table(tasks: &[Task]) -> comfy_table::Table {
    let mut table =
        output::table(&["RANK", "NODE", "ADDRESS", "STATE", "START", "RUN", "CPU", "PEAK", "END"]);
    for task in tasks {
        let end = match (task.exit, &task.reason) {
            (_, Some(reason)) => reason.clone(),
            (Some(TaskExit::Code(code)), None) => format!("exit {code}"),
            (Some(TaskExit::Signal(signal)), None) => format!("signal {signal}"),
            (Some(TaskExit::OutOfMemory), None) => "out of memory".to_owned(),
            (None, None) => String::new(),
        };
        table.add_row([
            task.rank.to_string(),
            task.node.clone().unwrap_or_default(),
            task.address.clone().unwrap_or_default(),
            task_state_name(task.state).to_owned(),
            output::duration(task.stages.start_ms),
            output::duration(task.stages.run_ms),
            output::duration(task.usage.cpu_us / 1_000),
            format!("{} MiB", task.usage.memory_peak_bytes >> 20),
            end,
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> anyhow::Result<JobSpec> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        file::read(&path)
    }

    #[test]
    fn toml_and_json_are_the_same_job() {
        let toml =
            parse("job.toml", "name = \"a\"\nclass = \"microvm\"\nimage = \"i\"\ntasks = 4\n").unwrap();
        let json = parse("job.json", r#"{"name":"a","class":"microvm","image":"i","tasks":4}"#).unwrap();
        assert_eq!(toml, json);
    }

    #[test]
    fn mistakes_are_named_by_line_and_field() {
        let error = parse("job.toml", "name = \"a\"\nclass = \"microvm\"\nimage = \"i\"\ntask = 4\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 4") && error.contains("task"), "{error}");
        let error =
            parse("job.toml", "name = \"a\"\nclass = \"vm\"\nimage = \"i\"\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("vm"), "{error}");
        let error = parse("job.toml", "name = \"a\"\nclass = \"microvm\"\n").unwrap_err().to_string();
        assert!(error.contains("image"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn ranks_come_from_the_sandbox_name() {
        assert_eq!(rank_of("longley-4-x7f2qa-3-1"), "3");
    }
}
