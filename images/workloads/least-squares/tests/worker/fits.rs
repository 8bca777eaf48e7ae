//! What a user gets from a fit that works: the right numbers, for any number of ranks.

use std::fmt::Write as _;

use crate::support::{LONGLEY_FEATURES, digits, gang, longley, numbers, result, run};

/// NIST StRD, Longley: coefficients and their standard deviations.
const CERTIFIED: [(f64, f64); 7] = [
    (-3482258.63459582, 890420.383607373),
    (15.0618722713733, 84.9149257747669),
    (-0.358191792925910E-01, 0.334910077722432E-01),
    (-2.02022980381683, 0.488399681651699),
    (-1.03322686717359, 0.214274163161675),
    (-0.511041056535807E-01, 0.226073200069370),
    (1829.15146461355, 455.478499142212),
];

/// Sixteen rows over up to sixteen ranks: most have fewer rows than there are columns.
#[test]
fn longley_keeps_its_digits_with_any_number_of_ranks() {
    let data = longley();
    let args =
        ["fit", "--data", data.to_str().unwrap(), "--response", "TOTEMP", "--features", LONGLEY_FEATURES];
    for world in [1, 2, 3, 4, 7, 16] {
        let outputs = gang(world, &args);
        let fit = result(&outputs[0]);
        let (values, errors) = (numbers(&fit["coefficients"]), numbers(&fit["standard_errors"]));
        for (i, (coefficient, error)) in CERTIFIED.iter().enumerate() {
            assert!(digits(values[i], *coefficient) > 12.0, "{world} ranks: {} {coefficient}", values[i]);
            assert!(digits(errors[i], *error) > 9.0, "{world} ranks: {} {error}", errors[i]);
        }
        let certain = |name: &str, certified: f64| {
            let value = fit[name].as_f64().unwrap();
            assert!(digits(value, certified) > 12.0, "{world} ranks: {name} {value}");
        };
        certain("r_squared", 0.995479004577296);
        certain("residual_standard_error", 304.854073561965);
        assert_eq!(fit["rows"], 16);
        assert_eq!(fit["ranks"], world);
        assert_eq!(fit["names"][0], "(intercept)");
        for output in &outputs[1..] {
            assert!(output.status.success());
            let text = String::from_utf8(output.stdout.clone()).unwrap();
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }
}

#[test]
fn even_without_refinement_longley_has_nine_digits() {
    let data = longley();
    let args = [
        "fit",
        "--data",
        data.to_str().unwrap(),
        "--response",
        "TOTEMP",
        "--features",
        LONGLEY_FEATURES,
        "--refine",
        "0",
    ];
    for world in 1..=4 {
        let fit = result(&gang(world, &args)[0]);
        for (value, (certified, _)) in numbers(&fit["coefficients"]).iter().zip(CERTIFIED) {
            assert!(digits(*value, certified) > 9.0, "{world} ranks: {value} {certified}");
        }
    }
}

/// Like NIST's Wampler1: a polynomial of degree five with all coefficients one, exactly.
#[test]
fn a_polynomial_is_recovered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wampler.csv");
    let mut text = "y,x,x2,x3,x4,x5\n".to_owned();
    for x in 0..=20i64 {
        let powers: Vec<i64> = (1..=5).map(|k| x.pow(k)).collect();
        let y = 1 + powers.iter().sum::<i64>();
        let _ = writeln!(text, "{y},{}", powers.iter().map(i64::to_string).collect::<Vec<_>>().join(","));
    }
    std::fs::write(&path, text).unwrap();
    for world in [1, 3] {
        let fit = result(&gang(world, &["fit", "--data", path.to_str().unwrap(), "--response", "y"])[0]);
        for value in numbers(&fit["coefficients"]) {
            assert!(digits(value, 1.0) > 11.0, "{value}");
        }
        assert!(fit["residuals"]["max"].as_f64().unwrap() < 1e-6);
    }
}

#[test]
fn a_generated_dataset_gives_its_coefficients_back_from_csv_and_parquet_alike() {
    let folder = tempfile::tempdir().unwrap();
    let mut fits = Vec::new();
    for name in ["data.csv", "data.parquet"] {
        let path = folder.path().join(name);
        let path = path.to_str().unwrap();
        let made = run(&["generate", "--rows", "300000", "--features", "5", "--seed", "3", "--output", path]);
        assert!(made.status.success());
        let truth: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        // No memory for rows between passes: every pass reads the file.
        let fit = result(
            &gang(3, &["fit", "--data", path, "--response", "y", "--keep-mib", "0", "--refine", "1"])[0],
        );
        assert_eq!(fit["rows"], 300_000);
        assert_eq!(fit["names"], truth["names"]);
        let errors = numbers(&fit["standard_errors"]);
        let pairs = numbers(&fit["coefficients"]).into_iter().zip(numbers(&truth["coefficients"]));
        for ((value, known), error) in pairs.zip(errors) {
            assert!((value - known).abs() < 5.0 * error, "{value} {known} {error}");
        }
        fits.push(numbers(&fit["coefficients"]));
    }
    // The ranks' shares differ by format, so the last bits may.
    for (a, b) in fits[0].iter().zip(&fits[1]) {
        assert!(digits(*a, *b) > 13.0, "{a} {b}");
    }
}

#[test]
fn a_fit_through_the_origin_writes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("d.csv"), "\u{feff}\"x\", y ,note\r\n1,2.5,\"a, b\"\r\n\"2\",3.5,\r\n\r\n3,6,c")
        .unwrap();
    let (data, output, residuals) = (at("d.csv"), at("out.json"), at("res.csv"));
    let args = [
        "fit",
        "--data",
        &data,
        "--response",
        "y",
        "--features",
        "x",
        "--no-intercept",
        "--output",
        &output,
        "--residuals",
        &residuals,
    ];
    let fit = result(&run(&args));
    // Σxy / Σx² = 27.5 / 14, R² about zero.
    assert!((numbers(&fit["coefficients"])[0] - 27.5 / 14.0).abs() < 1e-14);
    assert_eq!(fit["r_squared_about"], "zero");
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    assert_eq!(written["coefficients"], fit["coefficients"]);
    let rows = std::fs::read_to_string(&residuals).unwrap();
    assert_eq!(rows.lines().next(), Some("row,observed,fitted,residual"));
    assert_eq!(rows.lines().count(), 4);
    assert!(rows.lines().nth(3).unwrap().starts_with("3,6,"));

    let outputs = gang(2, &args);
    result(&outputs[0]);
    let rows: String =
        [at("res.0.csv"), at("res.1.csv")].iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    let numbers: Vec<&str> =
        rows.lines().filter_map(|l| l.split(',').next()).filter(|n| *n != "row").collect();
    assert_eq!(numbers, ["1", "2", "3"]);
}

#[test]
fn a_constant_response_has_no_r_squared() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.csv");
    std::fs::write(&path, "x,y\n1,2\n2,2\n4,2\n").unwrap();
    let fit = result(&run(&["fit", "--data", path.to_str().unwrap(), "--response", "y"]));
    assert!(fit["r_squared"].is_null());
}
