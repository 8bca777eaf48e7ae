//! The demo: two hosts, a cluster, and a model trained on real data in microVMs and in containers.
//!
//! Prints what it does and what came out, and writes `target/demo/report.json`. What it starts, it ends.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, ensure};
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::nist;
use lathe_e2e::report::{JobReport, report};

/// Rows of the generated dataset.
const ROWS: &str = "2000000";

/// Digits that a fit of Longley's data must share with NIST's certified values.
const DIGITS: f64 = 9.0;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let demo = Instant::now();
    let directory = artefacts::repository().join("target/demo");
    std::fs::create_dir_all(&directory)?;

    step("images: the guest's kernel and init, two OCI images");
    artefacts::guest_bundle()?;
    let least_squares = artefacts::least_squares_image()?;
    let python_ml = artefacts::python_ml_image()?;

    step("datasets: NIST's Longley, and two million generated rows");
    let generated = directory.join("generated.parquet");
    let truth = generate(&generated)?;

    step("two emulated hosts (SVM, IOMMU), a coordinator, an agent on each host");
    let cluster = Cluster::start(&Options::default())?;
    show(&cluster, &["node", "list"])?;

    step("images and datasets into the cluster");
    for args in [
        ["image", "add", "least-squares", path(&least_squares)?],
        ["image", "add", "python-ml", path(&python_ml)?],
        ["dataset", "add", "longley", path(&artefacts::longley())?],
        ["dataset", "add", "generated", path(&generated)?],
    ] {
        show(&cluster, &args)?;
    }

    let mut reports = Vec::new();
    for file in ["longley.toml", "generated.toml", "python-ml.toml"] {
        for class in ["microvm", "container"] {
            step(&format!("lathe job run {file} --class {class}"));
            let (job, logs) = cluster.run(&artefacts::job(file), &["--class", class])?;
            for line in logs.lines().filter(|line| !line.contains("RESULT ")) {
                println!("  {line}");
            }
            let report = report(&job, &logs)?;
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

/// Makes the dataset; gives the coefficients it was made with.
fn generate(to: &Path) -> anyhow::Result<Vec<(String, f64)>> {
    let output = Command::new(artefacts::binary("least-squares")?)
        .args(["generate", "--rows", ROWS, "--features", "6", "--seed", "1", "--output", path(to)?])
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
