//! What the demo shows, as tests: real jobs in both classes give the right numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::report::report;
use lathe_e2e::{artefacts, leftovers, nist};

/// Digits of NIST's certified values that every fit must reach.
const DIGITS: f64 = 9.0;

fn add(cluster: &Cluster, args: &[&str]) {
    let output = cluster.lathe(args).unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn longley(class: &str) {
    let image = artefacts::least_squares_image().unwrap();
    let cluster = Cluster::start(&Options::default()).unwrap();
    add(&cluster, &["image", "add", "least-squares", image.to_str().unwrap()]);
    add(&cluster, &["dataset", "add", "longley", artefacts::longley().to_str().unwrap()]);
    for tasks in ["1", "2", "3", "4"] {
        let more = ["--class", class, "--tasks", tasks];
        let (job, logs) = cluster.run(&artefacts::job("longley.toml"), &more).unwrap();
        let report = report(&job, &logs).unwrap();
        let digits = nist::longley_digits(&report.coefficients).unwrap();
        assert!(digits >= DIGITS, "{class}, {tasks} ranks: {digits} digits: {report:?}");
        let r_squared = report.r_squared.unwrap();
        assert!(nist::digits(r_squared, nist::LONGLEY_R_SQUARED) >= DIGITS, "R² is {r_squared}");
        if tasks == "4" {
            let mut nodes = report.nodes.clone();
            nodes.sort();
            nodes.dedup();
            assert_eq!(nodes, ["n1", "n2"], "a gang of four needs both hosts' CPUs");
        }
    }
}

#[test]
fn longley_agrees_with_nist_in_containers_with_one_to_four_ranks() {
    longley("container");
}

#[test]
fn longley_agrees_with_nist_in_microvms_with_one_to_four_ranks() {
    longley("microvm");
}

/// Runs the job twice: the first brings up what stays, the bridge and the image's cache among it.
fn python(class: &str) {
    let image = artefacts::python_ml_image().unwrap();
    let cluster = Cluster::start(&Options { hosts: 1, ..Options::default() }).unwrap();
    add(&cluster, &["image", "add", "python-ml", image.to_str().unwrap()]);
    let mut before = None;
    for run in 1..=2 {
        let (job, logs) = cluster.run(&artefacts::job("python-ml.toml"), &["--class", class]).unwrap();
        let report = report(&job, &logs).unwrap();
        let values: Vec<f64> = report.coefficients.iter().map(|c| c.value).collect();
        assert_eq!(values.len(), 2, "{report:?}");
        assert!((values[0] - 1.0).abs() < 1e-9 && (values[1] - 2.0).abs() < 1e-9, "{report:?}");
        let now = cluster.settled_census(&cluster.hosts()[0]).unwrap();
        if let Some(before) = &before {
            assert_eq!(leftovers::new_since(before, &now), [""; 0], "after run {run}");
        }
        before.get_or_insert(now);
    }
}

#[test]
fn ordinary_python_fits_a_line_in_a_container_and_leaves_nothing() {
    python("container");
}

#[test]
fn ordinary_python_fits_a_line_in_a_microvm_and_leaves_nothing() {
    python("microvm");
}
