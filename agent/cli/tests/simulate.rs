//! `lathe simulate` as a user runs it: what it prints for a small cluster, and what it says of bad input.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Three jobs on one GPU: they run from 0 to 100, 100 to 150 and 150 to 170 seconds.
const JOBS: &str = "job,arrival_s,duration_s,gpus,model\na,0,100,1,x\nb,10,50,1,x\nc,20,20,1,y\n";

const PODS: &str =
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np1,1000,1024,1,500,T4\np2,1000,1024,1,1000,\n";

const NODES: &str = "sn,cpu_milli,memory_mib,gpu,model\nn1,8000,65536,2,T4\nn2,8000,65536,2,P100\n";

fn lathe(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lathe")).args(args).current_dir(dir).output().expect("lathe runs")
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("a file");
    }
    dir
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let output = lathe(dir, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_small_list_gives_these_figures() {
    let dir = folder(&[("jobs.csv", JOBS)]);
    let output =
        lathe(dir.path(), &["simulate", "--jobs", "jobs.csv", "--cluster", "1x1", "--backfill", "none"]);
    let printed: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        printed,
        [
            "queue: 3 jobs on 1 nodes with 1 GPUs, load 8.50, 1 seed",
            "",
            "POLICY BACKFILL ESTIMATES WAIT MEAN P95 COMPLETION MEAN P95 SLOWDOWN P95 MAKESPAN JAIN ALLOCATED \
             FRAGMENTED PREEMPTED",
            "fcfs none perfect 73.3 s 2 min 6 s 2 min 10 s 2 min 29 s 3.77 7.03 2 min 50 s 1.000 100.0 % 0.0 % 0",
        ]
    );
}

#[test]
fn programs_get_the_same_figures_in_seconds() {
    let dir = folder(&[("jobs.csv", JOBS)]);
    let args = ["simulate", "--json", "--jobs", "jobs.csv", "--cluster", "1x1", "--backfill", "none,easy"];
    let report = json(dir.path(), &args);
    assert_eq!(report["procedure"], "queue");
    assert_eq!(report["results"].as_array().map(Vec::len), Some(2));
    let first = &report["results"][0];
    assert_eq!((&first["policy"], &first["backfill"]), (&Value::from("fcfs"), &Value::from("none")));
    assert_eq!((&first["completed"], &first["makespan_s"]), (&Value::from(3), &Value::from(170.0)));
    let near = |value: &Value, wanted: f64| (value.as_f64().expect("a number") - wanted).abs() < 1e-9;
    assert!(near(&first["waiting_s"]["mean"], 220.0 / 3.0) && near(&first["waiting_s"]["p50"], 90.0));
    assert!(near(&first["completion_s"]["p95"], 149.0) && near(&first["completion_s"]["p99"], 149.8));
    assert_eq!(json(dir.path(), &args), report, "the same seed gives the same report");
}

#[test]
fn a_load_sizes_a_cluster_or_moves_arrivals() {
    let rows: String = (0..100).map(|job| format!("{job},{},80,8\n", job * 10)).collect();
    let dir = folder(&[("jobs.csv", &format!("job,arrival_s,duration_s,gpus\n{rows}"))]);
    let sized = json(dir.path(), &["simulate", "--json", "--jobs", "jobs.csv", "--load", "0.9"]);
    // 100 jobs of 640 GPU-seconds in 990 s: 64.6 GPUs at a load of 1.
    assert_eq!((&sized["nodes"], &sized["gpus"]), (&Value::from(9), &Value::from(72)));
    let moved =
        json(dir.path(), &["simulate", "--json", "--jobs", "jobs.csv", "--cluster", "4x8", "--load", "0.9"]);
    assert!((moved["load"].as_f64().expect("a load") - 0.9).abs() < 1e-3, "{}", moved["load"]);
}

#[test]
fn jobs_that_never_fit_are_named_and_left_out() {
    let dir = folder(&[("jobs.csv", "job,arrival_s,duration_s,gpus\nsmall,0,10,1\nlarge,0,10,64\n")]);
    let report = json(dir.path(), &["simulate", "--json", "--jobs", "jobs.csv", "--cluster", "2x8"]);
    assert_eq!((&report["jobs"], &report["left_out"][0]["job"]), (&Value::from(1), &Value::from("large")));
}

#[test]
fn a_plot_is_drawn() {
    let dir = folder(&[("jobs.csv", JOBS)]);
    let args =
        ["simulate", "--jobs", "jobs.csv", "--cluster", "1x1", "--policy", "fcfs,sjf", "--plot", "out.svg"];
    assert!(lathe(dir.path(), &args).status.success());
    let svg = fs::read_to_string(dir.path().join("out.svg")).expect("a picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for word in ["GPUs allocated", "Completion time", "fcfs, easy, perfect", "sjf, easy, perfect"] {
        assert!(svg.contains(word), "{word}");
    }
}

/// Six GPUs of two models, one pod of half a GPU of one model and pods of whole ones of any.
#[test]
fn pods_that_stay_fill_the_gpus() {
    let nodes =
        "sn,cpu_milli,memory_mib,gpu,model\nn1,64000,65536,4,T4\nn2,64000,65536,2,P100\nn3,64000,65536,0,\n";
    let dir = folder(&[("pods.csv", PODS), ("nodes.csv", nodes)]);
    let args = ["simulate", "--json", "--jobs", "pods.csv", "--nodes", "nodes.csv", "--seeds", "3"];
    let options = ["--policy", "balanced,fgd,random", "--plot", "out.svg"];
    let report = json(dir.path(), &[&args[..], &options].concat());
    assert_eq!((&report["procedure"], &report["nodes"]), (&Value::from("arrivals"), &Value::from(2)));
    assert_eq!((&report["gpus"], &report["seeds"]), (&Value::from(6), &serde_json::json!([42, 43, 44])));
    let results = report["results"].as_array().expect("results");
    let names: Vec<_> = results.iter().map(|result| result["policy"].as_str().expect("a name")).collect();
    assert_eq!(names, ["balanced", "fgd", "random"]);
    for result in results {
        let curve = |name: &str| -> Vec<f64> {
            let values = result[name].as_array().expect("a curve").iter();
            values.map(|value| value.as_f64().expect("a number")).collect()
        };
        let (allocated, fragmented) = (curve("percent_gpu_allocated"), curve("percent_gpu_fragmented"));
        assert!(allocated.len() > 100 && fragmented.len() == allocated.len());
        // Half of the GPUs are had when half of them were asked for, to one pod.
        assert!((allocated[50] - 50.0).abs() < 17.0, "{allocated:?}");
        let full = &result["percent_gpu_allocated_at_100"];
        assert_eq!(full["by_seed"].as_array().map(Vec::len), Some(3));
        assert!((full["mean"].as_f64().expect("a mean") - allocated[100]).abs() < 1e-9);
        let (placed, arrived) = (result["placed"].as_f64(), result["arrived"].as_f64());
        assert!(placed <= arrived && arrived >= Some(7.0), "{placed:?} of {arrived:?}");
    }
    let svg = fs::read_to_string(dir.path().join("out.svg")).expect("a picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for word in ["GPUs allocated", "GPUs fragmented", "balanced", "fgd", "random"] {
        assert!(svg.contains(word), "{word}");
    }
    assert_eq!(json(dir.path(), &[&args[..], &options].concat()), report, "the same seeds, the same report");
}

/// The table is for people: a row a policy.
#[test]
fn pods_that_stay_are_printed_as_a_table() {
    let dir = folder(&[("pods.csv", PODS), ("nodes.csv", NODES)]);
    let args = ["simulate", "--jobs", "pods.csv", "--nodes", "nodes.csv", "--policy", "best-fit,spread"];
    let output = lathe(dir.path(), &args);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.starts_with("arrivals: 2 jobs on 2 nodes with 4 GPUs, 1 seed"), "{printed}");
    for policy in ["best-fit", "spread"] {
        assert_eq!(printed.lines().filter(|line| line.starts_with(policy)).count(), 1, "{printed}");
    }
}

#[test]
fn bad_input_is_one_line_and_writes_nothing() {
    let dir = folder(&[
        ("jobs.csv", JOBS),
        ("pods.csv", PODS),
        ("nodes.csv", NODES),
        ("bad.csv", "job,arrival_s,duration_s,gpus\na,0,100,1\nb,x,1,1\n"),
        ("cpu.csv", "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np1,1000,1024,0,0\n"),
    ]);
    let cases: [(&[&str], &str); 13] = [
        (&["--jobs", "bad.csv", "--cluster", "1x1"], "bad.csv: line 3: arrival_s \"x\": write seconds"),
        (&["--jobs", "none.csv", "--cluster", "1x1"], "cannot read none.csv"),
        (&["--jobs", "nodes.csv", "--cluster", "1x1"], "are not those of a pod list"),
        (&["--jobs", "jobs.csv", "--nodes", "jobs.csv"], "are not those of a node list"),
        (&["--jobs", "jobs.csv"], "which nodes? Give --nodes FILE, --cluster NxG, or --load"),
        (
            &["--jobs", "jobs.csv", "--cluster", "1x1", "--policy", "fgd"],
            "there are fcfs, sjf, hrrn, fair, priority",
        ),
        (
            &["--jobs", "jobs.csv", "--cluster", "1x1", "--backfill", "x"],
            "there are none, easy, conservative",
        ),
        (&["--jobs", "pods.csv", "--nodes", "nodes.csv", "--policy", "sjf"], "no such placement policy"),
        (&["--jobs", "pods.csv", "--nodes", "nodes.csv", "--procedure", "queue"], "creation_time"),
        (&["--jobs", "jobs.csv", "--cluster", "1x1", "--procedure", "arrivals"], "give a list of pods"),
        (&["--jobs", "cpu.csv", "--nodes", "nodes.csv"], "no pod of cpu.csv asks for a GPU"),
        (&["--jobs", "jobs.csv", "--cluster", "1x1", "--plot", "no/out.svg"], "there is no folder no"),
        (&["--jobs", "jobs.csv", "--cluster", "1x1", "--plot", "out.png"], "end the name in .svg"),
    ];
    for (args, wanted) in cases {
        let output = lathe(dir.path(), &[&["simulate"], args].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(wanted) && said.trim_end().lines().count() == 1, "{args:?}: {said}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
    let with_plot = ["simulate", "--jobs", "bad.csv", "--cluster", "1x1", "--plot", "out.svg"];
    assert_eq!(lathe(dir.path(), &with_plot).status.code(), Some(2));
    assert!(!dir.path().join("out.svg").exists());
    for (option, value) in [("--cluster", "16"), ("--load", "NaN"), ("--seeds", "0"), ("--ties", "x")] {
        let output = lathe(dir.path(), &["simulate", "--jobs", "jobs.csv", option, value]);
        assert_eq!(output.status.code(), Some(2), "{option} {value}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(option), "{option} {value}");
    }
}
