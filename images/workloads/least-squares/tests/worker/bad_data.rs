//! Bad input gets one line that names the place, status 2, and leaves nothing behind.

use std::path::Path;

use crate::support::{LONGLEY_FEATURES, complaint, finish, free_port, gang, longley, rank, run};

/// Fits `content` and returns the complaint.
fn refusal(content: &str, more: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.csv");
    std::fs::write(&path, content).unwrap();
    refusal_of(&path, more)
}

fn refusal_of(path: &Path, more: &[&str]) -> String {
    let args = [&["fit", "--data", path.to_str().unwrap(), "--response", "y"], more].concat();
    let output = run(&args);
    let text = complaint(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(output.stdout.is_empty());
    text
}

#[test]
fn a_broken_value_is_named_by_line_column_and_value() {
    let text = refusal("x,y\n1,2\n\n3,4\n5x,6\n", &[]);
    assert!(text.contains("d.csv: line 5: column x: \"5x\" is not a finite number"), "{text}");
    for value in ["NaN", "inf", "1e999"] {
        let text = refusal(&format!("x,y\n1,{value}\n"), &[]);
        assert!(text.contains("line 2: column y") && text.contains(value), "{text}");
    }
    let text = refusal("x,y\n1,2\n2,\n", &[]);
    assert!(text.contains("line 3: column y: no value"), "{text}");
}

#[test]
fn a_row_of_the_wrong_width_is_named_by_line() {
    let text = refusal("x,y\n1,2\n1,2,3\n", &[]);
    assert!(text.contains("line 3: 3 fields, but the header names 2"), "{text}");
    let text = refusal("x,y\n1\n", &[]);
    assert!(text.contains("line 2: 1 fields"), "{text}");
}

#[test]
fn a_line_break_in_quotes_is_refused_not_misread() {
    let text = refusal("x,y,note\n1,2,\"a\nb\"\n", &[]);
    assert!(text.contains("line 2: a quoted field does not end on its line"), "{text}");
}

#[test]
fn headers_are_checked() {
    assert!(refusal("", &[]).contains("empty; the first line must name the columns"));
    assert!(refusal("x,y,x\n1,2,3\n", &[]).contains("two columns \"x\""));
    assert!(refusal("x,,y\n1,2,3\n", &[]).contains("column 2 of the header has no name"));
    assert!(refusal("x;y\n1;2\n", &[]).contains("separate columns by commas"));
    assert!(refusal("x,z\n1,2\n", &[]).contains("no column \"y\"; it has x, z"));
    assert!(refusal("x,y\n1,2\n", &["--features", "x,w"]).contains("no column \"w\""));
    assert!(refusal("x,y\n1,2\n", &["--features", "x,x"]).contains("names one column twice: \"x\""));
    assert!(refusal("x,y\n1,2\n", &["--features", "y"]).contains("both the response and a feature"));
    assert!(refusal("y\n1\n", &[]).contains("no feature left"));
}

#[test]
fn a_problem_without_a_single_solution_is_explained() {
    assert!(refusal("x,y\n", &[]).contains("0 rows cannot determine 2 coefficients"));
    assert!(refusal("x,y\n1,2\n", &[]).contains("1 rows cannot determine 2 coefficients"));
    let text = refusal("a,b,y\n1,2,1\n2,4,2\n5,10,4\n7,14,9\n", &[]);
    assert!(text.contains("column b is a linear combination of the columns before it"), "{text}");
    assert!(refusal("a,y\n3,1\n3,2\n3,3\n", &[]).contains("column a is a linear combination"));
    assert!(refusal("a,y\n1e308,1\n1.7e308,2\n1e308,3\n1.7e308,3\n", &[]).contains("too large"));
}

#[test]
fn files_that_are_no_datasets_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(refusal_of(&at("none.csv"), &[]).contains("none.csv: No such file"));
    std::fs::write(at("d.txt"), "x,y\n").unwrap();
    assert!(refusal_of(&at("d.txt"), &[]).contains("must end in .csv or .parquet"));
    std::fs::create_dir(at("dir.csv")).unwrap();
    assert!(refusal_of(&at("dir.csv"), &[]).contains("not a regular file"));
    std::fs::write(at("d.parquet"), "x,y\n1,2\n").unwrap();
    assert!(refusal_of(&at("d.parquet"), &[]).contains("not a readable Parquet file"));
    std::fs::write(at("long.csv"), format!("x,y\n{},2\n", "1".repeat(2 << 20))).unwrap();
    assert!(refusal_of(&at("long.csv"), &[]).contains("line 2: longer than 1048576 bytes"));
}

/// Whatever byte of a Parquet file is damaged, the outcome is a fit or one line, never a panic.
#[test]
fn damaged_parquet_files_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.parquet");
    let name = path.to_str().unwrap();
    assert!(run(&["generate", "--rows", "50", "--features", "1", "--output", name]).status.success());
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        std::fs::write(&path, bad).unwrap();
        let output = run(&["fit", "--data", name, "--response", "y"]);
        let text = complaint(&output);
        assert!(matches!(output.status.code(), Some(0 | 2)), "byte {at}: {:?} {text}", output.status);
        assert!(text.lines().count() <= 1, "byte {at}: {text}");
    }
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let data = longley();
    let output = run(&[
        "fit",
        "--data",
        data.to_str().unwrap(),
        "--response",
        "TOTEMP",
        "--features",
        LONGLEY_FEATURES,
        "--output",
        "/nonexistent/out.json",
    ]);
    assert_eq!(output.status.code(), Some(2));
    assert!(complaint(&output).contains("/nonexistent/out.json: cannot write"));
}

/// The broken row may be in any rank's share: all ranks end, and say where it is.
#[test]
fn a_broken_row_ends_the_whole_gang_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.csv");
    for broken in [2, 500, 998] {
        let mut text = "x,y\n".to_owned();
        for line in 2..1000 {
            text += &if line == broken { "1,oops\n".to_owned() } else { format!("{line},{}\n", line * 2) };
        }
        std::fs::write(&path, text).unwrap();
        let outputs = gang(4, &["fit", "--data", path.to_str().unwrap(), "--response", "y"]);
        for output in &outputs {
            let text = complaint(output);
            assert_eq!(output.status.code(), Some(2), "{text}");
            assert!(text.contains(&format!("line {broken}: column y: \"oops\"")), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }
}

#[test]
fn ranks_with_different_data_do_not_work_together() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("a.csv"), "x,y\n1,2\n2,3\n3,5\n").unwrap();
    std::fs::write(at("b.csv"), "x,y\n1,2\n2,3\n3,5\n4,5\n").unwrap();
    let port = free_port();
    let (a, b) = (at("a.csv"), at("b.csv"));
    let args = |data| ["fit", "--response", "y", "--connect-timeout", "3", "--data", data];
    let zero = rank(0, 2, port, &args(a.as_str()));
    let one = finish(rank(1, 2, port, &args(b.as_str())));
    assert_eq!(one.status.code(), Some(3));
    assert!(complaint(&one).contains("another problem"), "{}", complaint(&one));
    let zero = finish(zero);
    assert_eq!(zero.status.code(), Some(3));
    let text = complaint(&zero);
    assert!(text.contains("rank 1 did not connect") && text.contains("another problem"), "{text}");
}
