//! What a benchmark measured.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lathe_e2e::artefacts;
use serde::Serialize;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// What was measured.
    pub metric: String,
    /// Whose.
    pub subject: String,
    /// The median over the runs, or their mean where it is said so.
    pub value: f64,
    /// Of `value`.
    pub unit: &'static str,
    /// Smallest and largest of the runs.
    pub range: [f64; 2],
    /// How many runs.
    pub runs: usize,
}

impl Record {
    /// The median of `values`, which are not empty.
    pub fn of(metric: &str, subject: &str, unit: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self {
            metric: metric.to_owned(),
            subject: subject.to_owned(),
            value: at(values.len() / 2),
            unit,
            range: [at(0), at(values.len().saturating_sub(1))],
            runs: values.len(),
        }
    }

    /// The mean of `values`, for what is compared by its sum.
    pub fn mean_of(metric: &str, subject: &str, unit: &'static str, values: Vec<f64>) -> Self {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self { value: mean, ..Self::of(metric, subject, unit, values) }
    }
}

/// Prints a row a metric and a column a subject, with the ratio to the first subject.
pub fn print(records: &[Record]) {
    let mut subjects: Vec<&str> = Vec::new();
    let mut rows: BTreeMap<(&str, &str), BTreeMap<&str, f64>> = BTreeMap::new();
    for record in records {
        if !subjects.contains(&record.subject.as_str()) {
            subjects.push(&record.subject);
        }
        rows.entry((&record.metric, record.unit)).or_default().insert(&record.subject, record.value);
    }
    print!("{:<32}", "METRIC");
    subjects.iter().for_each(|subject| print!("{subject:>26}"));
    println!();
    for ((metric, unit), values) in &rows {
        print!("{:<32}", format!("{metric} ({unit})"));
        let ours = subjects.first().and_then(|subject| values.get(subject));
        for subject in &subjects {
            let cell = match (values.get(subject), ours) {
                (Some(value), Some(ours)) => format!("{value:.2} ({:.2}x)", value / ours),
                (Some(value), None) => format!("{value:.2}"),
                (None, _) => "-".to_owned(),
            };
            print!("{cell:>26}");
        }
        println!();
    }
}

/// Prints a row a subject and a column a metric, all of one unit.
pub fn print_by_subject(records: &[Record]) {
    let (mut metrics, mut subjects): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    for record in records {
        for (list, name) in [(&mut metrics, &record.metric), (&mut subjects, &record.subject)] {
            if !list.contains(&name.as_str()) {
                list.push(name);
            }
        }
    }
    print!("{:<24}", records.first().map_or("", |record| record.unit));
    metrics.iter().for_each(|metric| print!("{metric:>18}"));
    println!();
    for subject in subjects {
        print!("{subject:<24}");
        for metric in &metrics {
            let found = records.iter().find(|record| record.subject == subject && record.metric == *metric);
            let cell = found.map_or_else(|| "-".to_owned(), |record| format!("{:.3}", record.value));
            print!("{cell:>18}");
        }
        println!();
    }
}

/// Writes `target/bench/NAME.json`.
pub fn write(name: &str, records: &[Record]) -> anyhow::Result<PathBuf> {
    let directory = artefacts::repository().join("target/bench");
    std::fs::create_dir_all(&directory)?;
    let path = directory.join(format!("{name}.json"));
    std::fs::write(&path, serde_json::to_vec_pretty(records)?)?;
    Ok(path)
}
