//! The demo: hosts, a cluster, and a model trained on real data in microVMs and in containers.
//!
//! The host is this machine where it can be one, else two are emulated; `--hosts` decides otherwise.
//! Prints what it does and what came out, and writes `target/demo/report.json`. What it starts, it ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use lathe_api::job::Job;
use lathe_api::node::Node;
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{self, Cluster};
use lathe_e2e::report::{JobReport, report};
use lathe_e2e::{nist, this_machine};

/// The gang where the cluster has the CPUs for it.
const RANKS: u32 = 4;

/// Rows of the generated dataset, unless said otherwise.
const ROWS: u32 = 2_000_000;

/// Digits that a fit of Longley's data must share with NIST's certified values.
const DIGITS: f64 = 9.0;

/// What the command line chose.
struct Options {
    /// Whether this machine is the host; decided by what it can do if `None`.
    this_machine: Option<bool>,
    rows: u32,
    /// Whether the image of a whole Python is part of it.
    python: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Options> {
    let mut options = Options { this_machine: None, rows: ROWS, python: true };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--hosts" => match words.next().as_deref() {
                Some("this-machine") => options.this_machine = Some(true),
                Some("emulated") => options.this_machine = Some(false),
                _ => bail!("--hosts takes this-machine or emulated"),
            },
            "--rows" => {
                let rows = words.next().and_then(|word| word.parse().ok()).filter(|rows| *rows >= 100_000);
                options.rows = rows.context("--rows takes a number from 100000")?;
            }
            "--no-python" => options.python = false,
            _ => bail!(
                "unknown argument {word:?}; usage: demo [--hosts this-machine|emulated] [--rows N] [--no-python]"
            ),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let demo = Instant::now();
    let directory = artefacts::repository().join("target/demo");
    std::fs::create_dir_all(&directory)?;

    step("images: the guest's kernel and init, two OCI images");
    artefacts::guest_bundle()?;
    let least_squares = artefacts::least_squares_image()?;
    let python_ml = options.python.then(artefacts::python_ml_image).transpose()?;

    step(&format!("datasets: NIST's Longley, and {} generated rows", options.rows));
    let generated = directory.join("generated.parquet");
    let truth = generate(&generated, options.rows)?;

    let cluster = start(options)?;
    show(&cluster, &["node", "list"])?;

    step("images and datasets into the cluster");
    show(&cluster, &["image", "add", "least-squares", path(&least_squares)?])?;
    if let Some(python_ml) = &python_ml {
        show(&cluster, &["image", "add", "python-ml", path(python_ml)?])?;
    }
    show(&cluster, &["dataset", "add", "longley", path(&artefacts::longley())?])?;
    show(&cluster, &["dataset", "add", "generated", path(&generated)?])?;

    let nodes: Vec<Node> = cluster.json(["node", "list"])?;
    let ranks = nodes.iter().map(|node| node.inventory.cpus.online).sum::<u32>().min(RANKS).to_string();
    let mut reports = Vec::new();
    for file in ["longley.toml", "generated.toml", "python-ml.toml"] {
        if file == "python-ml.toml" && !options.python {
            continue;
        }
        for class in ["microvm", "container"] {
            let mut args = vec!["--class", class];
            if file != "python-ml.toml" {
                args.extend(["--tasks", &ranks]);
            }
            step(&format!("lathe job run {file} {}", args.join(" ")));
            let (job, output) = run_job(&cluster, &artefacts::job(file), &args)?;
            let report = report(&job, &output)?;
            check(&report, &truth)?;
            reports.push(report);
        }
    }
    let path = directory.join("report.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&reports)?)?;

    step("taking it down");
    drop(cluster);
    print_table(&reports);
    println!("\n{} written; the demo took {} s", path.display(), demo.elapsed().as_secs());
    Ok(())
}

/// Starts the cluster on this machine or on emulated hosts.
fn start(options: &Options) -> anyhow::Result<Cluster> {
    let unfit = this_machine::unfit();
    match (options.this_machine, unfit) {
        (Some(true), Some(problem)) => bail!("--hosts this-machine: {problem}"),
        (Some(true) | None, None) => {
            step("this machine as the host, a coordinator and an agent on it");
            Cluster::start_here()
        }
        (chosen, unfit) => {
            step("two emulated hosts (SVM, IOMMU), a coordinator, an agent on each host");
            if let (None, Some(problem)) = (chosen, unfit) {
                println!("(this machine cannot be the host: {problem})");
            }
            Cluster::start(&cluster::Options::default())
        }
    }
}

fn step(what: &str) {
    println!("\n== {what}");
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn show(cluster: &Cluster, args: &[&str]) -> anyhow::Result<()> {
    println!("$ lathe {}", args.join(" "));
    let output = cluster.lathe(args)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    print!("{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// Runs a job as a person would, its progress and output as they come; the job and its output.
fn run_job(cluster: &Cluster, file: &Path, args: &[&str]) -> anyhow::Result<(Job, String)> {
    let mut command = cluster.lathe_command()?;
    command.args(["job", "run", path(file)?]).args(args).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start lathe")?;
    let mut output = String::new();
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        // For programs: every digit of every coefficient, and it is in the report.
        if !line.contains("RESULT ") {
            println!("  {line}");
        }
        output.push_str(&line);
        output.push('\n');
    }
    let status = child.wait()?;
    let jobs: Vec<Job> = cluster.json(["job", "list"])?;
    let job = jobs.into_iter().max_by_key(|job| job.submitted_ms).context("the job is not listed")?;
    if !status.success() {
        cluster.save_logs(&job.id);
        bail!("lathe job run: {status}");
    }
    Ok((job, output))
}

/// Makes the dataset; gives the coefficients it was made with.
fn generate(to: &Path, rows: u32) -> anyhow::Result<Vec<(String, f64)>> {
    let output = Command::new(artefacts::binary("least-squares")?)
        .args([
            "generate",
            "--rows",
            &rows.to_string(),
            "--features",
            "6",
            "--seed",
            "1",
            "--output",
            path(to)?,
        ])
        .output()?;
    ensure!(output.status.success(), "generate: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().last().context("generate printed nothing")?;
    let json: serde_json::Value = serde_json::from_str(line).context("generate's coefficients")?;
    let names = json["names"].as_array().context("generate's names")?;
    let values = json["coefficients"].as_array().context("generate's coefficients")?;
    names
        .iter()
        .zip(values)
        .map(|(name, value)| {
            let name = name.as_str().context("a coefficient's name")?.trim_matches(['(', ')']);
            Ok((name.to_owned(), value.as_f64().context("a coefficient's value")?))
        })
        .collect()
}

/// A demo that shows wrong numbers is no demo.
fn check(report: &JobReport, truth: &[(String, f64)]) -> anyhow::Result<()> {
    match report.job.as_str() {
        "longley" => {
            let digits = nist::longley_digits(&report.coefficients).context("a coefficient is missing")?;
            println!("  agrees with NIST's certified values to {digits:.1} digits or more");
            ensure!(digits >= DIGITS, "{digits:.1} digits are fewer than {DIGITS}");
        }
        "generated" => {
            for (name, expected) in truth {
                let found = report.coefficients.iter().find(|c| c.name == *name);
                let found = found.with_context(|| format!("no coefficient {name}"))?.value;
                // The noise leaves the estimates about 1/sqrt(rows) away from the truth.
                ensure!((found - expected).abs() < 0.01, "{name} is {found}, made with {expected}");
            }
            println!("  every coefficient is within 0.01 of what the data was made with");
        }
        _ => {
            for (coefficient, expected) in report.coefficients.iter().zip([1.0, 2.0]) {
                let far = (coefficient.value - expected).abs();
                ensure!(far < 1e-9, "{} is {}", coefficient.name, coefficient.value);
            }
        }
    }
    Ok(())
}

fn print_table(reports: &[JobReport]) {
    println!(
        "\n{:<10} {:<10} {:>5}  {:<12} {:>10}  {:>7} {:>7} {:>7} {:>7}",
        "JOB", "CLASS", "RANKS", "NODES", "R2", "IMAGE", "START", "RUN", "TOTAL"
    );
    for report in reports {
        let mut nodes = report.nodes.clone();
        nodes.dedup();
        let seconds = &report.seconds;
        println!(
            "{:<10} {:<10} {:>5}  {:<12} {:>10.6}  {:>5.1} s {:>5.1} s {:>5.1} s {:>5.1} s",
            report.job,
            report.class,
            report.ranks,
            nodes.join(","),
            report.r_squared.unwrap_or(f64::NAN),
            seconds.image,
            seconds.start,
            seconds.run,
            seconds.total
        );
    }
}
