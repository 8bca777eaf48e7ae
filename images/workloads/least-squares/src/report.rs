//! What a fit leaves behind: a table for people, JSON for programs, residuals as CSV.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::data::Part;
use crate::fit::{Fit, RankWork};
use crate::output::{OutputError, PendingFile};

/// The residuals of one share, row by row, if they are wanted at all.
pub struct ResidualFile {
    target: Option<PendingFile>,
    text: String,
    row: u64,
}

impl ResidualFile {
    /// Starts the file of `part`, whose first row is the dataset's row `first_row` (from 0).
    /// With several ranks each writes its own: `residuals.csv` becomes `residuals.2.csv`.
    pub fn create(path: Option<&Path>, part: Part, first_row: u64) -> Result<Self, OutputError> {
        let mut target = match path {
            None => None,
            Some(path) if part.of == 1 => Some(PendingFile::create(path)?),
            Some(path) => Some(PendingFile::create(&ranked(path, part.rank))?),
        };
        if let Some(file) = &mut target {
            file.write(b"row,observed,fitted,residual\n")?;
        }
        Ok(Self { target, text: String::new(), row: first_row })
    }

    /// Adds a block of rows.
    pub fn write(&mut self, response: &[f64], residuals: &[f64]) -> Result<(), OutputError> {
        let Some(file) = &mut self.target else { return Ok(()) };
        self.text.clear();
        for (y, r) in response.iter().zip(residuals) {
            self.row += 1;
            // Writing to memory cannot fail.
            let _ = writeln!(self.text, "{},{y},{},{r}", self.row, y - r);
        }
        file.write(self.text.as_bytes())
    }

    /// Puts the file in its place.
    pub fn finish(self) -> Result<(), OutputError> {
        self.target.map_or(Ok(()), PendingFile::finish)
    }
}

fn ranked(path: &Path, rank: u32) -> PathBuf {
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}.{rank}{extension}"))
}

/// The fit as JSON. Numbers are the shortest decimals that read back as the same double, so none
/// of the up to 17 significant digits is lost.
pub fn json(fit: &Fit) -> Value {
    let slowest = |of: fn(&RankWork) -> f64| fit.ranks.iter().map(of).fold(0.0, f64::max);
    json!({
        "names": fit.names,
        "coefficients": fit.coefficients,
        "standard_errors": fit.standard_errors(),
        "r_squared": fit.r_squared(),
        "r_squared_about": if fit.centred { "mean" } else { "zero" },
        "residual_standard_error": fit.residual_standard_error(),
        "rmse": fit.rmse(),
        "residuals": {
            "sum_of_squares": fit.residuals.squares,
            "mean_absolute": fit.residuals.absolute / fit.residuals.rows as f64,
            "min": fit.residuals.min,
            "max": fit.residuals.max,
        },
        "degrees_of_freedom": fit.degrees_of_freedom(),
        "condition": fit.condition,
        "rows": fit.residuals.rows,
        "ranks": fit.ranks.len(),
        "seconds": {
            "read": slowest(|r| r.read_seconds),
            "factor": slowest(|r| r.compute_seconds),
            "gather": fit.gather_seconds,
            "total": fit.total_seconds,
        },
        "by_rank": fit.ranks.iter().map(|r| json!({
            "rank": r.rank,
            "address": r.address,
            "rows": r.rows,
            "read_seconds": r.read_seconds,
            "factor_seconds": r.compute_seconds,
        })).collect::<Vec<_>>(),
    })
}

/// The fit as a table.
pub fn table(fit: &Fit, response: &str) -> String {
    let mut text = String::new();
    let errors = fit.standard_errors();
    let width = fit.names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max(11);
    // Writing to memory cannot fail.
    let _ =
        writeln!(text, "least squares: {response}, {} rows, {} ranks", fit.residuals.rows, fit.ranks.len());
    let _ = writeln!(text, "{:width$}  {:>22}  {:>14}  {:>10}", "", "coefficient", "std. error", "t");
    for (i, (name, value)) in fit.names.iter().zip(&fit.coefficients).enumerate() {
        let (error, t) = match errors.as_ref().map(|e| e[i]) {
            Some(e) => (format!("{e:.7e}"), format!("{:.3}", value / e)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let _ = writeln!(text, "{name:width$}  {value:>22.14e}  {error:>14}  {t:>10}");
    }
    let number = |v: Option<f64>| v.map_or_else(|| "undefined".to_owned(), |v| format!("{v}"));
    let _ = writeln!(
        text,
        "R² {}   residual standard error {} on {} degrees of freedom   RMSE {:.6e}",
        number(fit.r_squared()),
        number(fit.residual_standard_error()),
        fit.degrees_of_freedom(),
        fit.rmse()
    );
    let _ = writeln!(
        text,
        "residuals: min {:.6e}  mean |r| {:.6e}  max {:.6e}   condition {:.1e}",
        fit.residuals.min,
        fit.residuals.absolute / fit.residuals.rows as f64,
        fit.residuals.max,
        fit.condition
    );
    for r in &fit.ranks {
        let _ = writeln!(
            text,
            "rank {} ({}): {} rows, read {:.3} s, factor {:.3} s",
            r.rank,
            r.address.as_deref().unwrap_or("here"),
            r.rows,
            r.read_seconds,
            r.compute_seconds
        );
    }
    let _ = writeln!(text, "gathered in {:.3} s, {:.3} s in all", fit.gather_seconds, fit.total_seconds);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_write_to_files_of_their_own() {
        assert_eq!(ranked(Path::new("/a/r.csv"), 2), Path::new("/a/r.2.csv"));
        assert_eq!(ranked(Path::new("r"), 0), Path::new("r.0"));
    }

    #[test]
    fn nothing_is_left_of_a_file_that_was_not_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.csv");
        let mut file = ResidualFile::create(Some(&path), Part { rank: 0, of: 1 }, 0).unwrap();
        file.write(&[1.0], &[0.5]).unwrap();
        drop(file);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
